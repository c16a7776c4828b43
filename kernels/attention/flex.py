"""FlexAttention: a Python function of one score, compiled into a fused kernel (arXiv:2412.05496)."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from contextlib import suppress
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.autograd.forward_ad import unpack_dual
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from vit.attention import bad_bias, fit_bias

ScoreMod = Callable[..., Tensor]
MaskMod = Callable[..., Tensor]

_FUNCTIONS = 256  # that may be compiled in a process, for each dtype; PyTorch's own limit is eight
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_NO_BACKWARD = "has no backward pass on a cpu: call the model under torch.no_grad()"


def flex(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: Tensor | None = None,
    score_mod: ScoreMod | None = None,
    mask_mod: MaskMod | None = None,
) -> Tensor:
    """Attention with changed scores and masked pairs of tokens, in one fused kernel.

    The first call compiles, and on a CPU each new shape does, for seven to fifteen seconds. Numbers that a function
    holds are compiled in, tensors are not.

    Args:
        q, k, v: [B, A, T, d]; float32, bfloat16 or float16; on a CPU without gradients. Any T.
        bias: as `vit.attention` describes it.
        score_mod: (score, b, h, i, j) -> score, for image b, head h, query i and key j, each a tensor of one number;
            tokens are numbered as in the model, prefix first.
        mask_mod: (b, h, i, j) -> whether query i may attend to key j. It is evaluated once per length, for every pair
            of tokens and for all images together (b is 0), and remembered with the function, which must not change
            what it holds. Within torch.compile it is evaluated in each pass.

    Returns:
        [B, A, T, d].

    Raises:
        ValueError: the reason that `refusal` gives.
    """
    if reason := refusal(q, k, v, bias, score_mod=score_mod, mask_mod=mask_mod):
        raise ValueError(f"attention 'flex' {reason}")
    # With tensors that have no values, as in torch.export, or that wrap others, as in torch.func.
    traced = torch.compiler.is_compiling() or type(q) is not Tensor or is_functorch_wrapped_tensor(q)
    make = block_mask if traced else remembered_mask
    mask = None if mask_mod is None else make(mask_mod, q.shape[1], q.shape[2], k.shape[2], q.device)
    score_mod = _add(bias, score_mod, q, k)
    if q.device.type == "cpu":  # where strided rows, as those of one qkv tensor, cost a sixth of the time
        k, v = k.contiguous(), v.contiguous()
    if torch.compiler.is_compiling():  # by the caller
        return cast(Tensor, flex_attention(q, k, v, score_mod=score_mod, block_mask=mask))
    try:
        with torch._dynamo.config.patch(recompile_limit=_FUNCTIONS):
            return cast(Tensor, _compiled(q.device.type)(q, k, v, score_mod=score_mod, block_mask=mask))
    except torch._inductor.exc.InductorError as error:  # PyTorch's error for a gradient on a CPU
        if q.device.type == "cpu" and torch.is_grad_enabled() and "tuple index out of range" in str(error):
            raise ValueError(f"attention 'flex' {_NO_BACKWARD} (score_mod holds what is trained)") from error
        raise


def _add(bias: Tensor | None, score_mod: ScoreMod | None, q: Tensor, k: Tensor) -> ScoreMod | None:
    """A score_mod that adds the bias after the given one."""
    if bias is None:
        return score_mod
    table = fit_bias(q, k, bias).expand(*q.shape[:3], k.shape[2])  # [B, A, T, T], a view
    if bias.numel() == 1:  # inductor cannot index a tensor whose strides are all 0
        table = table.contiguous()

    def biased(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (score if score_mod is None else score_mod(score, b, h, i, j)) + table[b, h, i, j]

    return biased


def block_mask(mask_mod: MaskMod, A: int, T: int, keys: int, device: torch.device) -> BlockMask:
    """Which blocks of 128 x 128 pairs a mask does not empty."""

    def alike(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return mask_mod(b * 0, h, i, j)

    return create_block_mask(alike, None, A, T, keys, device=device)


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # whose tensors a later backward pass could not use
def remembered_mask(mask_mod: MaskMod, A: int, T: int, keys: int, device: torch.device) -> BlockMask:
    """The same, kept for the next call."""
    return block_mask(mask_mod, A, T, keys, device)


@lru_cache(maxsize=2)
def _compiled(device: str) -> Callable[..., Any]:
    if device == "cpu":
        # With dynamic lengths, PyTorch 2.15 writes C++ that does not compile if a function holds a tensor.
        return torch.compile(flex_attention, fullgraph=True, dynamic=False)
    return torch.compile(flex_attention, fullgraph=True)


def refusal(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, **options: object) -> str | None:
    """Why it cannot run on these, [B, A, T, d] each, or None if it can."""
    device = q.device.type
    if bias is not None and (reason := bad_bias(q, k, bias)):
        return reason
    for name in ("score_mod", "mask_mod"):
        fn = options.get(name)
        if fn is not None and not (callable(fn) and isinstance(fn, Hashable)):
            return f"takes a hashable function as {name}, not {fn!r}"
    if not (q.numel() and k.numel()):
        return f"takes no empty tensors, not q {list(q.shape)} and k {list(k.shape)}"
    if device not in ("cuda", "cpu"):
        return f"runs on cuda and cpu, not on {device}"
    if q.dtype not in _DTYPES:
        return f"runs in float32, bfloat16 or float16, not in {q.dtype}"
    if any(unpack_dual(x).tangent is not None for x in (q, k, v, bias) if x is not None):
        return "has no forward-mode derivative"
    learning = (x is not None and x.requires_grad for x in (q, k, v, bias, *_held(options.get("score_mod"))))
    if device == "cpu" and torch.is_grad_enabled() and any(learning):
        return _NO_BACKWARD
    return None


def _held(fn: object) -> list[Tensor]:
    """The tensors in a function's closure; those nested deeper only show when it is compiled."""
    found = []
    for cell in getattr(fn, "__closure__", None) or ():
        with suppress(ValueError):  # an empty cell
            found.append(cell.cell_contents)
    return [x for x in found if isinstance(x, Tensor)]
