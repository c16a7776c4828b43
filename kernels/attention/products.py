"""Attention as two batched matrix products with a softmax between: on a CPU in bfloat16, faster than fused kernels."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vit.attention import bad_bias, fit_bias


def bmm(q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None = None) -> Tensor:
    """The formula of `vit.attention.reference` with fewer passes over T*T numbers: q is scaled, not the scores."""
    scores = (q * (1 / math.sqrt(q.shape[-1]))) @ k.transpose(-2, -1)  # [B, A, T, T]
    if bias is not None:
        scores = scores + fit_bias(q, k, bias)
    place = None if scores.requires_grad else scores
    return torch.softmax(scores, dim=-1, out=place) @ v  # [B, A, T, d]


def refusal(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> str | None:
    """Why it cannot run on these, or None if it can."""
    return None if bias is None else bad_bias(q, k, bias)
