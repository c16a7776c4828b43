"""A model's config from the shapes of its weights, compared with what is stated of it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from vit.checks import as_pair
from vit.config import ViTConfig
from vit.metadata import Preprocessing
from vit.presets import NAMED_MODELS

from .checkpoint import CheckpointError
from .description import ANSWERS, layout_default
from .keymap import Layout
from .layouts.vit import VIT

# The weights whose shapes are read, besides optional ones.
SHAPE_SOURCES = ("position_embedding", "patch_embed.proj.weight", "blocks.0.mlp.fc1.weight")
_OPTIONAL = re.compile(r"(dist_token|register_tokens|blocks\.\{\}\.scale|norm\.|fc_norm\.|head).*")

# Who states something about the model -> fields of ViTConfig; earlier ones take precedence.
Claims = Mapping[str, Mapping[str, Any]]
ASSUMED = "the named model's default"  # claims under this name yield to the shapes


def required_names(names: Iterable[str]) -> list[str]:
    """The weights that every ViT has, with as many blocks as there are numbers in `names` (at least one)."""
    templates = [entry.ours for entry in VIT.entries if not _OPTIONAL.fullmatch(entry.ours)]
    depth = max(1, _depth(names))
    return [name for t in templates for name in ([t.format(i) for i in range(depth)] if "{}" in t else [t])]


def _depth(names: Iterable[str]) -> int:
    """How many different block numbers there are; gaps between them show as missing and unexpected keys."""
    return len({match.group(1) for name in names if (match := re.match(r"blocks\.(\d+)\.", name))})


def config_from_shapes(
    tensors: Mapping[str, Tensor], claims: Claims, layout: Layout, extra: Mapping[str, Any] | None = None
) -> ViTConfig:
    """The config of a state dict in our names; its `sources` say where each value came from.

    Shapes give everything except the heads, eps, the GELU, the pooling, the rule for positions and a grid that is not
    square. Those come from the claims, or else from the layout's assumptions.

    Args:
        tensors: the weights in our names, including `SHAPE_SOURCES`.
        claims: what the caller, a header or a config.json states, in order of precedence.
        layout: the layout that the weights came in.
        extra: what only this layout's shapes give (the heads).

    Raises:
        CheckpointError: shapes contradict what is stated, or something is neither stated nor given by the shapes.
    """
    facts = _facts(tensors) | dict(extra or {})
    stated, sources = _merge({source: fields for source, fields in claims.items() if source != ASSUMED})
    for name, value in facts.items():
        if name in stated and stated[name] != value and name not in ("init_values", "global_pool"):
            raise CheckpointError(f"{name} is declared to be {stated[name]}, but the weights have {value}")
    if "init_values" in stated and (stated["init_values"] is None) != (facts["init_values"] is None):
        has = "have" if facts["init_values"] is not None else "lack"
        raise CheckpointError(f"init_values is declared as {stated['init_values']}, the weights {has} LayerScale")
    usual, named = layout.assumptions, dict(claims.get(ASSUMED, {}))
    pool = {"global_pool": "avg"} if facts["fc_norm"] else {}  # as a rule: the token may be pooled before it too
    assumed = {**usual.defaults, **pool, **(usual.register_defaults if facts["reg_tokens"] else {}), **named}
    values: dict[str, Any] = {**assumed, **facts, **stated}
    if "num_heads" not in values:
        values["num_heads"] = assumed["num_heads"] = _default_heads(layout, values["embed_dim"])
    try:
        positions = _positions(tensors["position_embedding"].shape[1], values, layout)
        config = ViTConfig().override(**values | positions)
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(str(error)) from None
    sources = (
        dict.fromkeys(config.field_names(), "the default")
        | dict.fromkeys((*ANSWERS, *assumed), layout_default(layout.name))
        | dict.fromkeys(_settled(layout), f"the {layout.name} layout")
        | dict.fromkeys(named, ASSUMED)
        | dict.fromkeys({**facts, **positions}, "the shapes")
        | dict.fromkeys(_guessed(values, layout), layout_default(layout.name))
        | sources
    )
    return replace(config, sources=sources)


def _merge(claims: Claims) -> tuple[dict[str, Any], dict[str, str]]:
    """What is stated, and by whom. Of several claims about one field, the first counts."""
    stated: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for source, fields in claims.items():
        for name, value in fields.items():
            if name not in stated:
                stated[name], sources[name] = value, source
    return stated, sources


def _settled(layout: Layout) -> list[str]:
    """The fields that are the same in all models of a layout, so nothing is assumed about them."""
    pooling = [] if layout.holds.head_pool is None else ["global_pool"]
    return [name for name, values in layout.holds.needs.items() if len(values) == 1] + pooling


# ViTs that are wider than ViT-L have fewer heads than width / 64: SO-400M, H, g and G (arXiv:2106.04560)
_WIDE = {1152: 16, 1280: 16, 1408: 16, 1664: 16}


def _default_heads(layout: Layout, width: int) -> int:
    usual = layout.assumptions
    heads = usual.heads or 0
    if not heads and usual.head_width is not None and width % usual.head_width == 0:
        heads = _WIDE.get(width, width // usual.head_width)
    if not heads:
        raise CheckpointError(
            f"the number of heads is not known for the width {width}: state num_heads"
            " (load_pretrained(..., num_heads=...), convert(..., config={'num_heads': ...}), or --set num_heads=...)"
        )
    return heads


def _facts(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The fields of a config that shapes give."""

    def shape(name: str, dims: int) -> tuple[int, ...]:
        if tensors[name].ndim != dims:
            raise CheckpointError(f"{name} has shape {list(tensors[name].shape)}, expected {dims} dimensions")
        return tuple(tensors[name].shape)

    shape("position_embedding", 3)
    D, in_chans, patch_size, _ = shape("patch_embed.proj.weight", 4)
    hidden, _ = shape("blocks.0.mlp.fc1.weight", 2)
    classes, width = shape("head.weight", 2) if "head.weight" in tensors else (0, D)
    facts: dict[str, Any] = {
        "embed_dim": D,
        "in_chans": in_chans,
        "patch_size": patch_size,
        "depth": _depth(tensors),
        "mlp_ratio": hidden / D,
        "init_values": 1.0 if "blocks.0.scale1" in tensors else None,  # trained: its first value is unknown
        "dist_token": "dist_token" in tensors,
        "reg_tokens": shape("register_tokens", 3)[1] if "register_tokens" in tensors else 0,
        "fc_norm": "fc_norm.weight" in tensors,
        "num_classes": classes,
    }
    if "head_dist.weight" in tensors:
        facts["global_pool"] = "dist"
    elif width == 2 * D:
        facts["global_pool"] = "token_avg"
    return facts


def _positions(rows: int, values: Mapping[str, Any], layout: Layout) -> dict[str, Any]:
    """Whether the class and distillation tokens have rows in the position embedding, and the grid of the other rows.

    With a stated size, the number of rows gives the first. Without one the layout does, and the grid must be square.
    """
    p, prefix = values["patch_size"], 1 + values["dist_token"]
    if not isinstance(values.get("class_position", True), bool):
        raise CheckpointError(f"class_position must be True or False, not {values['class_position']!r}")
    if "img_size" in values:
        H, W = as_pair(values["img_size"], "img_size")
        class_position = values.get("class_position", rows == (H // p) * (W // p) + prefix)
        if rows - class_position * prefix != (H // p) * (W // p):
            raise CheckpointError(
                f"position_embedding has {rows} rows, which does not fit img_size {H}x{W}: img_size is the size that it"
                " was trained at; the model takes any other too (size=... sets the size that images are prepared at)"
            )
        return {"class_position": class_position}
    choices = [values["class_position"]] if "class_position" in values else _usual_class_rows(layout, values)
    for class_position in choices:
        side = math.isqrt(max(rows - class_position * prefix, 0))
        if side > 0 and side * side == rows - class_position * prefix:
            return {"class_position": class_position, "img_size": (side * p, side * p)}
    raise CheckpointError(
        f"position_embedding has {rows} rows, which do not make a square grid: state img_size=(height, width)"
    )


def _guessed(values: Mapping[str, Any], layout: Layout) -> list[str]:
    """What `_positions` cannot know without a size: 64 rows may be 16x4 as well as 8x8, and one may be a token's."""
    if "img_size" in values:
        return []
    grid = [] if layout.holds.square else ["img_size"]
    return grid + ["class_position"] * (layout.assumptions.class_rows not in ("always", "never"))


def _usual_class_rows(layout: Layout, values: Mapping[str, Any]) -> list[bool]:
    """Whether the class token has a row in a layout's models, the more likely answer first."""
    if layout.assumptions.class_rows == "unless registers" and values["reg_tokens"]:
        return [False]
    if layout.assumptions.class_rows == "unless registers" and values["init_values"] is not None:
        return [True, False]  # DINOv2 has one, DeiT-III has none: only one of them leaves a square
    return [layout.assumptions.class_rows != "never"]


def known_preprocessing(config: ViTConfig, layout: Layout) -> Preprocessing:
    """The preprocessing if no file states it: the layout's, that of a named model with this config, or the default."""
    if layout.assumptions.preprocessing is not None:
        return replace(layout.assumptions.preprocessing, size=config.img_size).with_channels(config.in_chans)
    # fields that may differ while the preprocessing stays the same
    loose = {"num_classes": 0, "init_values": None, "drop_path_rate": 0.0, "grad_checkpointing": False, "in_chans": 3}
    for named in NAMED_MODELS.values():
        if named.config.to_dict() | loose == config.to_dict() | loose:
            return named.preprocessing.with_channels(config.in_chans)
    return Preprocessing(size=config.img_size).with_channels(config.in_chans)
