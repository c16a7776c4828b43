"""`vit predict`: images in, labels out."""

import argparse
import glob
import json
import os
import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from vit.image import ImageError, Transform, create_transform, load_image
from vit.model import ViT
from vit.packed import BUDGET
from vit.resources import imagenet_categories, imagenet_synsets

from . import loading, options

# What counts as an image when a folder is searched; a file that is named is read whatever its ending.
ENDINGS = {
    ".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pnm", ".jp2", ".avif",
}  # fmt: skip

Decoded = tuple[Path, Tensor | ImageError]  # a file, and its pixels or what is wrong with it


def add_parser(commands: Any) -> None:
    """Declare the command and its options."""
    parser = commands.add_parser("predict", help="label images", description="Label images: files, folders, globs.")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="files, folders (searched through) or globs")
    options.add_model(parser)
    options.add_reading(parser)
    options.add_size(parser)
    parser.add_argument("-k", "--top-k", type=options.positive, default=5, help="labels per image (%(default)s)")
    parser.add_argument("--json", action="store_true", help="one JSON object per line and image")
    options.add_compute(parser)
    loading.add_optimize(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Find the images, load the model, print labels as they come."""
    paths = find_images(args.images)
    sizing = options.sizing(args)
    model = loading.load(args)
    if model.config.num_classes == 0:
        raise ValueError(f"{args.model} has no classifier, so there is nothing to predict")
    transform = create_transform(model, **sizing)

    failures = 0
    shown = len(paths) > 1 and sys.stderr is not None and sys.stderr.isatty()
    with warnings.catch_warnings(), tqdm(total=len(paths), unit="image", leave=False, disable=not shown) as bar:
        warnings.filterwarnings("ignore", module="PIL")  # what cannot be read is reported; the rest was read
        for batch in batches(decode(paths, transform), args.batch_size, transform):
            for path, outcome in label(model, batch, args.top_k, packed=transform.mode == "native"):
                failures += isinstance(outcome, ImageError)
                report(path, outcome, args.json, bar)
                bar.update()
    if failures:
        print(f"vit predict: {failures} of {len(paths)} could not be used", file=sys.stderr)
    return 1 if failures else 0


def find_images(arguments: Iterable[str]) -> list[Path]:
    """Files as they are named; the images in folders and matches of globs, sorted.

    Raises:
        ValueError: an empty name, a folder without images, or a glob without a match.
    """
    paths: list[Path] = []
    for argument in arguments:
        path = Path(argument)
        if not argument:
            raise ValueError("expected the name of an image, a folder or a glob, not ''")
        if path.is_dir():
            found = sorted(file for file in path.rglob("*") if file.suffix.lower() in ENDINGS and file.is_file())
            if not found:
                raise ValueError(f"the folder {argument} holds no images")
        elif not path.exists() and glob.has_magic(argument):
            found = sorted(Path(match) for match in glob.glob(argument, recursive=True) if os.path.isfile(match))
            if not found:
                raise ValueError(f"no file matches {argument}")
        else:
            found = [path]
        paths += found
    return paths


def decode(paths: Iterable[Path], transform: Callable[[Image.Image], Tensor]) -> Iterator[Decoded]:
    """Read and transform images in the order of `paths`, in threads that stay a little ahead of the model."""

    def prepare(path: Path) -> Decoded:
        try:
            return path, transform(load_image(path))
        except ImageError as error:
            return path, error
        except ValueError as error:  # a readable image that the transform refuses
            return path, ImageError(f"{path}: {error}")

    workers = min(8, os.cpu_count() or 1)
    with ThreadPoolExecutor(workers) as pool:
        ahead: deque = deque()
        try:
            for path in paths:
                ahead.append(pool.submit(prepare, path))
                if len(ahead) > 2 * workers:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def batches(items: Iterable[Decoded], size: int, transform: Transform) -> Iterator[list[Decoded]]:
    """Neighbours in groups of `size`; files that could not be used ride along.

    Images at their own sizes make smaller groups, as many as go through the model at a time.
    """
    batch: list[Decoded] = []
    tokens = 0
    for item in items:
        if transform.mode == "native" and isinstance(item[1], Tensor):
            more = item[1].shape[1] * item[1].shape[2] // transform.patch_size**2
            if batch and tokens + more > BUDGET:
                yield batch
                batch, tokens = [], 0
            tokens += more
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch, tokens = [], 0
    if batch:
        yield batch


@torch.inference_mode()
def label(model: ViT, batch: list[Decoded], top_k: int, packed: bool) -> Iterator[tuple[Path, list[dict] | ImageError]]:
    """The `top_k` most probable classes of each image of a batch, in its order; `packed` where their sizes differ."""
    tensors = [outcome for _, outcome in batch if isinstance(outcome, Tensor)]
    rows: Iterator[Tensor] = iter(())
    if tensors:
        weights = model.patch_embed.proj.weight
        tensors = [tensor.to(weights.device, weights.dtype) for tensor in tensors]
        logits = model.forward_packed(tensors) if packed else model(torch.stack(tensors))  # [B, classes]
        rows = iter(logits.float().softmax(dim=-1).cpu())
    for path, outcome in batch:
        yield path, outcome if isinstance(outcome, ImageError) else describe(model, next(rows), top_k)


def describe(model: ViT, probabilities: Tensor, top_k: int) -> list[dict]:
    """The most probable classes: number, label (and synset, for ImageNet's) and probability."""
    values, classes = probabilities.topk(min(top_k, len(probabilities)))
    synsets = imagenet_synsets() if model.categories == imagenet_categories() else None
    answers = []
    for value, index in zip(values.tolist(), classes.tolist()):
        answer: dict[str, Any] = {"class": index, "probability": value}
        if model.categories is not None:
            answer["label"] = model.categories[index]
        if synsets is not None:
            answer["synset"] = synsets[index]
        answers.append(answer)
    return answers


def report(path: Path, outcome: list[dict] | ImageError, as_json: bool, bar: tqdm) -> None:
    """Print one image's answers, above the progress bar; errors go to stderr."""
    if isinstance(outcome, ImageError):
        bar.write(f"vit predict: {outcome}", file=sys.stderr)
        if as_json:
            bar.write(json.dumps({"path": str(path), "error": str(outcome)}), file=sys.stdout)
        return
    if as_json:
        bar.write(json.dumps({"path": str(path), "predictions": outcome}), file=sys.stdout)
        return
    lines = [str(path)]
    for answer in outcome:
        name = answer.get("label", f"class {answer['class']}")
        synset = f"  {answer['synset']}" if "synset" in answer else ""
        lines.append(f"  {answer['probability']:7.2%}{synset}  {name}")
    bar.write("\n".join(lines), file=sys.stdout)
