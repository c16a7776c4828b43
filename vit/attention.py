"""Attention: what a function must look like to take its place, and the two functions that are built in.

An attention function is `fn(q, k, v, *, bias=None) -> out`:

    q, k, v   [B, A, T, d]   queries, keys and values of A heads, each of width d, for T tokens
    bias      broadcastable to [B, A, T, T], added to the scores before the softmax, or None
    out       [B, A, T, d]   softmax(q k^T / sqrt(d) + bias) v

One line replaces it, in all blocks or in some:

    model.set_attention(fn)
    model.set_attention("mine", blocks=[0, 1])     # after vit.register_attention("mine", fn)

The model never passes a bias. A function of your own may compute one and call `sdpa(q, k, v, bias=distances)`. If all
scores of a query are -inf, its softmax is 0/0: `reference` returns NaN there, `sdpa` returns 0.

A function may take further keywords, which the model then fills in:

    grid      (h, w) of the patches           prefix    P, the number of tokens before the patches
    block     the block's number, from 0      lengths   None, or the number of tokens of each packed image

Packed images come in one call with B = 1, T = sum(lengths) and `grid` a list of pairs; the tokens of an image attend to
that image alone. A function without `lengths` is called image by image instead. All other keywords are options:
`model.set_attention("mine", window=7)`.

Attention with weights of its own is a factory `(config, block) -> nn.Module`, for example an nn.Module class. It is
called once per block, and the module is called as a function is.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

AttentionFunction = Callable[..., Tensor]
AttentionFactory = Callable[..., nn.Module]
AttentionLike = str | AttentionFunction | AttentionFactory  # what `set_attention` takes; a string is a name


def reference(q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None = None) -> Tensor:
    """Eq. 6 and 7 of the ViT paper (Eq. 1 of arXiv:1706.03762), as written. Keeps all T*T weights in memory."""
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])  # [B, A, T, T]
    if bias is not None:
        scores = scores + fit_bias(q, k, bias)
    weights = torch.softmax(scores, dim=-1)  # [B, A, T, T], each row sums to 1
    return weights @ v  # [B, A, T, d]


def sdpa(q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None = None) -> Tensor:
    """The same by PyTorch's fused kernels, which never hold the T*T weights. The default."""
    bias = None if bias is None else fit_bias(q, k, bias)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)  # [B, A, T, d]


def fit_bias(q: Tensor, k: Tensor, bias: Tensor) -> Tensor:
    """`bias` with four dimensions, which some kernels require, and under autocast in the dtype of q.

    Raises:
        ValueError: `bias` cannot be added to the scores of q and k [B, A, T, d].
    """
    if reason := bad_bias(q, k, bias):
        raise ValueError(reason)
    return bias[(None,) * (4 - bias.ndim)].to(q.dtype)


def bad_bias(q: Tensor, k: Tensor, bias: Tensor) -> str | None:
    """Why `bias` cannot be added to the scores of q and k [B, A, T, d]; None if it can."""
    scores = (*q.shape[:3], k.shape[2])
    if not isinstance(bias, Tensor):
        return f"bias must be a tensor, not {type(bias).__name__}"
    sides = zip(reversed(bias.shape), reversed(scores))
    if bias.ndim > 4 or any(side not in (1, whole) for side, whole in sides):
        return f"bias {list(bias.shape)} does not broadcast to [B, A, T, T] = {list(scores)}"
    autocast = q.device.type != "meta" and torch.is_autocast_enabled(q.device.type) and bias.is_floating_point()
    if (bias.dtype != q.dtype and not autocast) or bias.device != q.device:
        return f"bias is {bias.dtype} on {bias.device}, expected q's {q.dtype} on {q.device}"
    return None
