"""Labelled images for `vit evaluate`: which folders are classes, and which output of a model is which class."""

import random
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from PIL import Image

from vit.model import ViT
from vit.resources import digit_images, imagenet_categories, imagenet_synsets

from .predict import ENDINGS, find_images

DIGITS = "digits"  # the name of the data set that ships with the package

Sample = tuple[Path | Image.Image, str]  # an image or its file, and the name of its class


def find_samples(data: str) -> list[Sample]:
    """The labelled images of "digits", or of a folder with one sub-folder per class, as torchvision's ImageFolder.

    Images are searched for below each sub-folder, too. Folders whose names begin with a dot are no classes.

    Raises:
        ValueError: no folder of that name, one without sub-folders, or a sub-folder without images.
    """
    if data == DIGITS:
        images, labels = digit_images()
        return [(image, str(label)) for image, label in zip(images, labels.tolist())]
    root = Path(data)
    if not data or not root.is_dir():
        raise ValueError(f"there is no folder {data!r}: expected one, or {DIGITS!r} for the bundled images")
    folders = sorted(entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not folders:
        count = sum(file.suffix.lower() in ENDINGS for file in root.iterdir())
        raise ValueError(
            f"the folder {data} holds {count} images and no sub-folders: expected one sub-folder per class, with the"
            " class's images in it, such as val/n01440764/ILSVRC2012_val_00000293.JPEG"
        )
    return [(path, folder.name) for folder in folders for path in find_images([str(folder)])]


def draw_samples(samples: list[Sample], limit: int | None, seed: int) -> list[Sample]:
    """`limit` samples drawn at random, all alike whatever their class, in the order that they had; None for all."""
    if limit is None or limit >= len(samples):
        return samples
    return [samples[i] for i in sorted(random.Random(seed).sample(range(len(samples)), limit))]


def match(samples: Sequence[Sample], model: ViT, data: str, class_map: Path | None) -> tuple[dict[str, int], str]:
    """The model's output for each class of the data, and the rule that found it."""
    names = sorted({name for _, name in samples})
    if data == DIGITS and model.config.num_classes != len(names):
        raise ValueError(
            f"the digits have {len(names)} classes and the model {model.config.num_classes}: expected one such as"
            " --model vit_digits_patch4_32"
        )
    if class_map is not None:
        return apply_class_map(names, class_map, model.config.num_classes), f"the class map {class_map}"
    return match_classes(names, model.categories, model.config.num_classes)


def match_classes(names: list[str], categories: list[str] | None, num_classes: int) -> tuple[dict[str, int], str]:
    """The output of a model for each of the sub-folders' names, by the first of these rules that knows any of them.

    ImageNet's synsets, where the categories are ImageNet's; the categories themselves; the whole numbers below
    num_classes; and last, for exactly num_classes sub-folders, their sorted order, as torchvision's ImageFolder.

    Args:
        names: the sub-folders, each once; not all of the classes need be there, but for the last rule.
        categories: the model's, in the order of its outputs, or None.

    Returns:
        {name: output}, and the rule in words.

    Raises:
        ValueError: names that match no rule, or of which only a part matches.
    """
    rules: list[tuple[str, dict[str, int]]] = []
    if categories is not None and categories == imagenet_categories():
        rules += [("ImageNet's synsets (n01440764 ...)", number(imagenet_synsets()))]
    if categories is not None:
        rules += [(f"the model's categories ({categories[0]!r} ...)", number(categories))]
    numbers = {name: int(name) for name in names if name.isascii() and name.isdigit() and int(name) < num_classes}
    rules += [(f"whole numbers from 0 to {num_classes - 1}", numbers)]
    for rule, known in rules:
        if found := {name: known[name] for name in names if name in known}:
            if len(found) < len(names):  # by another rule they would count as something else, and nobody would know
                raise ValueError(unmatched([name for name in names if name not in found], len(names), rule))
            return found, rule
    if len(names) == num_classes:
        return number(sorted(names)), f"the sorted order of the {num_classes} sub-folders, as torchvision's ImageFolder"
    expected = ", or ".join(rule for rule, _ in rules) + f", or exactly {num_classes} sub-folders in their sorted order"
    raise ValueError(unmatched(names, len(names), expected))


def number(names: Iterable[str]) -> dict[str, int]:
    """Names to their places; a name that stands for several (ImageNet has two cranes) is left out."""
    places: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        places.setdefault(name, []).append(i)
    return {name: place[0] for name, place in places.items() if len(place) == 1}


def unmatched(names: list[str], total: int, expected: str) -> str:
    """What is wrong with sub-folders that match no class, on one line."""
    shown = ", ".join(map(repr, names[:3])) + (" ..." if len(names) > 3 else "")
    return f"{len(names)} of {total} classes of the data match none of the model: {shown}; expected {expected}"


def apply_class_map(names: list[str], file: Path, num_classes: int) -> dict[str, int]:
    """The output for each name, as a class map says: a name per line, from output 0 on, or lines of 'name index'.

    Raises:
        OSError, ValueError: a file that cannot be read, lacks one of the names or has an output that there is not.
    """
    lines = [row.strip() for row in file.read_text(encoding="utf-8-sig").splitlines()]
    while lines and not lines[-1]:
        lines.pop()
    for i, row in enumerate(lines, 1):
        if not row or row.startswith("#"):  # either would shift all that follow
            raise ValueError(f"line {i} of {file} is {'a comment' if row else 'empty'}, expected the name of a class")
    known = number(lines)
    pairs = [re.fullmatch(r"(\S.*?)\s+([0-9]{1,9})", row) for row in lines if row]
    # A name may end in a number itself: which way a file is meant is what the sub-folders say.
    if not any(name in known for name in names) and all(pairs):
        named = number([pair[1] for pair in pairs if pair])  # each that is there once
        known = {pair[1]: int(pair[2]) for pair in pairs if pair and pair[1] in named}
    if missing := [name for name in names if name not in known]:
        raise ValueError(unmatched(missing, len(names), f"a line of {file} for each, and one only"))
    for name in names:
        if known[name] >= num_classes:
            raise ValueError(f"{file} gives {name!r} output {known[name]}, and the model's are 0 to {num_classes - 1}")
    return {name: known[name] for name in names}
