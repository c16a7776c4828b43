"""Key maps: how a project names and arranges a ViT's parameters, as data that reads in both directions.

A layout is a table of entries. Each entry gives one of our parameters, the keys of the other project that hold it, and
the transform that makes our values of theirs, which has an inverse. Names and values are kept apart.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vit.config import ViTConfig
from vit.metadata import Preprocessing

from .description import Attributes, Description


@dataclass(frozen=True)
class Transform:
    """How values change, in both directions. `heads` is A: some arrangements keep the heads apart."""

    name: str
    to_ours: Callable[[list[Tensor], int], Tensor]
    to_theirs: Callable[[Tensor, int], list[Tensor]]


def _fuse(parts: list[Tensor], heads: int) -> Tensor:
    if len({part.shape for part in parts}) > 1:
        raise ValueError(f"their shapes differ: {', '.join(str(list(part.shape)) for part in parts)}")
    return torch.cat(parts)


def _split(whole: Tensor, heads: int) -> list[Tensor]:
    return list(whole.chunk(3))


SAME = Transform("same", lambda parts, heads: parts[0], lambda whole, heads: [whole])
FUSE = Transform("fuse q, k, v", _fuse, _split)  # rows of q, then k, then v


@dataclass(frozen=True)
class Entry:
    """One of our parameters and the keys that hold it in the other project; `{}` stands for a block's number."""

    ours: str
    theirs: tuple[str, ...]
    transform: Transform = SAME


def same(ours: str, theirs: str) -> list[Entry]:
    """The entry of a parameter whose values are the same in both."""
    return [Entry(ours, (theirs,))]


def pair(ours: str, theirs: str) -> list[Entry]:
    """The entries of a module's weight and bias."""
    return [Entry(f"{ours}.{kind}", (f"{theirs}.{kind}",)) for kind in ("weight", "bias")]


def fused(ours: str, *theirs: str) -> list[Entry]:
    """The entries of our fused qkv layer, weight and bias, which is three layers in the other project."""
    return [Entry(f"{ours}.{kind}", tuple(f"{name}.{kind}" for name in theirs), FUSE) for kind in ("weight", "bias")]


@dataclass(frozen=True)
class Naming:
    """How the keys of a state dict differ from those of the table."""

    prefix: str = ""  # before every key except the classifier's, in models that have a classifier
    always_prefixed: bool = False  # written with the prefix even for models without a classifier
    drops: Mapping[str, str] = field(default_factory=dict)  # keys to leave out, by how they begin -> why
    zeros: Mapping[str, tuple[int | str, ...]] = field(default_factory=dict)  # dropped keys to write as zeros -> shape
    unpack: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] | None = None  # their state dict -> the table's keys
    pack: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] | None = None  # the inverse


@dataclass(frozen=True)
class Detection:
    """What tells a layout from all others."""

    markers: tuple[str, ...]  # keys that every checkpoint of this layout has, or, ending in a dot, how one begins
    absent: tuple[str, ...] = ()  # keys, or how keys begin, that only other layouts with the same markers have


@dataclass(frozen=True)
class Assumptions:
    """What to assume about a model when neither the caller nor a file states it."""

    heads: int | None = None  # how many; None: as many as are `head_width` wide
    head_width: int | None = None  # None as well: the caller must state the heads
    read_heads: Callable[[Mapping[str, Tensor]], int] | None = None  # reads the number of heads from shapes
    defaults: Mapping[str, Any] = field(default_factory=dict)  # other fields of ViTConfig
    register_defaults: Mapping[str, Any] = field(default_factory=dict)  # the same, only for models with registers
    # do the class and distillation tokens have rows in the position embedding? "always", "never", "either", or, as in
    # timm's models, "unless registers"
    class_rows: str = "always"
    preprocessing: Preprocessing | None = None


@dataclass(frozen=True)
class Holds:
    """Which models can be written in a layout."""

    needs: Mapping[str, tuple] = field(default_factory=dict)  # fields of ViTConfig -> the values they may have
    requires: tuple[str, ...] = ()  # optional parameters of ours that a model must have
    head_pool: str | None = None  # the only global_pool for models with a classifier; others must have "token"
    square: bool = False  # only square grids of position embeddings
    attention: bool = False  # weights of attention modules set by the user


@dataclass(frozen=True)
class Files:
    """How a layout is written to disk: safetensors with our header, unless it has files of its own."""

    npz: bool = False  # may also be written as .npz, which has no header
    beside: tuple[str, ...] = ()  # JSON files beside the weights, which take the place of our header
    write: Callable[[ViTConfig, Attributes], dict[str, dict[str, Any]]] | None = None  # -> their contents, by name
    read: Callable[[Mapping[str, dict[str, Any]]], Description] | None = None  # the inverse


@dataclass(frozen=True)
class Layout:
    """How one project names and arranges a ViT's parameters."""

    name: str
    about: str  # whose it is, for lists
    entries: tuple[Entry, ...]  # the table
    detection: Detection
    naming: Naming = Naming()
    assumptions: Assumptions = Assumptions()
    holds: Holds = Holds()
    files: Files = Files()
    library: str | None = None  # the library whose own model reads it; the tests compare with that

    def table(self, prefixed: bool) -> dict[str, tuple[Entry, int]]:
        """Their keys, with `{}` for a block's number -> the entry that each belongs to, and its place in it."""
        return {key: (entry, i) for entry in self.entries for i, key in enumerate(self.keys(entry, prefixed))}

    def keys(self, entry: Entry, prefixed: bool) -> list[str]:
        """Their keys of an entry, with the prefix or without."""
        in_front = self.naming.prefix if prefixed and not entry.ours.startswith("head") else ""
        return [in_front + key for key in entry.theirs]

    def entry(self, ours: str) -> tuple[Entry | None, str]:
        """The entry of one of our names, and the number of its block ("" if it has none)."""
        template, number = split_number(ours)
        found = next((entry for entry in self.entries if entry.ours == template), None)
        return found, number


# A block's number is a part of a name (blocks.3.norm1) or the end of a word (encoder_layer_3, encoderblock_3).
_NUMBER = re.compile(r"(?<=[._])(0|[1-9][0-9]*)(?=[./])")


def split_number(key: str) -> tuple[str, str]:
    """A key with its first number replaced by `{}`, and that number ("" if it has none)."""
    found = _NUMBER.search(key)
    if found is None:
        return key, ""
    return f"{key[: found.start()]}{{}}{key[found.end() :]}", found.group(1)


@dataclass(frozen=True)
class Sorted:
    """What became of each key of a state dict."""

    groups: dict[str, tuple[Entry, list[str]]]  # our name -> its entry, their keys in its order ("": missing)
    dropped: dict[str, str]  # their key -> why
    missing: list[str]  # their keys, in entries of which only a part was found
    unexpected: list[str]  # their keys that are not in the table


def sort_keys(layout: Layout, keys: Iterable[str], prefixed: bool) -> Sorted:
    """Sort their keys by the parameters of ours that they hold."""
    table = layout.table(prefixed)
    in_front = layout.naming.prefix if prefixed else ""
    result = Sorted({}, {}, [], [])
    for key in keys:
        template, number = (key, "") if key in table else split_number(key)
        reason = next(
            (why for start, why in layout.naming.drops.items() if key.startswith((start, in_front + start))), None
        )
        if template in table:
            entry, place = table[template]
            ours = entry.ours.replace("{}", number)
            _, group = result.groups.setdefault(ours, (entry, [""] * len(entry.theirs)))
            group[place] = key
        elif reason is not None:
            result.dropped[key] = reason
        else:
            result.unexpected.append(key)
    for ours, (entry, group) in result.groups.items():
        _, number = split_number(ours)
        expected = [key.replace("{}", number) for key in layout.keys(entry, prefixed)]
        result.missing.extend(want for want, key in zip(expected, group) if not key)
    return result
