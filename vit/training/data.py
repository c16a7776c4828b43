"""What a training step sees: every draw follows from the seed and its place, so a resumed run draws the same."""

from __future__ import annotations

import math
import os
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vit.image import ImageError, Transform, load_image, to_mode

# The first number after the seed: what is drawn.
ORDER, IMAGE, STEP = 0, 1, 2

Key = tuple[int, int]  # an epoch, and an image's number


def seed_from(*numbers: int) -> int:
    """One seed from several numbers, such as (seed, epoch, image): the same in every process."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


@contextmanager
def own_generators(device: torch.device) -> Iterator[None]:
    """Give Python's, NumPy's and PyTorch's generators back as they were: inside, they are seeded again and again."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


@dataclass(frozen=True)
class RandomCrop:
    """A random part of an image, resized and perhaps mirrored: [C, H, W] float32, normalised as `transform` says.

    The same draws as torchvision's RandomResizedCrop and RandomHorizontalFlip (arXiv:1409.4842, section 6), in
    PyTorch's generator, and the same pixels.
    """

    transform: Transform  # the model's own: size, mean, std, interpolation
    scale: float  # the least share of the image's area
    hflip: float  # probability of mirroring

    def __call__(self, image: Image.Image) -> Tensor:
        return self.transform.normalise(self.view(image))

    def view(self, image: Image.Image) -> Image.Image:
        """The part that was drawn, at the model's size."""
        image = to_mode(image, len(self.transform.mean))
        assert isinstance(self.transform.size, tuple)
        height, width = self.transform.size
        # cropped first: with resize(box=...) the filter would read pixels outside of the crop
        image = image.crop(self.draw(*image.size))
        image = image.resize((width, height), Image.Resampling[self.transform.interpolation.upper()])
        mirrored = torch.rand(1).item() < self.hflip
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else image

    def draw(self, width: int, height: int) -> tuple[int, int, int, int]:
        """A box (left, top, right, bottom) with sides in a proportion of 3:4 to 4:3."""
        for _ in range(10):
            area = width * height * torch.empty(1).uniform_(self.scale, 1.0).item()
            ratio = torch.exp(torch.empty(1).uniform_(math.log(3 / 4), math.log(4 / 3))).item()
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                top = int(torch.randint(0, height - h + 1, (1,)))
                left = int(torch.randint(0, width - w + 1, (1,)))
                return left, top, left + w, top + h
        w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))  # the middle of a long, thin image
        left, top = (width - w) // 2, (height - h) // 2
        return left, top, left + w, top + h


class Item(NamedTuple):
    """A labelled image; of a batch each field holds all."""

    image: Any  # [C, H, W]; [B, C, H, W]
    label: Any  # int; [B]
    weight: Any  # float; [B]: 0 for an image that does not count
    error: Any = ""  # str; a list: why it could not be read


class Images(Dataset):
    """Labelled images as tensors. Item (epoch, i) has the same pixels in every process, whatever was asked before.

    Args:
        data: `data[i]` is (image, label) or {"image": ..., "label": ...}: a path, a PIL image or whatever `transform`
            takes, and the number of a class.
        transform: from an image to a [C, H, W] tensor; it may draw from Python's, NumPy's or PyTorch's generator.
        seed: of these draws.
        channels: PIL images are turned upright and made RGB (3) or grey (1) for `transform`.

    An image that cannot be read has weight 0, black pixels and an error.
    """

    def __init__(self, data: Sequence[Any], transform: Callable[[Any], Tensor], seed: int, channels: int = 3) -> None:
        self.data, self.transform, self.seed, self.channels = data, transform, seed, channels

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, key: Key) -> Item:
        epoch, i = key
        image, label = pair(self.data[i])
        seed = seed_from(self.seed, IMAGE, max(epoch, 0), i)
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        if not isinstance(image, (str, os.PathLike, Image.Image)):
            return Item(self.transform(image), label, float(epoch >= 0))
        try:
            image = image if isinstance(image, Image.Image) else load_image(image)
            return Item(self.transform(to_mode(image, self.channels)), label, float(epoch >= 0))
        except ValueError as error:  # an ImageError, or an image that cannot be brought to size
            black = Image.new("RGB" if self.channels == 3 else "L", (64, 64))
            text = str(error) if isinstance(error, ImageError) else f"{self.name(i)}: {error}"
            return Item(self.transform(black), label, 0.0, text)

    def name(self, i: int) -> str:
        """What an error calls an image: its file, or its number."""
        image, _ = pair(self.data[i])
        return str(image) if isinstance(image, (str, os.PathLike)) else f"image {i}"


def pair(item: Any) -> tuple[Any, int]:
    """(image, label) of one item of a data set."""
    if isinstance(item, Mapping):
        if not {"image", "label"} <= item.keys():
            raise ValueError(f"each item must have 'image' and 'label', got {', '.join(map(repr, item))}: rename them")
        item = item["image"], item["label"]
    image, label = item
    if int(label) != label:
        raise ValueError(f"expected the number of a class, got the label {label!r}")
    return image, int(label)


def batches(
    count: int, batch_size: int, start: int, stop: int, seed: int, rank: int = 0, world: int = 1
) -> Iterator[list[Key]]:
    """For each step from `start` to `stop`, this process's share of the step's images.

    Each epoch is a permutation of the images; a rest that does not fill a batch is left out, another one each time.
    The images of a step are the same however many processes (`world`) share them.
    """
    per_epoch = count // batch_size
    order: list[int] = []
    for step in range(start, stop):
        epoch, batch = divmod(step, per_epoch)
        if not order or batch == 0:
            generator = torch.Generator().manual_seed(seed_from(seed, ORDER, epoch))
            order = torch.randperm(count, generator=generator).tolist()
        yield [(epoch, i) for i in order[batch * batch_size : (batch + 1) * batch_size][rank::world]]


def shares(count: int, batch_size: int, rank: int, world: int) -> Iterator[list[Key]]:
    """This process's share of all images in their order; every process gets equally many batches.

    An image that only fills up a batch has the epoch -1, so that it does not count.
    """
    own = [(0, i) for i in range(rank, count, world)]
    own += [(-1, 0)] * (math.ceil(count / world) - len(own))
    size = math.ceil(batch_size / world)
    yield from (own[i : i + size] for i in range(0, len(own), size))


def loader(images: Images, keys: Iterable[list[Key]], workers: int, device: torch.device) -> DataLoader:
    """Batches of images, prepared by `workers` processes, or by this one."""
    return DataLoader(images, batch_sampler=keys, num_workers=workers, pin_memory=device.type == "cuda")


def balanced(labels: Sequence[int], classes: int) -> Tensor:
    """[classes], weights that make all classes count alike: images / (classes * images of the class)."""
    counts = Counter(labels)
    return torch.tensor([len(labels) / (classes * max(1, counts[label])) for label in range(classes)])
