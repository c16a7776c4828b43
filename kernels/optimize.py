"""`optimize` makes a faster model for inference out of a model."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from vit.attend import Attend
from vit.attention import sdpa
from vit.checks import dtype_name, inside, unknown
from vit.model import Attention, ViT
from vit.registry import choose, get_attention
from vit.trainable import LeftOut

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
    dtype: str | torch.dtype = "float32",
    images: Tensor | Sequence[Tensor] | None = None,
    mode: str = "latency",
) -> OptimizedViT:
    """The same model for inference, faster.

    Args:
        model: in eval mode and in float32, on the CPU or on an NVIDIA GPU, whichever the dtype needs. It is not
            changed.
        dtype: by name or as a torch.dtype. On a CPU "float32", equal within the rounding errors of float32; or "int8",
            see `vit.kernels.cpu.int8`, which needs a processor with VNNI and cannot hold NaN: images with NaN get
            finite logits. On a GPU of compute capability 8.0 or higher "bfloat16" or "float16", see `vit.kernels.gpu`;
            the model then takes images in that dtype, in float32, and as unsigned bytes, unnormalised.
        images: for int8, the images to calibrate on: 32 to 512 images like those to come, normalised as
            `model.preprocessing` says, [n, C, H, W] or a list of [C, H, W].
            None: parts of seven photographs that ship with the package.
        mode: "latency", or on a GPU "throughput". On a GPU "latency" records the logits of small batches as a CUDA
            graph, at the third call with the same shape, and keeps the graphs of the last 16 shapes; "throughput"
            records none.

    Returns:
        A model that is called as `model` is.

    Raises:
        ValueError: a model that is already optimized, in training mode, on another device or in another dtype, or with
            modules other than those of its config; an unknown dtype or mode, a mode that the dtype does not have, or a
            dtype that this machine cannot run; images for another dtype than int8, too few, constant or with NaN.
    """
    dtype = dtype_name(dtype, DTYPES)
    check_mode(mode, dtype)
    check(model, dtype)
    if dtype != "int8" and images is not None:
        raise ValueError(f"images are for calibrating int8, and dtype is {dtype}: leave out images")
    with torch.no_grad(), torch.autocast(machine(dtype), enabled=False):
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
    """The class of the models that compute in a dtype."""
    if dtype in cpu.BLOCKS:
        return cpu.CPUViT
    from .gpu.model import CUDAViT

    return CUDAViT


def tensors_for(model: ViT, dtype: str, images: Tensor | Sequence[Tensor] | None) -> dict[str, Tensor]:
    """The tensors that the optimized model is made of, by name."""
    if dtype == "float32":
        return float_tensors(model)
    if dtype == "int8":
        return int8_tensors(model, batches(model, photographs(model) if images is None else images))
    from .gpu.blocks import half_tensors

    return half_tensors(model, gpu.DTYPES[dtype])


def faster_attention(model: ViT, dtype: str) -> str:
    """The name of the backend that replaces "sdpa", which gives the same numbers."""
    if dtype == "int8" and int8.multiplies_bfloat16():
        return "bmm"
    if dtype not in gpu.DTYPES:
        return "sdpa"
    (h, w), A, d = model.config.grid, model.config.num_heads, model.config.embed_dim // model.config.num_heads
    T, weights = model.config.num_prefix_tokens + h * w, model.class_token
    random = torch.Generator(weights.device).manual_seed(0)  # leaves the global generator alone
    qkv = torch.randn(16, T, 3, A, d, dtype=gpu.DTYPES[dtype], device=weights.device, generator=random)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [16, A, T, d]
    if flash.refusal(q, k, v) is not None:
        return "sdpa"
    if not weights.is_cuda:
        return "triton"
    from .gpu import tuning

    calls = {name: partial(get_attention(name), q, k, v) for name in ("sdpa", "triton")}
    return tuning.choose(f"attention {[T, A, d]}", q, calls)


def check(model: object, dtype: str) -> None:
    """ValueError for what `optimize` does not take."""
    if not isinstance(model, ViT):
        held = inside(model, ViT)
        hint = f": optimize the model in it, its .{held}" if held else ""
        raise ValueError(f"expected a vit.ViT, not {type(model).__name__}{hint}")
    if any(isinstance(module, LeftOut) for module in model.modules()):
        raise ValueError(
            "expected a whole model, got a backbone without its norm: optimize the model whose weights it shares"
        )
    if isinstance(model, OptimizedViT):
        raise ValueError(f"the model is already optimized, to {model.optimized}: optimize the original model")
    if model.training:
        raise ValueError("the model is in training mode, and an optimized model only infers: call model.eval() first")
    device = machine(dtype)
    for name, parameter in model.named_parameters():
        if parameter.device.type != device:
            raise ValueError(f"{dtype} needs a model on {device}, and its {name} is on {parameter.device}")
        if parameter.dtype != torch.float32:
            raise ValueError(f"{dtype} is made from a model in torch.float32, and its {name} is {parameter.dtype}")
        if not torch.isfinite(parameter).all():
            raise ValueError(f"{name} has values that are not finite")
    check_modules(model)
    if reason := missing(dtype, model.class_token.device):
        raise ValueError(f"this machine cannot run {dtype}: {reason}")
    widths = {"embed_dim": model.config.embed_dim, "mlp_dim": model.config.mlp_dim}
    for name, width in widths.items() if dtype in gpu.DTYPES else ():
        if width % 8:
            raise ValueError(f"{dtype} needs a model whose {name} is a multiple of 8, not {width}")


def check_mode(mode: str, dtype: str) -> None:
    """ValueError for an unknown mode, or for one that this dtype does not have."""
    if mode not in MODES:
        raise ValueError(unknown("mode", mode, MODES))
    if mode == "throughput" and dtype not in gpu.DTYPES:
        raise ValueError(
            f"mode='throughput' is for {' and '.join(gpu.DTYPES)} on a GPU, not for {dtype}: leave out mode"
        )


def check_modules(model: ViT) -> None:
    """ValueError for modules, methods, attention or hooks that a user has put in or taken out, by hand."""
    if is_watched(model):
        raise ValueError("the model has hooks, whose work would be lost: remove them, or leave vit.patch, first")
    with torch.device("meta"):
        expected = dict(ViT(model.config).named_modules())
    for name, module in {**dict.fromkeys(expected), **dict(model.named_modules())}.items():
        if ".attend." in name:  # attention's own module, which is kept
            continue
        if adapted := getattr(module, "base_layer", None):
            raise ValueError(
                f"{name} is an adapter ({type(module).__name__}, as of LoRA) around {type(adapted).__name__}: merge it"
                " first, with peft's model.merge_and_unload() for example"
            )
        found, wanted = describe(module), describe(expected.get(name))
        if found != wanted:
            cure = "merge it into the model's weights, or make the model from a config that says so"
            if name == "head":
                cure = "use model.reset_classifier and copy the weights"
            raise ValueError(f"{name or 'the model'} is {found}, expected {wanted}: its work would be lost; {cure}")
        for key, value in vars(cast(nn.Module, module)).items():
            method = getattr(type(module), key, None)
            if callable(method) and getattr(value, "__func__", None) is not method:
                raise ValueError(f"the {key} of {name or 'the model'} was replaced: its work would be lost")
    for attend in model.attends:
        if (attend.fn is attend.source) == attend.choice.is_factory:
            raise ValueError(f"the attention of block {attend.block} was replaced by hand: use model.set_attention")


def describe(module: nn.Module | None) -> str:
    """A module's class and settings, such as its width and eps, but not the attention that was set."""
    if module is None:
        return "nothing"
    kind = f"{type(module).__module__}.{type(module).__name__}"
    if isinstance(module, Attention):
        return f"{kind}({module.num_heads} heads)"
    return kind if isinstance(module, Attend) else f"{kind}({module.extra_repr()})"


def machine(dtype: str) -> str:
    """The type of device that runs models of a dtype. In Triton's interpreter those for a GPU run on a CPU."""
    on_gpu = dtype in gpu.DTYPES and not (flash.installed() and flash.kernels().INTERPRETED)
    return "cuda" if on_gpu else "cpu"


def missing(dtype: str, device: torch.device) -> str | None:
    """What this machine lacks for a dtype; None if nothing."""
    return gpu.missing(dtype, device) if dtype in gpu.DTYPES else cpu.missing(dtype)
