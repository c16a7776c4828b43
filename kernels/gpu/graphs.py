"""A function on a GPU, recorded as a CUDA graph for each shape, so that one call launches all of its kernels."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vit.checks import warn

from . import capture

SHAPES = 16  # whose graphs are kept
CALLS = 3  # of a shape until it is recorded: recording takes as long as several calls, and some shapes come only once
COUNTED = 4096  # shapes whose calls are counted


class Recorded(NamedTuple):
    """A graph, the tensor it reads images from, the tensor it writes its result to, and what else it reads."""

    graph: torch.cuda.CUDAGraph
    images: Tensor
    result: Tensor
    besides: list[Tensor]


class Graphs:
    """A function of images by CUDA graphs (https://docs.nvidia.com/cuda/cuda-c-programming-guide, CUDA Graphs).

    All graphs of a GPU run one after another, whatever streams they are called from, and each result is copied before
    the next graph begins. So the graphs of one function share their memory.
    """

    def __init__(self) -> None:
        self.kept: dict[tuple, Recorded] = {}  # the one used last comes last
        self.calls: Counter[tuple] = Counter()
        self.dropped: Counter[tuple] = Counter()
        self.broken = False
        self.pool: Any = None  # a handle of their memory

    def __reduce__(self) -> tuple:  # copies record their own
        return Graphs, ()

    def __call__(
        self, fn: Callable[[Tensor], Tensor], images: Tensor, what: object, besides: Callable[[], list[Tensor]]
    ) -> Tensor:
        """fn(images). The third call with the same shape, dtype and `what` records a graph.

        If that fails, it warns and launches the kernels one by one from then on; if memory was short, it tries again
        after twice as many calls.

        Args:
            fn: computes on a GPU alone; the same at each call.
            images: what it computes on.
            what: what else makes it a different function, besides shape and dtype.
            besides: returns the other tensors that it reads, which must live as long as the graph.
        """
        key = (*images.shape, images.dtype, what)
        with capture.lock, torch.cuda.device_of(images):
            if self.is_recorded(key) or (self.is_due(key) and self.add(key, fn, images, besides)):
                return self.replay(key, images)
        return fn(images)

    def is_recorded(self, key: tuple) -> bool:
        """Whether there is a graph, which counts as used now."""
        if key in self.kept:
            self.kept[key] = self.kept.pop(key)
        return key in self.kept

    def is_due(self, key: tuple) -> bool:
        """Count a call. Whether it is time to record: twice as late after each time that its graph was dropped."""
        if len(self.calls) >= COUNTED:
            self.calls.clear()
            self.dropped.clear()
        self.calls[key] += 1
        return not self.broken and self.calls[key] >= CALLS << self.dropped[key]

    def add(
        self, key: tuple, fn: Callable[[Tensor], Tensor], images: Tensor, besides: Callable[[], list[Tensor]]
    ) -> bool:
        """Record a graph in place of the least recently used one, if there are many. Whether that succeeded."""
        if len(self.kept) >= SHAPES:
            self.wait()
            oldest = next(iter(self.kept))
            del self.kept[oldest], self.calls[oldest]
            self.dropped[oldest] += 1
        handled = sys.exc_info()[1]
        try:
            self.kept[key] = self.record(fn, images, besides)
        except RuntimeError as error:
            lacks_memory, text = cause(error, handled)
            if lacks_memory:
                self.calls[key] = 0
                self.dropped[key] += 1
            else:
                self.broken = True
            warn(f"kernels are launched one by one, which is slower for small batches; no CUDA graph because: {text}")
        return key in self.kept

    @torch.inference_mode(False)  # whose tensors later calls outside of it could not write to
    @torch.no_grad()
    def record(self, fn: Callable[[Tensor], Tensor], images: Tensor, besides: Callable[[], list[Tensor]]) -> Recorded:
        """A graph of `fn` for images like these."""
        if self.pool is None:
            self.pool = torch.cuda.graph_pool_handle()
        given = images.clone()
        graph, result = capture.record(partial(fn, given), images.device, self.pool)
        return Recorded(graph, given, result, besides())

    def replay(self, key: tuple, images: Tensor) -> Tensor:
        """The result of a graph for these images."""
        recorded, stream, free = self.kept[key], torch.cuda.current_stream(images.device), free_event(images.device)
        stream.wait_event(free)  # another stream may still be running one
        recorded.images.copy_(images)
        recorded.graph.replay()
        result = recorded.result.clone()
        free.record(stream)
        return result

    def forget(self) -> None:
        """Drop all graphs, after waiting until none of them runs."""
        with capture.lock:
            self.wait()
            self.kept.clear()
            self.calls.clear()
            self.dropped.clear()
            self.broken = False
            self.pool = None

    def wait(self) -> None:
        """Wait until none of its graphs runs."""
        for device in {recorded.images.device for recorded in self.kept.values()}:
            free_event(device).synchronize()


def cause(error: RuntimeError, handled: BaseException | None) -> tuple[bool, str]:
    """Whether memory was short, and the text of the error that ended a recording.

    PyTorch's own error says only that a recording ended early, so the one behind it counts, unless that is the error
    that the caller was already handling.
    """
    context = error.__context__
    plain = isinstance(error, torch.OutOfMemoryError) or context is None or context is handled
    why = error if plain else context
    return isinstance(why, torch.OutOfMemoryError), str(why)


@cache
def free_event(device: torch.device) -> torch.cuda.Event:
    """An event that passes when no graph runs on a GPU."""
    return torch.cuda.Event()
