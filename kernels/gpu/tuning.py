"""Which layout of a kernel is the fastest on this GPU, or whether PyTorch is: measured once, and kept in a file."""

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
MOST = 65536  # rows; larger numbers share one entry


def fastest(kernel: str, what: str, x: Tensor, rows: int, call: Callable[[Tile | None], Result]) -> Result:
    """What `call` gives with the layout that is the fastest; None stands for plain PyTorch.

    Measured on a GPU at the first call for a kernel, what it computes and each power of two of rows, so that most other
    batch sizes need nothing. While a graph is recorded nothing can be measured: run it once before. Triton's
    interpreter has one layout, and nothing to measure.

    Args:
        kernel: in `TILES`.
        what: sizes and kind of the operation, by which it is remembered.
        x: what it works on.
        rows: how many tokens.
        call: runs it.
    """
    if not x.is_cuda:
        return call(INTERPRETER)
    calls = {tile: partial(call, tile) for tile in (None, *TILES[kernel, rows <= FEW])}
    return call(choose(f"{kernel} {what}, up to {bucket(rows)} rows", x, calls))


def bucket(rows: int) -> int:
    """The power of two that so many rows are measured as, 64 at the least."""
    return min(MOST, 1 << max(6, (rows - 1).bit_length()))


def choose(what: str, x: Tensor, calls: Mapping[Choice, Callable[[], object]]) -> Choice:
    """The key of the fastest of these calls, which work on x: measured, or remembered.

    RuntimeError where none of them runs, or where somebody records a CUDA graph, in which nothing can be measured.
    """
    key, known = f"{name_of(x.device)}, {x.dtype}: {what}", remembered()
    if known.get(key, UNMEASURED) not in calls:
        if capture.is_recording(x):
            raise RuntimeError(
                f"which kernel is the fastest for {what} is not known: run it once before it is recorded"
            )
        with capture.lock, torch.cuda.device_of(x):  # whose clock and stream they are measured by
            if known.get(key, UNMEASURED) not in calls:  # nor has another thread measured meanwhile
                known[key], lasts = measure(calls, x.device)
                if lasts:
                    remember({key: known[key]})
    return known[key]


@cache
def name_of(device: torch.device) -> str:
    """Of a GPU, of what makes code for it, and of what the code is made of."""
    import triton  # type: ignore[import-untyped]

    here = Path(__file__).parent
    sources = [here / "triton_kernels.py", here.parent / "attention" / "flash_kernels.py"]
    digest = sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:8]
    gpu = torch.cuda.get_device_name(device)
    return f"{gpu}, torch {torch.__version__}, triton {triton.__version__}, kernels {digest}"


def measure(calls: Mapping[Choice, Callable[[], object]], device: torch.device) -> tuple[Choice, bool]:
    """The key of the fastest, by the median, and whether another time would have the same to choose from."""
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
        raise RuntimeError("no layout of a kernel runs here; the warnings say why")
    return min(times, key=lambda choice: times[choice]), lasts


def is_tritons(error: Exception) -> bool:
    """Does a layout need more than this GPU has, or not compile for it? Memory may be lacking for once only."""
    from triton import TritonError

    return isinstance(error, TritonError) or "PassManager" in str(error)


def milliseconds(run: Callable[[], object], device: torch.device) -> float:
    """The median on a GPU, launched as a CUDA graph, so that Python's part is not measured."""

    def repeat(times: int) -> None:
        for _ in range(times):
            run()

    once = replayed(capture.record(partial(repeat, 1), device)[0], device)
    times = max(1, int(MILLISECONDS / max(once, 1e-3)))
    return replayed(capture.record(partial(repeat, times), device)[0], device) / times


def replayed(graph: torch.cuda.CUDAGraph, device: torch.device) -> float:
    """The median of a graph's time in milliseconds."""
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
    """What was measured on this machine before; it is changed in place."""
    return read()


def read() -> dict[str, Any]:
    """What the file holds, where JSON keeps a `Tile` as a list; nothing where there is none."""
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
