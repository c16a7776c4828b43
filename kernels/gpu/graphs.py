"""A function on a GPU recorded as a CUDA graph for each shape: its kernels are launched by one call."""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock
from typing import NamedTuple

import torch
from torch import Tensor

SHAPES = 16  # that are kept; a graph holds its activations


class Recorded(NamedTuple):
    """A graph, where it reads images, where it leaves its result, and what it reads besides."""

    graph: torch.cuda.CUDAGraph
    images: Tensor
    result: Tensor
    free: torch.cuda.Event  # passes when nothing of it is in use
    besides: list[Tensor]


class Graphs:
    """`fn(images)` by CUDA graphs (https://docs.nvidia.com/cuda/cuda-c-programming-guide, CUDA Graphs)."""

    def __init__(self, fn: Callable[[Tensor], Tensor], besides: Callable[[], list[Tensor]]) -> None:
        """`fn`: computes on a GPU alone. `besides`: what it reads that could be freed while a graph lives."""
        self.fn, self.besides = fn, besides
        self.kept: dict[tuple, Recorded] = {}
        self.lock = Lock()

    def __reduce__(self) -> tuple:  # copies record for themselves
        return Graphs, (self.fn, self.besides)

    def __call__(self, images: Tensor, what: object) -> Tensor:
        """What `fn` gives. The first call for a shape and dtype records, and so does another `what` it rests on."""
        key = (*images.shape, images.dtype, what)
        with self.lock, torch.cuda.device_of(images):  # a graph has one place for its images and one for its result
            if key not in self.kept:
                if len(self.kept) >= SHAPES:
                    oldest = next(iter(self.kept))
                    self.kept.pop(oldest).free.synchronize()
                self.kept[key] = self.record(images)
            recorded, stream = self.kept[key], torch.cuda.current_stream(images.device)
            stream.wait_event(recorded.free)  # another stream may be in the middle of it
            recorded.images.copy_(images)
            recorded.graph.replay()
            result = recorded.result.clone()
            recorded.free.record(stream)
            return result

    @torch.inference_mode(False)  # whose tensors could not be written to outside of it, at another call
    @torch.no_grad()
    def record(self, images: Tensor) -> Recorded:
        """A graph of `fn` on images like these."""
        given = images.clone()
        here, apart = torch.cuda.current_stream(images.device), torch.cuda.Stream(images.device)
        apart.wait_stream(here)
        with torch.cuda.stream(apart):  # what is measured, compiled or kept at a first call must not be recorded
            for _ in range(2):
                self.fn(given)
        here.wait_stream(apart)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = self.fn(given)
        return Recorded(graph, given, result, torch.cuda.Event(), self.besides())
