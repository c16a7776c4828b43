"""What is exported: a model as one function from images to named outputs."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from vit.checks import unknown
from vit.maps import attention_weights
from vit.model import Block, ViT
from vit.packed import Packing

OUTPUTS = ("logits", "features", "attention")


class Graph(nn.Module):
    """A model from images to some of its outputs, in the order in which they were asked for.

        logits     [B, num_classes]
        features   [B, D], what the head reads; [B, 2D] with global_pool "token_avg"
        attention  [B, A, h, w], how much each head of the last block lets the class token look at each patch

    Images and outputs are float32 whatever the dtype of the weights.
    """

    def __init__(self, model: ViT, outputs: Sequence[str]) -> None:
        super().__init__()
        self.model, self.names = model, tuple(outputs)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        model = self.model
        images = model.accept(images.to(model.class_token.dtype))  # [B, C, H, W]
        last = len(model.blocks) - 1
        keep = {last: model.norm}
        if "attention" in self.names:  # of the tokens that the last block reads
            block, heads = cast(Block, model.blocks[last]), list(range(model.config.num_heads))
            keep[last - 1] = partial(attention_weights, block, heads=heads, rows=[0])  # type: ignore[assignment]
        grid = model.grid_of(images)
        _, kept = model.encode(model.tokens(images), Packing(grid), keep)
        found = {}
        for name in self.names:
            if name == "attention":
                weights = kept[last - 1][:, :, 0, model.config.num_prefix_tokens :]  # [B, A, N]
                found[name] = weights.reshape(images.shape[0], -1, *grid)  # [B, A, h, w]
            else:
                found[name] = model.forward_head(kept[last], pre_logits=name == "features")
        return tuple(found[name].float() for name in self.names)


def check_outputs(outputs: Sequence[str] | None, model: ViT) -> tuple[str, ...]:
    """The outputs that were asked for; None means logits, or features of a model without a head."""
    has_head = model.config.num_classes > 0
    if outputs is None:
        return ("logits",) if has_head else ("features",)
    names = (outputs,) if isinstance(outputs, str) else tuple(outputs)
    for name in names:
        if name not in OUTPUTS:
            raise ValueError(unknown("output", name, OUTPUTS))
    if not names or len(set(names)) < len(names):
        raise ValueError(f"outputs must be one or more of {', '.join(OUTPUTS)}, each once, not {names!r}")
    if "logits" in names and not has_head:
        raise ValueError("this model has no classifier, so it has no logits: ask for features")
    return names


@torch.no_grad()
def at_size(model: ViT, size: tuple[int, int] | None, dtype: torch.dtype) -> ViT:
    """A copy in eval mode, on the CPU and in a dtype; if a size (H, W) is given, its positions fit that size."""
    copied = copy.deepcopy(model).cpu().eval().requires_grad_(False)
    if size is not None and size != model.config.img_size:
        p, n = model.config.patch_size, model.config.num_position_rows
        positions = copied.positions((size[0] // p, size[1] // p))  # [1, N, D]
        prefix = copied.position_embedding[:, :n]  # [1, n, D]
        copied.position_embedding = nn.Parameter(torch.cat([prefix, positions], dim=1), requires_grad=False)
        copied.config = model.config.override(img_size=size)
    return copied.to(dtype)
