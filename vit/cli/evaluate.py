"""`vit evaluate`: how often a model is right, at one image size or several."""

import argparse
import hashlib
import json
import math
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from vit.image import Transform, create_transform
from vit.training.distributed import rank_and_world

from . import loading, options, plots, runtime
from .accuracy import count, figures, size_name
from .datasets import DIGITS, Sample, draw_samples, find_samples, match
from .images import counted
from .loading import Model
from .processes import gather, share, sharing

TABLE = "image size   tokens   ms/image     top-1   95 % interval        top-5   right"


def add_parser(commands: Any) -> None:
    """Declare the command and its options."""
    parser = commands.add_parser(
        "evaluate",
        help="measure accuracy at several image sizes",
        description="Measure a model's accuracy on labelled images, at one image size or several.",
    )
    parser.add_argument(
        "data", metavar="DATA",
        help="a folder with one sub-folder per class, named by synset, category or number; or digits: the bundled ones",
    )  # fmt: skip
    options.add_model(parser)
    loading.add_trust(parser)
    options.add_reading(parser)
    add_sizes(parser)
    classes = parser.add_mutually_exclusive_group()
    classes.add_argument(
        "--class-map", type=Path, metavar="FILE",
        help="a text file of sub-folders, one a line, in the order of the model's outputs; or lines of 'name index'",
    )  # fmt: skip
    classes.add_argument(
        "--class-order", choices=("numeric", "text"),
        help="the order of sub-folders that are numbers: 2 before 10, or 10 before 2 as torchvision's ImageFolder",
    )  # fmt: skip
    parser.add_argument("--limit", type=options.positive, metavar="N", help="use N images, drawn at random")
    parser.add_argument("--seed", type=int, default=0, help="random seed of that draw; default: %(default)s")
    parser.add_argument("--json", action="store_true", help="one JSON object per line and size")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw accuracy against size: .png, .svg or .pdf")
    parser.add_argument(
        "--results", type=Path, metavar="FILE",
        help="append each finished size to this file of JSON lines, and reuse what it holds already",
    )  # fmt: skip
    options.add_compute(parser)
    loading.add_optimize(parser)
    runtime.add_runtime(parser, "logits")
    runtime.add_pixels(parser)
    parser.set_defaults(run=run)


def add_sizes(parser: argparse.ArgumentParser) -> None:
    """--img-size, here a list, --mode, --crop-pct and --max-tokens: how images are brought to size."""
    parser.add_argument(
        "--img-size", type=options.listed(options.image_size), default=[None], metavar="SIZES",
        help="separated by commas: 384, 224x448 (height x width) or native; default: the model's own",
    )  # fmt: skip
    parser.add_argument(
        "--mode", choices=("crop", "squash"),
        help="crop cuts out the middle, squash changes the proportions; default: the model's own; squash for digits",
    )  # fmt: skip
    options.add_crop_pct(parser)
    parser.add_argument("--max-tokens", type=options.positive, metavar="N", help="refuse images with more patches")


@sharing()
def run(args: argparse.Namespace) -> int:
    """Find the images, load the model, print one row per size as soon as it is finished."""
    if args.plot is not None:
        plots.check(args.plot)
    before = [] if args.results is None else gather([read_results(args.results)])[0]  # as the first process saw it
    samples = find_samples(args.data)
    model = loading.load(args)
    if model.config.num_classes == 0:
        raise ValueError(f"{args.model} has no classifier, so there is nothing to evaluate")
    transforms = make_transforms(model, args)
    outputs, rule = match(samples, model, args.data, args.class_map, args.class_order)
    samples = draw_samples(samples, args.limit, args.seed)
    truth = torch.tensor([outputs[name] for _, name in samples])  # [images]
    own = share(len(samples), args.batch_size)
    first = rank_and_world()[0] == 0

    if first and not args.json:
        what = f"{loading.title(args, model)} on {args.data}"
        print(f"{what}: {counted(len(samples), 'image')}, {len(outputs)} classes, matched by {rule}")
        print(TABLE, flush=True)
    rows = []
    reported: set[str] = set()
    common = settings(args, model, samples, truth)
    for transform in transforms:
        row = common | describe(transform)
        known = next((old for old in before if row.items() <= old.items()), None)
        if known is None:
            row |= {"model": args.model, "data": args.data, "classes": rule}
            part = count(model, transform, [samples[i][0] for i in own], truth[own], args.batch_size, reported)
            row |= figures(gather([part]), len(samples))
            if first and args.results is not None:
                append_result(args.results, row)
        rows.append(known or row)
        if first:
            show(rows[-1], args, reused=known is not None)
    if not first:
        return 0
    if args.plot is not None:
        plots.save(plots.accuracy(rows, model.config.patch_size, model.config.num_prefix_tokens), args.plot)
    if failures := max(row["unreadable"] for row in rows):
        print(f"vit evaluate: {failures} of {counted(len(samples), 'image')} could not be used", file=sys.stderr)
    return 1 if failures else 0


def show(row: dict[str, Any], args: argparse.Namespace, reused: bool) -> None:
    """Print a finished row at once."""
    if args.json:
        print(json.dumps(row | {"reused": reused}), flush=True)
        return
    low, high = row["interval"]
    tokens = "-" if row["tokens"] is None else format(row["tokens"], ".0f")
    print(
        f"{row['size']:10} {tokens:>8} {row['ms_per_image']:10.3f} {row['top1']:9.2%}"
        f"   {f'{low:.2%} to {high:.2%}':17} {row['top5']:9.2%}   ({row['right']} of {row['images']})"
        + (f"   from {args.results}" if reused else ""),
        flush=True,
    )


def make_transforms(model: Model, args: argparse.Namespace) -> list[Transform]:
    """One transform per size, all checked before the first is used. --mode and --crop-pct do not apply to "native"."""
    if all(size == "native" for size in args.img_size) and (args.mode or args.crop_pct):
        raise ValueError("--img-size native neither crops nor squashes, so --mode and --crop-pct cannot go with it")
    mode = "squash" if args.mode is None and args.crop_pct is None and args.data == DIGITS else args.mode
    transforms = []
    for size in args.img_size:
        if size == "native":
            transforms.append(create_transform(model, mode="native", max_tokens=args.max_tokens))
            continue
        transform = create_transform(model, size, args.crop_pct, mode, args.max_tokens)
        assert isinstance(transform.size, tuple)
        patches = math.prod(side // model.config.patch_size for side in transform.size)
        if args.max_tokens is not None and patches > args.max_tokens:  # every image would be refused
            raise ValueError(f"size {size_name(transform)} makes {patches} patches, more than {args.max_tokens}")
        transforms.append(transform)
    return transforms


def settings(args: argparse.Namespace, model: Model, samples: Sequence[Sample], truth: Tensor) -> dict[str, Any]:
    """All that a measurement depends on, except the transform; "digest" stands for the images and their classes.

    What was read of the file is among it, because a file beside the weights or a newer version can read it otherwise.
    """
    digest = hashlib.sha256()
    for (image, _), label in zip(samples, truth.tolist()):
        facts: list[Any] = [hashlib.sha256(image.tobytes()).hexdigest()] if isinstance(image, Image.Image) else []
        if isinstance(image, Path):  # by size and time: hashing the content would mean reading all of it
            facts = [image.relative_to(args.data).as_posix(), image.stat().st_size, image.stat().st_mtime_ns]
        digest.update(f"{json.dumps([*facts, label])}\n".encode())
    source = model.provenance
    reading = [*args.settings, *([("runtime", args.runtime)] if args.runtime else [])]
    return {
        "sha256": source and source.sha256, "part": source and source.part,
        "config": json.loads(json.dumps(model.config.to_dict())),  # tuples as lists, as in a row that was read
        "reading": [args.layout, args.prefix, *(f"{name}={value}" for name, value in reading)],
        "digest": digest.hexdigest(), "max_tokens": args.max_tokens, "dtype": args.dtype,
        "optimize": loading.optimized(model), "device": str(args.device), "batch_size": args.batch_size,
    }  # fmt: skip


def describe(transform: Transform) -> dict[str, Any]:
    """The size and how images are brought to it and normalised, for one row."""
    return {
        "size": size_name(transform), "mode": transform.mode, "crop_pct": transform.crop_pct,
        "interpolation": transform.interpolation, "mean": list(transform.mean), "std": list(transform.std),
    }  # fmt: skip


def read_results(file: Path) -> list[dict[str, Any]]:
    """The rows measured before; the file is created if it does not exist.

    Raises:
        OSError: a file that cannot be read or written.
        ValueError: a line that is not a row.
    """
    file.open("a").close()  # fail now rather than after an hour
    rows = []
    for i, text in enumerate(file.read_bytes().splitlines(), start=1):
        row = None
        with suppress(ValueError, RecursionError):
            row = json.loads(text)
        if not isinstance(row, dict) or not {"size", "top1", "interval", "unreadable"} <= row.keys():
            raise ValueError(
                f"line {i} of {file} is not a result of vit evaluate: remove the line, or choose another file"
            )
        rows.append(row)
    return rows


def append_result(file: Path, row: dict[str, Any]) -> None:
    """Add one row to a file of JSON lines."""
    with file.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(row) + "\n")
