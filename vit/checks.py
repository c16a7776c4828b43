"""Checks that several files share. Each raises one ValueError that names the value and what was expected."""

import math
from collections.abc import Iterable
from difflib import get_close_matches


def unknown(kind: str, name: object, known: Iterable[str]) -> str:
    """The error text for an unknown `name` of some `kind`: the nearest known name, then all of them."""
    known = list(known)
    nearest = get_close_matches(str(name), known, n=1, cutoff=0.5)
    hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
    return f"unknown {kind} {name!r}.{hint} Known: {', '.join(known) or 'none'}."


def as_pair(value: object, name: str) -> tuple[int, int]:
    """`value` as (height, width); a whole number means a square."""
    pair = (value, value) if isinstance(value, int) else value
    if (
        not isinstance(pair, (tuple, list))
        or len(pair) != 2
        or not all(isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in pair)
    ):
        raise ValueError(f"{name} must be a whole number above 0 or a pair (height, width) of them, not {value!r}")
    return pair[0], pair[1]


def require_int(name: str, value: object, least: int) -> None:
    """`value` must be a whole number of at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, not {value!r}")


def require_float(name: str, value: object, above: float | None = None) -> None:
    """`value` must be a finite number, above `above` where that is given."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not abs(value) < 1e300:
        raise ValueError(f"{name} must be a finite number, not {repr(value)[:40]}")
    if above is not None and value <= above:
        raise ValueError(f"{name} must be above {above}, not {value!r}")


def nearest_multiple(side: float, patch: int) -> int:
    """The multiple of `patch` nearest to `side`, in pixels: at least one patch, and the larger of two equally near."""
    return max(1, math.floor(side / patch + 0.5)) * patch
