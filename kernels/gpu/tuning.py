"""Which layout of a kernel, or plain PyTorch, is the fastest on this GPU: measured once, and kept in a file."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from functools import cache, partial
from hashlib import sha256
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
MILLISECONDS = 2  # of runs in one measurement
MEASUREMENTS = 10
UNMEASURED = object()  # None is plain PyTorch
MOST = 65536  # rows; all larger numbers share one entry


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
    if not x.is_cuda:
        return call(INTERPRETER)
    calls = {tile: partial(call, tile) for tile in (None, *TILES[kernel, rows <= FEW])}
    return call(choose(f"{kernel} {what}, up to {bucket(rows)} rows", x, calls))


def bucket(rows: int) -> int:
    """The power of two under which so many rows are measured, at least 64."""
    return min(MOST, 1 << max(6, (rows - 1).bit_length()))


def choose(what: str, x: Tensor, calls: Mapping[Choice, Callable[[], object]]) -> Choice:
    """The key of the fastest of these calls, which work on x: measured or remembered.

    RuntimeError if none of them runs, or if it is not known while a CUDA graph is recorded.
    """
    key, known = f"{name_of(x.device)}, {x.dtype}: {what}", remembered()
    if known.get(key, UNMEASURED) not in calls:
        if capture.is_recording(x):
            raise RuntimeError(
                f"the fastest kernel for {what} is not measured yet: call the model once before recording a graph"
            )
        with capture.lock, torch.cuda.device_of(x):  # the device that the calls are measured on
            if known.get(key, UNMEASURED) not in calls:  # another thread may have measured it meanwhile
                known[key], lasts = measure(calls, x.device)
                if lasts:
                    remember({key: known[key]})
    return known[key]


@cache
def name_of(device: torch.device) -> str:
    """A name for a GPU, the versions that compile for it, and a hash of the kernels' sources."""
    import triton  # type: ignore[import-untyped]

    here = Path(__file__).parent
    sources = [here / "triton_kernels.py", here.parent / "attention" / "flash_kernels.py"]
    digest = sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:8]
    gpu = torch.cuda.get_device_name(device)
    return f"{gpu}, torch {torch.__version__}, triton {triton.__version__}, kernels {digest}"


def measure(calls: Mapping[Choice, Callable[[], object]], device: torch.device) -> tuple[Choice, bool]:
    """The key of the fastest, by the median, and whether the choice may be kept: no call failed for want of memory."""
    times: dict[Choice, float] = {}
    lasts = True
    for choice, call in calls.items():
        try:
            times[choice] = milliseconds(call, device)
        except Exception as error:
            if not isinstance(error, RuntimeError) and not is_tritons(error):
                raise
            why = (str(error).splitlines() or [type(error).__name__])[0]
            warn(f"{choice or 'plain PyTorch'} does not run here and is left out: {why}")
            lasts = lasts and is_tritons(error)
    if not times:
        raise RuntimeError("no layout of this kernel runs on this GPU: see the warnings")
    return min(times, key=lambda choice: times[choice]), lasts


def is_tritons(error: Exception) -> bool:
    """Whether a layout needs more than this GPU has, or does not compile for it; memory may be short just once."""
    from triton import TritonError

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
    """The choices of earlier measurements on this machine; changed in place."""
    return read()


def read() -> dict[str, Any]:
    """The choices in the file, which holds a `Tile` as a list; none if there is no file."""
    try:
        known = json.loads(path().read_text())
        return {key: Tile(*value) if isinstance(value, list) else value for key, value in known.items()}
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
