"""Checks that several files share. Each raises one ValueError that names the value and what was expected."""

import inspect
import math
import operator
import sys
import warnings
from collections.abc import Callable, Iterable
from contextlib import suppress
from difflib import get_close_matches

import torch
from torch import Tensor


def parameters(fn: Callable) -> tuple[str, ...]:
    """The names of a function's parameters; none for builtins that have no signature."""
    with suppress(TypeError, ValueError):
        return tuple(inspect.signature(fn).parameters)
    return ()


def unknown(kind: str, name: object, known: Iterable[str]) -> str:
    """The error text for an unknown `name` of some `kind`: the nearest known name, then all of them."""
    known = list(known)
    nearest = get_close_matches(str(name), known, n=1, cutoff=0.5)
    hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
    return f"unknown {kind} {name!r}.{hint} Known: {', '.join(known) or 'none'}."


def dtype_name(dtype: object, known: Iterable[str]) -> str:
    """The name, such as "bfloat16", of one of the `known` dtypes, given as a torch.dtype or by name."""
    name = str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else dtype
    known = list(known)
    if not isinstance(name, str) or name not in known:
        raise ValueError(unknown("dtype", name if isinstance(name, str) else type(name).__name__, known))
    return name


def as_dtype(dtype: object, known: Iterable[str]) -> torch.dtype:
    """One of the `known` dtypes, given as a torch.dtype or by name."""
    return getattr(torch, dtype_name(dtype, known))


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


def as_numbers(name: str, one: str, numbers: object, count: int) -> list[int]:
    """Numbers of things that there are `count` of, from 0: negative ones count from the end, None is all of them.

    `name` and `one` are what the error calls them: "blocks" and "block".
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
        number = operator.index(value)  # type: ignore[arg-type]  # NumPy's whole numbers and PyTorch's, too
    except TypeError:
        number = None
    if number is None or isinstance(value, bool):
        raise ValueError(f"a {one}'s number must be a whole number, not {value!r}")
    if not -count <= number < count:
        raise ValueError(f"{one} {number} is out of range: there are {count}, numbered from 0")
    return number


def warn(text: str) -> None:
    """Warn, pointing to the line outside of this package, and of wrappers in it, that led here."""
    level, frame = 2, sys._getframe(1)
    within = ("vit", "torch", "contextlib")
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in within:
        level, frame = level + 1, frame.f_back
    warnings.warn(text, stacklevel=level)


def check_list(images: object) -> None:
    """`images` must be a list of [C, H, W] tensors of one dtype and on one device, one image at least."""
    if not isinstance(images, (list, tuple)):
        raise ValueError(f"expected a list of [C, H, W] images, not {type(images).__name__}")
    if not images:
        raise ValueError("expected at least one [C, H, W] image, got an empty list")
    for i, image in enumerate(images):
        if not isinstance(image, Tensor) or image.ndim != 3:
            found = list(image.shape) if isinstance(image, Tensor) else type(image).__name__
            raise ValueError(f"image {i} of the list: expected a tensor [C, H, W], got {found}")
        for what in ("dtype", "device"):
            one, other = getattr(images[0], what), getattr(image, what)
            if one != other:
                raise ValueError(f"images of one list must share their {what}: image 0 has {one}, image {i} {other}")


def fit_bias(q: Tensor, k: Tensor, bias: Tensor) -> Tensor:
    """`bias` in four dimensions, which some kernels insist on, and under autocast in q's dtype.

    ValueError for what cannot be added to the scores of q and k [B, A, T, d].
    """
    if reason := bad_bias(q, k, bias):
        raise ValueError(reason)
    return bias[(None,) * (4 - bias.ndim)].to(q.dtype)


def bad_bias(q: Tensor, k: Tensor, bias: Tensor) -> str | None:
    """Why `bias` cannot be added to the scores of q and k [B, A, T, d], if it cannot."""
    scores = (*q.shape[:3], k.shape[2])
    if not isinstance(bias, Tensor):
        return f"bias must be a tensor, not {type(bias).__name__}"
    sides = zip(reversed(bias.shape), reversed(scores))
    if bias.ndim > 4 or any(side not in (1, whole) for side, whole in sides):
        return f"bias {list(bias.shape)} does not broadcast to [B, A, T, T] = {list(scores)}"
    autocast = q.device.type != "meta" and torch.is_autocast_enabled(q.device.type) and bias.is_floating_point()
    if (bias.dtype != q.dtype and not autocast) or bias.device != q.device:
        return f"bias is {bias.dtype} on {bias.device}, expected q's {q.dtype} on {q.device}"
    return None


def nearest_multiple(side: float, patch: int) -> int:
    """The multiple of `patch` nearest to `side`, in pixels: at least one patch, and the larger of two equally near."""
    return max(1, math.floor(side / patch + 0.5)) * patch
