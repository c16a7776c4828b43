"""Attention by our own Triton kernels, forward and backward: FlashAttention-2 (arXiv:2307.08691) with a bias.

This file holds what PyTorch sees: two operators, opaque to torch.compile. `flash_kernels` computes; it needs triton and
is imported at the first use, so that this file can be imported anywhere.
"""

from functools import cache
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from vit.attention import bad_bias, fit_bias

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
OPTIONS = {"enable_fp_fusion": True}  # multiply and add in one instruction: Triton's default is to change with 3.10
WIDTHS = (32, 128)  # of a head: narrower ones would be mostly padding, and tiles of wider ones would not fit


def triton(q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None = None) -> Tensor:
    """See `vit.attention` for the arguments. The T * T weights are never in memory.

    A query whose keys all have a bias of -inf gives NaN, as in `vit.attention.reference`, and NaN gradients. There is
    no second derivative.

    Args:
        q, k, v: [B, A, T, d] in float32, float16 or bfloat16, any strides, on CUDA; d of 32 to 128.
        bias: broadcastable to [B, A, T, T], of q's dtype, or None.

    Returns:
        [B, A, T, d], with the memory layout [B, T, A, d], so that merging the heads copies nothing.

    Raises:
        ValueError: the reason that `refusal` gives.
    """
    if reason := refusal(q, k, v, bias):
        raise ValueError(f"attention 'triton' {reason}")
    bias = None if bias is None else fit_bias(q, k, bias)
    return flash_attention(q, k, v, bias)[0]  # [B, A, T, d]


def refusal(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> str | None:
    """Why `triton` cannot run on these, in one line, or None if it can.

    While torch.compile traces, the machine is not checked: the operator itself does so when it runs.
    """
    if q.ndim != 4 or not q.shape == k.shape == v.shape:
        return f"takes q, k and v of one shape [B, A, T, d], not {', '.join(str(list(x.shape)) for x in (q, k, v))}"
    if not q.dtype == k.dtype == v.dtype:
        return f"takes q, k and v of one dtype, not {q.dtype}, {k.dtype}, {v.dtype}"
    if not q.device == k.device == v.device:
        return f"takes q, k and v on one device, not {q.device}, {k.device}, {v.device}"
    if q.dtype not in DTYPES:
        return f"takes {', '.join(str(dtype) for dtype in DTYPES)}, not {q.dtype}"
    if not WIDTHS[0] <= q.shape[3] <= WIDTHS[1]:
        return f"takes heads {WIDTHS[0]} to {WIDTHS[1]} wide, not {q.shape[3]}"
    if bias is not None and (reason := bad_bias(q, k, bias)):
        return f"cannot add this bias: {reason}"
    if any(unpack_dual(x).tangent is not None for x in (q, k, v, bias) if x is not None):
        return "has no forward-mode derivative"
    return None if torch.compiler.is_compiling() else wrong_machine(q)


def wrong_machine(q: Tensor) -> str | None:
    """Why the kernels cannot run on q's device and in its dtype, or None if they can."""
    if not installed():
        return "needs triton, which is not installed"
    interpreted = kernels().INTERPRETED
    if interpreted and q.dtype == torch.bfloat16:  # it multiplies the 16 bits as integers
        return "does not run in torch.bfloat16 in Triton's interpreter, which computes nonsense there"
    if q.device.type != "cuda" and not (interpreted and q.device.type == "cpu"):
        return (
            f"runs on CUDA; on a CPU only in Triton's interpreter, TRITON_INTERPRET=1 set before its first use"
            f" (these are on {q.device.type})"
        )
    if q.device.type == "cuda" and (capability := torch.cuda.get_device_capability(q.device)) < (8, 0):
        return f"needs a GPU of compute capability 8.0, as Triton does, not {'.'.join(map(str, capability))}"
    return None


@cache
def installed() -> bool:
    """Whether triton can be imported."""
    return find_spec("triton") is not None


def kernels() -> ModuleType:
    """`flash_kernels`, imported at the first use."""
    from . import flash_kernels

    return flash_kernels


@torch.library.custom_op("vit::flash_attention", mutates_args=())
def flash_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """`flash_kernels.forward`: out [B, A, T, d] and lse [B, A, T]."""
    if reason := wrong_machine(q):
        raise ValueError(f"attention 'triton' {reason}")
    out, lse = kernels().forward(q, k, v, bias)
    return out, lse


@torch.library.custom_op("vit::flash_attention_backward", mutates_args=())
def flash_attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, out: Tensor, lse: Tensor, bias_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`flash_kernels.backward`: dq, dk, dv [B, A, T, d] and the bias's gradient, [0] unless `bias_grad`."""
    dq, dk, dv, dbias = kernels().backward(dout, q, k, v, bias, out, lse, bias_grad)
    return dq, dk, dv, q.new_empty(0) if dbias is None else dbias


@flash_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """The shapes, strides and dtypes of `flash_attention`'s results, for torch.compile."""
    B, A, T, d = q.shape
    return q.new_empty(B, T, A, d).transpose(1, 2), q.new_empty(B, A, T, dtype=torch.float32)


@flash_attention_backward.register_fake
def _(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, out: Tensor, lse: Tensor, bias_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same for `flash_attention_backward`."""
    B, A, T, d = q.shape
    dq, dk, dv = (q.new_empty(B, T, A, d).transpose(1, 2) for _ in range(3))
    return dq, dk, dv, q.new_empty(bias.shape if bias_grad and bias is not None else 0)


def keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Keep what the backward pass needs: nothing of size T * T."""
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs, *output)


def differentiate(ctx: Any, dout: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of q, k, v and the bias; a bias that needs none costs nothing."""
    q, k, v, bias, out, lse = ctx.saved_tensors
    bias_grad = bias is not None and ctx.needs_input_grad[3]
    dq, dk, dv, dbias = flash_attention_backward(dout, q, k, v, bias, out, lse, bias_grad)
    return dq, dk, dv, dbias if bias_grad else None


flash_attention.register_autograd(differentiate, setup_context=keep)
