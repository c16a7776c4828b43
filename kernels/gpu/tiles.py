"""The sizes of tiles, by which kernels are laid out on a GPU."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

FEW = 4096  # rows; with so few, only small tiles give every processor one


class Tile(NamedTuple):
    """R rows, C columns, E multiplied at a time; warps of a program, loads in flight, programs on a processor."""

    R: int
    C: int
    E: int
    warps: int
    stages: int
    each: int = 1

    def programs(self, tiles: int, x: Tensor) -> int:
        """How many programs to launch for so many tiles: as many as run at once."""
        return max(1, min(tiles, self.each * processors(x.device)))


# By kernel and whether there are few rows; the first one is taken if nothing was measured. Not tuned on a GPU: chosen
# by what the compiler says about registers and shared memory for compute capability 9.0, see NOTES.md.
TILES: dict[tuple[str, bool], list[Tile]] = {
    ("linear", False): [
        Tile(128, 128, 64, 8, 3, 2), Tile(128, 128, 64, 8, 3, 1), Tile(128, 128, 64, 8, 2, 2),
        Tile(128, 128, 64, 4, 3, 2), Tile(128, 256, 64, 8, 3), Tile(64, 128, 64, 4, 4, 2), Tile(128, 64, 64, 4, 4, 2),
        Tile(256, 128, 64, 8, 3),
    ],
    ("linear", True): [
        Tile(32, 64, 128, 4, 3, 2), Tile(16, 64, 128, 4, 3, 2), Tile(64, 64, 64, 4, 4, 2), Tile(16, 32, 128, 4, 4, 2),
        Tile(64, 128, 64, 4, 4, 2),
    ],
    ("mlp", False): [Tile(128, 32, 0, 8, 2), Tile(64, 64, 0, 8, 1), Tile(64, 32, 0, 4, 2), Tile(128, 64, 0, 16, 1)],
    ("mlp", True): [Tile(32, 64, 0, 8, 1), Tile(16, 64, 0, 8, 1)],
    ("patches", False): [Tile(128, 128, 64, 8, 3), Tile(64, 128, 64, 4, 3, 2)],
    ("patches", True): [Tile(32, 64, 64, 4, 3, 2), Tile(64, 64, 64, 4, 3, 2)],
}  # fmt: skip
INTERPRETER = Tile(32, 64, 32, 1, 1)  # a step takes equally long for any size; not square, so that swapped sides show


def default(kernel: str, rows: int, x: Tensor) -> Tile:
    """The tile that is taken if nothing was measured."""
    return TILES[kernel, rows <= FEW][0] if x.is_cuda else INTERPRETER


@cache
def processors(device: torch.device) -> int:
    """How many multiprocessors a GPU has; 2 in the interpreter, so that each program gets several tiles there, too."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
