"""Key maps: how a project names and arranges a ViT's parameters, as data that reads in both directions.

A layout is a table of entries. Each entry gives one of our parameters, the keys of the other project that hold it, and
how their values make ours: a transform, which has an inverse. Names and values are separate matters.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vit.metadata import Preprocessing


@dataclass(frozen=True)
class Transform:
    """How values change on the way, in both directions. `heads` is A, which some arrangements spell out."""

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
    """One of our parameters and where the other project keeps it; `{}` stands for the number of a block."""

    ours: str
    theirs: tuple[str, ...]
    transform: Transform = SAME


def same(ours: str, theirs: str) -> list[Entry]:
    """The entry of one parameter that is the same in both."""
    return [Entry(ours, (theirs,))]


def pair(ours: str, theirs: str) -> list[Entry]:
    """The entries of a module's weight and bias."""
    return [Entry(f"{ours}.{kind}", (f"{theirs}.{kind}",)) for kind in ("weight", "bias")]


def fused(ours: str, *theirs: str) -> list[Entry]:
    """The entries of our fused qkv layer, weight and bias, which they keep as three layers."""
    return [Entry(f"{ours}.{kind}", tuple(f"{name}.{kind}" for name in theirs), FUSE) for kind in ("weight", "bias")]


@dataclass(frozen=True)
class Layout:
    """One project's names and arrangement, and what goes without saying there."""

    name: str
    about: str  # whose it is, for lists
    entries: tuple[Entry, ...]
    markers: tuple[str, ...]  # keys that every checkpoint of this layout has
    absent: tuple[str, ...] = ()  # keys that tell another layout with the same markers; a whole key or its beginning
    prefix: str = ""  # before every key but the classifier's, where there is a classifier
    always_prefixed: bool = False  # written with the prefix even where there is none
    drops: Mapping[str, str] = field(default_factory=dict)  # beginnings of keys that are left out -> why
    zeros: Mapping[str, tuple[int | str, ...]] = field(default_factory=dict)  # keys we lack, written as zeros -> shape
    heads: int | None = None  # how many where nothing says it; None: as many as are `head_width` wide
    head_width: int | None = None  # None, too: it must be stated
    defaults: Mapping[str, Any] = field(default_factory=dict)  # fields of ViTConfig where nothing states them
    register_defaults: Mapping[str, Any] = field(default_factory=dict)  # and where there are registers
    needs: Mapping[str, tuple] = field(default_factory=dict)  # the values that a model must have to be held
    requires: tuple[str, ...] = ()  # our parameters that others lack, and that a model must have to be held
    head_pool: str | None = None  # the one global_pool that goes with a classifier; without one it is "token"
    square: bool = False  # its position embeddings are of square grids only
    # have the class and distillation tokens rows in the position embedding: "always", "never", "either", or, as in
    # timm's models, "unless registers"
    class_rows: str = "always"
    preprocessing: Preprocessing | None = None  # where nothing states it
    facts: Callable[[Mapping[str, Tensor]], dict[str, Any]] | None = None  # what their shapes tell beyond ours
    unpack: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] | None = None  # a whole state dict, before its names
    pack: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] | None = None  # the inverse

    def table(self, prefixed: bool) -> dict[str, tuple[Entry, int]]:
        """Their keys, with `{}` for a number -> the entry that each belongs to, and its place in it."""
        return {key: (entry, i) for entry in self.entries for i, key in enumerate(self.keys(entry, prefixed))}

    def keys(self, entry: Entry, prefixed: bool) -> list[str]:
        """Their keys of an entry, with the prefix or without."""
        in_front = self.prefix if prefixed and not entry.ours.startswith("head") else ""
        return [in_front + key for key in entry.theirs]

    def entry(self, ours: str) -> tuple[Entry | None, str]:
        """The entry of one of our names, and the number of its block ("" where it has none)."""
        template, number = split_number(ours)
        found = next((entry for entry in self.entries if entry.ours == template), None)
        return found, number


# A block's number stands between two separators (blocks.3.norm1) or ends a word (encoder_layer_3, encoderblock_3).
_NUMBER = re.compile(r"(?<=[._])(0|[1-9][0-9]*)(?=[./])")


def split_number(key: str) -> tuple[str, str]:
    """A key with `{}` in the place of its first number, and that number ("" where there is none)."""
    found = _NUMBER.search(key)
    if found is None:
        return key, ""
    return f"{key[: found.start()]}{{}}{key[found.end() :]}", found.group(1)


@dataclass(frozen=True)
class Sorted:
    """What became of each key of a state dict."""

    groups: dict[
        str, tuple[Entry, list[str]]
    ]  # our name -> its entry, their keys in its order ("" where one is missing)
    dropped: dict[str, str]  # their key -> why
    missing: list[str]  # their keys, of entries that others are there of
    unexpected: list[str]  # their keys that the table does not know


def sort_keys(layout: Layout, keys: Iterable[str], prefixed: bool) -> Sorted:
    """Which of our parameters do their keys make up?"""
    table = layout.table(prefixed)
    in_front = layout.prefix if prefixed else ""
    result = Sorted({}, {}, [], [])
    for key in keys:
        template, number = (key, "") if key in table else split_number(key)
        reason = next((why for start, why in layout.drops.items() if key.startswith((start, in_front + start))), None)
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
