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
from .shapes import config_from_shapes

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
    ours, theirs = get_layout(source), get_layout(target)
    _check_values(state_dict)
    renamed = ours.to_ours(state_dict)
    tensors = {new: state_dict[old] for old, new in renamed.names.items()}
    declared = asdict(config) if isinstance(config, ViTConfig) else dict(config or {})
    try:
        config = config_from_shapes(tensors, declared)
    except CheckpointError as error:
        # A hole or a stranger explains a shape that does not fit better than the shape does.
        strangers = f"; unexpected keys: {', '.join(renamed.unexpected)}" if renamed.unexpected else ""
        raise CheckpointError(f"{error} ({source} layout){strangers}") from None
    _check_complete(tensors, config, ours, renamed.unexpected)
    names = theirs.to_theirs(tensors).names
    report = Report(source, target, {old: names[new] for old, new in renamed.names.items()}, renamed.dropped)
    return Converted({names[name]: tensor for name, tensor in tensors.items()}, config, report)


def skeleton(config: ViTConfig) -> ViT:
    """A model of that config on the meta device: shapes without memory."""
    with torch.device("meta"):
        return ViT(config)


def _check_values(tensors: Mapping[str, Tensor]) -> None:
    dtypes: dict[torch.dtype, str] = {}
    for name, tensor in tensors.items():
        if tensor.dtype not in _FLOATS:
            raise CheckpointError(f"{name} has dtype {tensor.dtype}, expected one of {', '.join(map(str, _FLOATS))}")
        dtypes.setdefault(tensor.dtype, name)
    if len(dtypes) > 1:
        mixed = ", ".join(f"{dtype} ({name})" for dtype, name in dtypes.items())
        raise CheckpointError(f"the weights have several dtypes, expected one: {mixed}")
    for name, tensor in tensors.items():
        # NaN and infinity show in the extremes; asking these needs no memory.
        if tensor.numel() and not all(torch.isfinite(extreme) for extreme in tensor.aminmax()):
            raise CheckpointError(f"{name} holds values that are not finite")


def _check_complete(tensors: Mapping[str, Tensor], config: ViTConfig, layout: Layout, unexpected: list[str]) -> None:
    """Every parameter filled, every key used, every shape right; or one error in the source's own names."""
    expected = skeleton(config).state_dict()
    names = layout.to_theirs(expected.keys() | tensors.keys()).names
    missing = [names[name] for name in expected if name not in tensors]
    unexpected = unexpected + [names[name] for name in tensors if name not in expected]
    misshaped = [
        f"{names[name]} {list(tensors[name].shape)}, expected {list(wanted.shape)}"
        for name, wanted in expected.items()
        if name in tensors and tensors[name].shape != wanted.shape
    ]
    problems = (("missing keys", missing), ("unexpected keys", unexpected), ("wrong shapes", misshaped))
    texts = [f"{what}: {', '.join(keys)}" for what, keys in problems if keys]
    if texts:
        raise CheckpointError(f"the weights do not fit the {layout.name} layout: {'; '.join(texts)}")
