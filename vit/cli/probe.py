"""`vit probe`: how well simple classifiers tell classes apart by a frozen model's features."""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vit.config import ViTConfig
from vit.image import Transform
from vit.model import ViT
from vit.probe import POOLS, fold, knn, ridge

from . import loading, options
from .accuracy import wilson
from .images import counted
from .parts import Data, from_features, from_images
from .stored import is_stored

NEIGHBOURS = (10, 20, 50, 100, 200)
LAMBDAS = tuple(10 ** (i / 2) for i in range(-4, 13))  # 0.01 to 1,000,000
TABLE = "features                    method   setting             chosen at   accuracy   95 % interval        seconds"


@dataclass(frozen=True)
class Result:
    """One row of the table; `chosen_at` is the accuracy on the images that choose, `right` counts test images."""

    features: str
    method: str
    setting: float  # k or lambda
    chosen_at: float
    right: int
    seconds: float
    linear: tuple[Tensor, Tensor] | None  # ridge's weight [C, D] and bias [C]


def add_parser(commands: Any) -> None:
    """Declare the command and its options."""
    parser = commands.add_parser(
        "probe",
        help="classify by frozen features: k-NN and ridge regression",
        description="Fit k nearest neighbours and ridge regression to a frozen model's features of labelled images, "
        "and print how often each is right. Nothing is trained. k and lambda are chosen on a part of the training "
        "images; then the probe is fitted to all of them.",
    )
    parser.add_argument(
        "data", metavar="DATA",
        help="a folder with train/ and val/ (or test/), each of one folder per class; one folder per class; a CSV file "
        "of path,label; digits: the bundled ones; or a .safetensors file of vit features, the images' folders being "
        "the classes",
    )  # fmt: skip
    parser.add_argument("--test", metavar="FILE", help="features to test on, if DATA is a file of features")
    parser.add_argument(
        "--holdout", type=float, default=0.2, metavar="SHARE",
        help="of each class, the part that chooses k and lambda, and the part to test on where there is neither val/ "
        "nor test/; default: %(default)s",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="random seed of that draw; default: %(default)s")
    parser.add_argument(
        "--k", type=options.listed(options.positive), default=list(NEIGHBOURS), metavar="NUMBERS",
        help="neighbours to choose from, separated by commas; default: " + ",".join(map(str, NEIGHBOURS)),
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="one JSON object per line and probe")
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FILE",
        help="save the model with the best ridge probe as its head, of those whose features a head reads: class, patch "
        "mean, or both",
    )  # fmt: skip
    parser.add_argument(
        "--model", metavar="NAME_OR_PATH",
        help="a name, or a checkpoint: a file or a folder in any known layout; default: the one that stored features "
        f"are of, else {options.DEFAULT_MODEL}",
    )  # fmt: skip
    options.add_reading(parser)
    options.add_size(parser)
    options.add_compute(parser)
    loading.add_optimize(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Compute or read the features, print one row per probe as soon as it is finished, fold the best one."""
    if not 0 < args.holdout < 1:
        raise ValueError(f"--holdout must lie between 0 and 1, not {args.holdout}")
    check_output(args)
    model, transform, data = from_features(args) if is_stored(args.data) else from_images(args)
    classes = sorted({name for _, name in data.fit.samples + data.choice.samples})
    if model is not None and args.output is not None and not any(can_hold(model.config, name) for name in data.kinds):
        raise ValueError(f"no head of {args.model} reads these features ({', '.join(data.kinds)}): leave out --output")
    if not args.json:
        fit, choice, test = (len(part.samples) for part in (data.fit, data.choice, data.test))
        print(f"{args.model} on {args.data}: {len(classes)} classes; {data.how}")
        print(f"{fit + choice} images to fit, of which {choice} first choose k and lambda; {test} to test")
        print(TABLE, flush=True)
    results = compare(data, classes, args)
    best = max(results, key=lambda result: result.chosen_at)
    if not args.json:
        print(f"best by the images that choose: {best.method} on {best.features}")
    if args.output is not None and model is not None and transform is not None:
        save(model, transform, results, classes, args)
    if data.failures:
        print(f"vit probe: {counted(data.failures, 'image')} could not be used", file=sys.stderr)
    return 1 if data.failures else 0


def check_output(args: argparse.Namespace) -> None:
    """Refuse an --output that could not be written, before anything is computed."""
    from vit.weights.save import target_files

    if args.output is None:
        return
    target_files(args.output, "vit")
    if args.optimize or args.dtype != "float32":
        raise ValueError("--output saves float32 weights, so --dtype and --optimize cannot go with it")


def compare(data: Data, classes: list[str], args: argparse.Namespace) -> list[Result]:
    """Fit each probe to each kind of features."""
    order = {name: i for i, name in enumerate(classes)}
    labels = [torch.tensor([order[name] for _, name in part.samples]) for part in (data.fit, data.choice, data.test)]
    ks = [k for k in args.k if k <= len(labels[0])]
    if not ks:
        raise ValueError(
            f"--k {min(args.k)} is more than the {counted(len(labels[0]), 'image')} to fit: give a smaller one"
        )
    if dropped := sorted(set(args.k) - set(ks)):
        numbers = ", ".join(map(str, dropped))
        print(f"vit probe: k {numbers} left out, with {counted(len(labels[0]), 'image')} to fit", file=sys.stderr)
    results = []
    for name, part in data.kinds.items():
        rows = [x.rows[:, part] for x in (data.fit, data.choice, data.test)]
        for method in ("ridge", "k-NN"):
            results.append(probe(name, method, rows, labels, LAMBDAS if method == "ridge" else ks, len(classes)))
            show(results[-1], data, args)
    return results


def probe(
    name: str, method: str, rows: list[Tensor], labels: list[Tensor], settings: Sequence[Any], classes: int
) -> Result:
    """Choose among the settings on the images that choose, fit to these too, and test."""
    start = time.perf_counter()
    fit, choice, test = rows
    scores, _ = predict(method, fit, labels[0], choice, settings, classes)
    shares = {setting: (scores[setting].argmax(dim=1) == labels[1]).float().mean().item() for setting in settings}
    equal = [setting for setting in settings if shares[setting] == max(shares.values())]
    best = equal[len(equal) // 2]  # few images leave many settings equal, and the outermost are the worst
    train = torch.cat([fit, choice]), torch.cat(labels[:2])
    scores, linear = predict(method, *train, test, [best], classes)
    right = int((scores[best].argmax(dim=1) == labels[2]).sum())
    return Result(name, method, best, shares[best], right, time.perf_counter() - start, linear.get(best))


def predict(
    method: str, train: Tensor, labels: Tensor, test: Tensor, settings: Sequence[Any], classes: int
) -> tuple[dict[Any, Tensor], dict[float, tuple[Tensor, Tensor]]]:
    """Scores [test, C] for each setting, and ridge's weights and biases."""
    if method == "k-NN":
        return knn(train, labels, test, settings, classes=classes), {}
    linear = ridge(train, labels, settings, classes)
    return {value: test.double() @ weight.T + bias for value, (weight, bias) in linear.items()}, linear


def show(result: Result, data: Data, args: argparse.Namespace) -> None:
    """Print a finished row at once."""
    total = len(data.test.samples)
    low, high = wilson(result.right, total)
    setting = "k" if result.method == "k-NN" else "lambda"
    if args.json:
        row = {
            "model": args.model, "data": args.data, "features": result.features, "method": result.method,
            setting: result.setting, "chosen_at": result.chosen_at, "accuracy": result.right / total,
            "interval": [low, high], "right": result.right, "images": total, "fit": len(data.fit.samples),
            "choice": len(data.choice.samples), "unreadable": data.failures, "seconds": result.seconds,
        }  # fmt: skip
        print(json.dumps(row), flush=True)
        return
    print(
        f"{result.features:27} {result.method:8} {f'{setting} {result.setting:.3g}':16} {result.chosen_at:12.2%}"
        f" {result.right / total:10.2%}   {f'{low:.2%} to {high:.2%}':18} {result.seconds:9.2f}",
        flush=True,
    )


def save(model: ViT, transform: Transform, results: list[Result], classes: list[str], args: argparse.Namespace) -> None:
    """Fold the best ridge probe that a head of this model can hold, and save the model with the images' transform."""
    from vit.weights import save_checkpoint

    foldable = [result for result in results if result.linear is not None and can_hold(model.config, result.features)]
    best = max(foldable, key=lambda result: result.chosen_at)
    assert best.linear is not None
    result = fold(model, best.features, *best.linear, classes)
    if isinstance(transform.size, tuple):
        crop_pct = transform.crop_pct or model.preprocessing.crop_pct
        result.preprocessing = replace(
            result.preprocessing, size=transform.size, mode=transform.mode, crop_pct=crop_pct
        )
    file = save_checkpoint(result, args.output)
    note = "" if isinstance(transform.size, tuple) else "; use it with --img-size native"
    print(
        f"saved with ridge on {best.features} as its head: {file}{note}", file=sys.stderr if args.json else sys.stdout
    )


def can_hold(config: ViTConfig, features: str) -> bool:
    """Whether a head can read these features: with fc_norm, class token and patch mean cannot be read together."""
    return features in POOLS and not (config.fc_norm and POOLS[features] == "token_avg")
