"""Labelled images for training: which of them train, which choose settings, and which are the test."""

import csv
import math
import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from .datasets import DIGITS, Sample, find_samples
from .images import counted

Names = tuple[str, ...]
TRAIN: Names = ("train",)  # names of folders, in capitals too
VAL: Names = ("val", "valid", "validation")
TEST: Names = ("test",)
HEADERS = ("path", "file", "filename", "image")  # a CSV file's first cell, if its first line is a header


@dataclass(frozen=True)
class Splits:
    """Labelled images in three parts. Every class has images in `train`; `val` is never empty, `test` may be."""

    train: list[Sample]
    val: list[Sample]
    test: list[Sample]
    how: str  # where the parts come from, in words: to be printed

    @property
    def classes(self) -> list[str]:
        """The names of the classes in sorted order, as in torchvision's ImageFolder."""
        return sorted({name for _, name in self.train})


def find_splits(data: str, holdout: float, seed: int) -> Splits:
    """Labelled images in three parts.

    Args:
        data: a folder with `train/`, `val/` (or `valid/`, `validation/`) and `test/`, each of one folder per class; the
            last two may be missing. Or one folder per class, a CSV file of path,label, or "digits".
        holdout: which share of the training images becomes `val` where there is none, in (0, 1).
        seed: of that draw.

    Raises:
        ValueError: data in none of these forms, one class only, or a class without training images.
    """
    if not 0 < holdout < 1:
        raise ValueError(f"the share of images to hold out must lie between 0 and 1, not {holdout}")
    folders = split_folders(Path(data)) if data and data != DIGITS else {}
    if folders:
        parts = [find_samples(str(folders[names])) if names in folders else [] for names in (TRAIN, VAL, TEST)]
        how = ", ".join(f"{folder.name}/" for folder in folders.values())
    else:
        parts = [read_csv(Path(data)) if Path(data).suffix.lower() == ".csv" else find_samples(data), [], []]
        how = ""
    check_classes(data, *parts)
    train, val, test = parts
    if not val:
        train, val = hold_out(train, holdout, seed)
        how = f"{how}, " * bool(how) + f"{counted(len(val), 'image')} held out, drawn by class with seed {seed}"
    return Splits(train, val, test, how)


def split_folders(root: Path) -> dict[Names, Path]:
    """The folders of TRAIN, VAL and TEST; none if the folders of `root` are classes.

    Classes may be called "train" (beside "bus") or "valid" (beside "invalid"): such a folder is a part of the data if
    it has sub-folders of its own, and "train" also if another part lies beside it.
    """
    if not root.is_dir():
        return {}
    below = sorted(entry for entry in root.iterdir() if entry.is_dir())
    found = {kind: [folder for folder in below if folder.name.lower() in kind] for kind in (TRAIN, VAL, TEST)}
    parts: dict[Names, Path] = {kind: folders[0] for kind, folders in found.items() if folders}
    nested = [folder for folder in parts.values() if any(map(is_class, folder.iterdir()))]
    if TRAIN not in parts and nested:
        raise ValueError(f"{root} has {nested[0].name}/ and no train/: expected both, or one folder per class")
    if TRAIN not in parts or (len(parts) == 1 and not nested):
        return {}
    for folders in found.values():
        if len(folders) > 1:
            raise ValueError(f"{root} has {folders[0].name}/ and {folders[1].name}/: keep the one that is meant")
    return parts


def is_class(entry: Path) -> bool:
    """Whether `find_samples` would take it for a class."""
    return entry.is_dir() and not entry.name.startswith(".")


def read_csv(file: Path) -> list[Sample]:
    """The images of a CSV file with two columns, path and label; paths are relative to the file's folder.

    Raises:
        OSError: a file that cannot be read.
        ValueError: a row without a path and a label, or whose image does not exist or was named before.
    """
    samples: dict[Path, str] = {}
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.reader(stream, skipinitialspace=True, strict=True)
            rows = [(reader.line_num, [cell.strip() for cell in row]) for row in reader if row]
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not a CSV file in UTF-8: {error}") from None
    for i, row in rows[bool(rows and rows[0][1][0].lower() in HEADERS) :]:
        if len(row) != 2 or not all(row):
            raise ValueError(f"line {i} of {file} is {','.join(row)!r}: expected a path and a label, as in a.png,cat")
        path = file.parent / row[0]
        if not path.is_file():
            raise ValueError(f"line {i} of {file} names {row[0]}, but there is no file {path}")
        if path in samples:  # it could be held out and be trained on
            raise ValueError(f"line {i} of {file} names {row[0]} again: expected each image once")
        samples[path] = row[1]
    return list(samples.items())


def check_classes(data: str, train: list[Sample], val: list[Sample], test: list[Sample]) -> None:
    """Refuse fewer than two classes, and a class that is in `val` or `test` alone."""
    classes = {name for _, name in train}
    if len(classes) < 2:
        named = f"one class, {min(classes)!r}" if classes else "no images"
        raise ValueError(f"{data} has {named}: expected at least two classes to tell apart")
    if unseen := sorted({name for _, name in val + test} - classes):
        more = f" (and {len(unseen) - 1} more)" if len(unseen) > 1 else ""
        raise ValueError(f"the class {unseen[0]!r}{more} of {data} has no training images, so it cannot be learned")


def hold_out(samples: list[Sample], share: float, seed: int) -> tuple[list[Sample], list[Sample]]:
    """Divide samples in two, class by class: those that stay, and the `share` of them that is drawn at random.

    Each class keeps at least one. Their order stays; the draw depends on the seed, and on the samples' order alone.

    Raises:
        ValueError: every class has one sample only.
    """
    members = group(samples)
    draw = random.Random(seed)
    # Each class gives its share rounded down; those with the largest remainders give what is still missing.
    exact = {name: share * len(numbers) for name, numbers in members.items()}
    count = {name: min(math.floor(exact[name]), len(members[name]) - 1) for name in members}
    able = [name for name in members if count[name] < len(members[name]) - 1]
    draw.shuffle(able)  # decides between equal remainders
    missing = max(1, round(share * len(samples))) - sum(count.values())
    for name in sorted(able, key=lambda name: count[name] - exact[name])[: max(0, missing)]:
        count[name] += 1
    drawn = {i for name, numbers in members.items() for i in draw.sample(numbers, count[name])}
    if not drawn:
        raise ValueError("every class has one image only, so none can be held out: expected at least two of a class")
    return [s for i, s in enumerate(samples) if i not in drawn], [s for i, s in enumerate(samples) if i in drawn]


def group(samples: Iterable[Sample]) -> dict[str, list[int]]:
    """Each class's samples by number; the classes in sorted order."""
    members: dict[str, list[int]] = {}
    for i, (_, name) in enumerate(samples):
        members.setdefault(name, []).append(i)
    return dict(sorted(members.items()))
