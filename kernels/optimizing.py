"""`optimize`, from a model to the fastest one that gives its answers on this machine."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vit.checks import unknown
from vit.model import ViT

from .attention.products import bmm
from .cpu import int8
from .cpu.calibrate import int8_tensors
from .cpu.float32 import float_tensors
from .cpu.images import batches, photographs
from .cpu.model import BLOCKS, CPUViT, missing
from .optimized import OptimizedViT, check_mode, is_watched

DTYPES = tuple(BLOCKS)


def optimize(
    model: ViT,
    dtype: str = "float32",
    images: Tensor | Sequence[Tensor] | None = None,
    mode: str = "latency",
) -> OptimizedViT:
    """The same model for inference on a CPU, faster.

    Args:
        model: in eval mode, in float32 on the CPU. It stays as it is.
        dtype: "float32", within the rounding errors of float32; or "int8", see `vit.kernels.cpu.int8`, which needs a
            processor with VNNI; bytes know no NaN, and images that have some get numbers.
        images: for int8, what to calibrate on: 32 to 512 images like those to come, normalised as
            `model.preprocessing` says, [n, C, H, W] or a list of [C, H, W].
            None: parts of seven photographs that ship with the package.
        mode: "latency" answers at once, whatever the images' size. "throughput" is for many batches of one size: logits
            come from torch.compile, which takes 10 seconds (float32) or 30 (int8) in each process for each of the first
            eight shapes of a batch, and needs a C++ compiler; without one it warns, and runs as "latency" does.

    Returns:
        A model that is called as `model` is.

    Raises:
        ValueError: a model that is optimized already, trains, or is elsewhere or in another dtype; an unknown dtype
            or mode, or a dtype that this machine cannot compute in; images for float32, too few, with NaN, or constant.
    """
    check_mode(mode)
    check(model, dtype)
    if dtype == "float32":
        if images is not None:
            raise ValueError("images are to calibrate int8 on: float32 needs none")
        tensors = float_tensors(model)
    else:
        given = photographs(model) if images is None else images
        with torch.no_grad():
            tensors = int8_tensors(model, batches(model, given))
    fast = CPUViT(model.config, dtype, tensors, mode)
    fast.preprocessing, fast.categories, fast.provenance = model.preprocessing, model.categories, model.provenance
    for block, attend in zip(fast.select_blocks(), model.attends):
        block.attention.attend = copy.deepcopy(attend).requires_grad_(False)
        if dtype == "int8" and attend.name == "sdpa" and not attend.options and int8.multiplies_bfloat16():
            block.attention.attend.set(bmm, "bmm", {}, attend.check)
    return fast


def check(model: object, dtype: str) -> None:
    """ValueError for what `optimize` does not take."""
    if dtype not in DTYPES:
        raise ValueError(unknown("dtype", dtype, DTYPES))
    if not isinstance(model, ViT):
        raise ValueError(f"expected a vit.ViT, not {type(model).__name__}: optimize a model as it was before compiling")
    if isinstance(model, OptimizedViT):
        raise ValueError(f"the model is optimized already, to {model.optimized}: take the one it was made of")
    if model.training:
        raise ValueError("the model is in training mode, and what is optimized only infers: call model.eval() before")
    for name, parameter in model.named_parameters():
        if parameter.device.type != "cpu" or parameter.dtype != torch.float32:
            where = f"{parameter.dtype} on {parameter.device}"
            raise ValueError(f"expected a model in torch.float32 on the CPU, and {name} is {where}")
        if not torch.isfinite(parameter).all():
            raise ValueError(f"{name} has values that are not finite")
    check_parts(model)
    if reason := missing(dtype):
        raise ValueError(f"this machine cannot compute in {dtype} so: {reason}")


def check_parts(model: ViT) -> None:
    """ValueError for a model with other parts than `ViT` has, whose work would be lost."""
    with torch.device("meta"):
        parts = dict(ViT(model.config).named_modules())
    for name, module in model.named_modules():
        if ".attend" in name:
            continue
        kind, expected = type(module), type(parts.get(name))
        if kind is not expected:
            raise ValueError(f"{name or 'the model'} is {kind.__name__}, expected {expected.__name__}")
        if isinstance(module, nn.LayerNorm) and module.eps != model.config.eps:
            raise ValueError(f"{name}.eps is {module.eps}, expected that of the config, {model.config.eps}")
    if is_watched(model):
        raise ValueError("the model has hooks, which would be lost: remove them, or leave vit.patch, first")
