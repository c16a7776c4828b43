"""Launches of `triton_kernels`; `plain` computes the same and documents the arguments.

Each raises ValueError for tensors of several dtypes or devices, and on a machine that cannot run the kernels
(`vit.kernels.attention.flash.wrong_machine`). Rows of x and of the weights are a multiple of 16 bytes long.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention.flash import OPTIONS, wrong_machine
from .tiles import Tile, default

THIRDS = (96, 192, 384)  # widths that `mlp` takes: three times a power of two, small enough for a GPU's registers


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    sums: Tensor | None = None,
    eps: float = 0.0,
    gelu: str = "",
    residual: Tensor | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """See `plain.linear`."""
    from . import triton_kernels as kernels

    (N, K), M = weight.shape, x.shape[:-1].numel()
    out = x.new_empty((*x.shape[:-1], N))  # [..., N]
    check("linear", x, weight, out, *([] if residual is None else [residual]))
    if M == 0:
        return out
    R, C, E, warps, stages, _ = tile = tile or default("linear", M, x)
    added = None if residual is None else matrix(residual, R, C)
    with torch.cuda.device_of(x):  # Triton launches on the current device, which may be another
        kernels.linear_kernel[tile.programs(cdiv(M, R) * cdiv(N, C), x),](
            matrix(x, R, E), matrix(weight, C, E), bias, sums, added, matrix(out, R, C), M, N, K, eps, gelu, R, C, E,
            num_warps=warps, num_stages=stages, **OPTIONS,
        )  # fmt: skip
    return out


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
    tile: Tile | None = None,
) -> Tensor:
    """See `plain.mlp`; the hidden layer is never in memory. D must be in `THIRDS`."""
    from . import triton_kernels as kernels

    (H, D), M = weight1.shape, x.shape[:-1].numel()
    check("mlp", x, weight1, weight2)
    E, out = D // 3, torch.empty_like(x, memory_format=torch.contiguous_format)  # [..., D]
    if M == 0:
        return out
    R, C, _, warps, stages, _ = tile = tile or default("mlp", M, x)
    with torch.cuda.device_of(x):  # Triton launches on the current device, which may be another
        kernels.mlp_kernel[tile.programs(cdiv(M, R), x),](
            matrix(x, R, E), matrix(weight1, C, E), bias1, sums1, matrix(weight2, E, C), bias2, matrix(out, R, E),
            M, H, D, eps, gelu, residual, R, C, num_warps=warps, num_stages=stages, **OPTIONS,
        )  # fmt: skip
    return out


def patches(
    images: Tensor, weight: Tensor, bias: Tensor, positions: Tensor, out: Tensor, first: int, tile: Tile | None = None
) -> None:
    """See `plain.patches`."""
    from . import triton_kernels as kernels

    (D, chans, p, _), (B, _, H, W) = weight.shape, images.shape
    h, w, K = H // p, W // p, chans * p * p
    weight = weight.flatten(1)  # [D, K]
    if short := -K % (16 // weight.itemsize):  # pad rows to a multiple of 16 bytes
        weight = F.pad(weight, (0, short))
    check("patches", out, weight)
    if B * h * w == 0:
        return
    R, C, E, warps, stages, _ = tile = tile or default("patches", B * h * w, out)
    with torch.cuda.device_of(out):  # Triton launches on the current device, which may be another
        kernels.patches_kernel[tile.programs(cdiv(B * h * w, R) * cdiv(D, C), out),](
            images, matrix(weight, C, E), bias, positions, out, *images.stride(), out.stride(0),
            B, h, w, first, p, K, D, images.dtype == torch.uint8, R, C, E,
            num_warps=warps, num_stages=stages, **OPTIONS,
        )  # fmt: skip


def fold_norm(weight: Tensor, bias: Tensor, gamma: Tensor, beta: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """W [N, K] and b [N] after a LayerNorm's gamma and beta [K] -> "weight" in `dtype`, "bias", "sums": `linear`'s.

    The sums are those of the rounded weight, so that a row's mean cancels as far as float32 goes.
    """
    folded = (weight * gamma).to(dtype)  # [N, K]
    return {"weight": folded, "bias": bias + weight @ beta, "sums": folded.float().sum(1)}


def matrix(x: Tensor, rows: int, columns: int) -> Any:
    """[..., K] as a matrix, described to a kernel that reads or writes it in tiles of rows x columns."""
    from triton.tools.tensor_descriptor import TensorDescriptor  # type: ignore[import-untyped]

    x, K = x.contiguous(), x.shape[-1]
    if x.data_ptr() % 16:  # Hopper's copy engine wants addresses aligned to 16 bytes
        x = x.clone()
    return TensorDescriptor(x, [x.numel() // K, K], [K, 1], [rows, columns])


def check(name: str, x: Tensor, *others: Tensor) -> None:
    """ValueError if a kernel cannot run on these."""
    if reason := wrong_machine(x):
        raise ValueError(f"{name} {reason}")
    for other in others:
        if other.dtype != x.dtype or other.device != x.device:
            found = f"{x.dtype} on {x.device} and {other.dtype} on {other.device}"
            raise ValueError(f"{name} takes tensors of one dtype on one device, not {found}")


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)
