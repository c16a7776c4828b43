"""`vit finetune`: from a folder of labelled images to a fine-tuned checkpoint."""

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from vit.image import create_transform
from vit.model import ViT
from vit.training import RECIPES, Recipe, balanced, train
from vit.training.distributed import STRATEGIES, rank_and_world
from vit.training.run import read_log
from vit.training.setup import check

from . import options, plots
from .accuracy import measure
from .images import counted
from .overfit import overfit
from .plan import describe, digest, load, make_recipe
from .processes import processes
from .splits import find_splits

TABLE = "    step   epoch       loss   val loss   accuracy   balanced   images/s"
HELP = {
    "opt": "adamw or sgd",
    "lr": "the highest learning rate, absolute: it is not scaled by the batch size",
    "weight_decay": "of matrices; vectors, tokens and the position embedding have none",
    "layer_decay": "each block's rate as a share of the next one's",
    "momentum": "of sgd",
    "steps": "updates of the weights",
    "warmup_steps": "of them with a rising rate; default: a tenth",
    "batch_size": "images per step, over all processes",
    "grad_accum_steps": "compute a step's images in N parts, to save memory",
    "clip_grad": "the largest norm of the gradient; 0: no limit",
    "smoothing": "of labels",
    "mixup": "the parameter alpha of mixup; 0: none",
    "drop_path": "stochastic depth of the last block, rising linearly from 0",
    "model_ema_decay": "save an average of the weights with this decay, such as 0.9999; 0: none",
    "scale": "random crops cover at least this share of an image",
    "hflip": "how often images are mirrored",
    "freeze": "do not train patches, positions and the first N blocks; -1: train only the head",
    "amp": "compute in bfloat16 or float16",
    "seed": "of all that is drawn",
}


def add_parser(commands: Any) -> None:
    """Declare the command and its options."""
    parser = commands.add_parser(
        "finetune",
        help="train a model on your own classes",
        description="Fine-tune a model on labelled images. The same command resumes a run that was interrupted, and"
        " ends with the same weights.",
    )
    parser.add_argument(
        "data", metavar="DATA",
        help="a folder with train/ and val/ (and test/), each of one sub-folder per class; or one sub-folder per class;"
        " or a CSV file of path,label; or digits: the bundled images",
    )  # fmt: skip
    options.add_model(parser)
    options.add_reading(parser)
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER", help="the run's folder")
    parser.add_argument(
        "--recipe", choices=RECIPES, default="adamw", help="where the options below start from; default: %(default)s"
    )
    parser.add_argument("--epochs", type=float, metavar="N", help="in place of --steps")
    for field in fields(Recipe):
        short = ["-b"] if field.name == "batch_size" else []
        kind = {"int": int, "float": float, "str": str}[str(field.type)]
        name = f"--{field.name.replace('_', '-')}"
        parser.add_argument(*short, name, type=kind, metavar="X", help=HELP[field.name])
    parser.add_argument(
        "--img-size", type=options.image_size, metavar="SIZE",
        help="384 or 224x448 (height x width); default: the model's own, and 384 for augreg",
    )  # fmt: skip
    parser.add_argument(
        "--holdout", type=float, default=0.2, metavar="SHARE",
        help="the share of the images to validate on, where there is no val/; default: %(default)s",
    )  # fmt: skip
    parser.add_argument("--balanced", action="store_true", help="let all classes count alike in the loss")
    parser.add_argument(
        "--head", choices=("new", "keep"),
        help="start from a head of zeros, or from the checkpoint's; default: keep it if it has the same classes",
    )  # fmt: skip
    parser.add_argument("--grad-checkpointing", action="store_true", help="use less memory and more time")
    parser.add_argument("--validate-every", type=options.positive, metavar="STEPS", help="default: an epoch")
    parser.add_argument("--save-every", type=options.positive, metavar="STEPS", help="default: --validate-every")
    parser.add_argument(
        "--max-bad", type=options.natural, default=10, metavar="N",
        help="leave out up to N unreadable images; default: %(default)s",
    )  # fmt: skip
    parser.add_argument("--check", action="store_true", help="draw one batch, overfit it, and stop")
    parser.add_argument(
        "--device", type=options.auto_device, default="auto", help="auto, cpu, cuda, mps ... default: %(default)s"
    )
    parser.add_argument(
        "-j", "--workers", type=options.natural, default=0, metavar="N", help="processes that prepare images"
    )
    parser.add_argument("--strategy", choices=STRATEGIES, default="none", help="for several processes, see torchrun")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the plan, train, and evaluate the test images once."""
    if args.img_size == "native":
        raise ValueError("--img-size native makes no batches: give a size such as 224 or 224x448")
    if args.check and args.strategy != "none":
        raise ValueError("--check draws and overfits a batch in one process: leave out --strategy and torchrun")
    if args.output.exists() and not args.output.is_dir():
        raise ValueError(f"--output {args.output} is a file, expected a folder")
    if Path(args.data).is_dir() and args.output.resolve().is_relative_to(Path(args.data).resolve()):
        raise ValueError(f"--output {args.output} lies in {args.data}: its pictures would count as images of a class")
    with processes(args.device, args.strategy), heard():
        splits = find_splits(args.data, args.holdout, args.seed or 0)
        recipe = make_recipe(args, len(splits.train))
        model, head = load(args, splits.classes)
        check(model, recipe, len(splits.train), rank_and_world()[1])
        numbers = {name: i for i, name in enumerate(model.categories or [])}
        data, validation, test = (
            [(image, numbers[name]) for image, name in part] for part in (splits.train, splits.val, splits.test)
        )
        first = rank_and_world()[0] == 0
        if first:
            describe(args, recipe, splits, model, head)
        if args.check:
            return overfit(model, data, recipe, args.output, args.device)
        weights = balanced([label for _, label in data], len(numbers)) if args.balanced else None
        with resumable(args.output), Report(recipe, len(data), args.output / "log.jsonl") as report:
            train(
                model, data, recipe, args.output, validation=validation, class_weights=weights, device=args.device,
                strategy=args.strategy, workers=args.workers, validate_every=args.validate_every,
                save_every=args.save_every, max_bad=args.max_bad, log=report,
                facts={"parent": model.provenance and model.provenance.sha256, "data": digest(splits, args.data)},
            )  # fmt: skip
        if first:
            finish(args.output, test, args.device)
    return 0


@contextmanager
def heard() -> Iterator[None]:
    """Make a pipe that `head` has closed a failure, which it is not for a listing: the training is not done."""
    try:
        yield
    except BrokenPipeError as error:
        raise OSError("standard output was closed, which has ended the run; the same command goes on") from error


@contextmanager
def resumable(folder: Path) -> Iterator[None]:
    """Say what an interrupted run needs."""
    try:
        yield
    except KeyboardInterrupt:
        states = sorted(path.name for path in (folder / "state").glob("step-*[0-9]"))
        where = f"after step {int(states[-1][5:])}" if states else "from the start: no state was saved yet"
        print(f"vit finetune: the same command goes on {where}", file=sys.stderr)
        raise


class Report:
    """Shows a run's log: a bar, the time to expect after ten steps, and a row per validation."""

    def __init__(self, recipe: Recipe, images: int, file: Path) -> None:
        self.recipe, self.epoch, self.file = recipe, images // recipe.batch_size, file
        self.losses: list[float] = []  # of the steps since the last validation
        self.timed, self.seconds = 0, 0.0  # steps, without validations
        self.last: float | None = None  # when the last step ended

    def __enter__(self) -> Callable[[dict[str, Any]], None]:
        self.bar: tqdm | None = None
        return self.show

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def show(self, record: dict[str, Any]) -> None:
        """One line of the log."""
        if self.bar is None:
            print(TABLE, flush=True)
            first = record["step"] - 1
            rows = read_log(self.file)[:-1]  # of the run that this one goes on with
            since = max((i + 1 for i, row in enumerate(rows) if "loss" not in row), default=0)
            self.losses = [row["loss"] for row in rows[since:]]
            self.bar = tqdm(total=self.recipe.steps, initial=first, unit="step", leave=False, disable=None)
        if "loss" not in record:
            self.row(record)
            return
        now = time.perf_counter()
        if self.last is not None:  # not after a validation, whose time would count
            self.timed, self.seconds = self.timed + 1, self.seconds + now - self.last
            if self.timed == 10:
                left = self.seconds / 10 * (self.recipe.steps - record["step"])
                self.bar.write(f"about {duration(left)} to go, without validation")
        self.last = now
        self.losses.append(record["loss"])
        self.bar.update()

    def row(self, record: dict[str, Any]) -> None:
        """A validation, with the mean loss of the steps before it, and the rate of all steps."""
        assert self.bar is not None
        rate = self.recipe.batch_size * self.timed / self.seconds if self.timed else math.nan
        loss = sum(self.losses) / max(1, len(self.losses))
        self.bar.write(
            f"{record['step']:8} {record['step'] / self.epoch:7.1f} {loss:10.4f} {record['val_loss']:10.4f}"
            f" {record['accuracy']:10.2%} {record['balanced_accuracy']:10.2%} {rate:10.1f}"
        )
        self.losses, self.last = [], None


def duration(seconds: float) -> str:
    """Seconds in words."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def finish(folder: Path, test: list[Any], device: torch.device) -> None:
    """Draw the curves, judge the best weights on the test images, and say where everything is."""
    import vit

    rows = read_log(folder / "log.jsonl")
    best = max((row for row in rows if "accuracy" in row), key=lambda row: (row["accuracy"], -row["val_loss"]))
    print(f"{folder / 'model.safetensors'}: the last weights, step {rows[-1]['step']}")
    print(f"{folder / 'model_best.safetensors'}: {best['accuracy']:.2%} of the validation images, step {best['step']}")
    try:
        plots.save(plots.curves(rows), folder / "curves.png")
    except ValueError as error:  # matplotlib is not installed
        print(f"no {folder / 'curves.png'}: {error}")
    if test:
        model = vit.load_pretrained(folder / "model_best.safetensors", device=device)
        judge(model, test)


def judge(model: ViT, test: list[Any]) -> None:
    """Print the accuracy on the test images."""
    truth = torch.tensor([label for _, label in test])
    found = measure(model, create_transform(model), [image for image, _ in test], truth, 32, set())
    low, high = found["interval"]
    print(
        f"test: {found['top1']:.2%} of {counted(found['images'], 'image')} with these best weights"
        f" (95 % interval {low:.2%} to {high:.2%})"
    )
