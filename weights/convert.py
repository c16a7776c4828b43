"""From one layout to another, completely or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from vit.config import ViTConfig
from vit.model import ViT

from .checkpoint import CheckpointError, NotATensor
from .description import assumed
from .detect import Place, explain, locate, whole_prefix
from .keymap import SAME, Entry, Layout, sort_keys, split_number
from .layouts import get_layout
from .layouts.vit import VIT, key_of_attention
from .shapes import SHAPE_SOURCES, Claims, config_from_shapes, required_names

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Step:
    """One of our parameters, on its way."""

    ours: str
    source: list[str]  # keys that it was made of
    target: list[str]  # keys that were made of it
    transforms: list[str]  # what changed its values, in order; empty: nothing


@dataclass(frozen=True)
class Report:
    """What a conversion did with each key."""

    source: str  # layouts
    target: str
    why: str  # how the source's layout was told
    prefix: str  # what stood before the names of the source
    steps: list[Step]
    dropped: dict[str, str]  # source key -> why it was left out
    left: list[str]  # source keys beside the model: an optimiser's, another model's
    notes: list[str] = field(default_factory=list)  # changes that cannot be undone, and other models that are there
    assumed: dict[str, dict[str, Any]] = field(default_factory=dict)  # what nobody stated -> its value, whose default
    unsaid: dict[str, Any] = field(default_factory=dict)  # settings that the files cannot say -> what a reader assumes

    def to_dict(self) -> dict[str, Any]:
        """As plain data, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Converted:
    """A state dict in the target's names, the config that goes with it, and what was done."""

    state_dict: dict[str, Tensor]
    config: ViTConfig
    report: Report


@dataclass(frozen=True)
class Ours:
    """A state dict in our names, and how it was read."""

    tensors: dict[str, Tensor]
    theirs: Mapping[str, Tensor]  # what they were made of, without a wrapper
    config: ViTConfig
    layout: Layout
    why: str
    prefix: str
    groups: dict[str, tuple[Entry, list[str]]]  # our name -> entry, source keys
    dropped: dict[str, str]
    left: list[str]
    notes: list[str] = field(default_factory=list)
    attention: Mapping[str, Tensor] = field(default_factory=dict)  # weights of attention modules, in our names


def convert(
    state_dict: Mapping[str, Tensor],
    source: str | None = None,
    target: str = "vit",
    config: ViTConfig | Mapping[str, Any] | None = None,
    prefix: str | None = None,
) -> Converted:
    """Convert a state dict from one layout to another.

    Values that are arranged alike in both are neither copied nor changed.

    Args:
        state_dict: the weights: finite, all of one floating dtype.
        source: its layout, one of `vit.weights.LAYOUTS`; None detects it.
        target: the layout to convert to.
        config: what is known of the model beyond the shapes: a whole config, or some of its fields.
        prefix: take only the keys that begin so, out of a larger model; the report lists what is left behind.

    Raises:
        CheckpointError: keys missing, left over or of the wrong shape (all are listed), weights that are not finite
            or not floating, a config that the weights contradict, or a model that the target cannot hold.
        ValueError: an unknown layout.
    """
    target_layout = get_layout(target)
    stated = config.to_dict() if isinstance(config, ViTConfig) else dict(config or {})
    ours = to_ours(state_dict, source, {"the caller": stated}, prefix)
    return to_theirs(ours, target_layout)


def to_ours(state_dict: Mapping[str, Any], source: str | None, claims: Claims, prefix: str | None = None) -> Ours:
    """Read a state dict in any layout; see `convert`."""
    prefix = whole_prefix(state_dict, prefix) if prefix else ""
    inside = {key[len(prefix) :]: value for key, value in state_dict.items() if key.startswith(prefix)}
    outside = [key for key in state_dict if not key.startswith(prefix)]
    place = locate(inside, source)
    layout = place.layout
    state, dropped, left, odd = _unwrap(inside, place)
    attention = {key: state.pop(key) for key in list(state) if layout is VIT and key_of_attention(key)}
    _check_tensors(attention)
    if broken := [key for key, tensor in attention.items() if tensor.isnan().any()]:  # masks hold infinities
        raise CheckpointError(f"{broken[0]} holds NaN")
    if layout.unpack is not None:
        state = layout.unpack(state)
    sorted_keys = sort_keys(layout, state, place.prefixed)
    _check_values({key: value for key, value in state.items() if key not in sorted_keys.dropped})
    extra = {} if layout.facts is None else layout.facts(state)
    tensors, shapes = _transform(state, sorted_keys.groups, extra.get("num_heads", 0))
    problems = {"missing": sorted_keys.missing, "unexpected": sorted_keys.unexpected, "shapes": shapes, "beside": odd}
    try:
        config = _fit(tensors, claims, place, extra, problems)
    except CheckpointError as error:
        if not odd or any(found for kind, found in problems.items() if kind != "beside"):
            raise
        hint = f"--prefix {prefix + place.wrapper!r} takes the model that lies there and leaves these behind"
        raise CheckpointError(f"{error}; {hint}") from None
    theirs = {key: state[key] for _, keys in sorted_keys.groups.values() for key in keys}
    notes = [
        f"took {prefix + place.wrapper}; {prefix + other} is there too: --prefix {prefix + other} takes that"
        for other in place.others
    ]
    return Ours(
        tensors, theirs, config, layout, explain(place), prefix + place.wrapper, sorted_keys.groups,
        dropped | sorted_keys.dropped, outside + left, notes, attention,
    )  # fmt: skip


def _unwrap(state: Mapping[str, Any], place: Place) -> tuple[dict[str, Any], dict[str, str], list[str], list[str]]:
    """The model's tensors without their wrapper, what is dropped beside it, left outside, and what is unexpected."""
    inside, dropped, left, odd = {}, {}, [], []
    for key, tensor in state.items():
        if key.startswith(place.wrapper):
            inside[key[len(place.wrapper) :]] = tensor
        elif not key.startswith(place.container):
            left.append(key)
        else:  # beside the model within its container, as DINO's projection head beside its backbone
            rest = key[len(place.container) :]
            why = next((why for beginning, why in place.layout.drops.items() if rest.startswith(beginning)), None)
            dropped.update({key: why} if why else {})
            odd.extend([] if why else [key])
    return inside, dropped, left, odd


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
    _check_finite(tensors)


def _check_tensors(tensors: Mapping[str, Any]) -> None:
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            kind = tensor.kind if isinstance(tensor, NotATensor) else type(tensor).__name__
            raise CheckpointError(f"{name} is of type {kind}, expected a tensor")
        if tensor.is_meta or tensor.numel() == 0:
            raise CheckpointError(f"{name} has no values: shape {list(tensor.shape)} on device {tensor.device}")


def _check_finite(tensors: Mapping[str, Tensor]) -> None:
    # NaN and infinity show in the extremes; asking these needs no memory.
    extremes = {name: torch.stack(tensor.aminmax()) for name, tensor in tensors.items()}
    if extremes and not torch.stack([*extremes.values()]).isfinite().all():
        odd = next(name for name, pair in extremes.items() if not pair.isfinite().all())
        raise CheckpointError(f"{odd} holds values that are not finite")


def _transform(
    state: Mapping[str, Tensor], groups: Mapping[str, tuple[Entry, list[str]]], heads: int
) -> tuple[dict[str, Tensor], list[str]]:
    """Our tensors, made of theirs, and what could not be made for its shape. Incomplete groups are passed over."""

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
    """The config with which every parameter is filled, every key used and every shape right.

    Otherwise one error lists all that does not fit, in the source's own names.
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
        theirs = place.layout.keys(entry, place.prefixed) if entry else [f"{name}, which it has no place for"]
        keys += [key.replace("{}", number) for key in theirs]
    return keys


def expected_shapes(config: ViTConfig) -> dict[str, torch.Size]:
    """The shapes of all parameters; blocks are alike, so one is built and the others are counted."""
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


def to_theirs(ours: Ours, target: Layout) -> Converted:
    """Write what was read in another layout; CheckpointError where that cannot hold it."""
    tensors, config, adapted = adapt_positions(ours.tensors, ours.config, target)
    notes = ours.notes + adapted
    _check_needs(tensors, config, target, ours.attention)
    prefixed = bool(target.prefix) and ("head.weight" in tensors or target.always_prefixed)
    result: dict[str, Tensor] = {}
    steps = []
    for name, tensor in tensors.items():
        entry, number = target.entry(name)
        assert entry is not None  # _check_needs
        keys = [key.replace("{}", number) for key in target.keys(entry, prefixed)]
        result |= zip(keys, entry.transform.to_theirs(tensor, config.num_heads))
        read, source = ours.groups[name]
        transforms = [one.transform.name for one in (read, entry) if one.transform is not SAME]
        steps.append(Step(name, [ours.prefix + key for key in source], keys, transforms))
    for key, shape in target.zeros.items():
        sizes = [getattr(config, side) if isinstance(side, str) else side for side in shape]
        dtype = tensors["class_token"].dtype
        result[(target.prefix if prefixed else "") + key] = torch.zeros(sizes, dtype=dtype)
        notes.append(f"{key} is written as zeros: this model has none")
    result |= ours.attention
    steps += [Step(name, [ours.prefix + name], [name], []) for name in ours.attention]
    if target.pack is not None:
        result = target.pack(result)
    report = Report(
        ours.layout.name, target.name, ours.why, ours.prefix, steps, ours.dropped, ours.left, notes,
        assumed(ours.config),
    )  # fmt: skip
    return Converted(result, config, report)


def adapt_positions(
    tensors: dict[str, Tensor], config: ViTConfig, target: Layout
) -> tuple[dict[str, Tensor], ViTConfig, list[str]]:
    """Give the class token a row in the position embedding, or take it away, where the target insists.

    A row of zeros changes nothing. A row is taken away by adding it to the token, where it ends up anyhow; that
    cannot be undone.
    """
    n = 1 + config.dist_token
    never = target.class_rows == "never" or (target.class_rows == "unless registers" and config.reg_tokens > 0)
    positions = tensors["position_embedding"]
    if config.class_position and never:
        added = {"class_token": tensors["class_token"] + positions[:, :1], "position_embedding": positions[:, n:]}
        if config.dist_token:
            added["dist_token"] = tensors["dist_token"] + positions[:, 1:2]
        note = "the class token's position is added to the class token, since the target has no place for it"
        return tensors | added, config.override(class_position=False), [note]
    if not config.class_position and target.class_rows == "always":
        rows = torch.cat([torch.zeros_like(positions[:, :n]), positions], dim=1)
        note = "the class token gets a position of zeros, since the target has one"
        return tensors | {"position_embedding": rows}, config.override(class_position=True), [note]
    return tensors, config, []


def _check_needs(
    tensors: Mapping[str, Tensor], config: ViTConfig, target: Layout, attention: Mapping[str, Tensor]
) -> None:
    """Can the target hold this model? CheckpointError names everything that it cannot."""
    problems = [
        f"{name} {getattr(config, name)!r} (it has {' or '.join(map(repr, values))})"
        for name, values in target.needs.items()
        if getattr(config, name) not in values
    ]
    problems += sorted({split_number(name)[0].replace("{}", "*") for name in tensors if target.entry(name)[0] is None})
    if attention and target is not VIT:
        problems += sorted({split_number(name)[0].replace("{}", "*") for name in attention})
    pool = None if target.head_pool is None else target.head_pool if config.num_classes else "token"
    if pool not in (None, config.global_pool):
        has = "with" if config.num_classes else "without"
        problems.append(f"global_pool {config.global_pool!r} {has} a classifier (it has {pool!r})")
    if target.square and config.grid[0] != config.grid[1]:
        problems.append(f"positions of {config.grid[0]}x{config.grid[1]} patches (its grids are square)")
    present = {split_number(name)[0] for name in tensors}
    problems += [f"a model without {name.replace('{}', '*')}" for name in target.requires if name not in present]
    if problems:
        raise CheckpointError(f"the {target.name} layout cannot hold {', '.join(problems)}")


def from_model(model: ViT) -> Ours:
    """A model's own weights, checked as those of a file are; of its settings it is still known who stated them."""
    ours = to_ours(model.state_dict(), VIT.name, {"the model": model.config.to_dict()})
    return replace(ours, config=replace(ours.config, sources={**ours.config.sources, **model.config.sources}))


def unrecorded(ours: Ours, config: ViTConfig, target: Layout, stated: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that files without our header cannot say -> what their reader will take them to be.

    Args:
        ours: the weights that are written.
        config: of the weights as they are written.
        target: the layout that they are written in.
        stated: the fields that its files do say.
    """
    tensors = adapt_positions(ours.tensors, ours.config, target)[0]
    shapes = {"num_heads": config.num_heads} if target.facts is not None else {}
    read = config_from_shapes(tensors, {"the files": stated}, target, shapes)
    return {
        name: getattr(read, name)
        for name in ViTConfig.field_names()
        if getattr(read, name) != getattr(config, name)
        and name not in ("init_values", "drop_path_rate", "grad_checkpointing")  # which change no answer
    }
