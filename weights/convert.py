"""From our names to another layout, and from any layout to any other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from vit.config import ViTConfig

from .checkpoint import CheckpointError
from .description import assumed
from .keymap import SAME, Layout, split_number
from .layouts import get_layout
from .reading import Ours, to_ours
from .shapes import config_from_shapes


@dataclass(frozen=True)
class Step:
    """What became of one of our parameters."""

    ours: str
    source: list[str]  # keys that it was made of
    target: list[str]  # keys that were made of it
    transforms: list[str]  # what changed its values, in order; empty: nothing


@dataclass(frozen=True)
class Report:
    """What a conversion did with each key."""

    source: str  # layouts
    target: str
    why: str  # how the source's layout was detected
    prefix: str  # what preceded the names of the source
    steps: list[Step]
    dropped: dict[str, str]  # source key -> why it was left out
    left: list[str]  # source keys outside the model: an optimizer's, another model's
    notes: list[str] = field(default_factory=list)  # changes that cannot be undone, and other models in the source
    assumed: dict[str, dict[str, Any]] = field(default_factory=dict)  # settings that nothing states -> value, source
    unsaid: dict[str, Any] = field(default_factory=dict)  # settings that the files cannot hold -> what readers assume

    def to_dict(self) -> dict[str, Any]:
        """As plain data, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Converted:
    """A state dict in the target's names, its config, and what was done."""

    state_dict: dict[str, Tensor]
    config: ViTConfig
    report: Report


def convert(
    state_dict: Mapping[str, Tensor],
    source: str | None = None,
    target: str = "vit",
    config: ViTConfig | Mapping[str, Any] | None = None,
    prefix: str | None = None,
) -> Converted:
    """Convert a state dict from one layout to another.

    Tensors that both layouts arrange alike are neither copied nor changed.

    Args:
        state_dict: the weights: finite, all of one floating dtype.
        source: its layout, one of `vit.weights.LAYOUTS`; None detects it.
        target: the layout to convert to.
        config: what is known of the model beyond the shapes: a whole config, or some of its fields.
        prefix: take only the keys that begin with it, out of a larger model; the report lists the others.

    Raises:
        CheckpointError: keys missing, left over or of the wrong shape (all are listed), weights that are not finite
            or not floating, a config that the weights contradict, or a model that the target cannot hold.
        ValueError: an unknown layout.
    """
    target_layout = get_layout(target)
    stated = config.to_dict() if isinstance(config, ViTConfig) else dict(config or {})
    ours = to_ours(state_dict, source, {"the caller": stated}, prefix)
    return to_theirs(ours, target_layout)


def to_theirs(ours: Ours, target: Layout) -> Converted:
    """Arrange weights in our names as another layout does; CheckpointError if it cannot hold them."""
    tensors, config, adapted = adapt_positions(ours.tensors, ours.config, target)
    _check_holds(tensors, config, target, ours.attention)
    naming, notes = target.naming, ours.notes + adapted
    prefixed = bool(naming.prefix) and ("head.weight" in tensors or naming.always_prefixed)
    result: dict[str, Tensor] = {}
    steps = []
    for name, tensor in tensors.items():
        entry, number = target.entry(name)
        assert entry is not None  # _check_holds
        keys = [key.replace("{}", number) for key in target.keys(entry, prefixed)]
        result |= zip(keys, entry.transform.to_theirs(tensor, config.num_heads))
        read, source = ours.groups[name]
        transforms = [one.transform.name for one in (read, entry) if one.transform is not SAME]
        steps.append(Step(name, [ours.prefix + key for key in source], keys, transforms))
    for key, shape in naming.zeros.items():
        sizes = [getattr(config, side) if isinstance(side, str) else side for side in shape]
        dtype = tensors["class_token"].dtype
        result[(naming.prefix if prefixed else "") + key] = torch.zeros(sizes, dtype=dtype)
        notes.append(f"{key} is written as zeros: this model has none")
    result |= ours.attention
    steps += [Step(name, [ours.prefix + name], [name], []) for name in ours.attention]
    if naming.pack is not None:
        result = naming.pack(result)
    report = Report(
        ours.layout.name, target.name, ours.why, ours.prefix, steps, ours.dropped, ours.left, notes,
        assumed(ours.config),
    )  # fmt: skip
    return Converted(result, config, report)


def adapt_positions(
    tensors: dict[str, Tensor], config: ViTConfig, target: Layout
) -> tuple[dict[str, Tensor], ViTConfig, list[str]]:
    """Give the class token a row in the position embedding, or remove the row, as the target requires.

    A row of zeros changes nothing. A row is removed by adding it to the token, as the forward pass would; that cannot
    be undone.
    """
    n = 1 + config.dist_token
    class_rows, positions = target.assumptions.class_rows, tensors["position_embedding"]
    never = class_rows == "never" or (class_rows == "unless registers" and config.reg_tokens > 0)
    if config.class_position and never:
        added = {"class_token": tensors["class_token"] + positions[:, :1], "position_embedding": positions[:, n:]}
        if config.dist_token:
            added["dist_token"] = tensors["dist_token"] + positions[:, 1:2]
        note = "the class token's position is added to the class token, since the target has no place for it"
        return tensors | added, config.override(class_position=False), [note]
    if not config.class_position and class_rows == "always":
        rows = torch.cat([torch.zeros_like(positions[:, :n]), positions], dim=1)
        note = "the class token gets a position of zeros, since the target has one"
        return tensors | {"position_embedding": rows}, config.override(class_position=True), [note]
    return tensors, config, []


def _check_holds(
    tensors: Mapping[str, Tensor], config: ViTConfig, target: Layout, attention: Mapping[str, Tensor]
) -> None:
    """CheckpointError that names everything in the model that the target cannot hold."""
    holds = target.holds
    problems = [
        f"{name} {getattr(config, name)!r} (it has {' or '.join(map(repr, values))})"
        for name, values in holds.needs.items()
        if getattr(config, name) not in values
    ]
    unknown = [name for name in tensors if target.entry(name)[0] is None]
    unknown += [] if holds.attention else list(attention)
    problems += sorted({split_number(name)[0].replace("{}", "*") for name in unknown})
    pool = None if holds.head_pool is None else holds.head_pool if config.num_classes else "token"
    if pool not in (None, config.global_pool):
        has = "with" if config.num_classes else "without"
        problems.append(f"global_pool {config.global_pool!r} {has} a classifier (it has {pool!r})")
    if holds.square and config.grid[0] != config.grid[1]:
        problems.append(f"positions of {config.grid[0]}x{config.grid[1]} patches (its grids are square)")
    present = {split_number(name)[0] for name in tensors}
    problems += [f"a model without {name.replace('{}', '*')}" for name in holds.requires if name not in present]
    if problems:
        raise CheckpointError(f"the {target.name} layout cannot hold {', '.join(problems)}")


def unrecorded(ours: Ours, config: ViTConfig, target: Layout, stated: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that files without our header cannot hold -> what their reader will assume instead.

    Args:
        ours: the weights that are written.
        config: of the weights as they are written.
        target: the layout that they are written in.
        stated: the fields that its files do hold.
    """
    tensors = adapt_positions(ours.tensors, ours.config, target)[0]
    shapes = {"num_heads": config.num_heads} if target.assumptions.read_heads is not None else {}
    read = config_from_shapes(tensors, {"the files": stated}, target, shapes)
    return {
        name: getattr(read, name)
        for name in ViTConfig.field_names()
        if getattr(read, name) != getattr(config, name)
        and name not in ("init_values", "drop_path_rate", "grad_checkpointing")  # which change no result
    }
