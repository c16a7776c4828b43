"""The labelled images of the comparisons: scikit-learn's digits, or a folder as `vit finetune` reads it."""

from pathlib import Path
from typing import Any

from train_digits import load_split

from vit.cli.splits import find_splits

DIGITS = "digits"
Labelled = list[tuple[Any, int]]  # a PIL image or a path, and the number of its class


def load_data(data: str) -> tuple[Labelled, Labelled, list[str]]:
    """Training images, held-out images (`test/`, or else `val/`, or else a fifth), and the classes' names in order."""
    if data == DIGITS:
        images, labels, heldout, truth = load_split()  # 1,437 and 360 images of 8x8 pixels
        return list(zip(images, labels.tolist())), list(zip(heldout, truth.tolist())), [str(i) for i in range(10)]
    splits = find_splits(str(Path(data)), 0.2, 0)
    number = {name: i for i, name in enumerate(splits.classes)}
    train, heldout = (
        [(image, number[name]) for image, name in part] for part in (splits.train, splits.test or splits.val)
    )
    return train, heldout, splits.classes
