"""Key maps: how a project names a ViT's parameters, as data that reads in both directions."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Layout:
    """One project's names. `{}` stands for the number of a block."""

    name: str
    names: Mapping[str, str]  # theirs -> ours, one to one
    markers: tuple[str, ...]  # keys that every checkpoint of this layout has and no other layout knows
    head_width: int | None  # how wide its heads are where nothing states their number; None: it must be stated
    drops: Mapping[str, str] = field(default_factory=dict)  # beginnings of their keys that are left out -> why

    def to_ours(self, keys: Iterable[str]) -> Renamed:
        """Their keys -> our names."""
        return _rename(keys, self.names, self.drops)

    def to_theirs(self, keys: Iterable[str]) -> Renamed:
        """Our names -> their keys."""
        return _rename(keys, {ours: theirs for theirs, ours in self.names.items()}, {})


@dataclass(frozen=True)
class Renamed:
    """What became of each key."""

    names: dict[str, str]  # source -> target
    dropped: dict[str, str]  # source -> why
    unexpected: list[str]  # source keys that the table does not know


_NUMBER = re.compile(r"\.(0|[1-9][0-9]*)\.")


def _rename(keys: Iterable[str], table: Mapping[str, str], drops: Mapping[str, str]) -> Renamed:
    renamed = Renamed({}, {}, [])
    for key in keys:
        number = _NUMBER.search(key)
        template = key if number is None else f"{key[: number.start()]}.{{}}.{key[number.end() :]}"
        reason = next((why for beginning, why in drops.items() if key.startswith(beginning)), None)
        if template in table:
            renamed.names[key] = table[template].replace("{}", number.group(1) if number else "{}")
        elif reason is not None:
            renamed.dropped[key] = reason
        else:
            renamed.unexpected.append(key)
    return renamed
