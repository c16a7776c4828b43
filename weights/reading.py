"""From a state dict in any layout to our names, completely or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vit.config import ViTConfig
from vit.model import ViT

from .attention import is_attention_key
from .checkpoint import CheckpointError, NotATensor
from .detect import BOOKKEEPING, Place, choices, explain, locate, whole_prefix
from .keymap import SAME, Entry, Layout, sort_keys
from .shapes import SHAPE_SOURCES, Claims, config_from_shapes, required_names

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Ours:
    """A state dict in our names, and how it was read."""

    tensors: dict[str, Tensor]
    config: ViTConfig
    layout: Layout  # that it was in
    why: str  # how the layout was detected
    prefix: str  # what preceded the layout's own names
    groups: dict[str, tuple[Entry, list[str]]]  # our name -> entry, source keys
    dropped: dict[str, str]  # source key -> why it was left out
    left: list[str]  # source keys outside the model
    part: str | None = None  # `prefix`, if the file held several models or the caller stated a part of it
    notes: list[str] = field(default_factory=list)
    attention: Mapping[str, Tensor] = field(default_factory=dict)  # weights of attention modules, in our names


def to_ours(state_dict: Mapping[str, Any], source: str | None, claims: Claims, prefix: str | None = None) -> Ours:
    """Read a state dict.

    Args:
        state_dict: the weights: finite, all of one floating dtype.
        source: the name of its layout; None detects it.
        claims: what is stated of the model beyond the shapes, and by whom.
        prefix: read only the keys that begin with it.

    Raises:
        CheckpointError: as `vit.weights.convert`.
        ValueError: an unknown layout.
    """
    prefix = whole_prefix(state_dict, prefix) if prefix else ""
    inside = {key[len(prefix) :]: value for key, value in state_dict.items() if key.startswith(prefix)}
    outside = [key for key in state_dict if not key.startswith(prefix)]
    place = locate(inside, source, prefix)
    naming, assumptions = place.layout.naming, place.layout.assumptions
    state, dropped, left, odd = _unwrap(inside, place)
    attention = _take_attention(state) if place.layout.holds.attention else {}
    if naming.unpack is not None:
        state = naming.unpack(state)
    sorted_keys = sort_keys(place.layout, state, place.prefixed)
    _check_values({key: value for key, value in state.items() if key not in sorted_keys.dropped})
    heads = 0 if assumptions.read_heads is None else assumptions.read_heads(state)
    tensors, shapes = _transform(state, sorted_keys.groups, heads)
    problems = {"missing": sorted_keys.missing, "unexpected": sorted_keys.unexpected, "shapes": shapes, "beside": odd}
    try:
        config = _fit(tensors, claims, place, {"num_heads": heads} if heads else {}, problems)
    except CheckpointError as error:
        if not odd or any(found for kind, found in problems.items() if kind != "beside"):
            raise
        hint = f"--prefix {prefix + place.wrapper!r} takes the model that lies there and leaves these behind"
        raise CheckpointError(f"{error}; {hint}") from None
    notes = [_chosen(prefix, place)] if place.others else []
    part = prefix + place.wrapper if prefix or place.others else None
    return Ours(
        tensors, config, place.layout, explain(place), prefix + place.wrapper, sorted_keys.groups,
        dropped | sorted_keys.dropped, outside + left, part, notes, attention,
    )  # fmt: skip


def _chosen(prefix: str, place: Place) -> str:
    """Which of several models was read, and how to read another."""
    others = choices(prefix + other for other in place.others)
    taken = f"took {prefix + place.wrapper!r}, one of {1 + len(place.others)} models of the same shapes in the file"
    return f"{taken}; {others} takes another"


def _unwrap(state: Mapping[str, Any], place: Place) -> tuple[dict[str, Any], dict[str, str], list[str], list[str]]:
    """The model's tensors without their wrapper, what is dropped beside it, left outside, and what is unexpected."""
    inside, dropped, left, odd = {}, {}, [], []
    counts = {front + name for front in place.fronts for name in BOOKKEEPING}
    for key, tensor in state.items():
        if key in counts:
            dropped[key] = "a count or a setting of what keeps the moving average"
        elif key.startswith(place.wrapper):
            inside[key[len(place.wrapper) :]] = tensor
        elif not key.startswith(place.container):
            left.append(key)
        elif isinstance(tensor, NotATensor) and tensor.plain:
            dropped[key] = f"beside the model, and not a tensor but of type {tensor.kind}"
        else:  # beside the model within its container, as DINO's projection head beside its backbone
            rest = key[len(place.container) :]
            why = next((why for start, why in place.layout.naming.drops.items() if rest.startswith(start)), None)
            dropped.update({key: why} if why else {})
            odd.extend([] if why else [key])
    return inside, dropped, left, odd


def _take_attention(state: dict[str, Any]) -> dict[str, Tensor]:
    """Remove the weights of attention modules from a state dict, and return them."""
    attention = {key: state.pop(key) for key in list(state) if is_attention_key(key)}
    _check_tensors(attention)
    if broken := [key for key, tensor in attention.items() if tensor.isnan().any()]:  # infinities may be masks
        raise CheckpointError(f"{broken[0]} holds NaN")
    return attention


def _check_values(tensors: Mapping[str, Any]) -> None:
    _check_tensors(tensors)
    dtypes: dict[torch.dtype, str] = {}
    for name, tensor in tensors.items():
        if tensor.dtype not in _FLOATS:
            raise CheckpointError(f"{name} has dtype {tensor.dtype}, expected one of {', '.join(map(str, _FLOATS))}")
        dtypes.setdefault(tensor.dtype, name)
    if len(dtypes) > 1:
        mixed = ", ".join(f"{dtype} ({name})" for dtype, name in dtypes.items())
        raise CheckpointError(f"the weights have several dtypes, expected one: {mixed}")
    # NaN and infinity show in the extremes, which take no memory to compute
    extremes = {name: torch.stack(tensor.aminmax()) for name, tensor in tensors.items()}
    if extremes and not torch.stack([*extremes.values()]).isfinite().all():
        odd = next(name for name, pair in extremes.items() if not pair.isfinite().all())
        raise CheckpointError(f"{odd} holds values that are not finite")


def _check_tensors(tensors: Mapping[str, Any]) -> None:
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            kind = tensor.kind if isinstance(tensor, NotATensor) else type(tensor).__name__
            raise CheckpointError(f"{name} is of type {kind}, expected a tensor")
        if tensor.is_meta or tensor.numel() == 0:
            raise CheckpointError(f"{name} has no values: shape {list(tensor.shape)} on device {tensor.device}")


def _transform(
    state: Mapping[str, Tensor], groups: Mapping[str, tuple[Entry, list[str]]], heads: int
) -> tuple[dict[str, Tensor], list[str]]:
    """Our tensors, and an error text for each that their shapes do not allow. Skips incomplete groups."""

    def make(group: tuple[Entry, list[str]]) -> Tensor | str:
        entry, keys = group
        try:
            return entry.transform.to_ours([state[key] for key in keys], heads)
        except ValueError as error:
            return f"{' + '.join(keys)}: {error}"

    complete = {ours: group for ours, group in groups.items() if all(group[1])}
    with ThreadPoolExecutor(2) as pool:  # PyTorch transposes on one core
        waiting = {ours: pool.submit(make, group) for ours, group in complete.items() if group[0].transform is not SAME}
        made = {ours: waiting[ours].result() if ours in waiting else make(group) for ours, group in complete.items()}
    tensors = {ours: tensor for ours, tensor in made.items() if isinstance(tensor, Tensor)}
    return tensors, [text for text in made.values() if isinstance(text, str)]


def _fit(
    tensors: Mapping[str, Tensor], claims: Claims, place: Place, extra: Mapping[str, Any], problems: dict[str, list]
) -> ViTConfig:
    """The config for which every parameter is filled, every key used and every shape right.

    If there is none, one error lists all that does not fit, in the source's own names.
    """
    layout = place.layout
    if problems["missing"] or problems["shapes"]:
        raise _misfit(place, problems)
    missing = [name for name in required_names(tensors) if name not in tensors]
    problems["missing"] = _their_keys(place, missing)
    if not tensors.keys() >= set(SHAPE_SOURCES):
        raise _misfit(place, problems)
    try:
        config = config_from_shapes(tensors, claims, layout, extra)
    except CheckpointError as error:
        raise _misfit(place, problems, error) from None
    expected = expected_shapes(config)
    problems["missing"] = _their_keys(place, [name for name in expected if name not in tensors])
    problems["unexpected"] += _their_keys(place, [name for name in tensors if name not in expected])
    for name, shape in expected.items():
        if name in tensors and tensors[name].shape != shape:
            (entry, _), keys = layout.entry(name), _their_keys(place, [name])
            where = keys[0] if entry and entry.transform is SAME else f"{' + '.join(keys)}, as {name},"
            problems["shapes"].append(f"{where} {list(tensors[name].shape)}, expected {list(shape)}")
    if any(problems.values()):
        raise _misfit(place, problems)
    return config


def _their_keys(place: Place, names: list[str]) -> list[str]:
    keys = []
    for name in names:
        entry, number = place.layout.entry(name)
        theirs = place.layout.keys(entry, place.prefixed) if entry else [f"{name}, which has no key in this layout"]
        keys += [key.replace("{}", number) for key in theirs]
    return keys


def expected_shapes(config: ViTConfig) -> dict[str, torch.Size]:
    """The shapes of all parameters. All blocks are alike, so only one is built."""
    one = skeleton(config.override(depth=1)).state_dict()
    shapes = {name: tensor.shape for name, tensor in one.items()}
    in_blocks = [name for name in shapes if name.startswith("blocks.0.")]
    numbers = range(config.depth)
    return shapes | {name.replace("blocks.0.", f"blocks.{i}."): shapes[name] for i in numbers for name in in_blocks}


def skeleton(config: ViTConfig) -> ViT:
    """A model of that config on the meta device: shapes without memory."""
    with torch.device("meta"):
        return ViT(config)


def _misfit(place: Place, problems: Mapping[str, list[str]], error: Exception | None = None) -> CheckpointError:
    lists = {
        "missing keys": problems["missing"],
        "unexpected keys": problems["beside"] + problems["unexpected"],
        "wrong shapes": problems["shapes"],
    }
    texts = [f"{title}: {', '.join(keys)}" for title, keys in lists.items() if keys]
    texts = texts if error is None else [str(error), *texts]
    stated = f" ({explain(place)})" if place.lacks else ""
    return CheckpointError(f"the weights do not fit the {place.layout.name} layout{stated}: {'; '.join(texts)}")
