"""From one layout to another, completely or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from vit.config import ViTConfig
from vit.model import ViT

from .files import CheckpointError
from .keymap import Layout
from .layouts import detect_layout, get_layout
from .shapes import SHAPE_SOURCES, config_from_shapes, required_names

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Report:
    """What a conversion did with each key."""

    source: str  # layouts
    target: str
    names: dict[str, str]  # source key -> target key
    dropped: dict[str, str]  # source key -> why it was left out


@dataclass(frozen=True)
class Converted:
    """A state dict in the target's names, the config that goes with it, and what was done."""

    state_dict: dict[str, Tensor]
    config: ViTConfig
    report: Report


def convert(
    state_dict: Mapping[str, Tensor],
    source: str | None = None,
    target: str = "vit",
    config: ViTConfig | Mapping[str, Any] | None = None,
) -> Converted:
    """Rename a state dict from one layout to another; no value is copied or changed.

    Args:
        state_dict: the weights: finite, all of one floating dtype.
        source: its layout; None detects it.
        target: the layout to convert to.
        config: what is known of the model beyond the shapes: a whole config, or some of its fields.

    Raises:
        CheckpointError: keys missing, left over or of the wrong shape (all are listed), weights that are not finite
            or not floating, or a config that the weights contradict.
        ValueError: an unknown layout.
    """
    source = detect_layout(state_dict) if source is None else source
    source_layout, target_layout = get_layout(source), get_layout(target)
    _check_values(state_dict)
    renamed = source_layout.to_ours(state_dict)
    tensors = {new: state_dict[old] for old, new in renamed.names.items()}
    declared = asdict(config) if isinstance(config, ViTConfig) else dict(config or {})
    found = _fit(tensors, declared, source_layout, renamed.unexpected)
    names = target_layout.to_theirs(tensors).names
    report = Report(source, target, {old: names[new] for old, new in renamed.names.items()}, renamed.dropped)
    return Converted({names[name]: tensor for name, tensor in tensors.items()}, found, report)


def skeleton(config: ViTConfig) -> ViT:
    """A model of that config on the meta device: shapes without memory."""
    with torch.device("meta"):
        return ViT(config)


def _check_values(tensors: Mapping[str, Tensor]) -> None:
    dtypes: dict[torch.dtype, str] = {}
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise CheckpointError(f"{name} is of type {type(tensor).__name__}, expected a tensor")
        if tensor.is_meta or tensor.numel() == 0:
            raise CheckpointError(f"{name} has no values: shape {list(tensor.shape)} on device {tensor.device}")
        if tensor.dtype not in _FLOATS:
            raise CheckpointError(f"{name} has dtype {tensor.dtype}, expected one of {', '.join(map(str, _FLOATS))}")
        dtypes.setdefault(tensor.dtype, name)
    if len(dtypes) > 1:
        mixed = ", ".join(f"{dtype} ({name})" for dtype, name in dtypes.items())
        raise CheckpointError(f"the weights have several dtypes, expected one: {mixed}")
    for name, tensor in tensors.items():
        # NaN and infinity show in the extremes; asking these needs no memory.
        if not all(torch.isfinite(extreme) for extreme in tensor.aminmax()):
            raise CheckpointError(f"{name} holds values that are not finite")


def _fit(tensors: Mapping[str, Tensor], declared: dict, layout: Layout, unexpected: list[str]) -> ViTConfig:
    """The config with which every parameter is filled, every key used and every shape right.

    Otherwise one error lists all that does not fit, in the source's own names.
    """
    required = required_names(tensors)
    names = layout.to_theirs(tensors.keys() | required).names
    missing = [names[name] for name in required if name not in tensors]
    if not tensors.keys() >= set(SHAPE_SOURCES):
        raise _misfit(layout, missing=missing, unexpected=unexpected)
    try:
        config = config_from_shapes(tensors, declared, layout.head_width)
    except CheckpointError as error:
        raise _misfit(layout, error=error, missing=missing, unexpected=unexpected) from None
    expected = _expected_shapes(config)
    names = layout.to_theirs(expected.keys() | tensors.keys()).names
    missing = [names[name] for name in expected if name not in tensors]
    unexpected = unexpected + [names[name] for name in tensors if name not in expected]
    shapes = [
        f"{names[name]} {list(tensors[name].shape)}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in tensors and tensors[name].shape != shape
    ]
    if missing or unexpected or shapes:
        raise _misfit(layout, missing=missing, unexpected=unexpected, shapes=shapes)
    return config


def _expected_shapes(config: ViTConfig) -> dict[str, torch.Size]:
    """The shapes of all parameters; blocks are alike, so one is built and the others are counted."""
    one = skeleton(config.override(depth=1)).state_dict()
    shapes = {name: tensor.shape for name, tensor in one.items()}
    in_blocks = [name for name in shapes if name.startswith("blocks.0.")]
    numbers = range(config.depth)
    return shapes | {name.replace("blocks.0.", f"blocks.{i}."): shapes[name] for i in numbers for name in in_blocks}


def _misfit(layout: Layout, error: Exception | None = None, **problems: list[str]) -> CheckpointError:
    titles = {"missing": "missing keys", "unexpected": "unexpected keys", "shapes": "wrong shapes"}
    texts = [f"{titles[kind]}: {', '.join(keys)}" for kind, keys in problems.items() if keys]
    texts = texts if error is None else [str(error), *texts]
    return CheckpointError(f"the weights do not fit the {layout.name} layout: {'; '.join(texts)}")
