"""Which layout of a kernel, or plain PyTorch, is the fastest on a GPU: measured once, and kept in a file.

A choice is kept by what it depends on: compute capability, dtype, kernel, sizes. `tuned.json` ships such choices, and
says where they were measured; those in the user's cache come before them. Neither is believed unseen, since compilers
change: at its first use in a process a choice is run once, and its result compared with plain PyTorch's.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import torch
from torch import Tensor

from vit.checks import warn
from vit.files import replacing

from . import capture
from .tiles import FEW, INTERPRETER, TILES, Tile

Result = TypeVar("Result")
Choice = TypeVar("Choice", bound="Tile | str | None")
SHIPPED = Path(__file__).with_name("tuned.json")
MILLISECONDS = 2  # of runs in one measurement
MEASUREMENTS = 10
UNKNOWN = object()  # None is plain PyTorch
MOST = 65536  # rows; all larger numbers share one entry
APART = 8  # times a dtype's eps: how far two ways to compute the same may lie apart
MEASURED = {"cuda"}  # types of device whose kernels are measured; Triton's interpreter has one layout


def fastest(kernel: str, what: str, x: Tensor, rows: int, call: Callable[[Tile | None], Result]) -> Result:
    """`call` with the fastest layout; None stands for plain PyTorch.

    On a GPU it is measured at the first call for each kernel, operation and power of two of rows, so that most other
    batch sizes need no measuring. Nothing can be measured while a graph is recorded: run it once before. Triton's
    interpreter has one layout and measures nothing.

    Args:
        kernel: in `TILES`.
        what: the sizes and kind of the operation, under which the choice is remembered.
        x: a tensor that it works on.
        rows: the number of tokens.
        call: runs the kernel.
    """
    if x.device.type not in MEASURED:
        return call(INTERPRETER)
    calls = {tile: partial(call, tile) for tile in (None, *TILES[kernel, rows <= FEW])}
    return call(choose(f"{kernel} {what}, up to {bucket(rows)} rows", x, calls))


def bucket(rows: int) -> int:
    """The power of two under which so many rows are measured, at least 64."""
    return min(MOST, 1 << max(6, (rows - 1).bit_length()))


def choose(what: str, x: Tensor, calls: Mapping[Choice, Callable[[], object]]) -> Choice:
    """The key of the fastest of these calls, which work on x: remembered or measured.

    The first of them is plain PyTorch, whose result the others must give.

    RuntimeError if none of them runs, or if it is not known while a CUDA graph is recorded.
    """
    key = f"{name_of(x.device)}, {x.dtype}: {what}"
    if chosen.get(key, UNKNOWN) not in calls:
        if capture.is_recording(x):
            if (known := remembered().get(key, UNKNOWN)) in calls:
                return known
            raise RuntimeError(
                f"the fastest kernel for {what} is not measured yet: call the model once before recording a graph"
            )
        with capture.lock, torch.cuda.device_of(x):  # the device that the calls are measured on
            if chosen.get(key, UNKNOWN) not in calls:  # another thread may have measured it meanwhile
                chosen[key] = decide(key, calls, x.device)
    return chosen[key]


chosen: dict[str, Any] = {}  # in this process


def decide(key: str, calls: Mapping[Choice, Callable[[], object]], device: torch.device) -> Choice:
    """The remembered choice if it works, else the fastest, which is remembered."""
    known = remembered().get(key, UNKNOWN)
    if known in calls:
        pair = {choice: calls[choice] for choice in (next(iter(calls)), known)}
        if known in measure(pair, lambda call: 0.0)[0]:
            return known
    times, lasts = measure(calls, partial(milliseconds, device=device))
    if not times:
        raise RuntimeError("no layout of this kernel runs on this GPU: see the warnings")
    fastest = min(times, key=lambda choice: times[choice])
    if lasts:
        remember({key: fastest})
    return fastest


@cache
def name_of(device: torch.device) -> str:
    """What choices depend on, of a GPU: its compute capability, such as 9.0."""
    return "compute capability {}.{}".format(*torch.cuda.get_device_capability(device))


def measure(
    calls: Mapping[Choice, Callable[[], object]], timed: Callable[[Callable[[], object]], float]
) -> tuple[dict[Choice, float], bool]:
    """The time of each that runs and gives the first one's result, and whether no call failed for want of memory."""
    times: dict[Choice, float] = {}
    lasts, expected = True, None
    for choice, call in calls.items():
        try:
            expected = compared(call(), expected)
            times[choice] = timed(call)
        except Exception as error:
            if not isinstance(error, RuntimeError | ArithmeticError) and not is_tritons(error):
                raise
            why = (str(error).splitlines() or [type(error).__name__])[0]
            warn(f"{choice or 'plain PyTorch'} does not run here and is left out: {why}")
            lasts = lasts and (is_tritons(error) or isinstance(error, ArithmeticError))
    return times, lasts


def compared(result: object, expected: Tensor | None) -> Tensor | None:
    """The expected result: a copy of this one if it is the first. ArithmeticError if they lie too far apart."""
    if not isinstance(result, Tensor):
        return expected
    if expected is None:
        expected = result.clone()
    far = distance(result, expected)
    result.fill_(torch.nan)  # what the next call leaves unwritten would look right, in the same memory
    if not far <= APART * torch.finfo(expected.dtype).eps:
        raise ArithmeticError(f"its result is off by {far:.1e}")
    return expected


def distance(ours: Tensor, theirs: Tensor) -> float:
    """The root mean square of the difference, relative to theirs, where theirs is finite: images may have NaN."""
    squares = torch.zeros(2, device=ours.device)
    for a, b in zip(ours.flatten().split(2**24), theirs.flatten().split(2**24)):  # in little memory
        finite = b.isfinite()
        wide = b.float().where(finite, 0.0)
        squares += torch.stack([(a.float().where(finite, 0.0) - wide).square().sum(), wide.square().sum()])
    return (squares[0] / squares[1].clamp(min=1e-30)).sqrt().item()


def is_tritons(error: Exception) -> bool:
    """Whether a layout needs more than this GPU has, or does not compile for it; memory may be short just once."""
    from triton import TritonError  # type: ignore[import-untyped]

    return isinstance(error, TritonError) or "PassManager" in str(error)


def milliseconds(run: Callable[[], object], device: torch.device) -> float:
    """The median time on a GPU, launched as a CUDA graph, so that Python's time is not measured."""

    def repeat(times: int) -> None:
        for _ in range(times):
            run()

    once = replayed(capture.record(partial(repeat, 1), device)[0], device)
    times = max(1, int(MILLISECONDS / max(once, 1e-3)))
    return replayed(capture.record(partial(repeat, times), device)[0], device) / times


def replayed(graph: torch.cuda.CUDAGraph, device: torch.device) -> float:
    """The median time of a graph in milliseconds."""
    measured = []
    for _ in range(MEASUREMENTS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize(device)
        measured.append(begin.elapsed_time(end))
    return median(measured)


@cache
def remembered() -> dict[str, Any]:
    """The choices that ship, and above them those of earlier measurements on this machine."""
    return as_choices(json.loads(SHIPPED.read_text())["choices"]) | read()


def as_choices(known: Mapping[str, Any]) -> dict[str, Any]:
    """Choices as a file holds them, in which a `Tile` is a list."""
    choices = {key: Tile(*value) if isinstance(value, list) else value for key, value in known.items()}
    set(choices.values())  # TypeError for what no choice can be
    return choices


def read() -> dict[str, Any]:
    """The choices in the user's file; none if there is no file."""
    try:
        return as_choices(json.loads(path().read_text()))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        warn(f"{path()} cannot be read, so kernels are measured again: {error}")
        return {}


def remember(new: dict[str, Any]) -> None:
    """Write choices for the next process; where the file cannot be written, that one measures again."""
    together = read() | new  # another process may have measured meanwhile
    try:
        path().parent.mkdir(parents=True, exist_ok=True)
        with replacing(path()) as temporary:
            temporary.write_text(json.dumps(together, indent=1, sort_keys=True))
    except OSError as error:
        warn(f"{path()} cannot be written, so the next process measures again: {error}")


def path() -> Path:
    """The file: `vit/gpu_tiles.json` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vit" / "gpu_tiles.json"
