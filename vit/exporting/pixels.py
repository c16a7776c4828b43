"""Preprocessing inside the graph: from the bytes of pictures to what the patch projection reads.

Mean and standard deviation go into the weights of the patch projection. A resize is a product with a matrix of
Pillow's filter weights for each axis, first along the rows, then along the columns, rounded to bytes after each. Only
what a crop keeps is computed. The matrix comes in bands, one for each row of patches, since a patch's worth of results
reads only the samples around it: that makes the product as many times cheaper as there are patches along the axis.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vit.checks import unknown
from vit.image import check_sides, to_cover
from vit.metadata import Preprocessing
from vit.model import ViT
from vit.position import cubic

INPUTS = ("float32", "uint8", "image")
UNIT = 256  # pixels are divided by it: a power of two, so exactly, and float16 holds the weights


class Filter(NamedTuple):
    """One of Pillow's filters."""

    reach: int  # the distance at which it ends, in samples of the smaller picture
    weight: Callable[[Tensor], Tensor]  # of distances >= 0


def sinc(x: Tensor) -> Tensor:
    """sin(pi x) / (pi x), at 0 its limit, 1."""
    angle = torch.where(x == 0, 1.0, x * math.pi)
    return torch.where(x == 0, 1.0, angle.sin() / angle)


FILTERS = {
    "bilinear": Filter(1, lambda x: (1 - x).clamp(min=0)),
    "bicubic": Filter(2, lambda x: cubic(x, a=-0.5)),
    "lanczos": Filter(3, lambda x: torch.where(x < 3, sinc(x) * sinc(x / 3), 0.0)),
}


class Axis(NamedTuple):
    """What becomes of the samples along one side of a picture; the numbers may be symbols of a traced graph."""

    old: int  # samples
    new: int  # those that they are resized to
    first: int  # of these, the first that the crop keeps
    kept: int  # how many it keeps


class Pixels(nn.Module):
    """[B, H, W, C] uint8 -> [B, C, h p, w p] float32 in [0, 1), pixels over 256; for a model after `fold`.

    Of kind "uint8" the sides are those of the pictures, "image" resizes and crops them to `settings.size`.
    """

    def __init__(self, kind: str, settings: Preprocessing, patch_size: int) -> None:
        super().__init__()
        self.kind, self.settings, self.patch_size = kind, settings, patch_size

    def forward(self, images: Tensor) -> Tensor:
        if self.kind == "image":
            return resize(images, self.settings, self.settings.size, self.patch_size) / UNIT
        return images.float().permute(0, 3, 1, 2) / UNIT  # a cast first: TensorRT has bytes as inputs only


def resize(
    images: Tensor, settings: Preprocessing, size: tuple[int, int], p: int, cover: tuple[int, int] | None = None
) -> Tensor:
    """[B, H, W, C] uint8 -> [B, C, *size] float32 whole numbers in [0, 255], as Pillow does it, at most one off.

    `cover`: `vit.image.to_cover` of a traced size, which the graph would compute in float32, and may round wrongly.

    Pillow 13 resizes the columns of tall pictures first, and there differs from its earlier versions by up to 5.
    """
    B, H, W, C = images.shape
    rows, columns = plan(settings, H, W, size, cover)
    x = images.permute(0, 2, 3, 1).reshape(B, W, C * H)
    x = resample(x, columns, p, FILTERS[settings.interpolation])  # [B, w, C * H]
    x = x.view(B, -1, C, H).permute(0, 3, 1, 2).reshape(B, H, -1)  # [B, H, w * C]
    x = resample(x, rows, p, FILTERS[settings.interpolation])  # [B, h, w * C]
    return x.view(B, x.shape[1], -1, C).permute(0, 3, 1, 2)


def resample(x: Tensor, axis: Axis, p: int, kernel: Filter) -> Tensor:
    """[B, old, M] bytes -> [B, kept, M] float32 whole numbers in [0, 255]; `kept` is n p, for n patches."""
    old, new, first = (torch.full((), value) for value in axis[:3])  # tensors: not all runtimes calculate with symbols
    taps = p + 2 * kernel.reach
    window = torch.sym_min(axis.old, taps * axis.old // axis.new + taps + 2)  # samples that p results read, or more
    results = torch.arange(axis.kept).view(-1, p) + first  # [n, p]
    centres = (2 * results + 1) * old  # in old samples, times 2 new: in whole numbers, hence exact
    whole = centres // (2 * new)
    rest = (centres - whole * 2 * new).float() / (2 * new).float()  # [n, p] in [0, 1)
    stretch = (old.float() / new.float()).clamp(min=1)
    start = whole[:, :1] - (kernel.reach * stretch).ceil().long() - 1
    samples = torch.minimum(start.clamp(min=0), old - window) + torch.arange(window)  # [n, window]
    distances = (samples[:, None] - whole[:, :, None]) + (0.5 - rest[:, :, None])  # [n, p, window]
    weights = kernel.weight(distances.abs() / stretch)
    weights = weights / weights.sum(dim=2, keepdim=True)
    found = weights @ x[:, samples].float()  # [n, p, window] @ [B, n, window, M] -> [B, n, p, M]
    return (found + 0.5).floor().clamp(0, 255).flatten(1, 2)


def plan(
    settings: Preprocessing, height: int, width: int, size: tuple[int, int], cover: tuple[int, int] | None = None
) -> tuple[Axis, Axis]:
    """What `vit.image.Transform` does to the rows and columns of a picture, in whole numbers, which a graph can hold.

    If the size is not a square, an exact half may be rounded the other way than in floating point.
    """
    if settings.mode == "squash":
        return Axis(height, size[0], 0, size[0]), Axis(width, size[1], 0, size[1])
    cover = cover or to_cover(size, settings.crop_pct)
    new: list[Any]
    if cover[0] == cover[1]:
        short = torch.sym_min(height, width)
        new = [cover[0] * side // short for side in (height, width)]
    else:  # whichever side is relatively short is covered; the other one's quotient is larger than its cover
        new = [
            torch.sym_max(cover[0], rounded(height * cover[1], width)),
            torch.sym_max(cover[1], rounded(width * cover[0], height)),
        ]
    rows, columns = (Axis(old, n, rounded(n - kept, 2), kept) for old, n, kept in zip((height, width), new, size))
    return rows, columns


def rounded(a: int, b: int) -> int:
    """a / b, rounded to the nearest whole number, halves to even ones."""
    up = (2 * a + b) // (2 * b)
    half: Any = 1 - torch.sym_min(1, (2 * a + b) % (2 * b))  # 1 if a / b is a whole number and a half
    return up - half * (up % 2)


@torch.no_grad()
def fold(model: ViT, settings: Preprocessing) -> None:
    """Let the patch projection of a model read pixels over `UNIT` in place of normalised ones."""
    layer = model.patch_embed.proj
    mean, std = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (settings.mean, settings.std))
    weight = layer.weight.double()  # [D, C, p, p]
    bias = 0.0 if layer.bias is None else layer.bias.double()
    layer.bias = nn.Parameter((bias - (weight * mean / std).sum((1, 2, 3))).float(), requires_grad=False)
    layer.weight = nn.Parameter((weight * (UNIT / 255) / std).float(), requires_grad=False)


def check_input(kind: str, model: ViT) -> str:
    """The kind of images that a file takes, one of INPUTS."""
    if kind not in INPUTS:
        raise ValueError(unknown("input", kind, INPUTS))
    settings, channels = model.preprocessing, model.config.in_chans
    if kind != "float32" and len(settings.mean) != channels:
        raise ValueError(f"model.preprocessing has {len(settings.mean)} channels, and the model has {channels}")
    if kind == "image" and channels not in (1, 3):
        raise ValueError(f"input='image' is for pictures of 1 or 3 channels, and the model takes {channels}")
    if kind == "image" and settings.interpolation not in FILTERS:
        raise ValueError(
            f"input='image' resizes by {', '.join(FILTERS)}, and model.preprocessing asks for"
            f" {settings.interpolation!r}: export with input='uint8' (--input uint8) and resize outside"
        )
    return kind


def check_picture(settings: Preprocessing, height: int, width: int) -> None:
    """ValueError for a picture that is too long and thin for a graph, see `vit.image.check_sides`."""
    check_sides((height, width), [axis.new for axis in plan(settings, height, width, settings.size)])
