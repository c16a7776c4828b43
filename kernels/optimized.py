"""Models for inference alone, which give the same answers sooner."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vit.attention import reference, sdpa
from vit.checks import unknown
from vit.config import ViTConfig
from vit.model import ViT

from . import int8
from .calibrate import int8_tensors
from .compiled import Compiled
from .float32 import FloatBlock, float_tensors, frozen
from .images import batches, photographs
from .products import bmm

DTYPES = ("float32", "int8")
MODES = ("latency", "throughput")
PREFIX = {"token": 1, "dist": 2}  # how many of the first tokens a head reads, where it reads no others
GRIDS = 16  # of which the resampled position embeddings are kept

# glibc gives back to the system what is freed at the top of its heap, and every forward would take it again, page by
# page: a tenth of the time at batch 8. Once it has freed a block of this size it keeps twice as much (M_MMAP_THRESHOLD
# in mallopt(3)); 32 MiB is the most that it learns from.
KEPT = 31 * 2**20  # bytes
PART = 4096  # tokens that go through at a time, whose largest activation is smaller than that: 24 MiB in ViT-S


class OptimizedViT(ViT):
    """A model whose weights are frozen and lie as the fastest products want them; `optimize` makes it.

    It is called as `ViT` is, for any batch and any size. Gradients, training, and other devices and dtypes are refused.
    """

    def __init__(self, config: ViTConfig, dtype: str, tensors: Mapping[str, Tensor], mode: str = "latency") -> None:
        """`tensors`: by name, as `float_tensors` or `int8_tensors` gives them; the rest as for `optimize`.

        Raises:
            ValueError: tensors of other names or shapes than these, an unknown mode.
        """
        if mode not in MODES:
            raise ValueError(unknown("mode", mode, MODES))
        with torch.device("meta"):
            super().__init__(config)
        check_shapes(self, dtype, tensors)
        self.optimized, self.mode = dtype, mode
        self._compiled = Compiled(self._through) if mode == "throughput" else None
        self._positions: dict[tuple[int, int], Tensor] = {}
        for i in range(config.depth):
            prefix = f"blocks.{i}."
            own = {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
            self.blocks[i] = (FloatBlock if dtype == "float32" else int8.Int8Block)(config, i, own)
        for name in [name for name, _ in self.named_parameters() if not name.startswith("blocks.")]:
            owner, _, part = name.rpartition(".")
            setattr(self.get_submodule(owner), part, frozen(tensors[name]))
        super().train(False)
        torch.empty(KEPT, dtype=torch.uint8)

    def forward(self, images: Tensor, ragged: str = "error") -> Tensor:
        """As `ViT.forward`; of the last block only what the head reads is computed, where nobody looks inside."""
        if is_watched(self):
            return super().forward(images, ragged)
        parts = self._parts(self.accept(images, ragged))
        return torch.cat([self.forward_head(self._read(part)) for part in parts])

    def forward_features(self, images: Tensor, ragged: str = "error") -> Tensor:
        """As `ViT.forward_features`."""
        if is_watched(self):
            return super().forward_features(images, ragged)
        parts = [super(OptimizedViT, self).forward_features(part) for part in self._parts(self.accept(images, ragged))]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _parts(self, images: Tensor) -> tuple[Tensor, ...]:
        """Batches of about `PART` tokens."""
        h, w = self.grid_of(images)
        return images.split(max(1, PART // (self.config.num_prefix_tokens + h * w)))

    def _read(self, images: Tensor) -> Tensor:
        """[B, n, D], the tokens that the head reads at the least."""
        cut_or_compiled = self.blocks[-1:] if self._compiled is None else self.blocks
        if not all(self._is_plain(block) for block in cut_or_compiled):
            return super().forward_features(images)
        n = PREFIX.get(self.config.global_pool)
        return (self._compiled or self._through)(self.embed(images), self.grid_of(images), n)

    def _through(self, x: Tensor, grid: tuple[int, int], n: int | None) -> Tensor:
        """The blocks and the norm after them: [B, T, D] -> [B, n, D] of the first n tokens, or of all."""
        for block in self.blocks[:-1]:
            x = block(x, grid)  # [B, T, D]
        last = self.blocks[-1]
        return self.norm(last(x, grid) if n is None else last.first(x, n))  # type: ignore[operator]

    def _is_plain(self, block: Any) -> bool:
        """Does it attend by softmax, which takes fewer queries than keys, and without a bias, which has T rows?"""
        attend = block.attention.attend
        return attend.source in (sdpa, reference, bmm) and not attend.options

    def accept(self, images: Tensor, ragged: str) -> Tensor:
        """As `ViT.accept`; ValueError where a gradient would be wanted."""
        if torch.is_grad_enabled() and isinstance(images, Tensor) and images.requires_grad:
            raise ValueError("an optimized model has no gradients: detach the images, or use the model it was made of")
        if torch.is_autocast_enabled("cpu"):
            raise ValueError(f"an optimized model computes in {self.optimized}, and autocast cannot change that")
        return super().accept(images, ragged)

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """As `ViT.positions`, of the last grids from memory: weights do not change here."""
        positions = self._positions.get(grid)
        if positions is None:
            positions = super().positions(grid)
            for old in list(self._positions)[: 1 - GRIDS]:
                self._positions.pop(old, None)
            self._positions[grid] = positions
        return positions

    def train(self, mode: bool = True) -> OptimizedViT:
        """ValueError for training."""
        if mode:
            raise ValueError("an optimized model cannot be trained: train the model it was made of")
        return self

    def requires_grad_(self, requires_grad: bool = True) -> OptimizedViT:
        """ValueError for True."""
        if requires_grad:
            raise ValueError("an optimized model has no gradients")
        return self

    def reset_classifier(self, num_classes: int) -> None:
        """ValueError."""
        raise ValueError("an optimized model keeps its classifier: reset that of the model it was made of")

    def state_dict(self, *args: Any, **keywords: Any) -> dict[str, Any]:  # type: ignore[override]
        """ValueError: packed weights have no names of a checkpoint."""
        raise ValueError("an optimized model is saved with vit.kernels.save; a checkpoint is made of the model before")

    def load_state_dict(self, *args: Any, **keywords: Any) -> Any:
        """ValueError."""
        raise ValueError("an optimized model takes no other weights: load them before, or use vit.kernels.load")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> OptimizedViT:  # .to(), .half() ...
        before, after = self.class_token, fn(self.class_token)
        if (before.device, before.dtype) != (after.device, after.dtype):
            where = f"{after.dtype} on {after.device}"
            raise ValueError(f"an optimized model stays on the CPU and takes float32, not {where}")
        return self

    def tensors(self) -> dict[str, Tensor]:
        """What it was made of."""
        tensors = {name: x for name, x in self.named_parameters() if not name.startswith("blocks.")}
        for i, block in enumerate(self.blocks):
            tensors |= {f"blocks.{i}.{name}": x for name, x in block.tensors().items()}  # type: ignore[operator]
        return {name: x.detach().contiguous() for name, x in tensors.items()}


def check_shapes(model: ViT, dtype: str, tensors: Mapping[str, Tensor]) -> None:
    """ValueError for tensors that are not those of such a model, by name, shape and kind."""
    expected: dict[str, tuple[list[int], torch.dtype]] = {}
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[2] not in ("scale1", "scale2"):
            expected[name] = list(parameter.shape), torch.float32
    if dtype == "int8":
        for i in range(model.config.depth):
            expected |= {f"blocks.{i}.{name}": kind for name, kind in int8.expected(model.config).items()}
    found = {name: (list(x.shape), x.dtype) for name, x in tensors.items()}
    for name in {**expected, **found}:
        if expected.get(name) != found.get(name):
            kinds = found.get(name), expected.get(name)
            texts = ["none" if kind is None else f"{kind[1]} {kind[0]}" for kind in kinds]
            raise ValueError(f"{name} is {texts[0]}, expected {texts[1]}")


def optimize(
    model: ViT,
    dtype: str = "float32",
    images: Tensor | Sequence[Tensor] | None = None,
    mode: str = "latency",
) -> OptimizedViT:
    """The same model for inference on a CPU, faster.

    Args:
        model: in eval mode, in float32 on the CPU. It stays as it is.
        dtype: "float32", within the rounding errors of float32; or "int8", see `vit.kernels.int8`, which needs a
            processor with VNNI; bytes know no NaN, and images that have some get numbers.
        images: for int8, what to calibrate on: 32 to 512 images like those to come, normalised as
            `model.preprocessing` says, [n, C, H, W] or a list of [C, H, W].
            None: parts of seven photographs that ship with the package.
        mode: "latency" answers at once, whatever the images' size. "throughput" is for many batches of one size: logits
            come from torch.compile, which takes 10 seconds (float32) or 30 (int8) in each process for each of the first
            `vit.kernels.compiled.SHAPES` shapes of a batch, and needs a C++ compiler; without one it warns, and runs as
            "latency" does.

    Returns:
        A model that is called as `model` is.

    Raises:
        ValueError: a model that is optimized already, trains, or is elsewhere or in another dtype; an unknown dtype
            or mode, or a dtype that this machine cannot compute in; images for float32, too few, with NaN, or constant.
    """
    check(model, dtype)
    if mode not in MODES:
        raise ValueError(unknown("mode", mode, MODES))
    if dtype == "float32":
        if images is not None:
            raise ValueError("images are to calibrate int8 on: float32 needs none")
        tensors = float_tensors(model)
    else:
        given = photographs(model) if images is None else images
        with torch.no_grad():
            tensors = int8_tensors(model, batches(model, given))
    fast = OptimizedViT(model.config, dtype, tensors, mode)
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


def is_watched(model: ViT) -> bool:
    """Does anybody look inside?"""
    hooks = any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    return hooks or any(attend.patched for attend in model.attends)


def missing(dtype: str) -> str | None:
    """What this machine lacks for a dtype; None where it lacks nothing."""
    if not torch.backends.mkldnn.is_available():
        return "PyTorch was built without oneDNN"
    if dtype == "int8" and not torch.cpu._is_vnni_supported():
        return "its processor has no VNNI, without which sums of bytes overflow (float32 runs here)"
    if dtype == "int8" and not hasattr(torch, "quantize_per_tensor"):
        return f"PyTorch {torch.__version__} has no quantize_per_tensor any more (float32 runs here)"
    return None
