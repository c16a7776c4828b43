"""Labelled images for `vit evaluate`: which folders are classes, and which of a model's outputs is which class."""

import random
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from PIL import Image

from vit.resources import digit_images, imagenet_categories, imagenet_synsets

from .images import ENDINGS, find_images
from .loading import Model

DIGITS = "digits"  # the name of the data set that ships with the package

Sample = tuple[Path | Image.Image, str]  # an image or its file, and the name of its class


def find_samples(data: str) -> list[Sample]:
    """The labelled images of "digits", or of a folder with one sub-folder per class, as in torchvision's ImageFolder.

    Sub-folders are searched recursively. Folders whose names begin with a dot are not classes.

    Raises:
        ValueError: no such folder, a folder without sub-folders, or a sub-folder without images.
    """
    if data == DIGITS:
        images, labels = digit_images()
        return [(image, str(label)) for image, label in zip(images, labels.tolist())]
    root = Path(data)
    if not data or not root.is_dir():
        raise ValueError(f"{data!r} is not a folder: expected one, or {DIGITS!r} for the bundled images")
    folders = sorted(entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not folders:
        count = sum(file.suffix.lower() in ENDINGS for file in root.iterdir())
        raise ValueError(
            f"the folder {data} holds {count} images and no sub-folders: expected one sub-folder per class, with the"
            " class's images in it, such as val/n01440764/ILSVRC2012_val_00000293.JPEG"
        )
    return [(path, folder.name) for folder in folders for path in find_images([str(folder)])]


def draw_samples(samples: list[Sample], limit: int | None, seed: int) -> list[Sample]:
    """`limit` samples drawn uniformly at random, whatever their class, in their original order; None for all."""
    if limit is None or limit >= len(samples):
        return samples
    return [samples[i] for i in sorted(random.Random(seed).sample(range(len(samples)), limit))]


def match(
    samples: Sequence[Sample], model: Model, data: str, class_map: Path | None, order: str | None = None
) -> tuple[dict[str, int], str]:
    """The model's output for each class of the data, and the rule that found it.

    Args:
        class_map: a file that says it.
        order: "numeric" or "text", of folders whose names are numbers; None: as `match_classes` finds.
    """
    names = sorted({name for _, name in samples})
    if data == DIGITS and model.config.num_classes != len(names):
        raise ValueError(
            f"the digits have {len(names)} classes and the model has {model.config.num_classes}: use a model such as"
            " --model vit_digits_patch4_32"
        )
    if class_map is not None:
        return apply_class_map(names, class_map, model.config.num_classes), f"the class map {class_map}"
    if order is not None:
        return in_order(names, order, model.config.num_classes), f"the sub-folders' {order} order"
    return match_classes(names, model.categories, model.config.num_classes)


def match_classes(names: list[str], categories: list[str] | None, num_classes: int) -> tuple[dict[str, int], str]:
    """The model's output for each sub-folder, by the first of these rules that matches any name.

    1. ImageNet's synsets, if the model's categories are ImageNet's; 2. the categories themselves; 3. whole numbers
    below num_classes; 4. for exactly num_classes sub-folders, their sorted order, as in torchvision's ImageFolder.

    Args:
        names: the sub-folders, each once; except for rule 4, some of the classes may be missing.
        categories: the model's, in the order of its outputs, or None.

    Returns:
        {name: output}, and the rule in words.

    Raises:
        ValueError: no rule matches, or a rule matches only some of the names; or the model has no categories, and the
            sub-folders are numbers whose order as numbers is not their order as text, by which ImageFolder counts.
    """
    if categories is None:
        refuse_two_orders(names, num_classes)
    rules: list[tuple[str, dict[str, int]]] = []
    if categories is not None and categories == imagenet_categories():
        rules += [("ImageNet's synsets (n01440764 ...)", number(imagenet_synsets()))]
    if categories is not None:
        rules += [(f"the model's categories ({categories[0]!r} ...)", number(categories))]
    numbers = {name: int(name) for name in names if name.isascii() and name.isdigit() and int(name) < num_classes}
    rules += [(f"whole numbers from 0 to {num_classes - 1}", numbers)]
    for rule, known in rules:
        if found := {name: known[name] for name in names if name in known}:
            if len(found) < len(names):  # the others would count as wrong answers
                hint = ", or --class-order to count the sub-folders" if all(map(is_number, names)) else ""
                raise ValueError(unmatched([name for name in names if name not in found], len(names), rule + hint))
            return found, rule
    if len(names) == num_classes:
        return number(sorted(names)), f"the sorted order of the {num_classes} sub-folders, as torchvision's ImageFolder"
    expected = ", or ".join(rule for rule, _ in rules) + f", or exactly {num_classes} sub-folders in their sorted order"
    raise ValueError(unmatched(names, len(names), expected))


def refuse_two_orders(names: list[str], num_classes: int) -> None:
    """ValueError if both orders of numbered sub-folders give an output for each, and they differ."""
    if not all(map(is_number, names)):
        return
    try:
        numeric, text = (in_order(names, order, num_classes) for order in ("numeric", "text"))
    except ValueError:
        return
    if odd := next((name for name in names if numeric[name] != text[name]), None):
        raise ValueError(
            f"the model has no categories, and the sub-folders are numbers: by number, {odd!r} is output"
            f" {numeric[odd]}, but by text, as torchvision's ImageFolder counts, output {text[odd]}: say which order"
            " the model was trained with, --class-order numeric or --class-order text"
        )


def in_order(names: list[str], order: str, num_classes: int) -> dict[str, int]:
    """The output of each sub-folder by its place in the "numeric" or "text" order of all classes.

    If some classes are missing, all of them are taken to be 0, 1 ... num_classes - 1, with as many leading zeros as the
    sub-folders have.

    Raises:
        ValueError: names that are not numbers in numeric order, or that are not among all classes.
    """
    if order == "numeric" and (odd := [name for name in names if not is_number(name)]):
        raise ValueError(unmatched(odd, len(names), "whole numbers, because of --class-order numeric"))
    width = max(map(len, names)) if any(re.match("0[0-9]", name) for name in names) else 0
    classes = names if len(names) == num_classes else [f"{i:0{width}}" for i in range(num_classes)]
    places = number(sorted(classes, key=int) if order == "numeric" else sorted(classes))
    if missing := [name for name in names if name not in places]:
        expected = f"exactly {num_classes} sub-folders, or numbers from {classes[0]} to {classes[-1]}"
        raise ValueError(unmatched(missing, len(names), expected))
    return {name: places[name] for name in names}


def is_number(name: str) -> bool:
    """Whether a name is a whole number in ASCII digits."""
    return re.fullmatch("-?[0-9]+", name) is not None


def number(names: Iterable[str]) -> dict[str, int]:
    """Each name's index; a name that occurs twice (ImageNet has two cranes) is left out."""
    places: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        places.setdefault(name, []).append(i)
    return {name: place[0] for name, place in places.items() if len(place) == 1}


def unmatched(names: list[str], total: int, expected: str) -> str:
    """The error for sub-folders that match no class, on one line."""
    shown = ", ".join(map(repr, names[:3])) + (" ..." if len(names) > 3 else "")
    return f"{len(names)} of {total} classes of the data match no class of the model: {shown}; expected {expected}"


def apply_class_map(names: list[str], file: Path, num_classes: int) -> dict[str, int]:
    """The output for each name, read from a class map: a name per line, from output 0 on, or lines of 'name index'.

    Raises:
        OSError: a file that cannot be read.
        ValueError: an empty line or a comment among names, a name that is missing or repeated, an output out of range.
    """
    lines = [row.strip() for row in file.read_text(encoding="utf-8-sig").splitlines()]
    while lines and not lines[-1]:
        lines.pop()
    for i, row in enumerate(lines, 1):
        if not row or row.startswith("#"):  # either would shift the classes that follow
            raise ValueError(f"line {i} of {file} is {'a comment' if row else 'empty'}, expected the name of a class")
    known = number(lines)
    pairs = [re.fullmatch(r"(\S.*?)\s+([0-9]{1,9})", row) for row in lines if row]
    # A name may itself end in a number, so the sub-folders decide which of the two forms a file has.
    if not any(name in known for name in names) and all(pairs):
        named = number([pair[1] for pair in pairs if pair])  # names that occur once
        known = {pair[1]: int(pair[2]) for pair in pairs if pair and pair[1] in named}
    if missing := [name for name in names if name not in known]:
        raise ValueError(unmatched(missing, len(names), f"a line of {file} for each, and one only"))
    for name in names:
        if known[name] >= num_classes:
            raise ValueError(
                f"{file} gives {name!r} output {known[name]}, but the model's outputs are 0 to {num_classes - 1}"
            )
    return {name: known[name] for name in names}
