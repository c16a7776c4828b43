"""What all optimized models share: a ViT for inference, with frozen weights in the layout that its machine wants."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from itertools import chain
from operator import is_
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.forward_ad import unpack_dual

from vit.config import ViTConfig
from vit.model import ViT
from vit.packed import Packing

GRIDS = 16  # the number of grids whose resampled position embeddings are kept
PREFIX = {"token": 1, "dist": 2}  # how many of the first tokens the head reads, if it reads no others

Kinds = dict[str, tuple[list[int], torch.dtype]]  # name -> shape and dtype of a tensor that a model is made of


class OptimizedViT(ViT):
    """A model for inference that `vit.kernels.optimize` made.

    It is called as `ViT` is, with any batch and any size. It refuses gradients, training, other devices and other
    dtypes. LayerScale is a part of its weights, so that `vit.record` gives `attention.out` and `mlp` after it.
    """

    optimized: str  # the name of the dtype it computes in, as `optimize` takes it
    mode: str
    _positions: dict[tuple[int, int], Tensor]
    _listed: Listing | None

    def __init__(self, config: ViTConfig, dtype: str, tensors: Mapping[str, Tensor], mode: str) -> None:
        """A model without weights; subclasses make its parts from `tensors`."""
        with torch.device("meta"):
            super().__init__(config)
        self.optimized, self.mode = dtype, mode
        self._positions = {}
        self._listed = None

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """The tensors that it was made of, by name."""

    @abstractmethod
    def tokens_read(self) -> int | None:
        """How many of the first tokens `forward` computes in the last block, if no hooks are registered; None: all."""

    def read(self, images: Tensor, n: int | None) -> Tensor:
        """Accepted images -> [B, n, D], the first n tokens after the final norm; None: all."""
        x, packing = self.tokens(images), Packing(self.grid_of(images))
        if n is None:
            x, _ = self.encode(x, packing)  # [B, T, D]
        else:  # in the last block all other tokens are keys and values only
            before, last = len(self.blocks) - 2, cast(Any, self.blocks[-1])
            _, kept = self.encode(x, packing, {before: partial(last.first, n=n)})
            x = kept[before]  # [B, n, D]
        return self.norm(x)

    def accept(self, images: Tensor, ragged: str = "error") -> Tensor:
        """As `ViT.accept`; ValueError for images with gradients, and under autocast."""
        if torch.is_grad_enabled() and isinstance(images, Tensor) and images.requires_grad:
            raise ValueError("an optimized model has no gradients: detach the images, or use the original model")
        if isinstance(images, Tensor) and unpack_dual(images).tangent is not None:
            raise ValueError("an optimized model has no forward-mode derivative: use the original model")
        if torch.is_autocast_enabled(self.class_token.device.type):
            raise ValueError(f"an optimized model computes in {self.optimized}, and autocast cannot change that")
        return super().accept(images, ragged)

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """As `ViT.positions`, kept for the last grids, since the weights do not change."""
        positions = self._positions.get(grid)
        if positions is None:
            positions = super().positions(grid)
            if not self.is_there(positions):
                return positions
            for old in list(self._positions)[: 1 - GRIDS]:
                self._positions.pop(old, None)
            self._positions[grid] = positions
        return positions

    def is_there(self, x: Tensor) -> bool:
        """Whether it has been computed and so can be kept for other calls."""
        return True

    def listed(self) -> Listing:
        """Its parts. If some were replaced since the last call, what was kept of them is dropped."""
        if self._listed is None or not self._listed.holds():
            if self._listed is not None:
                self.forget()
            self._listed = Listing(self)
        return self._listed

    def forget(self) -> None:
        """Drop what is kept between calls: position embeddings, and CUDA graphs."""
        self._positions.clear()

    def set_attention(self, *args: Any, **keywords: Any) -> None:
        """As `ViT.set_attention`; its weights and options get no gradients."""
        super().set_attention(*args, **{name: detached(value) for name, value in keywords.items()})
        for attend in self.attends:
            attend.requires_grad_(False)
        self.forget()

    def train(self, mode: bool = True) -> OptimizedViT:
        """ValueError for training."""
        if mode:
            raise ValueError("an optimized model cannot be trained: train the original model")
        super().train(False)
        return self

    def requires_grad_(self, requires_grad: bool = True) -> OptimizedViT:
        """ValueError for True."""
        if requires_grad:
            raise ValueError("an optimized model has no gradients: train the original model")
        return self

    def reset_classifier(self, num_classes: int) -> None:
        """ValueError."""
        raise ValueError(
            "an optimized model keeps its classifier: reset that of the original model, and optimize it again"
        )

    def state_dict(self, *args: Any, **keywords: Any) -> dict[str, Any]:  # type: ignore[override]
        """ValueError: packed weights have no names of a checkpoint."""
        raise ValueError(
            "an optimized model has no state dict: save it with vit.kernels.save, or save the original model"
        )

    def load_state_dict(self, *args: Any, **keywords: Any) -> Any:
        """ValueError."""
        raise ValueError(
            "an optimized model keeps its weights: load others into the original model, or use vit.kernels.load"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> OptimizedViT:  # .to(), .half() ...
        before, after = self.class_token, fn(self.class_token)
        if (before.device, before.dtype) != (after.device, after.dtype):
            raise ValueError(
                f"an optimized model stays in {before.dtype} on {before.device}: it cannot be moved to"
                f" {after.dtype} on {after.device}"
            )
        return self


class Listing:
    """The modules and tensors of a model, listed once: to find them takes as long as a small model takes on a GPU.

    It holds no reference to the model itself, so that the model is freed when its last user drops it.
    """

    def __init__(self, model: ViT) -> None:
        self.modules, self.attends = [module for module in model.modules() if module is not model], model.attends
        owners = (model, *self.modules)
        places = (place for one in owners for place in (one._modules, one._parameters, one._buffers))
        self.places: list[dict[str, Any]] = [place for place in places if place]
        self.parts = self._found()

    def __reduce__(self) -> tuple:
        return type(None), ()  # copies make their own

    def holds(self) -> bool:
        """Whether modules, parameters and buffers are the same as when they were listed."""
        found = self._found()
        return len(found) == len(self.parts) and all(map(is_, found, self.parts))

    def _found(self) -> list[object]:
        return list(chain.from_iterable(map(dict.values, self.places)))


def is_watched(model: ViT) -> bool:
    """Whether hooks are registered, or `vit.patch` is active."""
    if isinstance(model, OptimizedViT) and not torch.compiler.is_compiling():
        parts = model.listed()
        modules = [model, *parts.modules]
    else:
        modules = list(model.modules())
    return is_hooked(modules)


def is_hooked(modules: Iterable[nn.Module]) -> bool:
    """Whether one of them has forward hooks."""
    return any(module._forward_hooks or module._forward_pre_hooks for module in modules)


def detached(value: Any) -> Any:
    """A tensor or parameter without gradients; anything else unchanged."""
    if isinstance(value, nn.Parameter):
        return frozen(value.detach())
    return value.detach() if isinstance(value, Tensor) else value


def frozen(tensor: Tensor) -> nn.Parameter:
    """A parameter without gradients."""
    return nn.Parameter(tensor, requires_grad=False)


def float_tensors(model: ViT) -> dict[str, Tensor]:
    """A copy of a model's weights, LayerScale folded into the layers before it, without those of its attention."""
    tensors = {name: x.detach().clone() for name, x in model.state_dict().items() if ".attend." not in name}
    for i in range(model.config.depth):
        for scale, layer in (("scale1", "attention.proj"), ("scale2", "mlp.fc2")):
            factor = tensors.pop(f"blocks.{i}.{scale}", None)  # [D]
            if factor is not None:
                tensors[f"blocks.{i}.{layer}.weight"] *= factor[:, None]
                tensors[f"blocks.{i}.{layer}.bias"] *= factor
    return tensors


def check_tensors(tensors: Mapping[str, Tensor], expected: Kinds) -> None:
    """ValueError for tensors whose names, shapes or dtypes differ from the expected ones."""
    found = {name: (list(x.shape), x.dtype) for name, x in tensors.items()}
    for name in {**expected, **found}:
        if expected.get(name) != found.get(name):
            pair = found.get(name), expected.get(name)
            texts = ["none" if kind is None else f"{kind[1]} {kind[0]}" for kind in pair]
            raise ValueError(f"{name} is {texts[0]}, expected {texts[1]}")
