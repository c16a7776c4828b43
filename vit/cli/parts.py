"""Labelled features in three parts, to fit, to choose and to test: computed from images, or read from files."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from vit.image import ImageError, Transform, create_transform
from vit.model import ViT
from vit.probe import columns, extract

from . import loading, options
from .accuracy import read
from .datasets import DIGITS, Sample
from .images import batches, counted, progress, usable
from .splits import check_classes, find_splits, hold_out
from .stored import Stored, check_same, is_stored, read_features


@dataclass(frozen=True)
class Part:
    """Labelled images and their features, [images, columns] float32 on the CPU."""

    samples: list[Sample]
    rows: Tensor


@dataclass(frozen=True)
class Data:
    """What a probe is fitted on, what chooses its k or lambda, and what it is tested on."""

    fit: Part
    choice: Part
    test: Part
    kinds: dict[str, slice]  # of features, with their columns
    failures: int  # images that could not be used
    how: str  # where the images to test on come from


def from_images(args: argparse.Namespace) -> tuple[ViT, Transform, Data]:
    """The features of images, computed."""
    if args.test is not None:
        raise ValueError("--test goes with files of features: images to test on lie in test/ or val/ beside train/")
    args.model = args.model or options.DEFAULT_MODEL
    sizing = options.sizing(args)
    if args.data == DIGITS and args.mode is None and args.crop_pct is None and args.img_size != "native":
        sizing["mode"] = "squash"  # a crop would cut off strokes
    splits = find_splits(args.data, args.holdout, args.seed)
    fit, choice, test = splits.train, splits.val, splits.test
    if not test:
        fit, choice, test = *hold_out(fit, args.holdout, args.seed), choice
    model = loading.load_vit(args)
    if args.output is not None and loading.optimized(model):
        raise ValueError(f"{args.model} is optimized, so --output cannot save it: give the original checkpoint")
    transform = create_transform(model, **sizing)
    asked = (fit, choice, test)
    with progress(sum(map(len, asked))) as bar:
        parts = [compute(model, transform, samples, args.batch_size, bar) for samples in asked]
    check_parts(args.data, asked, parts)
    failures = sum(map(len, asked)) - sum(len(part.samples) for part in parts)
    return model, transform, Data(parts[0], parts[1], parts[2], columns(model), failures, splits.how)


def compute(model: ViT, transform: Transform, samples: list[Sample], batch_size: int, bar: tqdm) -> Part:
    """The features of those images that can be read; the others are reported."""
    used: list[Sample] = []
    rows: list[Tensor] = []
    seen = 0
    for batch in batches(read([image for image, _ in samples], transform), batch_size, transform):
        inputs = usable(batch, model)
        if inputs:
            rows += extract(model, inputs if transform.mode == "native" else torch.stack(inputs)).float().cpu()
        for sample, (path, outcome) in zip(samples[seen : seen + len(batch)], batch):
            if isinstance(outcome, ImageError):
                bar.write(f"vit probe: {outcome}", file=sys.stderr)
                continue
            if not rows[len(used)].isfinite().all():
                dtype = inputs[0].dtype
                raise ValueError(f"the features of {path} are NaN or infinite in {dtype}: try --dtype float32")
            used.append(sample)
        seen += len(batch)
        bar.update(len(batch))
    return Part(used, torch.stack(rows) if rows else torch.empty(0, 0))


def check_parts(data: str, asked: Sequence[list[Sample]], parts: Sequence[Part]) -> None:
    """Refuse a part, or a class, of which no image could be read."""
    for part in parts:
        if not part.samples:
            raise ValueError(f"too few images of {data} can be used: there must be some to fit, to choose and to test")
    fit, choice, test = (part.samples for part in parts)
    if lost := sorted({name for _, name in asked[0] + asked[1]} - {name for _, name in fit + choice}):
        raise ValueError(f"none of the training images of the class {lost[0]!r} can be used")
    check_classes(data, fit + choice, [], test)


def from_features(args: argparse.Namespace) -> tuple[ViT | None, Transform | None, Data]:
    """The features of one file, or of two; the model only if --model or --output asks for it."""
    if args.test is not None and not is_stored(args.test):
        raise ValueError(f"--test takes a .safetensors file of vit features, as DATA is one, got {args.test}")
    stored = [read_features(name) for name in (args.data, args.test) if name is not None]
    for other in stored[1:]:
        check_same(other.file, other.settings, stored[0].settings)
        if both := {str(path) for path, _ in stored[0].samples} & {str(path) for path, _ in other.samples}:
            raise ValueError(f"{min(both)} is in {args.data} and in {args.test}: it would be fitted and tested")
    model, transform = load_same(stored[0], args) if args.model or args.output else (None, None)
    if model is None and (args.img_size or args.mode or args.max_tokens):
        raise ValueError("features were computed at a size already: --img-size, --mode and --max-tokens need --model")
    args.model = args.model or stored[0].settings["model"]
    check_classes(args.data, stored[0].samples, [], stored[1].samples if stored[1:] else [])

    skipped = [reason for one in stored for reason in one.skipped]
    for reason in skipped:
        print(f"vit probe: {reason} (when the features were written)", file=sys.stderr)
    train, test = (
        (one.samples for one in stored) if stored[1:] else hold_out(stored[0].samples, args.holdout, args.seed)
    )
    how = args.test if stored[1:] else f"{counted(len(test), 'image')} held out, drawn by class with seed {args.seed}"
    rows = {str(path): row for one in stored for (path, _), row in zip(one.samples, one.rows)}
    parts = [
        Part(samples, torch.stack([rows[str(path)] for path, _ in samples]))
        for samples in (*hold_out(train, args.holdout, args.seed), test)
    ]
    return model, transform, Data(parts[0], parts[1], parts[2], {stored[0].name: slice(None)}, len(skipped), how)


def load_same(stored: Stored, args: argparse.Namespace) -> tuple[ViT, Transform]:
    """The model that the features are of, and the transform that their images went through."""
    args.model = args.model or stored.settings["model"]
    args.prefix = args.prefix or stored.settings["prefix"] or None
    model = loading.load_vit(args)
    transform = create_transform(model, **options.sizing(args))
    sha256 = None if model.provenance is None else model.provenance.sha256
    if str(sha256) != stored.settings["model_sha256"]:
        raise ValueError(f"{stored.file} holds features of another model, {stored.settings['model']}, not {args.model}")
    if args.output is not None and (stored.settings["computed"], stored.settings["optimize"]) != ("float32", "None"):
        raise ValueError(
            f"the features of {stored.file} were not computed by the model in float32, which --output saves"
        )
    if repr(transform) != stored.settings["transform"]:
        raise ValueError(
            f"the features of {stored.file} were computed with {stored.settings['transform']}, not {transform}:"
            " give the same --img-size, --mode, --crop-pct and --max-tokens"
        )
    return model, transform
