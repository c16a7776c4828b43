"""Which layout of a kernel is the fastest on this GPU, or whether PyTorch is: measured once, and kept in a file."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from vit.checks import warn

from .tiles import FEW, INTERPRETER, TILES, Tile

Result = TypeVar("Result")
Choice = TypeVar("Choice", bound="Tile | str | None")
MILLISECONDS = 2  # of runs in one measurement, of which there are ten
MOST = 65536  # rows; more are measured as so many


def fastest(kernel: str, what: str, x: Tensor, rows: int, call: Callable[[Tile | None], Result]) -> Result:
    """What `call` gives with the layout that is the fastest, or with None, by which it is to take plain PyTorch.

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
    """The key of the fastest of these calls, which work on x: measured, or remembered."""
    key, known = f"{name_of(x.device)}, {x.dtype}: {what}", remembered()
    if key not in known or known[key] not in calls:
        with torch.cuda.device_of(x):  # whose clock and stream they are measured by
            known[key] = measure(calls)
        remember(known)
    return known[key]


@cache
def name_of(device: torch.device) -> str:
    """Of a GPU, and of what makes code for it."""
    import triton  # type: ignore[import-untyped]

    return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}, triton {triton.__version__}"


def measure(calls: Mapping[Choice, Callable[[], object]]) -> Choice:
    """The key of the fastest, by the median. RuntimeError where none of them runs."""
    from triton import TritonError

    times: dict[Choice, float] = {}
    for choice, call in calls.items():
        try:
            times[choice] = milliseconds(call)
        except (TritonError, RuntimeError) as error:  # one that needs more than this GPU has, or does not compile
            why = (str(error).splitlines() or [type(error).__name__])[0]
            warn(f"{choice or 'plain PyTorch'} does not run here and is left out: {why}")
    if not times:
        raise RuntimeError("no layout of a kernel runs here; the warnings say why")
    return min(times, key=lambda choice: times[choice])


def milliseconds(run: Callable[[], object]) -> float:
    """The median on the current GPU, launched as a CUDA graph, so that Python's part is not measured."""
    from triton.testing import do_bench_cudagraph  # type: ignore[import-untyped]

    torch.cuda.synchronize()  # it works on a stream of its own
    return do_bench_cudagraph(run, rep=MILLISECONDS, return_mode="median")


@cache
def remembered() -> dict[str, Any]:
    """What was measured on this machine before; it is changed in place."""
    return read()


def read() -> dict[str, Any]:
    """What the file holds, where JSON keeps a `Tile` as a list; nothing where there is none."""
    try:
        found = json.loads(path().read_text())
        return {key: Tile(*value) if isinstance(value, list) else value for key, value in found.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        warn(f"{path()} cannot be read, so kernels are measured again: {error}")
        return {}


def remember(known: dict[str, Any]) -> None:
    """Write it for the next process; a folder that cannot be written to costs only the time to measure again."""
    file = path()
    temporary = file.with_name(f".{file.name}.{secrets.token_hex(4)}")
    together = read() | known  # another process may have measured meanwhile
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(together, indent=1, sort_keys=True))
        os.replace(temporary, file)
    except OSError as error:
        warn(f"{file} cannot be written, so the next process measures again: {error}")


def path() -> Path:
    """The file: `vit/gpu_tiles.json` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vit" / "gpu_tiles.json"
