"""What a run is given: its checks, its defaults, and what must be the same when it is resumed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from vit.image import Transform, create_transform
from vit.model import ViT

from .data import Images, RandomCrop, batches, pair
from .recipes import Recipe


def check(model: nn.Module, recipe: Recipe, images: int, world: int) -> None:
    """ValueError for a model that cannot be trained, or a batch that does not fit the images or the processes."""
    if hasattr(model, "optimized"):
        raise ValueError("an optimized model cannot be trained: train the model that it was made from")
    dtypes = {parameter.dtype for parameter in model.parameters()}
    if dtypes != {torch.float32}:
        raise ValueError(
            f"the weights are {', '.join(sorted(map(str, dtypes)))}: train them in float32, and with Recipe(amp=...)"
            " compute in half precision"
        )
    if recipe.batch_size > images:
        raise ValueError(f"batch_size {recipe.batch_size} is more than the {images} training images")
    if recipe.batch_size % (world * recipe.grad_accum_steps):
        by = f"{world} processes times {recipe.grad_accum_steps} parts (grad_accum_steps)"
        raise ValueError(f"batch_size {recipe.batch_size} cannot be divided by {by}")
    if recipe.mixup and recipe.batch_size == world * recipe.grad_accum_steps:
        raise ValueError("mixup blends the images of a part of a batch, and each part has one: raise batch_size")


def default_transforms(
    model: nn.Module, recipe: Recipe, augment: Callable | None, transform: Callable | None
) -> tuple[Callable[[Any], Tensor], Callable[[Any], Tensor]]:
    """The transforms for training and for validation; ValueError if they are missing for a model that is no ViT."""
    if not isinstance(model, ViT):
        if augment is None or transform is None:
            raise ValueError(f"give augment= and transform= for {type(model).__name__}, which has no preprocessing")
        return augment, transform
    if augment is None:
        augment = RandomCrop(create_transform(model, mode="squash"), recipe.scale, recipe.hflip)
    return augment, transform or create_transform(model)


def same_when_resumed(
    model: nn.Module,
    recipe: Recipe,
    data: Sequence[Any],
    validation: Sequence[Any],
    augment: Callable,
    transform: Callable,
    class_weights: Tensor | None,
    others: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """All that decides a run's result, as plain data; of a caller's own transforms only that they are there."""
    config = model.config.to_dict() if isinstance(model, ViT) else {}
    elsewhere = ("drop_path_rate", "grad_checkpointing")  # the recipe has the first, the second changes no bit
    return {
        **asdict(recipe),
        "categories": getattr(model, "categories", None),
        "labels": some_labels(data) + some_labels(validation),
        "model": type(model).__name__,
        **{f"model {name}": value for name, value in config.items() if name not in elsewhere},
        "images": len(data),
        "validation images": len(validation),
        "augment": repr(augment) if isinstance(augment, RandomCrop) else "the caller's",
        "transform": repr(transform) if isinstance(transform, Transform) else "the caller's",
        "class_weights": None if class_weights is None else class_weights.tolist(),
        **(others or {}),
    }


def some_labels(data: Sequence[Any], most: int = 200) -> list[int]:
    """The labels of some items, evenly spaced: an item may be an image that is decoded when it is asked for."""
    return [pair(data[i])[1] for i in range(0, len(data), max(1, len(data) // most))]


def not_finite(loss: float, norm: float, step: int, images: Images, recipe: Recipe) -> str:
    """The error text for a step whose loss or gradient is not finite: where, and on which images."""
    (keys,) = batches(len(images), recipe.batch_size, step, step + 1, recipe.seed)
    names = ", ".join(images.name(i) for _, i in keys[:8]) + (" ..." if len(keys) > 8 else "")
    return (
        f"at step {step + 1} the loss is {loss} and the norm of its gradient {norm}, on {names}: lower lr, or look at"
        " these images; the last saved state is kept"
    )
