"""The attention backends, which of them run on this machine, and which run on given images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from vit.attend import Attend
from vit.attention import bad_bias, fit_bias, reference, sdpa
from vit.model import ViT

from ..base import OptimizedViT
from . import flash, flex, products, pytorch, varlen

Refusal = Callable[..., "str | None"]


def _bias_alone(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> str | None:
    return None if bias is None else bad_bias(q, k, bias)


BACKENDS: dict[str, Callable[..., Tensor]] = {
    "math": pytorch.math, "flash": pytorch.flash, "efficient": pytorch.efficient, "cudnn": pytorch.cudnn,
    "flex": flex.flex, "triton": flash.triton, "varlen": varlen.varlen, "bmm": products.bmm,
}  # fmt: skip
# Name -> why it cannot run on q, k, v [B, A, T, d] and a bias, or None if it can; in the order of the listing.
REFUSALS: dict[str, Refusal] = {
    "reference": _bias_alone, "sdpa": _bias_alone, "bmm": products.refusal, **pytorch.REFUSALS,
    "flex": flex.refusal, "triton": flash.refusal, "varlen": varlen.refusal,
}  # fmt: skip


def available(device: str | torch.device | None = None) -> dict[str, str | None]:
    """Which backends run on this machine.

    Args:
        device: where to run; None: CUDA if there is a GPU, else the CPU.

    Returns:
        Each backend's name -> None if it runs in at least one of float32, bfloat16 and float16, with or without
        gradients; otherwise the reason why not.
    """
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(1, device=where)
    except Exception:  # which one depends on the device type
        return dict.fromkeys(REFUSALS, f"there is no device {str(where)!r} here")
    found: dict[str, str | None] = {}
    for name, refusal in REFUSALS.items():
        reasons = [refusal(*_empty(dtype, where)) for dtype in (torch.float32, torch.bfloat16, torch.float16)]
        found[name] = None if None in reasons else reasons[-1]
    return found


def _empty(dtype: torch.dtype, device: str | torch.device) -> list[Tensor]:
    return [torch.empty(1, 1, 16, 64, dtype=dtype, device=device) for _ in range(3)]


def explain(model: ViT, images: Tensor) -> None:
    """Print which kernel runs in each block for these images, what it is given, and why others would not run.

    Nothing is computed. `requires_grad` and autocast count as they are at the time of the call.

    Args:
        model: the model.
        images: [B, C, H, W], as for `model`.

    Raises:
        ValueError: images that the model refuses.
    """
    q, k, v = _what_attention_gets(model, model.accept(images, "error"))
    trains = "with gradients" if q.requires_grad else "without gradients"
    print(f"q, k and v: {list(q.shape)} {q.dtype} on {q.device}, {trains}")
    for first, last, attend in _alike(model.attends):
        numbers = f"block {first}" if first == last else f"blocks {first} to {last}"
        print(f"{numbers}: {attend.extra_repr()}: {_what_runs(attend, q, k, v)}")
    if isinstance(model, OptimizedViT) and (n := model.tokens_read()) is not None:
        how = "as above" if images.device.type == "cpu" and model.optimized in ("float32", "int8") else "by 'sdpa'"
        print(f"for logits alone, the last block computes attention for {n} token{'s' * (n > 1)} only, {how}")
    print("the others:")
    used = {attend.name for attend in model.attends}
    for name, refusal in REFUSALS.items():
        if name not in used:
            print(f"  {name:10} {refusal(q, k, v) or 'would run'}")


def _what_attention_gets(model: ViT, images: Tensor) -> Tensor:
    """q, k and v, [3, B, A, T, d], as each block gives them to attention, without values."""
    h, w = model.grid_of(images)
    weight, device = model.class_token, images.device.type
    autocast = device != "meta" and torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else weight.dtype
    dtype = getattr(model.blocks[0].attention, "dtype", dtype)  # int8 models have their own
    T, A = model.config.num_prefix_tokens + h * w, model.config.num_heads
    qkv = torch.empty(len(images), T, 3, A, model.config.embed_dim // A, dtype=dtype, device=images.device)
    tokens = [x for x in (model.class_token, model.dist_token, model.register_tokens) if x is not None]
    before = (*model.patch_embed.parameters(), *model.blocks.parameters(), *tokens, model.position_embedding)
    trains = torch.is_grad_enabled() and any(x.requires_grad for x in (images, *before))
    return qkv.requires_grad_(trains).permute(2, 0, 3, 1, 4)


def _alike(attends: list[Attend]) -> list[tuple[int, int, Attend]]:
    """Runs of blocks with equal attention: the first number, the last, and one of them."""
    runs: list[tuple[int, int, Attend]] = []
    for attend in attends:
        if runs and _same(runs[-1][2], attend):
            runs[-1] = (runs[-1][0], attend.block, attend)
        else:
            runs.append((attend.block, attend.block, attend))
    return runs


def _same(a: Attend, b: Attend) -> bool:
    def trained(attend: Attend) -> list[bool]:  # which `extra_repr` does not show
        return [x.requires_grad for x in attend.options.values() if isinstance(x, Tensor)]

    return a.source is b.source and a.extra_repr() == b.extra_repr() and trained(a) == trained(b)


def _what_runs(attend: Attend, q: Tensor, k: Tensor, v: Tensor) -> str:
    refusal = REFUSALS.get(attend.name or "")
    ours = {"reference": reference, "sdpa": sdpa, **BACKENDS}
    if refusal is None or attend.source is not ours[attend.name or ""]:
        return "runs as it is: no backend of vit.kernels"
    options: dict[str, Any] = attend.options
    asked = {name: options[name] for name in ("bias", "score_mod", "mask_mod") if name in options}
    if reason := refusal(q, k, v, **asked):
        return f"refused: {reason}"
    if attend.name == "sdpa":
        bias = None if options.get("bias") is None else fit_bias(q, k, options["bias"])
        return f"PyTorch takes {SDPBackend(torch._fused_sdp_choice(q, k, v, bias)).name}"
    return "runs"
