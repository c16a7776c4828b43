"""Attention maps: the softmax weights of chosen blocks, heads and query tokens."""

from collections.abc import Sequence
from functools import partial
from typing import cast

import torch
from torch import Tensor

from .checks import as_numbers, warn
from .model import Block, ViT
from .packed import Packing
from .position import without_autocast


@torch.no_grad()
def attention_maps(
    model: ViT,
    images: Tensor,
    blocks: Sequence[int] = (-1,),
    heads: Sequence[int] | None = None,
    queries: str | Sequence[int] = "class",
    ragged: str = "error",
) -> list[Tensor]:
    """The softmax weights of some blocks, recomputed from their queries and keys.

    Fused backends never hold these weights. They are computed beside the forward pass, in float32, for these heads and
    rows only, and no block runs beyond those that are needed. They are softmax(q k^T / sqrt(d)) whatever attention
    function is set; a warning says so if that function computes something else.

    Args:
        model: the model, with any attention function.
        images: [B, C, H, W], as for `model`.
        blocks: which blocks; negative numbers count from the end.
        heads: which heads, in the order of the result; negative numbers count from the end. None for all A.
        queries: "class" for the row of the class token, "all" for the rows of all tokens, or a list of token numbers:
            0 is the class token, P + y * w + x the patch in row y and column x; negative ones count from the end.
        ragged: as for `model`.

    Returns:
        For each block [B, heads, rows, P + N] float32; rows sum to 1. The last N columns are the patches in reading
        order. They take most of the memory that the call needs.

    Raises:
        ValueError: an unknown block, head or token, or other `queries`.
    """
    numbers = model.block_numbers(blocks)
    chosen = as_numbers("heads", "head", heads, model.config.num_heads)
    if not all(model.attends[i].exact for i in numbers):
        warn("these maps are softmax(q k^T / sqrt(d)), but a block here attends by another function")
    if any(model.attends[i]._forward_pre_hooks or model.attends[i].instead for i in numbers):
        warn("q, k, v, scores or weights of a block are patched, but not in these maps: record 'weights' instead")
    if queries is None or (isinstance(queries, str) and queries not in ("class", "all")):
        raise ValueError(f"queries must be 'class', 'all' or a list of token numbers, not {queries!r}")
    images = model.accept(images, ragged)
    x = model.tokens(images)  # [B, T, D]
    names = {"class": [0], "all": None}
    rows = as_numbers("queries", "token", names[queries] if isinstance(queries, str) else queries, x.shape[1])

    # A block's weights come from the tokens that it reads, those after the block before it.
    keep = {i - 1: partial(attention_weights, cast(Block, model.blocks[i]), heads=chosen, rows=rows) for i in numbers}
    _, maps = model.encode(x, Packing(model.grid_of(images)), keep)
    return [maps[i - 1] for i in numbers]


def attention_weights(block: Block, x: Tensor, heads: list[int], rows: list[int]) -> Tensor:
    """[B, T, D] tokens before a block -> [B, heads, rows, T], the softmax weights of these rows."""
    qkv = block.attention.qkv(block.norm1(x)).unflatten(2, (3, block.attention.num_heads, -1))  # [B, T, 3, A, d]
    q, k, _ = qkv[:, :, :, heads].permute(2, 0, 3, 1, 4).float()  # each [B, heads, T, d]
    q = q[:, :, rows] / q.shape[-1] ** 0.5  # [B, heads, rows, d]
    with without_autocast(x.device.type):
        weights = q @ k.transpose(-2, -1)  # [B, heads, rows, T]; softmax in place, they may be as large as memory
    weights -= weights.amax(dim=-1, keepdim=True)
    weights.exp_()
    weights /= weights.sum(dim=-1, keepdim=True)
    return weights
