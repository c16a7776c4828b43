"""The files that ship with the package, in `vit/data`."""

from functools import cache
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

DATA = Path(__file__).parent / "data"


@cache
def _imagenet() -> list[tuple[str, str]]:
    lines = (DATA / "imagenet1k.tsv").read_text(encoding="utf-8").splitlines()
    return [tuple(line.split("\t")) for line in lines]  # type: ignore[misc]


def imagenet_categories() -> list[str]:
    """The 1,000 names of ImageNet-1k, in the order of the classes (WordNet's lemmas, as timm lists them)."""
    return [name for _, name in _imagenet()]


def imagenet_synsets() -> list[str]:
    """The 1,000 WordNet synsets of ImageNet-1k ("n01440764" ...), in the order of the classes."""
    return [synset for synset, _ in _imagenet()]


def bundled_checkpoint(name: str) -> Path | None:
    """The folder of a checkpoint that ships with the package, or None if there is none of that name."""
    folder = DATA / name
    return folder if (folder / "model.safetensors").is_file() else None


def digit_images() -> tuple[list[Image.Image], Tensor]:
    """The held-out images of scikit-learn's digits, 8x8 pixels in mode "L", and their labels [360] int64."""
    sheet = Image.open(DATA / "digits" / "heldout.png").convert("L")
    labels = torch.tensor([int(digit) for digit in (DATA / "digits" / "heldout.txt").read_text().split()])
    columns = sheet.width // 8
    boxes = [(8 * (i % columns), 8 * (i // columns)) for i in range(len(labels))]
    return [sheet.crop((x, y, x + 8, y + 8)) for x, y in boxes], labels
