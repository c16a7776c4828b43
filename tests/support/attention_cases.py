"""Attention of several kinds, for the tests of what a block attends with."""

import torch
from torch import nn

import vit
from vit.attention import reference, sdpa

TINY = vit.ViTConfig(img_size=32, patch_size=4, embed_dim=64, depth=3, num_heads=2, num_classes=7, reg_tokens=2)


class Scaled(nn.Module):
    """Attention with a weight of its own: a temperature per head."""

    def __init__(self, config: vit.ViTConfig, block: int, start: float = 1.0) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((config.num_heads, 1, 1), start + block))
        self.register_buffer("order", torch.arange(3))

    def forward(self, q, k, v, *, bias=None):
        return sdpa(q * self.scale, k, v, bias=bias)


def sharp(q, k, v, *, bias=None, power=2.0):
    return reference(q * power, k, v, bias=bias)


def widened(q, k, v, *, bias=None, power):
    return reference(q * power, k, v, bias=bias)
