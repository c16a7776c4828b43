"""What the shapes of the weights tell of a model's config, held against what is declared of it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from torch import Tensor

from vit.checks import as_pair
from vit.config import NAMED_MODELS, ViTConfig
from vit.metadata import Preprocessing

from .files import CheckpointError
from .own import VIT

# The weights that the shapes are read from, besides the optional ones.
SHAPE_SOURCES = ("position_embedding", "patch_embed.proj.weight", "blocks.0.mlp.fc1.weight")
_OPTIONAL = ("register_tokens", "blocks.{}.scale1", "blocks.{}.scale2", "head.weight", "head.bias")


def required_names(names: Iterable[str]) -> list[str]:
    """The weights that no ViT lacks, for as many blocks as `names` has numbers of (at least one)."""
    templates = [template for template in VIT.names if template not in _OPTIONAL]
    depth = max(1, _depth(names))
    return [name for t in templates for name in ([t.format(i) for i in range(depth)] if "{}" in t else [t])]


def _depth(names: Iterable[str]) -> int:
    """How many numbers of blocks there are; gaps between them show as missing and unexpected keys."""
    return len({match.group(1) for name in names if (match := re.match(r"blocks\.(\d+)\.", name))})


def config_from_shapes(tensors: Mapping[str, Tensor], declared: Mapping[str, Any], head_width: int | None) -> ViTConfig:
    """The config of a state dict in our names.

    Shapes tell everything but the heads, eps, the GELU, the pooling and a grid that is not square; these come from
    `declared`, or else are this family's own: eps 1e-6, erf, class token, square, and heads of the layout's width.

    Args:
        tensors: the weights, in our names, `SHAPE_SOURCES` among them.
        declared: fields of `ViTConfig` that a header, a config.json or the caller states.
        head_width: how wide heads are where their number is not declared; None: it has to be.

    Raises:
        CheckpointError: shapes contradict what is declared, or cannot tell what has to be known.
    """
    facts = _facts(tensors)
    for name, value in facts.items():
        if name in declared and declared[name] != value and name != "init_values":
            raise CheckpointError(f"{name} is declared to be {declared[name]}, but the weights have {value}")
    if "init_values" in declared and (declared["init_values"] is None) != (facts["init_values"] is None):
        has = "have" if facts["init_values"] is not None else "lack"
        raise CheckpointError(f"init_values is declared as {declared['init_values']}, the weights {has} LayerScale")
    values: dict[str, Any] = {**facts, **declared}
    if "num_heads" not in declared:
        if head_width is None or values["embed_dim"] % head_width:
            raise CheckpointError(f"nothing says how many heads share the width {values['embed_dim']}: state num_heads")
        values["num_heads"] = values["embed_dim"] // head_width
    try:
        values |= _positions(tensors["position_embedding"].shape[1], values)
        return ViTConfig().override(**values)
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(str(error)) from None


def _facts(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The fields of a config that shapes tell."""

    def shape(name: str, dims: int) -> tuple[int, ...]:
        if tensors[name].ndim != dims:
            raise CheckpointError(f"{name} has shape {list(tensors[name].shape)}, expected {dims} dimensions")
        return tuple(tensors[name].shape)

    shape("position_embedding", 3)
    D, in_chans, patch_size, _ = shape("patch_embed.proj.weight", 4)
    hidden, _ = shape("blocks.0.mlp.fc1.weight", 2)
    return {
        "embed_dim": D,
        "in_chans": in_chans,
        "patch_size": patch_size,
        "depth": _depth(tensors),
        "mlp_ratio": hidden / D,
        "init_values": 1.0 if "blocks.0.scale1" in tensors else None,  # trained: what it started from is not known
        "reg_tokens": shape("register_tokens", 3)[1] if "register_tokens" in tensors else 0,
        "num_classes": shape("head.weight", 2)[0] if "head.weight" in tensors else 0,
    }


def _positions(rows: int, values: Mapping[str, Any]) -> dict[str, Any]:
    """Does the class token have a row in the position embedding, and what is the grid of the others?

    With a declared size the number of rows answers the first question. Without one the grid is taken to be square,
    and the class token to have a row unless there are registers, as in timm's models.
    """
    p = values["patch_size"]
    if "img_size" in values:
        H, W = as_pair(values["img_size"], "img_size")
        class_position = values.get("class_position", rows == (H // p) * (W // p) + 1)
        if rows - class_position != (H // p) * (W // p):
            raise CheckpointError(f"position_embedding has {rows} rows, which img_size {H}x{W} does not give")
        return {"class_position": class_position}
    class_position = values.get("class_position", not values["reg_tokens"])
    side = math.isqrt(max(rows - class_position, 0))
    if side == 0 or side * side != rows - class_position:
        raise CheckpointError(
            f"position_embedding has {rows} rows, {'one for the class token and ' if class_position else ''}"
            "no square grid: state img_size=(height, width) or class_position"
        )
    return {"class_position": class_position, "img_size": (side * p, side * p)}


def known_preprocessing(config: ViTConfig) -> Preprocessing:
    """The preprocessing of the named model that this is, or the default at this size, where no file says it."""
    # fields that may differ without the images being prepared otherwise
    loose = {"num_classes": 0, "init_values": None, "drop_path_rate": 0.0, "grad_checkpointing": False, "in_chans": 3}
    for named in NAMED_MODELS.values():
        if asdict(named.config) | loose == asdict(config) | loose:
            return named.preprocessing.with_channels(config.in_chans)
    return Preprocessing(size=config.img_size).with_channels(config.in_chans)
