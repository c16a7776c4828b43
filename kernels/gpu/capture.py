"""Recording work on a GPU as a CUDA graph: one at a time in a process, since PyTorch cannot record two."""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import cache
from threading import RLock
from typing import Any, TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")

lock = RLock()  # held while recording and replaying


@cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """The one stream on which all graphs are recorded: the allocator does not reuse one stream's memory on another."""
    return torch.cuda.Stream(device)


def record(run: Callable[[], Result], device: torch.device, pool: Any = None) -> tuple[torch.cuda.CUDAGraph, Result]:
    """A graph of `run`, and the result of `run`, which a replay fills; call it with `lock` held.

    `run` is called once before, since what kernels and libraries set up at their first call must not be recorded.
    cuBLAS keeps a workspace for each stream. It is dropped before and after, so that the graph gets one in its own
    memory: any other would be freed as soon as another graph of this stream is.
    """
    graph, collects = torch.cuda.CUDAGraph(), gc.isenabled()
    torch.cuda.synchronize(device)  # a graph that is still running may use the same memory as the call below
    with torch.cuda.stream(side_stream(device)):  # which torch.cuda.graph does not leave when recording fails
        run()
        torch._C._cuda_clearCublasWorkspaces()
        gc.disable()  # unloading a kernel meanwhile would end the recording
        try:
            # Other threads may use the GPU meanwhile, as those that load images do.
            with torch.cuda.graph(graph, pool, stream=side_stream(device), capture_error_mode="thread_local"):
                result = run()
        finally:
            if collects:
                gc.enable()
            torch._C._cuda_clearCublasWorkspaces()
    return graph, result


def is_recording(x: Tensor) -> bool:
    """Whether this thread is recording a CUDA graph, so that nothing is computed on x yet."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()
