"""PyTorch's own attention kernels, each on its own: `sdpa` chooses among them, these take one or refuse.

On CUDA PyTorch can only be told so for the whole process, so attention in other threads meanwhile takes the same one.

https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.scaled_dot_product_attention.html
"""

from __future__ import annotations

from functools import partial
from threading import RLock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from vit.attention import bad_bias, fit_bias

HALF = (torch.bfloat16, torch.float16)


def math(q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None = None) -> Tensor:
    """The formula in plain matrix products, T*T weights in memory: on any device, in any floating dtype."""
    return _insist("math", q, k, v, bias)


def flash(q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None = None) -> Tensor:
    """FlashAttention (arXiv:2205.14135): on CUDA in half precision without bias, on a CPU in any dtype."""
    return _insist("flash", q, k, v, bias)


def efficient(q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None = None) -> Tensor:
    """Memory-efficient attention (arXiv:2112.05682), from xFormers: on CUDA, with bias."""
    return _insist("efficient", q, k, v, bias)


def cudnn(q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None = None) -> Tensor:
    """cuDNN's fused attention: on CUDA in half precision."""
    return _insist("cudnn", q, k, v, bias)


_KERNELS = {
    "math": SDPBackend.MATH, "flash": SDPBackend.FLASH_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}  # fmt: skip
_one_at_a_time = RLock()  # PyTorch's switches hold for all threads, and two of them at a time would leave one set


def _insist(name: str, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """[B, A, T, d] from this kernel and no other; ValueError with the reason if it cannot run."""
    if reason := refusal(name, q, k, v, bias):
        raise ValueError(f"attention {name!r} {reason}")
    bias = None if bias is None else fit_bias(q, k, bias)
    if name == "math":
        return torch.ops.aten._scaled_dot_product_attention_math(q, k, v, bias)[0]
    if q.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=bias)[0]
    if torch.compiler.is_compiling():
        return _by(name, q, k, v, bias)
    with _one_at_a_time:
        return _by(name, q, k, v, bias)


def _by(name: str, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """The same by PyTorch's switches, with only one kernel enabled."""
    with sdpa_kernel(_KERNELS[name]):  # PyTorch raises if its kernel refuses for other reasons
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


def refusal(name: str, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> str | None:
    """Why a kernel cannot run on these, [B, A, T, d] each, or None if it can."""
    device, d = q.device.type, q.shape[3]
    if bias is not None and (reason := bad_bias(q, k, bias)):
        return reason
    if name == "math":
        return None
    if device != "cuda" and (device != "cpu" or name != "flash"):
        return f"runs on cuda{' and cpu' if name == 'flash' else ''}, not on {device}"
    if device == "cpu":
        return _refusal_of_flash_on_a_cpu(q, k, v, bias)
    if name != "efficient" and q.dtype not in HALF:
        return f"runs in bfloat16 or float16 on cuda, not in {q.dtype}"
    if name == "efficient" and q.dtype not in (*HALF, torch.float32):
        return f"runs in float32, bfloat16 or float16, not in {q.dtype}"
    if name == "flash" and bias is not None:
        return "takes no bias on cuda"
    if (most := {"flash": 256, "cudnn": 128}.get(name)) and (d > most or d % 8):
        return f"takes heads of at most {most} numbers, in multiples of 8, not of {d}"
    return None


def _refusal_of_flash_on_a_cpu(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> str | None:
    if bias is not None and bias.requires_grad and torch.is_grad_enabled():
        return "has no gradient of bias on a cpu"
    if any(x.stride(-1) != 1 and x.shape[-1] > 1 for x in (q, k, v)):  # it would read them as if it were 1
        return "takes q, k and v whose last stride is 1"
    if not (q.numel() and k.numel()):
        return f"takes no empty tensors, not q {list(q.shape)} and k {list(k.shape)}"
    return None


REFUSALS = {name: partial(refusal, name) for name in _KERNELS}
