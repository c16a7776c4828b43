"""How work on a GPU is recorded as a CUDA graph: one at a time in a process, since PyTorch cannot record two."""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import cache
from threading import RLock
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")

lock = RLock()  # held by whoever records or replays


@cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """On which all graphs are recorded: memory that a stream was given is not used again on another."""
    return torch.cuda.Stream(device)


def record(run: Callable[[], Result], device: torch.device, pool: Any = None) -> tuple[torch.cuda.CUDAGraph, Result]:
    """A graph of `run`, and what that gave while it was recorded, which a replay fills; call it with `lock` held.

    `run` is called once before, since what kernels and libraries set up at their first call must not be recorded.
    """
    here, apart = torch.cuda.current_stream(device), side_stream(device)
    apart.wait_stream(here)
    with torch.cuda.stream(apart):
        run()
    here.wait_stream(apart)
    graph = torch.cuda.CUDAGraph()
    collects = gc.isenabled()
    gc.disable()  # a kernel that is thrown away meanwhile would break it off
    try:
        # Other threads may use the GPU meanwhile, as those that load images do.
        with torch.cuda.graph(graph, pool, stream=apart, capture_error_mode="thread_local"):
            result = run()
    finally:
        if collects:
            gc.enable()
    return graph, result
