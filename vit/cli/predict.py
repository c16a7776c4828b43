"""`vit predict`: images in, labels out."""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from vit.image import ImageError, create_transform
from vit.resources import imagenet_categories, imagenet_synsets

from . import loading, options, runtime
from .images import Decoded, batches, counted, decode, find_images, progress, usable
from .loading import Model
from .processes import in_order, share, sharing


def add_parser(commands: Any) -> None:
    """Declare the command and its options."""
    parser = commands.add_parser(
        "predict", help="label images", description="Print the most probable labels of images."
    )
    options.add_images(parser)
    options.add_model(parser)
    loading.add_trust(parser)
    options.add_reading(parser)
    options.add_size(parser)
    parser.add_argument(
        "-k", "--top-k", type=options.positive, default=5, help="labels per image; default: %(default)s"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object per line and image")
    options.add_compute(parser)
    loading.add_optimize(parser)
    runtime.add_runtime(parser, "logits")
    runtime.add_pixels(parser)
    parser.set_defaults(run=run)


@sharing()
def run(args: argparse.Namespace) -> int:
    """Find the images, load the model, print the labels batch by batch."""
    paths = find_images(args.images)
    sizing = options.sizing(args)
    model = loading.load(args)
    if model.config.num_classes == 0:
        raise ValueError(f"{args.model} has no classifier, so there is nothing to predict")
    if model.config.num_classes == 1:
        raise ValueError(
            f"{args.model} gives one number, of which a softmax is 100 % for every image: call it in Python, and take"
            " the sigmoid if it is a logit"
        )
    transform = create_transform(model, **sizing)
    own = [paths[i] for i in share(len(paths), args.batch_size)]
    found = (
        answer
        for batch in batches(decode(own, transform), args.batch_size, transform)
        for answer in label(model, batch, args.top_k, packed=transform.mode == "native")
    )

    failures = 0
    with progress(len(paths)) as bar:
        for path, outcome in in_order(found, len(paths), args.batch_size):
            failures += isinstance(outcome, ImageError)
            report(path, outcome, args.json, bar)
            bar.update()
    if failures:
        print(f"vit predict: {failures} of {counted(len(paths), 'image')} could not be used", file=sys.stderr)
    return 1 if failures else 0


@torch.inference_mode()
def label(
    model: Model, batch: list[Decoded], top_k: int, packed: bool
) -> Iterator[tuple[Path, list[dict] | ImageError]]:
    """The `top_k` most probable classes of each image of a batch, in its order; `packed` if the sizes differ."""
    rows: Iterator[Tensor] = iter(())
    if images := usable(batch, model):
        logits = model.forward_packed(images) if packed else model(torch.stack(images))  # [B, classes]
        rows = iter(logits.float().softmax(dim=-1).cpu())
    for path, outcome in batch:
        yield path, outcome if isinstance(outcome, ImageError) else describe(model, next(rows), top_k)


def describe(model: Model, probabilities: Tensor, top_k: int) -> list[dict]:
    """The most probable classes: number, probability, the label if known, and the synset for ImageNet's classes."""
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
    """Print one image's answers above the progress bar; errors go to stderr."""
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
