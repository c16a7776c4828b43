"""`vit evaluate`: how often a model is right, at one image size or several."""

import argparse
import hashlib
import json
import math
import statistics
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from vit.image import ImageError, Transform, create_transform
from vit.model import ViT

from . import loading, options
from .datasets import DIGITS, Sample, draw_samples, find_samples, match
from .plots import check_plot, figure_class
from .predict import Decoded, batches, decode

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
    options.add_reading(parser)
    add_sizes(parser)
    parser.add_argument(
        "--class-map", type=Path, metavar="FILE",
        help="a text file: the sub-folder of the model's first output in line 1, and so on; or 'name index' in each",
    )  # fmt: skip
    parser.add_argument("--limit", type=options.positive, metavar="N", help="take N images, drawn at random")
    parser.add_argument("--seed", type=int, default=0, help="of that draw (%(default)s)")
    parser.add_argument("--json", action="store_true", help="one JSON object per line and size")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw accuracy against size: .png, .svg or .pdf")
    parser.add_argument(
        "--results", type=Path, metavar="FILE",
        help="add each finished size to this file of JSON lines, and take from it what was measured before",
    )  # fmt: skip
    options.add_compute(parser)
    loading.add_optimize(parser)
    parser.set_defaults(run=run)


def add_sizes(parser: argparse.ArgumentParser) -> None:
    """--img-size, here a list, --mode, --crop-pct and --max-tokens: what becomes of an image's sides."""
    parser.add_argument(
        "--img-size", type=image_sizes, default=[None], metavar="SIZES",
        help="separated by commas: 384, 224x448 (height x width) or native; default: the model's own",
    )  # fmt: skip
    parser.add_argument(
        "--mode", choices=("crop", "squash"),
        help="how to get there from another shape; default: the model's own, and squash for digits",
    )  # fmt: skip
    parser.add_argument("--crop-pct", type=float, metavar="SHARE", help="of the resized image that a crop keeps")
    parser.add_argument("--max-tokens", type=options.positive, metavar="N", help="refuse images of more patches")


def image_sizes(text: str) -> list[int | tuple[int, int] | str]:
    """ "384,224x448,native" -> [384, (224, 448), "native"], for argparse."""
    return [options.image_size(part) for part in text.split(",")]


def run(args: argparse.Namespace) -> int:
    """Find the images, load the model, print one row per size as it is finished."""
    if args.plot is not None:
        check_plot(args.plot)
    before = [] if args.results is None else read_results(args.results)
    samples = find_samples(args.data)
    model = loading.load(args)
    if model.config.num_classes == 0:
        raise ValueError(f"{args.model} has no classifier, so there is nothing to evaluate")
    transforms = make_transforms(model, args)
    outputs, rule = match(samples, model, args.data, args.class_map)
    samples = draw_samples(samples, args.limit, args.seed)
    truth = torch.tensor([outputs[name] for _, name in samples])  # [images]

    if not args.json:
        what = loading.title(args, model)
        print(f"{what} on {args.data}: {len(samples)} images, {len(outputs)} classes, matched by {rule}")
        print(TABLE, flush=True)
    rows = []
    reported: set[str] = set()
    common = settings(args, model, samples, truth)
    for transform in transforms:
        row = common | describe(transform)
        known = next((old for old in before if row.items() <= old.items()), None)
        if known is None:
            row |= {"model": args.model, "data": args.data, "classes": rule}
            row |= measure(model, transform, [image for image, _ in samples], truth, args.batch_size, reported)
            if args.results is not None:
                append_result(args.results, row)
        rows.append(known or row)
        show(rows[-1], args, reused=known is not None)
    if args.plot is not None:
        plot(rows, model.config.patch_size, model.config.num_prefix_tokens, args.plot)
    if failures := max(row["unreadable"] for row in rows):
        print(f"vit evaluate: {failures} of {len(samples)} could not be used", file=sys.stderr)
    return 1 if failures else 0


def show(row: dict[str, Any], args: argparse.Namespace, reused: bool) -> None:
    """Print a finished row, at once: it is kept whatever becomes of the rest."""
    if args.json:
        print(json.dumps(row | {"reused": reused}), flush=True)
        return
    low, high = row["interval"]
    print(
        f"{row['size']:10} {row['tokens']:8.0f} {row['ms_per_image']:10.3f} {row['top1']:9.2%}"
        f"   {f'{low:.2%} to {high:.2%}':17} {row['top5']:9.2%}   ({row['right']} of {row['images']})"
        + (f"   from {args.results}" if reused else ""),
        flush=True,
    )


def make_transforms(model: ViT, args: argparse.Namespace) -> list[Transform]:
    """One transform per size; all are checked before the first is used. --mode and --crop-pct are not for "native"."""
    if all(size == "native" for size in args.img_size) and (args.mode or args.crop_pct):
        raise ValueError("--img-size native cuts and squashes nothing, so neither --mode nor --crop-pct can go with it")
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


def size_name(transform: Transform) -> str:
    """ "224x448" (height x width) or "native"."""
    return "x".join(map(str, transform.size)) if isinstance(transform.size, tuple) else "native"


@torch.inference_mode()
def measure(
    model: ViT,
    transform: Transform,
    images: Sequence[Path | Image.Image],
    truth: Tensor,
    batch_size: int,
    reported: set[str],
) -> dict[str, Any]:
    """Classify labelled images at one size.

    Args:
        images: as files, or in memory.
        truth: [images] int64, the model's right output for each.
        reported: the errors that were printed already, so that each is printed once; added to.

    Returns:
        "images", which could be read, and "unreadable", "right" (top-1) and "right5" (top-5); of those that could be
        read, the shares "top1" and "top5", "interval" (95 %, of top1), "tokens" per image (patches, class token ...)
        and "ms_per_image" of the forward pass alone: the median of the batches, the first left out if there are more.

    Raises:
        ValueError: none of the images can be read, or logits are not numbers.
    """
    total = right = right5 = tokens = seen = 0
    times = []
    shown = sys.stderr is not None and sys.stderr.isatty()
    with warnings.catch_warnings(), tqdm(total=len(images), unit="image", leave=False, disable=not shown) as bar:
        warnings.filterwarnings("ignore", module="PIL")  # what cannot be read is reported; the rest was read
        bar.set_description(size_name(transform))
        for batch in batches(read(images, transform), batch_size, transform):
            usable = torch.tensor([isinstance(outcome, Tensor) for _, outcome in batch])
            labels = truth[seen : seen + len(batch)][usable]  # [B]
            seen += len(batch)
            report([outcome for _, outcome in batch if isinstance(outcome, ImageError)], reported, bar)
            bar.update(len(batch))
            if len(labels) == 0:
                continue
            inputs = [outcome for _, outcome in batch if isinstance(outcome, Tensor)]
            logits, seconds = forward(model, inputs, packed=transform.mode == "native")
            times.append(seconds / len(labels))
            total += len(labels)
            right += int((logits.argmax(dim=1) == labels).sum())
            best = logits.topk(min(5, logits.shape[1]), dim=1).indices  # [B, 5]
            right5 += int((best == labels[:, None]).sum())
            tokens += sum(model.config.num_prefix_tokens + math.prod(model.grid_of(image[None])) for image in inputs)
    if total == 0:
        raise ValueError(f"none of the {len(images)} images can be used")
    return {
        "images": total, "unreadable": len(images) - total, "right": right, "right5": right5,
        "top1": right / total, "interval": list(wilson(right, total)), "top5": right5 / total,
        "tokens": tokens / total, "ms_per_image": 1000 * statistics.median(times[1:] or times),
    }  # fmt: skip


def read(images: Sequence[Path | Image.Image], transform: Transform) -> Iterator[Decoded]:
    """Transformed images, in their order: files through threads, those in memory at once."""
    if paths := [image for image in images if isinstance(image, Path)]:
        return decode(paths, transform)
    return ((Path(DIGITS), transform(image)) for image in images if isinstance(image, Image.Image))


def report(errors: Iterable[ImageError], reported: set[str], bar: tqdm) -> None:
    """Print errors that were not printed before, above the progress bar."""
    for error in errors:
        if str(error) not in reported:
            bar.write(f"vit evaluate: {error}", file=sys.stderr)
            reported.add(str(error))


def forward(model: ViT, images: list[Tensor], packed: bool) -> tuple[Tensor, float]:
    """[B, classes] float32 logits on the CPU, and the seconds that the model took; `packed` where sizes differ."""
    weights = model.patch_embed.proj.weight
    images = [image.to(weights.device, weights.dtype) for image in images]
    batch = None if packed else torch.stack(images)  # [B, C, H, W]
    wait(weights.device)
    start = time.perf_counter()
    logits = model.forward_packed(images) if batch is None else model(batch)  # [B, classes]
    wait(weights.device)
    seconds = time.perf_counter() - start
    if logits.isnan().any():  # argmax would still name a class
        raise ValueError(f"the model's logits are not numbers (NaN) in {weights.dtype}: try --dtype float32")
    return logits.float().cpu(), seconds


def wait(device: torch.device) -> None:
    """Until a device has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def wilson(right: int, total: int) -> tuple[float, float]:
    """The 95 % interval of a share, by Wilson's score: it keeps its width where all are right."""
    z = statistics.NormalDist().inv_cdf(0.975)
    share, weight = right / total, z * z / total
    middle = (share + weight / 2) / (1 + weight)
    half = z / (1 + weight) * math.sqrt(share * (1 - share) / total + weight / total / 4)
    return max(0.0, min(share, middle - half)), min(1.0, max(share, middle + half))  # rounding may miss 0 % and 100 %


def settings(args: argparse.Namespace, model: ViT, samples: Sequence[Sample], truth: Tensor) -> dict[str, Any]:
    """What a measurement depends on, but for the size; "digest" stands for the images and their classes."""
    digest = hashlib.sha256()
    for (image, _), label in zip(samples, truth.tolist()):
        facts: list[Any] = [hashlib.sha256(image.tobytes()).hexdigest()] if isinstance(image, Image.Image) else []
        if isinstance(image, Path):  # not by content, which would have to be read for that
            facts = [image.relative_to(args.data).as_posix(), image.stat().st_size, image.stat().st_mtime_ns]
        digest.update(f"{json.dumps([*facts, label])}\n".encode())
    return {
        "sha256": model.provenance.sha256 if model.provenance else None,
        "reading": [args.layout, args.prefix, *(f"{name}={value}" for name, value in args.settings)],
        "digest": digest.hexdigest(), "max_tokens": args.max_tokens, "dtype": args.dtype,
        "optimize": loading.optimized(model), "device": str(args.device), "batch_size": args.batch_size,
    }  # fmt: skip


def describe(transform: Transform) -> dict[str, Any]:
    """The size, and how images are brought to it, for one row."""
    return {"size": size_name(transform), "mode": transform.mode, "crop_pct": transform.crop_pct}


def read_results(file: Path) -> list[dict[str, Any]]:
    """The rows that were measured before; a file that is not there is made.

    Raises:
        OSError, ValueError: a file that cannot be read or written, or a line that is no row.
    """
    file.open("a").close()  # better now than after an hour
    rows = []
    for i, text in enumerate(file.read_bytes().splitlines(), start=1):
        row = None
        with suppress(ValueError, RecursionError):
            row = json.loads(text)
        if not isinstance(row, dict) or not {"size", "top1", "interval", "unreadable"} <= row.keys():
            raise ValueError(f"line {i} of {file} is no result of vit evaluate: remove it, or name another file")
        rows.append({"optimize": None} | row)  # files from before that option do not say
    return rows


def append_result(file: Path, row: dict[str, Any]) -> None:
    """Add one row to a file of JSON lines."""
    with file.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(row) + "\n")


def plot(rows: Sequence[dict[str, Any]], patch_size: int, prefix_tokens: int, file: Path) -> None:
    """Draw top-1, with its interval, and top-5 against the side of a square of as many patches."""
    sides: dict[float, list[str]] = {}  # 32x48 and 48x32 share a place
    points = []
    for row in rows:
        side = patch_size * math.sqrt(row["tokens"] - prefix_tokens)
        sides.setdefault(side, []).append(row["size"])
        low, high = row["interval"]
        points.append((side, 100 * row["top1"], 100 * (row["top1"] - low), 100 * (high - row["top1"]), row["top5"]))
    x, top1, below, above, top5 = zip(*sorted(points))
    figure = figure_class()(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(x, [100 * share for share in top5], "s--", color="0.6", label="top-5")
    axes.errorbar(x, top1, (below, above), fmt="o-", capsize=3, label="top-1, 95 % interval")
    axes.set_xticks(list(sides), ["\n".join(dict.fromkeys(names)) for names in sides.values()])
    axes.set_xlabel("image size")
    axes.set_ylabel("accuracy in %")
    axes.set_title(f"{Path(rows[0]['model']).name} on {Path(rows[0]['data']).name}")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=150)
