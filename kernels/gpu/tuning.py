"""Which layout of a kernel is the fastest on this GPU, or whether PyTorch is: measured once, and kept in a file."""

from __future__ import annotations

import json
import os
import secrets
import statistics
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
REPEATS = 20


def fastest(kernel: str, what: str, x: Tensor, rows: int, call: Callable[[Tile | None], Result]) -> Result:
    """What `call` gives with the layout that is the fastest, or with None, by which it is to take plain PyTorch.

    Measured on a GPU at the first call for a kernel, what it computes and whether rows are few, so that another batch
    size needs nothing. While a graph is recorded nothing can be measured: run it once before. Triton's interpreter has
    one layout, and nothing to measure.

    Args:
        kernel: in `TILES`.
        what: sizes and kind of the operation, by which it is remembered.
        x: what it works on.
        rows: how many tokens.
        call: runs it.
    """
    if not x.is_cuda:
        return call(INTERPRETER)
    few = rows <= FEW
    calls = {tile: partial(call, tile) for tile in (None, *TILES[kernel, few])}
    return call(choose(f"{kernel} {what}, {'few' if few else 'many'} rows", x, calls))


def choose(what: str, x: Tensor, calls: Mapping[Choice, Callable[[], object]]) -> Choice:
    """The key of the fastest of these calls, which work on x: measured, or remembered."""
    key, known = f"{name_of(x.device)}, {x.dtype}: {what}", remembered()
    if key not in known or restored(known[key]) not in calls:
        with torch.cuda.device_of(x):  # whose clock and stream they are measured by
            known[key] = measure(calls)
        remember(known)
    return restored(known[key])


@cache
def name_of(device: torch.device) -> str:
    """Of a GPU."""
    return torch.cuda.get_device_name(device)


def restored(found: Any) -> Any:
    """What was remembered as it was before: JSON keeps tuples as lists."""
    return Tile(*found) if isinstance(found, list) else found


def measure(calls: Mapping[Choice, Callable[[], object]]) -> Choice:
    """The key of the fastest, by the median."""
    from triton import TritonError  # type: ignore[import-untyped]
    from triton.runtime.errors import OutOfResources  # type: ignore[import-untyped]

    times: dict[Choice, float] = {}
    for choice, call in calls.items():
        try:
            times[choice] = milliseconds(call)
        except OutOfResources:  # which some GPUs have less of
            continue
        except TritonError as error:
            warn(f"{choice} does not compile here and is left out: {error}")
    return min(times, key=lambda choice: times[choice])


def milliseconds(run: Callable[[], object]) -> float:
    """The median of several runs on the current GPU."""
    for _ in range(3):
        run()
    times = []
    for _ in range(REPEATS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


@cache
def remembered() -> dict[str, Any]:
    """What was measured on this machine before; it is changed in place."""
    try:
        return json.loads(path().read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        warn(f"{path()} cannot be read, so kernels are measured again: {error}")
        return {}


def remember(known: dict[str, Any]) -> None:
    """Write it for the next process; a folder that cannot be written to costs only the time to measure again."""
    file = path()
    temporary = file.with_name(f".{file.name}.{secrets.token_hex(4)}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(known, indent=1, sort_keys=True))
        os.replace(temporary, file)
    except OSError as error:
        warn(f"{file} cannot be written, so the next process measures again: {error}")


def path() -> Path:
    """The file: `vit/gpu_tiles.json` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vit" / "gpu_tiles.json"
