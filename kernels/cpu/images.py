"""The images to calibrate int8 on: the caller's, checked and batched, or parts of photographs that ship."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import torch
from PIL import Image
from torch import Tensor

from vit.checks import warn
from vit.image import create_transform
from vit.model import ViT
from vit.resources import DATA

LEAST, MOST = 32, 512  # images
TOKENS = 2048  # in a batch, at most


def batches(model: ViT, images: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """[n, C, H, W] or a list of [C, H_i, W_i] -> batches [B, C, H, W] of consecutive images of one size.

    Warns of images that do not look normalised.

    Raises:
        ValueError: fewer than `LEAST` images or more than `MOST`; an image, named by its number, that the model
            refuses, that has values that are not finite, or whose values are all the same.
    """
    expected = "expected a tensor [n, C, H, W] or a list of tensors [C, H, W] to calibrate on"
    if not isinstance(images, (Tensor, list, tuple)):
        raise ValueError(f"{expected}, not {type(images).__name__}")
    if isinstance(images, Tensor) and images.ndim != 4:
        raise ValueError(f"{expected}, not a tensor {list(images.shape)}")
    if others := [type(image).__name__ for image in images if not isinstance(image, Tensor)]:
        raise ValueError(f"{expected}, not a list with {others[0]}")
    if len(images) < LEAST or len(images) > MOST:
        raise ValueError(f"expected {LEAST} to {MOST} images to calibrate on, not {len(images)}")
    result: list[list[Tensor]] = []
    for i, image in enumerate(images):
        try:
            image = model.accept(image[None], "error")
        except ValueError as error:
            why = str(error).partition(" (or say ragged=")[0]  # which `optimize` does not take
            raise ValueError(f"image {i} to calibrate on: {why}") from None
        if not torch.isfinite(image).all():
            raise ValueError(f"image {i} to calibrate on has values that are not finite")
        if (image == image[:, :, :1, :1]).all():
            raise ValueError(f"image {i} to calibrate on is constant: expected images like those to come")
        h, w = model.grid_of(image)
        most = max(1, TOKENS // (model.config.num_prefix_tokens + h * w))
        if not result or len(result[-1]) >= most or result[-1][0].shape != image.shape:
            result.append([])
        result[-1].append(image)
    found = [torch.cat(batch) for batch in result]
    if (strange := unlike(model, found)) is not None:
        warn(f"the images to calibrate on {strange}: were they normalised as model.preprocessing says?")
    return found


def unlike(model: ViT, batches: list[Tensor]) -> str | None:
    """Why these do not look like normalised images; None if they do."""
    low, high = min(x.min().item() for x in batches), max(x.max().item() for x in batches)
    least = min(-mean / std for mean, std in zip(model.preprocessing.mean, model.preprocessing.std))
    most = max((1 - mean) / std for mean, std in zip(model.preprocessing.mean, model.preprocessing.std))
    if low >= 0 > least:
        return f"range from {low:.3g} to {high:.3g}, all above their mean"
    if high > 10 * most or low < 10 * least:
        return f"range from {low:.3g} to {high:.3g}, where pixels range from {least:.3g} to {most:.3g}"
    return None


def photographs(model: ViT, each: int = 10) -> Tensor:
    """[7 * each, C, H, W] of the model's own size: random crops of the seven photographs that ship.

    Raises:
        ValueError: a model for another number of channels than 1 or 3.
    """
    if model.config.in_chans not in (1, 3):
        raise ValueError(
            f"the photographs that ship have 1 or 3 channels, and the model takes {model.config.in_chans}: calibrate on"
            " images of your own, images=..."
        )
    transform = create_transform(model, mode="squash")
    random = Random(0)
    crops = []
    for file in sorted((DATA / "photographs").glob("*.jpg")):
        with Image.open(file) as photograph:
            for _ in range(each):
                side = round(min(photograph.size) * random.uniform(0.3, 1))
                x, y = random.randint(0, photograph.width - side), random.randint(0, photograph.height - side)
                crops.append(transform(photograph.crop((x, y, x + side, y + side))))
    return torch.stack(crops)
