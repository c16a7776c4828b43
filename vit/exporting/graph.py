"""What is exported: a model as one function from images to named outputs."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from vit.checks import unknown
from vit.maps import attention_weights
from vit.model import Block, ViT
from vit.packed import Packing

from .int8 import ByteAttend
from .metadata import Metadata
from .pixels import Pixels, fold

OUTPUTS = ("logits", "features", "attention")
PREFIX = {"token": 1, "dist": 2}  # how many of the first tokens the head reads, if it reads no others


class Graph(nn.Module):
    """A model from images to some of its outputs, in the order in which they were asked for.

        logits     [B, num_classes]
        features   [B, D], what the head reads; [B, 2D] with global_pool "token_avg"
        attention  [B, A, h, w], how much each head of the last block lets the class token look at each patch

    Outputs are float32 whatever the dtype of the weights; images are normalised float32 [B, C, H, W], or what
    `prepare` makes pixels of.
    """

    def __init__(self, model: ViT, outputs: Sequence[str], prepare: nn.Module | None = None) -> None:
        super().__init__()
        self.model, self.names, self.prepare = model, tuple(outputs), prepare or nn.Identity()

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        model = self.model
        images = model.accept(self.prepare(images).to(model.class_token.dtype))  # [B, C, H, W]
        grid, before, last = model.grid_of(images), len(model.blocks) - 2, cast(Block, model.blocks[-1])
        _, kept = model.encode(model.tokens(images), Packing(grid), {before: lambda x: x})
        x = kept[before]  # [B, T, D], what the last block reads
        found = {}
        if "attention" in self.names:
            weights = class_attention(last, x)[:, :, model.config.num_prefix_tokens :]  # [B, A, N]
            found["attention"] = weights.reshape(images.shape[0], -1, *grid)  # [B, A, h, w]
        n = PREFIX.get(model.config.global_pool)
        tokens = model.norm(first(last, x, n) if n and last.attention.attend.exact else last(x, Packing(grid)))
        found["features"] = model.forward_head(tokens, pre_logits=True)
        found["logits"] = model.forward_head(tokens)
        return tuple(found[name].float() for name in self.names)


def class_attention(block: Block, x: Tensor) -> Tensor:
    """[B, T, D] tokens before a block -> [B, A, T], the class token's softmax weights."""
    attend: Any = block.attention.attend
    if isinstance(attend, ByteAttend):
        q, k, _ = heads(block, x)
        return attend.weights(q[:, :, :1], k)[:, :, 0]
    return attention_weights(block, x, list(range(block.attention.num_heads)), rows=[0])[:, :, 0]


def heads(block: Block, x: Tensor) -> Tensor:
    """[B, T, D] tokens before a block -> [3, B, A, T, d], its queries, keys and values."""
    B, T, D = x.shape
    A = block.attention.num_heads
    return block.attention.qkv(block.norm1(x)).view(B, T, 3, A, D // A).permute(2, 0, 3, 1, 4)


def first(block: Block, x: Tensor, n: int) -> Tensor:
    """[B, T, D] -> [B, n, D], a block's result for the first n tokens; the others are only keys and values."""
    B, _, D = x.shape
    attention = block.attention
    q, k, v = heads(block, x)  # each [B, A, T, d]
    out = attention.attend(q[:, :, :n], k, v)  # [B, A, n, d]
    x = x[:, :n] + block.residual_attention(attention.proj(out.transpose(1, 2).reshape(B, n, D)), block.scale1)
    return x + block.residual_mlp(block.mlp(block.norm2(x)), block.scale2)  # [B, n, D]


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


def graph_of(model: ViT, metadata: Metadata) -> Graph:
    """The graph that a file's metadata describe, in eval mode."""
    settings, dtype = metadata.preprocessing, torch.float16 if metadata.precision == "float16" else torch.float32
    if metadata.input == "float32":
        return Graph(at_size(model, metadata.size, dtype), metadata.outputs)
    copied = at_size(model, settings.size if metadata.input == "image" else metadata.size, torch.float32)
    fold(copied, settings)
    return Graph(copied.to(dtype), metadata.outputs, Pixels(metadata.input, settings, model.config.patch_size)).eval()


def example(metadata: Metadata) -> tuple[Tensor, dict[int, Any]]:
    """Images to trace a graph with, and their dimensions that are dynamic, as `torch.export` takes them."""
    p, channels, batch = metadata.config.patch_size, metadata.config.in_chans, metadata.batch or 2
    B, h, w = (torch.export.Dim(name, min=1) for name in ("batch", "h", "w"))
    if metadata.input == "float32":
        images, sides = torch.zeros(batch, channels, *(metadata.size or (3 * p, 5 * p))), (2, 3)
    else:
        images, sides = torch.zeros(batch, *(metadata.size or (3 * p, 5 * p)), channels, dtype=torch.uint8), (1, 2)
    dynamic = {} if metadata.batch else {0: B}
    if metadata.size is None:
        factor = 1 if metadata.input == "image" else p
        dynamic |= {sides[0]: factor * h, sides[1]: factor * w}
    return images, dynamic


@torch.no_grad()
def at_size(model: ViT, size: tuple[int, int] | None, dtype: torch.dtype) -> ViT:
    """A copy in eval mode, on the CPU and in a dtype; if a size (H, W) is given, its positions fit that size."""
    copied = copy.deepcopy(model).cpu().eval().requires_grad_(False)
    for attend in copied.attends:
        attend.check = False  # which looks at values
    if size is not None and size != model.config.img_size:
        p, n = model.config.patch_size, model.config.num_position_rows
        positions = copied.positions((size[0] // p, size[1] // p))  # [1, N, D]
        prefix = copied.position_embedding[:, :n]  # [1, n, D]
        copied.position_embedding = nn.Parameter(torch.cat([prefix, positions], dim=1), requires_grad=False)
        copied.config = model.config.override(img_size=size)
    return copied.to(dtype)
