"""The loss of each image, and mixup, which blends images and their losses."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def mixup(x: Tensor, y: Tensor, w: Tensor, alpha: float) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Blend each image with its neighbour (arXiv:1710.09412): the images, and pairs of labels and their weights."""
    if alpha == 0.0:
        return x, [(y, w)]
    share = float(torch.distributions.Beta(alpha, alpha).sample())
    return x.lerp(x.roll(1, 0), 1 - share), [(y, share * w), (y.roll(1), (1 - share) * w.roll(1))]


def cross_entropy(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """[b] losses, in float32; ValueError for a label that the model has no class for."""
    for label in (int(labels.min()), int(labels.max())):
        if not 0 <= label < logits.shape[1]:
            raise ValueError(f"there is an image with label {label}, and the model has {logits.shape[1]} classes")
    return F.cross_entropy(logits.float(), labels, reduction="none", label_smoothing=smoothing)
