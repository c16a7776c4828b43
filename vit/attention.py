"""Attention, and the one line in which it is replaced.

An attention function is `fn(q, k, v, *, bias=None) -> out`:

    q, k, v   [B, A, T, d]    queries, keys and values of A heads, each d wide, for T tokens
    bias      broadcastable to [B, A, T, T], added to the scores before the softmax, or None (always, so far)
    out       [B, A, T, d]    the values, averaged with weights softmax(q k^T / sqrt(d) + bias)

It may take `lengths` as well, then it is handed packed images in one call: B is 1, T the sum of `lengths`, and each
image's tokens attend to one another only. A function without it is called image by image.

    vit.register_attention("mine", fn)
    model.set_attention("mine")
"""

import importlib
import inspect
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checks import unknown

AttentionFunction = Callable[..., Tensor]


def reference(q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None = None) -> Tensor:
    """Attention as Eq. 1 of arXiv:1706.03762 writes it; keeps all T*T weights in memory."""
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])  # [B, A, T, T]
    if bias is not None:
        scores = scores + bias
    weights = torch.softmax(scores, dim=-1)  # [B, A, T, T], each row sums to 1
    return weights @ v  # [B, A, T, d]


def sdpa(q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None = None) -> Tensor:
    """The same numbers from PyTorch's fused kernels, which never hold the T*T weights. The default."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)  # [B, A, T, d]


def call(fn: AttentionFunction, q: Tensor, k: Tensor, v: Tensor, **keywords: object) -> Tensor:
    """What an attention function gives for q, k and v; ValueError for anything but [B, A, T, d] in their dtype."""
    out = fn(q, k, v, **keywords)
    if not isinstance(out, Tensor) or out.shape != q.shape or out.dtype != v.dtype:
        found = f"{out.dtype} {list(out.shape)}" if isinstance(out, Tensor) else type(out).__name__
        raise ValueError(f"the attention function returned {found}, expected {v.dtype} {list(q.shape)}")
    return out


def image_by_image(fn: AttentionFunction, q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    """Attention within each of several images whose tokens lie one after another, q, k, v and the result [1, A, T, d].

    For functions that do not take `lengths`, each image's number of tokens, themselves.
    """
    images = zip(*(x.split(lengths, dim=2) for x in (q, k, v)))
    return torch.cat([call(fn, *image) for image in images], dim=2)


def takes(fn: AttentionFunction, keyword: str) -> bool:
    """Whether an attention function has a parameter of that name."""
    return keyword in inspect.signature(fn).parameters


SOFTMAX = (reference, sdpa)  # functions whose weights are softmax(q k^T / sqrt(d))
_registry: dict[str, AttentionFunction] = {"reference": reference, "sdpa": sdpa}


def register_attention(name: str, fn: AttentionFunction, *, overwrite: bool = False) -> None:
    """Give an attention function a name, so that `model.set_attention(name)` finds it.

    Raises:
        ValueError: the name is taken and `overwrite` is not set, or `fn` cannot be called as described above.
    """
    if not isinstance(name, str):
        raise ValueError(f"an attention's name must be a text, not {name!r}")
    if name in _registry and not overwrite:
        raise ValueError(f"attention {name!r} is registered already; overwrite=True replaces it")
    _check_signature(fn, name)
    _registry[name] = fn


def attention_names() -> list[str]:
    """The registered names, sorted."""
    return sorted(_registry)


def get_attention(name_or_fn: str | AttentionFunction) -> AttentionFunction:
    """The function of a registered name; a function is checked and handed back.

    Raises:
        ValueError: an unknown name (the nearest known one is named), or a function with a wrong signature.
    """
    if callable(name_or_fn):
        _check_signature(name_or_fn, getattr(name_or_fn, "__name__", repr(name_or_fn)))
        return name_or_fn
    if not isinstance(name_or_fn, str):
        raise ValueError(f"attention must be a registered name or a function, not {name_or_fn!r}")
    if name_or_fn not in _registry:
        importlib.import_module("vit.kernels")  # the faster backends register themselves there
    if name_or_fn not in _registry:
        raise ValueError(unknown("attention", name_or_fn, attention_names()))
    return _registry[name_or_fn]


def _check_signature(fn: AttentionFunction, name: str) -> None:
    if isinstance(fn, nn.Module):  # all blocks would share its one set of weights, and checkpoints would not have them
        raise ValueError(f"attention {name!r} is a module: only functions without weights can be set")
    try:
        inspect.signature(fn).bind("q", "k", "v", bias=None)
    except (TypeError, ValueError) as error:
        raise ValueError(f"attention {name!r} must be callable as fn(q, k, v, *, bias=None): {error}") from None
