"""How often a model is right on labelled images at one size."""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from vit.exporting.foreign import ForeignModel
from vit.image import ImageError, Transform

from .datasets import DIGITS
from .images import Decoded, batches, decode, progress, usable
from .loading import Model
from .timing import synchronize


class Counts(NamedTuple):
    """What `count` finds."""

    images: int  # that could be read
    right: int  # top-1
    right5: int  # top-5
    tokens: int  # of all images; 0 if the model does not show them
    seconds: list[float]  # per image, for each batch; without the first if there are several


def measure(
    model: Model,
    transform: Transform,
    images: Sequence[Path | Image.Image],
    truth: Tensor,
    batch_size: int,
    reported: set[str],
) -> dict[str, Any]:
    """Classify labelled images at one size.

    Args:
        images: files, or images in memory.
        truth: [images] int64, the model's right output for each.
        reported: the errors printed so far, so that each is printed once; new ones are added.

    Returns:
        "images", the number that could be read, and "unreadable", the others; "right" (top-1) and "right5" (top-5).
        Over those that could be read: the shares "top1" and "top5", "interval" (95 %, of top1), "tokens" per image
        (patches, class token ...; None if a foreign file does not show them), and "ms_per_image" of the forward pass
        alone: the median of the batches, without the first if there are several.

    Raises:
        ValueError: no image can be read, or the logits are NaN.
    """
    return figures([count(model, transform, images, truth, batch_size, reported)], len(images))


@torch.inference_mode()
def count(
    model: Model,
    transform: Transform,
    images: Sequence[Path | Image.Image],
    truth: Tensor,
    batch_size: int,
    reported: set[str],
) -> Counts:
    """Classify images, which may be a part of all; the arguments are those of `measure`.

    Raises:
        ValueError: the logits are NaN.
    """
    total = right = right5 = tokens = seen = 0
    times = []
    with progress(len(images)) as bar:
        bar.set_description(size_name(transform))
        for batch in batches(read(images, transform), batch_size, transform):
            readable = torch.tensor([isinstance(outcome, Tensor) for _, outcome in batch])
            labels = truth[seen : seen + len(batch)][readable]  # [B]
            seen += len(batch)
            for _, outcome in batch:
                if isinstance(outcome, ImageError) and str(outcome) not in reported:
                    bar.write(f"vit evaluate: {outcome}", file=sys.stderr)
                    reported.add(str(outcome))
            bar.update(len(batch))
            if len(labels) == 0:
                continue
            inputs = usable(batch, model)
            logits, seconds = forward(model, inputs, packed=transform.mode == "native")
            times.append(seconds / len(labels))
            total += len(labels)
            right += int((logits.argmax(dim=1) == labels).sum())
            best = logits.topk(min(5, logits.shape[1]), dim=1).indices  # [B, 5]
            right5 += int((best == labels[:, None]).sum())
            if not isinstance(model, ForeignModel):
                tokens += sum(model.config.num_prefix_tokens + math.prod(model.grid_of(x[None])) for x in inputs)
    return Counts(total, right, right5, tokens, times[1:] or times)


def figures(parts: Sequence[Counts], images: int) -> dict[str, Any]:
    """The figures that `measure` returns, from the counts of all parts of the images."""
    total, right, right5, tokens = (sum(column) for column in list(zip(*parts))[:4])
    seconds = [one for part in parts for one in part.seconds]
    if total == 0:
        raise ValueError(f"none of the {images} images can be used")
    return {
        "images": total, "unreadable": images - total, "right": right, "right5": right5,
        "top1": right / total, "interval": list(wilson(right, total)), "top5": right5 / total,
        "tokens": tokens / total or None, "ms_per_image": 1000 * statistics.median(seconds),
    }  # fmt: skip


def read(images: Sequence[Path | Image.Image], transform: Transform) -> Iterator[Decoded]:
    """Transformed images in their order: files are decoded in threads, images in memory one after the other."""
    if paths := [image for image in images if isinstance(image, Path)]:
        return decode(paths, transform)
    return ((Path(DIGITS), transform(image)) for image in images if isinstance(image, Image.Image))


def forward(model: Model, images: list[Tensor], packed: bool) -> tuple[Tensor, float]:
    """[B, classes] float32 logits on the CPU, and the seconds that the model took; `packed` if the sizes differ."""
    device = images[0].device
    batch = None if packed else torch.stack(images)  # [B, C, H, W]
    synchronize(device)
    start = time.perf_counter()
    logits = model.forward_packed(images) if batch is None else model(batch)  # [B, classes]
    synchronize(device)
    seconds = time.perf_counter() - start
    if logits.isnan().any():  # argmax would still name a class
        raise ValueError(f"the model's logits are NaN in {images[0].dtype}: try --dtype float32")
    return logits.float().cpu(), seconds


def wilson(right: int, total: int) -> tuple[float, float]:
    """The 95 % interval of a share by Wilson's score, which does not shrink to a point if all answers are right."""
    z = statistics.NormalDist().inv_cdf(0.975)
    share, weight = right / total, z * z / total
    middle = (share + weight / 2) / (1 + weight)
    half = z / (1 + weight) * math.sqrt(share * (1 - share) / total + weight / total / 4)
    return max(0.0, min(share, middle - half)), min(1.0, max(share, middle + half))  # rounding may miss 0 % and 100 %


def size_name(transform: Transform) -> str:
    """ "224x448" (height x width) or "native"."""
    return "x".join(map(str, transform.size)) if isinstance(transform.size, tuple) else "native"
