"""How kernels are laid out on a GPU: the sizes of their tiles."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

FEW = 1024  # rows; with so few, small tiles give every processor one


class Tile(NamedTuple):
    """R rows, C columns, E multiplied at a time; warps of a program, loads in flight, programs on a processor."""

    R: int
    C: int
    E: int
    warps: int
    stages: int
    each: int = 1

    def programs(self, tiles: int, x: Tensor) -> int:
        """On how many programs so many tiles are launched: as many as run at once."""
        return max(1, min(tiles, self.each * processors(x.device)))


# By kernel, the first what is taken where nothing was measured: for few rows and for many. Not tuned on a GPU: chosen
# by what the compiler says of registers and shared memory for compute capability 9.0, see NOTES.md.
TILES: dict[tuple[str, bool], list[Tile]] = {
    ("linear", False): [
        Tile(128, 128, 64, 8, 3, 2), Tile(128, 128, 64, 4, 3, 2), Tile(128, 256, 64, 8, 3), Tile(64, 128, 64, 4, 4, 2),
        Tile(128, 64, 64, 4, 4, 2), Tile(256, 128, 64, 8, 3),
    ],
    ("linear", True): [Tile(32, 64, 128, 4, 3, 2), Tile(16, 64, 128, 4, 3, 2), Tile(64, 64, 64, 4, 4, 2)],
    ("mlp", False): [Tile(128, 32, 0, 8, 2), Tile(64, 64, 0, 8, 1), Tile(64, 32, 0, 4, 2), Tile(128, 64, 0, 16, 1)],
    ("mlp", True): [Tile(32, 64, 0, 8, 1), Tile(16, 64, 0, 8, 1)],
    ("patches", False): [Tile(128, 128, 64, 8, 3), Tile(64, 128, 64, 4, 3, 2)],
    ("patches", True): [Tile(32, 64, 64, 4, 3, 2)],
}  # fmt: skip
INTERPRETER = Tile(32, 64, 32, 1, 1)  # a step takes as long for any size; oblong, so that a tile read sideways shows


def default(kernel: str, rows: int, x: Tensor) -> Tile:
    """The tile that is taken where nothing was measured."""
    return TILES[kernel, rows <= FEW][0] if x.is_cuda else INTERPRETER


@cache
def processors(device: torch.device) -> int:
    """How many multiprocessors a GPU has; the interpreter's programs come one after another, and two show it."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
