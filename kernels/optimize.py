"""`optimize`, from a model to the fastest one that gives its answers on this machine."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from vit.attend import Attend
from vit.attention import sdpa
from vit.checks import unknown
from vit.model import Residual, ViT
from vit.registry import choose, get_attention

from . import gpu
from .attention import flash
from .base import OptimizedViT, detached, float_tensors, is_watched
from .cpu import int8
from .cpu import model as cpu
from .cpu.calibrate import int8_tensors
from .cpu.images import batches, photographs

DTYPES = (*cpu.BLOCKS, *gpu.DTYPES)  # what a model can be optimized to, by name
MODES = ("latency", "throughput")


def optimize(
    model: ViT,
    dtype: str = "float32",
    images: Tensor | Sequence[Tensor] | None = None,
    mode: str = "latency",
) -> OptimizedViT:
    """The same model for inference, faster.

    Args:
        model: in eval mode, in float32, on the CPU or on an NVIDIA GPU, as the dtype wants it. It stays as it is.
        dtype: on a CPU "float32", within the rounding errors of float32; or "int8", see `vit.kernels.cpu.int8`, which
            needs a processor with VNNI; a byte is never NaN, so images with NaN get ordinary logits. On a GPU of
            compute capability 8.0 "bfloat16" or "float16", by the fused kernels of `vit.kernels.gpu`; besides images in
            the dtype it takes float32, and unsigned bytes as they come from a file.
        images: for int8, what to calibrate on: 32 to 512 images like those to come, normalised as
            `model.preprocessing` says, [n, C, H, W] or a list of [C, H, W].
            None: parts of seven photographs that ship with the package.
        mode: "latency", or on a GPU "throughput". On a GPU "latency" records the logits of small batches as a CUDA
            graph, at the third call with the same shape, and keeps the graphs of the last 16 shapes; "throughput"
            records none.

    Returns:
        A model that is called as `model` is.

    Raises:
        ValueError: a model that is optimized already, trains, or is elsewhere or in another dtype; an unknown dtype
            or mode, a mode that the dtype does not have, or a dtype that this machine cannot run; images for float32,
            too few, with NaN, or constant.
    """
    check(model, dtype)
    check_mode(mode, dtype)
    if dtype != "int8" and images is not None:
        raise ValueError(f"images are to calibrate int8 on: {dtype} needs none")
    with torch.no_grad():
        fast = kind(dtype)(model.config, dtype, tensors_for(model, dtype, images), mode)
        better = choose(faster_attention(model, dtype), {})
    fast.preprocessing, fast.categories, fast.provenance = model.preprocessing, model.categories, model.provenance
    for block, attend in zip(cast(Any, fast.blocks), model.attends):
        options = {id(x): copy.deepcopy(detached(x)) for x in attend.options.values() if isinstance(x, Tensor)}
        block.attention.attend = copy.deepcopy(attend, options).requires_grad_(False)  # options without gradients
        if attend.source is sdpa and not attend.options and better.source is not sdpa:
            block.attention.attend.set(better, better.make(model.config, attend.block), attend.check)
    return fast


def kind(dtype: str) -> type[OptimizedViT]:
    """What kind of model computes in a dtype."""
    if dtype in cpu.BLOCKS:
        return cpu.CPUViT
    from .gpu.model import CUDAViT

    return CUDAViT


def tensors_for(model: ViT, dtype: str, images: Tensor | Sequence[Tensor] | None) -> dict[str, Tensor]:
    """What the optimized model is made of."""
    if dtype == "float32":
        return float_tensors(model)
    if dtype == "int8":
        return int8_tensors(model, batches(model, photographs(model) if images is None else images))
    from .gpu.blocks import half_tensors

    return half_tensors(model, gpu.DTYPES[dtype])


def faster_attention(model: ViT, dtype: str) -> str:
    """The backend that is to stand where "sdpa" does, which computes the same."""
    if dtype == "int8" and int8.multiplies_bfloat16():
        return "bmm"
    if dtype not in gpu.DTYPES:
        return "sdpa"
    (h, w), A, d = model.config.grid, model.config.num_heads, model.config.embed_dim // model.config.num_heads
    T, weights = model.config.num_prefix_tokens + h * w, model.class_token
    random = torch.Generator(weights.device).manual_seed(0)  # nobody else's numbers change
    qkv = torch.randn(16, T, 3, A, d, dtype=gpu.DTYPES[dtype], device=weights.device, generator=random)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [16, A, T, d]
    if flash.refusal(q, k, v) is not None:
        return "sdpa"
    if not weights.is_cuda:
        return "triton"
    from .gpu.tuning import choose

    return choose(
        f"attention {[T, A, d]}", q, {name: partial(get_attention(name), q, k, v) for name in ("triton", "sdpa")}
    )


def check(model: object, dtype: str) -> None:
    """ValueError for what `optimize` does not take."""
    if not isinstance(dtype, str):
        raise ValueError(f"expected a dtype's name, {', '.join(DTYPES)}, not {type(dtype).__name__}")
    if dtype not in DTYPES:
        raise ValueError(unknown("dtype", dtype, DTYPES))
    if not isinstance(model, ViT):
        raise ValueError(f"expected a vit.ViT, not {type(model).__name__}: optimize a model as it was before compiling")
    if isinstance(model, OptimizedViT):
        raise ValueError(f"the model is optimized already, to {model.optimized}: take the one it was made of")
    if model.training:
        raise ValueError("the model is in training mode, and what is optimized only infers: call model.eval() before")
    device = machine(dtype)
    if torch.is_autocast_enabled(device):
        raise ValueError("autocast would round what the optimized model is made of: leave it first")
    for name, parameter in model.named_parameters():
        if parameter.device.type != device:
            raise ValueError(f"{dtype} is for a model on {device}, and this one's {name} is on {parameter.device}")
        if parameter.dtype != torch.float32:
            raise ValueError(
                f"{dtype} is made from a model in torch.float32, and this one's {name} is {parameter.dtype}"
            )
        if not torch.isfinite(parameter).all():
            raise ValueError(f"{name} has values that are not finite")
    check_parts(model)
    if reason := missing(dtype, model.class_token.device):
        raise ValueError(f"this machine cannot run {dtype}: {reason}")
    if dtype == "int8" and model.config.mlp_dim < 2:
        raise ValueError("int8 is for models whose mlp_dim is at least 2, not 1: its channels are parted")
    widths = {"embed_dim": model.config.embed_dim, "mlp_dim": model.config.mlp_dim}
    for name, width in widths.items() if dtype in gpu.DTYPES else ():
        if width % 8:
            raise ValueError(f"{dtype} is for models whose {name} is a multiple of 8, not {width}")


def check_mode(mode: str, dtype: str) -> None:
    """ValueError for an unknown mode, or for one that a known dtype does not have."""
    if mode not in MODES:
        raise ValueError(unknown("mode", mode, MODES))
    if mode == "throughput" and dtype not in gpu.DTYPES:
        raise ValueError(
            f"mode='throughput' is for {' and '.join(gpu.DTYPES)} on a GPU, not for {dtype}: leave out mode"
        )


def machine(dtype: str) -> str:
    """Where models of a dtype run: on "cuda" or on the "cpu", as those for a GPU do in Triton's interpreter."""
    on_gpu = dtype in gpu.DTYPES and not (flash.installed() and flash.kernels().INTERPRETED)
    return "cuda" if on_gpu else "cpu"


def missing(dtype: str, device: torch.device) -> str | None:
    """What a machine lacks for a dtype; None where it lacks nothing."""
    return gpu.missing(dtype, device) if dtype in gpu.DTYPES else cpu.missing(dtype)


def check_parts(model: ViT) -> None:
    """ValueError for a model with other parts than `ViT` has, whose work would be lost."""
    with torch.device("meta"):
        parts = dict(ViT(model.config).named_modules())
    for name, module in model.named_modules():
        if ".attend.fn" not in name:  # which goes along as it is
            check_part(name or "the model", module, parts.get(name))
    for attend in model.attends:
        if attend.fn is not attend.source and not isinstance(attend.fn, nn.Module):
            raise ValueError(f"block {attend.block} attends by what set_attention did not set: set it so")
    if is_watched(model):
        raise ValueError("the model has hooks, which would be lost: remove them, or leave vit.patch, first")


def check_part(name: str, module: nn.Module, expected: nn.Module | None) -> None:
    """ValueError for a module that is not as it was made: another kind, a method or a setting of its own, a buffer."""
    cure = ": use model.reset_classifier, and copy the weights" if name == "head" else ""
    if type(module) is not type(expected):
        wanted = "none" if expected is None else type(expected).__name__
        raise ValueError(f"{name} is {type(module).__name__}, expected {wanted}{cure}")
    for key, value in vars(module).items():
        method = getattr(type(module), key, None)
        if callable(method) and getattr(value, "__func__", None) is not method:
            raise ValueError(f"{name} has a {key} of its own, which would be lost: make the model without it")
    if module._buffers:
        raise ValueError(f"{name} has a buffer {next(iter(module._buffers))}, which would be lost")
    if isinstance(module, (Attend, Residual)):  # what was set is kept; the rate matters in training only
        return
    for key, value in vars(expected).items():  # eps, num_heads, stride ...
        found = getattr(module, key, None)
        simple = isinstance(value, (int, float, str, tuple)) and key[0] != "_" and key != "training"
        if (simple and found != value) or (key in ("scale1", "scale2") and found is not None):
            text = "a tensor" if isinstance(found, Tensor) else repr(found)
            raise ValueError(f"{name}.{key} is {text}, expected {value!r}, as the config says{cure}")
