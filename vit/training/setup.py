"""What a run is given: its checks, its defaults, and what must be the same when it is resumed."""

from __future__ import annotations

import hashlib
import os
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from vit.checks import warn
from vit.image import Transform, create_transform
from vit.model import ViT

from .data import Images, RandomCrop, batches, own_generators, pair
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
    if not images:
        raise ValueError("there are no training images")
    if recipe.batch_size > images:
        raise ValueError(
            f"batch_size {recipe.batch_size} is more than the {images} training images: choose {images} or less"
            f" (-b {images})"
        )
    if recipe.batch_size % (world * recipe.grad_accum_steps):
        by = f"{world} processes times {recipe.grad_accum_steps} parts (grad_accum_steps)"
        raise ValueError(f"batch_size {recipe.batch_size} cannot be divided by {by}")
    if recipe.mixup and recipe.batch_size == world * recipe.grad_accum_steps:
        raise ValueError("mixup blends the images of a part of a batch, and each part has one: raise batch_size")


def check_data(data: Sequence[Any], transform: Callable) -> None:
    """ValueError for data without numbered items, or with items that the transform does not take."""
    numbered = hasattr(data, "__len__") and hasattr(data, "__getitem__")
    if isinstance(data, (DataLoader, IterableDataset)) or not numbered:
        raise ValueError(
            f"expected data with len(data) and data[i], got a {type(data).__name__}: pass the Dataset, not a"
            " DataLoader; list(...) makes one of an iterator"
        )
    if not len(data) or not isinstance(transform, (RandomCrop, Transform)):
        return
    image, _ = pair(data[0])
    if not isinstance(image, (str, os.PathLike, Image.Image)):
        raise ValueError(
            f"the images are of type {type(image).__name__}, expected paths or PIL images: leave out the data's own"
            " transform, or give augment= and transform=, which take any item"
        )


def warn_of_unused_classes(model: nn.Module, data: Sequence[Any], validation: Sequence[Any]) -> None:
    """Warn of a head for more classes than the labels use, as the checkpoint's own is."""
    labels = known_labels(data) + known_labels(validation)
    if not isinstance(model, ViT) or not labels:
        return
    classes, used = model.config.num_classes, max(labels) + 1
    # of a sample of the labels the largest may be missing, but hardly all in the upper half
    if used < (classes if len(labels) == len(data) + len(validation) else classes / 2):
        warn(
            f"the largest label is {used - 1}, and the model has {classes} classes: model.reset_classifier({used})"
            " gives it a head for these labels"
        )


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
        "images of each class": count_classes(model, data, validation),
        "pictures": some_pictures(data) + some_pictures(validation),
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


def known_labels(data: Sequence[Any]) -> list[int]:
    """All labels where that is cheap, those of some items elsewhere."""
    return [pair(item)[1] for item in data] if isinstance(data, (list, tuple)) else some_labels(data)


def count_classes(model: nn.Module, *parts: Sequence[Any]) -> dict[str, int] | None:
    """The number of images of each class by its name, or by its number; None where counting would decode images."""
    if not all(isinstance(part, (list, tuple)) for part in parts):
        return None
    counts = Counter(label for part in parts for label in known_labels(part))
    names = dict(enumerate(getattr(model, "categories", None) or []))
    return {str(names.get(label, label)): count for label, count in sorted(counts.items())}


def some_pictures(data: Sequence[Any], most: int = 8) -> str:
    """A hash of the content of some items, evenly spaced: "" without any.

    The generators are seeded meanwhile, since a data set may draw a part of an image by itself.
    """
    found = hashlib.sha256()
    count = min(most, len(data))
    with own_generators(torch.device("cpu")):
        for i in range(count):
            torch.default_generator.manual_seed(0)
            random.seed(0)
            np.random.seed(0)
            found.update(hashlib.sha256(content(pair(data[i * len(data) // count])[0])).digest())
    return found.hexdigest() if count else ""


def content(image: Any) -> bytes:
    """The bytes of a file behind a path, or the pixels of an image or an array; of anything else its type's name."""
    try:
        if isinstance(image, (str, os.PathLike)):
            return Path(image).read_bytes()
        if isinstance(image, Image.Image):
            return f"{image.mode} {image.size} ".encode() + image.tobytes()
    except (OSError, SyntaxError, ValueError):  # Pillow's, of a damaged file
        return b"unreadable"
    if isinstance(image, Tensor):
        image = image.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return image.tobytes() if isinstance(image, np.ndarray) else type(image).__name__.encode()


def not_finite(loss: float, norm: float, step: int, images: Images, recipe: Recipe) -> str:
    """The error text for a step whose loss or gradient is not finite: where, and on which images."""
    (keys,) = batches(len(images), recipe.batch_size, step, step + 1, recipe.seed)
    names = ", ".join(images.name(i) for _, i in keys[:8]) + (" ..." if len(keys) > 8 else "")
    return (
        f"at step {step + 1} the loss is {loss} and the norm of its gradient {norm}, on {names}: lower lr, or look at"
        " these images; the last saved state is kept"
    )
