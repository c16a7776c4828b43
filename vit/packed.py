"""Images of different sizes in one pass, without padding: their tokens lie one after another.

Linear layers and norms treat every token by itself, so that they do not care whose it is; attention is told the
lengths and keeps to each image. NaViT (arXiv:2307.06304) trains so, and calls it Patch n' Pack.

`torch.compile` makes a graph for every list of sizes: compile a model's blocks, or pack without `fullgraph`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .checks import check_list, require_int

if TYPE_CHECKING:
    from .attend import Grid
    from .model import ViT

BUDGET = 2048  # tokens that are packed at a time; the best of those in tests/benchmarks/packed.py


def parts(model: ViT, images: Sequence[Tensor], ragged: str, budget: int) -> list[list[Tensor]]:
    """A list of [C, H_i, W_i] images -> lists of [1, C, H_i, W_i] with whole patches, in their order.

    Each list makes at most `budget` tokens, or is a single image that makes more.

    Raises:
        ValueError: an image that the model refuses, which is named, an empty list, several dtypes or devices.
    """
    require_int("budget", budget, 1)
    check_list(images)
    result: list[list[Tensor]] = [[]]
    tokens = 0
    for i, image in enumerate(images):
        try:
            accepted = model.accept(image[None], ragged)
        except ValueError as error:
            raise ValueError(f"image {i} of the list: {error}") from None
        more = model.config.num_prefix_tokens + math.prod(model.grid_of(accepted))
        if result[-1] and tokens + more > budget:
            result.append([])
            tokens = 0
        result[-1].append(accepted)
        tokens += more
    return result


def pack(model: ViT, images: list[Tensor]) -> tuple[Tensor, list[Grid], list[int]]:
    """[1, C, H_i, W_i] images -> tokens [1, T, D], one image after the other, their grids and numbers of tokens."""
    tokens = [model.embed(image) for image in images]  # each [1, T_i, D]
    return torch.cat(tokens, dim=1), [model.grid_of(image) for image in images], [x.shape[1] for x in tokens]


def features(model: ViT, parts: list[list[Tensor]]) -> list[Tensor]:
    """For each image its tokens after the final norm, [P + N_i, D]."""
    result: list[Tensor] = []
    for images in parts:
        x, grids, lengths = pack(model, images)  # [1, T, D]
        for block in model.blocks:
            x = model.run(block, x, grids, lengths)  # [1, T, D]
        result += model.norm(x)[0].split(lengths)
    return result


def intermediates(
    model: ViT, parts: list[list[Tensor]], numbers: list[int], norm: bool
) -> list[list[tuple[Tensor, Tensor]]]:
    """For each of these blocks and each image its patches as a map [D, h_i, w_i], and its other tokens [P, D]."""
    kept: dict[int, list[tuple[Tensor, Tensor]]] = {i: [] for i in numbers}
    for images in parts:
        x, grids, lengths = pack(model, images)  # [1, T, D]
        for i in range(max(numbers) + 1):
            x = model.run(model.blocks[i], x, grids, lengths)  # [1, T, D]
            if i in numbers:
                tokens = (model.norm(x) if norm else x).split(lengths, dim=1)  # each [1, P + N_i, D]
                pairs = (model.split(one, grid) for one, grid in zip(tokens, grids))
                kept[i] += [(patches[0], prefix[0]) for patches, prefix in pairs]
    return [kept[i] for i in numbers]


def summary(tokens: Tensor, P: int) -> Tensor:
    """[P + N_i, D] tokens -> [P + 1, D], all that a head reads, as many for every image: the prefix, the patches' mean.

    To a head these are the tokens of an image of one patch.
    """
    return torch.cat([tokens[:P], tokens[P:].mean(dim=0, keepdim=True)])
