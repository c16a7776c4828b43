"""Attention over packed images in one call on CUDA: PyTorch's `varlen_attn`, a FlashAttention (arXiv:2307.08691).

Images of different sizes are concatenated; tokens attend only within their own image, and nothing is padded.
"""

from itertools import accumulate
from typing import cast

import torch
from torch import Tensor

from .pytorch import HALF


def varlen(q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None = None, lengths: list[int] | None = None) -> Tensor:
    """See `vit.attention` for the arguments.

    Args:
        q, k, v: [B, A, T, d] on CUDA, bfloat16 or float16; with `lengths` B is 1.
        bias: must be None; the kernel takes none.
        lengths: each image's number of tokens, T in sum; None if each of the B images has T.

    Returns:
        [B, A, T, d].

    Raises:
        ValueError: another device or dtype, or a bias.
    """
    if reason := refusal(q, k, v, bias):
        raise ValueError(f"attention 'varlen' {reason}")
    return attend(q, k, v, lengths or [q.shape[2]] * q.shape[0])


def refusal(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> str | None:
    """Why it cannot run on these, [B, A, T, d] each, or None if it can."""
    if q.device.type != "cuda":
        return f"runs on cuda, not on {q.device.type}"
    if q.dtype not in HALF:
        return f"runs in bfloat16 or float16, not in {q.dtype}"
    return None if bias is None else "takes no bias"


def attend(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    """The call itself, on [tokens, A, d] with the places where each image begins and ends."""
    from torch.nn.attention.varlen import varlen_attn  # which older PyTorch versions do not have

    B, A, T, d = q.shape
    ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=q.device)  # [images + 1]
    q, k, v = (x.transpose(1, 2).reshape(B * T, A, d) for x in (q, k, v))  # each [B * T, A, d]
    out = cast(Tensor, varlen_attn(q, k, v, ends, ends, max(lengths), max(lengths)))  # [B * T, A, d]
    return out.view(B, T, A, d).transpose(1, 2)  # [B, A, T, d]
