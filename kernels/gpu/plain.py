"""The plain twins of `fused` in PyTorch: what its kernels compute, one operation at a time.

The kernels are tested against them, and on a GPU they run wherever cuBLAS is measured to be faster.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    sums: Tensor | None = None,
    eps: float = 0.0,
    gelu: str = "",
    residual: Tensor | None = None,
) -> Tensor:
    """[..., K] -> [..., N]: gelu(norm(x) W^T + b) + residual.

    Args:
        x: the tokens.
        weight: [N, K], and bias [N] in float32; where there is a norm, with its weight and bias folded in.
        sums: [N] in float32, the sums of the weight's rows, if there is a norm; else None.
        eps: the norm's.
        gelu: "erf", "tanh" or "" for none.
        residual: [..., N] or None.
    """
    if sums is not None:
        x = F.layer_norm(x, x.shape[-1:], eps=eps)  # [..., K]
    y = F.linear(x, weight, bias.to(x.dtype))  # [..., N]
    if gelu:
        y = F.gelu(y, approximate="none" if gelu == "erf" else "tanh")
    return y if residual is None else y + residual


def mlp(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    sums1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    eps: float,
    gelu: str,
    residual: bool = True,
) -> Tensor:
    """[..., D] -> [..., D]: fc2(gelu(fc1(norm(x)))), and x added to it with `residual`; arguments as of `linear`."""
    hidden = linear(x, weight1, bias1, sums1, eps, gelu)  # [..., H]
    return linear(hidden, weight2, bias2, residual=x if residual else None)  # [..., D]


def patches(images: Tensor, weight: Tensor, bias: Tensor, positions: Tensor, out: Tensor, first: int) -> None:
    """Embed patches: images [B, chans, h p, w p] into rows `first` to `first` + h w of out [B, T, D].

    Args:
        images: in any dtype; unsigned bytes count as 256ths, so that weights for them are no smaller than others.
        weight: [D, chans, p, p], and bias [D] in float32.
        positions: [h w, D].
        out: is written to.
        first: how many tokens come before those of the patches.
    """
    pixels = images.to(weight.dtype)
    if images.dtype == torch.uint8:
        pixels = pixels / 256
    x = F.conv2d(pixels, weight, bias.to(weight.dtype), stride=weight.shape[-1])  # [B, D, h, w]
    out[:, first:] = x.flatten(2).transpose(1, 2) + positions  # [B, h w, D]
