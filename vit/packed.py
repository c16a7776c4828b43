"""Images of different sizes in one pass, without padding: their tokens are concatenated.

Linear layers and norms treat every token on its own. Attention receives the length of each image and stays within it
(NaViT, arXiv:2307.06304, calls this Patch n' Pack).

`torch.compile` makes a new graph for every list of sizes: compile a model's blocks, or pack without `fullgraph`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .checks import require_int
from .config import ViTConfig
from .inputs import check_list

Grid = tuple[int, int]
BUDGET = 2048  # tokens per pass; the fastest of those in tests/benchmarks/packed.py


class Packing(NamedTuple):
    """How images lie in [B, T, D] tokens: B images of one grid or, with `lengths`, B = 1 and one after another."""

    grid: Grid | list[Grid]  # (h, w) of the patches; of packed images a list
    lengths: list[int] | None = None  # the number of tokens of each packed image

    def per_token(self, values: Tensor) -> Tensor:
        """One value per image -> one per token: [B] -> [B, 1, 1], or [1, T, 1] for packed images."""
        if self.lengths is None:
            return values[:, None, None]
        return torch.cat([value.expand(n) for value, n in zip(values, self.lengths)])[None, :, None]


class PackedForward:
    """The methods of `ViT` for images of different sizes."""

    config: ViTConfig
    norm: nn.Module
    accept: Callable[[Tensor, str], Tensor]
    tokens: Callable[[Tensor], Tensor]
    encode: Callable[..., tuple[Tensor, dict[int, Any]]]
    forward_head: Callable[[Tensor], Tensor]
    grid_of: Callable[[Tensor], Grid]
    split: Callable[[Tensor, Grid], tuple[Tensor, Tensor]]
    block_numbers: Callable[[Sequence[int] | None], list[int]]

    def forward_packed(self, images: Sequence[Tensor], ragged: str = "error", budget: int = BUDGET) -> Tensor:
        """Classify images of different sizes without padding them.

        Args:
            images: a list of [in_chans, H_i, W_i], of one dtype and on one device.
            ragged: as for `forward`.
            budget: tokens per pass, in the order of the images; an image with more gets a pass of its own.

        Returns:
            [B, num_classes] logits: those of `forward` on each image.

        Raises:
            ValueError: as `forward`, naming the image; an empty list, several dtypes or devices.
        """
        tokens = self.forward_features_packed(images, ragged, budget)  # each [P + N_i, D]
        return torch.cat([self.forward_head(x[None]) for x in tokens])

    def forward_features_packed(
        self, images: Sequence[Tensor], ragged: str = "error", budget: int = BUDGET
    ) -> list[Tensor]:
        """`forward_features` of a list of [in_chans, H_i, W_i] images: for each [P + N_i, D]."""
        result: list[Tensor] = []
        for x, _, lengths in self._passes(images, ragged, budget):
            result += self.norm(x)[0].split(lengths)
        return result

    def forward_intermediates_packed(
        self,
        images: Sequence[Tensor],
        blocks: Sequence[int] | None = None,
        norm: bool = False,
        return_prefix_tokens: bool = False,
        ragged: str = "error",
        budget: int = BUDGET,
    ) -> list[list[Any]]:
        """`forward_intermediates` of a list: for each block and each image [D, h_i, w_i].

        With `return_prefix_tokens` a pair of that and [P, D].
        """
        numbers = self.block_numbers(blocks)
        keep = dict.fromkeys(numbers, self.norm if norm else nn.Identity())
        result: dict[int, list[Any]] = {i: [] for i in numbers}
        for kept, grids, lengths in self._passes(images, ragged, budget, keep):
            for i in kept:
                for tokens, grid in zip(kept[i].split(lengths, dim=1), grids):  # each [1, P + N_i, D]
                    patches, prefix = self.split(tokens, grid)
                    result[i].append((patches[0], prefix[0]) if return_prefix_tokens else patches[0])
        return [result[i] for i in numbers]

    def _passes(
        self, images: Sequence[Tensor], ragged: str, budget: int, keep: Mapping[int, Any] | None = None
    ) -> Iterator[tuple[Any, list[Grid], list[int]]]:
        """Encode up to `budget` tokens at a time: what `encode` returns (with `keep`: kept), the grids and lengths."""
        require_int("budget", budget, 1)
        check_list(images)
        accepted: list[Tensor] = []
        for i, image in enumerate(images):  # all of them before the first pass
            try:
                accepted.append(self.accept(image[None], ragged))
            except ValueError as error:
                raise ValueError(f"image {i} of the list: {error}") from None
        grids = [self.grid_of(image) for image in accepted]
        lengths = [self.config.num_prefix_tokens + math.prod(grid) for grid in grids]
        start = 0
        while start < len(accepted):
            stop, total = start + 1, lengths[start]
            while stop < len(accepted) and total + lengths[stop] <= budget:
                stop, total = stop + 1, total + lengths[stop]
            part = Packing(grids[start:stop], lengths[start:stop])
            x = torch.cat([self.tokens(image) for image in accepted[start:stop]], dim=1)  # [1, T, D]
            x, kept = self.encode(x, part, keep)
            yield (x if keep is None else kept), grids[start:stop], lengths[start:stop]
            start = stop
