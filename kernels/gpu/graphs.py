"""A function on a GPU recorded as a CUDA graph for each shape: its kernels are launched by one call."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from threading import Lock
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vit.checks import warn

SHAPES = 16  # whose graphs are kept
CALLS = 3  # of a shape until it is recorded: to record takes as long as several calls, and some shapes come once
COUNTED = 4096  # shapes whose calls are counted

_recording = Lock()  # PyTorch records one graph at a time


class Recorded(NamedTuple):
    """A graph, where it reads images, where it leaves its result, and what it reads besides."""

    graph: torch.cuda.CUDAGraph
    images: Tensor
    result: Tensor
    besides: list[Tensor]


class Graphs:
    """`fn(images)` by CUDA graphs (https://docs.nvidia.com/cuda/cuda-c-programming-guide, CUDA Graphs).

    All of them work in the same memory, one after another, whatever streams they are called from: what a graph leaves
    there is copied before the next one begins.
    """

    def __init__(self, fn: Callable[[Tensor], Tensor], besides: Callable[[], list[Tensor]]) -> None:
        """`fn`: computes on a GPU alone. `besides`: what it reads that could be freed while a graph lives."""
        self.fn, self.besides = fn, besides
        self.kept: dict[tuple, Recorded] = {}  # the one used last is the last
        self.calls: Counter[tuple] = Counter()
        self.broken = False
        self.lock = Lock()
        self.free: torch.cuda.Event | None = None  # passes when no graph runs
        self.pool: Any = None  # a handle of their memory

    def __reduce__(self) -> tuple:  # copies record for themselves
        return Graphs, (self.fn, self.besides)

    def __call__(self, images: Tensor, what: object) -> Tensor:
        """What `fn` gives. The third call for a shape and dtype records, and so does another `what` it rests on.

        Warns once where it cannot be recorded, and launches its kernels one by one from then on.
        """
        key = (*images.shape, images.dtype, what)
        with self.lock, torch.cuda.device_of(images):
            if (recorded := self.find(key, images)) is not None:
                return self.replay(recorded, images)
        return self.fn(images)

    def find(self, key: tuple, images: Tensor) -> Recorded | None:
        """The graph for a shape, recorded if it is time to; None where there is none."""
        if key in self.kept:
            self.kept[key] = self.kept.pop(key)
            return self.kept[key]
        if len(self.calls) >= COUNTED:
            self.calls.clear()
        self.calls[key] += 1
        if self.broken or self.calls[key] < CALLS:
            return None
        if len(self.kept) >= SHAPES:
            self.wait()
            self.kept.pop(next(iter(self.kept)))
        try:
            self.kept[key] = self.record(images)
        except RuntimeError as error:
            self.broken = True
            warn(f"kernels are launched one by one, which is slower for small batches; no CUDA graph because: {error}")
            return None
        return self.kept[key]

    def replay(self, recorded: Recorded, images: Tensor) -> Tensor:
        """What a graph gives for images."""
        stream = torch.cuda.current_stream(images.device)
        if self.free is None:
            self.free = torch.cuda.Event()
        stream.wait_event(self.free)  # another stream may be in the middle of one
        recorded.images.copy_(images)
        recorded.graph.replay()
        result = recorded.result.clone()
        self.free.record(stream)
        return result

    @torch.inference_mode(False)  # whose tensors could not be written to outside of it, at another call
    @torch.no_grad()
    def record(self, images: Tensor) -> Recorded:
        """A graph of `fn` on images like these, which `fn` has been called with before."""
        given = images.clone()
        here, apart = torch.cuda.current_stream(images.device), torch.cuda.Stream(images.device)
        apart.wait_stream(here)
        with torch.cuda.stream(apart):  # what libraries set up for a stream must not be recorded
            self.fn(given)
        here.wait_stream(apart)
        self.wait()
        if self.pool is None:
            self.pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # Other threads may use the GPU meanwhile, as those that load images do.
        with _recording, torch.cuda.graph(graph, self.pool, stream=apart, capture_error_mode="thread_local"):
            result = self.fn(given)
        return Recorded(graph, given, result, self.besides())

    def forget(self) -> None:
        """Drop all graphs, once none of them runs."""
        with self.lock:
            self.wait()
            self.kept.clear()
            self.calls.clear()

    def wait(self) -> None:
        """Until no graph runs."""
        if self.free is not None:
            self.free.synchronize()
