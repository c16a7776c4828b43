"""Checks that several files share. Each raises one ValueError that names the value and what was expected."""

import math
import operator
import sys
import warnings
from collections.abc import Iterable
from difflib import get_close_matches

import torch


def unknown(kind: str, name: object, known: Iterable[str]) -> str:
    """The error text for an unknown `name` of some `kind`: the nearest known name, then all of them."""
    known = list(known)
    nearest = get_close_matches(str(name), known, n=1)
    hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
    return f"unknown {kind} {name!r}.{hint} Known: {', '.join(known) or 'none'}."


def inside(wrapper: object, kind: type) -> str | None:
    """Where a wrapper, such as a compiled model or an average of weights, holds a module of a kind: "module"."""
    modules = wrapper.named_modules() if isinstance(wrapper, torch.nn.Module) else ()
    return next((name for name, module in modules if isinstance(module, kind)), None)


def dtype_name(dtype: object, known: Iterable[str]) -> str:
    """The name, such as "bfloat16", of one of the `known` dtypes, given as a torch.dtype or by name."""
    name = str(dtype).removeprefix("torch.") if isinstance(dtype, (str, torch.dtype)) else dtype
    known = list(known)
    if not isinstance(name, str) or name not in known:
        raise ValueError(unknown("dtype", type(name).__name__ if isinstance(name, torch.Tensor) else name, known))
    return name


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


def whole_patches(size: object, patch: int) -> tuple[int, int]:
    """`size` as (height, width), multiples of the patch; the error names the nearest size that is."""
    H, W = as_pair(size, "size")
    if H % patch or W % patch:
        nearest = " x ".join(str(nearest_multiple(side, patch)) for side in (H, W))
        raise ValueError(
            f"size {H} x {W} is not made of whole patches of {patch} x {patch} pixels;"
            f" the nearest size that works is {nearest}"
        )
    return H, W


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


def as_dtype(dtype: object) -> torch.dtype:
    """A floating dtype, given as torch.bfloat16 or by its name, "bfloat16"."""
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"dtype must be a floating dtype such as torch.bfloat16 or 'bfloat16', not {dtype!r}")
    return found


def as_numbers(name: str, one: str, numbers: object, count: int) -> list[int]:
    """Indices into `count` things, from 0; negative ones count from the end, None means all.

    `name` and `one` are their names in error messages: "blocks" and "block".
    """
    if numbers is None:
        return list(range(count))
    try:
        listed = [] if isinstance(numbers, str) else list(numbers)  # type: ignore[call-overload]
    except TypeError:
        listed = []
    if not listed:
        raise ValueError(f"{name} must be a list of at least one number, not {numbers!r}")
    return [_as_number(one, i, count) % count for i in listed]


def _as_number(one: str, value: object, count: int) -> int:
    try:
        number = operator.index(value)  # type: ignore[arg-type]  # also integers of NumPy and PyTorch
    except TypeError:
        number = None
    if number is None or isinstance(value, bool):
        raise ValueError(f"the number of a {one} must be a whole number, not {value!r}")
    if not -count <= number < count:
        raise ValueError(f"{one} {number} is out of range: there are {count}, numbered from 0")
    return number


def warn(text: str) -> None:
    """Warn, and point to the calling line outside of this package and of PyTorch's wrappers."""
    level, frame = 2, sys._getframe(1)
    within = ("vit", "torch", "contextlib")
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in within:
        level, frame = level + 1, frame.f_back
    warnings.warn(text, stacklevel=level)


def nearest_multiple(side: float, patch: int) -> int:
    """The multiple of `patch` nearest to `side`, in pixels: at least one patch, and the larger one of a tie."""
    return max(1, math.floor(side / patch + 0.5)) * patch
