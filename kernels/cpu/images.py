"""Images to calibrate on: those that are given, checked and in batches, or parts of photographs that ship."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import torch
from PIL import Image
from torch import Tensor

from vit.image import create_transform
from vit.model import ViT
from vit.resources import DATA

LEAST, MOST = 32, 512  # images
TOKENS = 2048  # in a batch, at most


def batches(model: ViT, images: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """[n, C, H, W] or a list of [C, H_i, W_i] -> batches [B, C, H, W] of neighbours of one size.

    Raises:
        ValueError: fewer than `LEAST` images or more than `MOST`, or one that the model refuses, is not finite, or has
            one value throughout; it is named by its number.
    """
    if not isinstance(images, (Tensor, list, tuple)) or not all(isinstance(image, Tensor) for image in images):
        raise ValueError(f"expected a tensor or a list of tensors to calibrate on, not {type(images).__name__}")
    if len(images) < LEAST or len(images) > MOST:
        raise ValueError(f"expected {LEAST} to {MOST} images to calibrate on, not {len(images)}")
    result: list[list[Tensor]] = []
    for i, image in enumerate(images):
        try:
            image = model.accept(image[None], "error")
        except ValueError as error:
            raise ValueError(f"image {i} to calibrate on: {error}") from None
        if not torch.isfinite(image).all():
            raise ValueError(f"image {i} to calibrate on has values that are not finite")
        if (image == image[:, :, :1, :1]).all():
            raise ValueError(f"image {i} to calibrate on is constant: expected images like those to come")
        h, w = model.grid_of(image)
        most = max(1, TOKENS // (model.config.num_prefix_tokens + h * w))
        if not result or len(result[-1]) >= most or result[-1][0].shape != image.shape:
            result.append([])
        result[-1].append(image)
    return [torch.cat(batch) for batch in result]


def photographs(model: ViT, each: int = 10) -> Tensor:
    """[7 * each, C, H, W] of the model's own size, cut at random places and scales out of the photographs that ship.

    Raises:
        ValueError: a model whose channels are not 1 or 3.
    """
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
