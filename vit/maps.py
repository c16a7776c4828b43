"""Attention maps: who looks at whom."""

import warnings
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from .attention import SOFTMAX
from .model import ViT


@torch.no_grad()
def attention_maps(model: ViT, images: Tensor, blocks: Sequence[int] = (-1,), queries: str = "class") -> list[Tensor]:
    """The softmax weights of some blocks, recomputed from their queries and keys.

    Fused backends never hold these weights, so they are computed beside the forward pass, for the asked rows only.
    They are softmax(q k^T / sqrt(d)), whatever function attends; where that is neither `sdpa` nor `reference`, a
    warning says so.

    Args:
        model: the model, with any attention function.
        images: [B, C, H, W], as for `model`.
        blocks: which blocks; negative numbers count from the end.
        queries: "class" for the row of the class token, "all" for the rows of all tokens.

    Returns:
        For each block [B, A, 1, P + N] or [B, A, P + N, P + N]; rows sum to 1. The last N columns are the patches in
        reading order.

    Raises:
        ValueError: a block that there is not, or other `queries`.
    """
    if queries not in ("class", "all"):
        raise ValueError(f"queries must be 'class' or 'all', not {queries!r}")
    chosen = model.select_blocks(blocks)
    if any(block.attention.attend not in SOFTMAX for block in chosen):
        warnings.warn("these are softmax(q k^T / sqrt(d)), and a block here attends by another function", stacklevel=2)
    maps: dict[nn.Module, Tensor] = {}
    hooks = [block.attention.qkv.register_forward_hook(partial(_record, maps, model, queries)) for block in {*chosen}]
    try:
        model.forward_features(images)
    finally:
        for hook in hooks:
            hook.remove()
    return [maps[block.attention.qkv] for block in chosen]


def _record(maps: dict[nn.Module, Tensor], model: ViT, queries: str, layer: nn.Module, _: tuple, qkv: Tensor) -> None:
    A = model.config.num_heads
    q, k, _ = (part.unflatten(2, (A, -1)).transpose(1, 2) for part in qkv.chunk(3, dim=2))  # each [B, A, T, d]
    q = q[:, :, :1] if queries == "class" else q
    scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5  # [B, A, 1 or T, T]
    maps[layer] = torch.softmax(scores.float(), dim=-1)
