"""--runtime: exported files, ours and those of other tools, run by the runtime that is asked for."""

import argparse
from pathlib import Path
from typing import Any

from vit.exporting import ExportedModel, load_exported
from vit.exporting.foreign import ForeignModel
from vit.exporting.runtimes import RUNTIMES, is_exported
from vit.metadata import EXPORTED_KEY, INTERPOLATIONS

PIXELS = ("mean", "std", "interpolation")  # what `add_pixels` adds


def add_runtime(parser: argparse.ArgumentParser, reads: str, needs: str = "--mean, --std and --img-size") -> None:
    """--runtime, for a command that reads "logits" or "features"."""
    parser.add_argument(
        "--runtime", choices=RUNTIMES,
        help=f"run --model, an .onnx or .xml file, in this runtime; one that vit export did not write needs {needs}"
        f" (unless it has but one), and gives the output named {reads}, or its only one of shape [images, N]",
    )  # fmt: skip


def add_pixels(parser: argparse.ArgumentParser) -> None:
    """--mean, --std and --interpolation: how pictures are prepared for a file that does not say it."""
    for name, example in (("mean", "0.485,0.456,0.406"), ("std", "0.229,0.224,0.225")):
        parser.add_argument(
            f"--{name}", type=shares, metavar="LIST",
            help=f"with --runtime: of each channel, for pixels from 0 to 1, such as {example}",
        )  # fmt: skip
    parser.add_argument(
        "--interpolation", choices=INTERPOLATIONS, help="with --runtime: how pictures are resized; default: bicubic"
    )


def shares(text: str) -> tuple[float, ...]:
    """ "0.5,0.5,0.5" -> (0.5, 0.5, 0.5), for argparse."""
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers such as 0.5,0.5,0.5, got {text!r}") from None
    if not all(0 <= value <= 1 for value in values):
        raise argparse.ArgumentTypeError(f"expected numbers for pixels from 0 to 1, got {text!r}: divide them by 255")
    return values


def is_ours(name: str) -> bool:
    """Whether `vit export` wrote a file."""
    path = Path(name)
    if path.suffix == ".xml":
        return path.is_file() and f"<{EXPORTED_KEY} ".encode() in path.read_bytes()
    return is_exported(path)


def check_unused(args: argparse.Namespace) -> None:
    """Refuse, without --runtime, what only goes with it, and an .xml that something else wrote."""
    if given := [f"--{name}" for name in PIXELS if vars(args).get(name)]:
        why = f"{args.model} says itself how its images are prepared"
        raise ValueError(f"{', '.join(given)} goes with --runtime only: {why}")
    if Path(args.model).suffix == ".xml" and Path(args.model).is_file() and not is_ours(args.model):
        raise ValueError(f"vit export did not write {args.model}: say --runtime openvino to run it all the same")


def load(args: argparse.Namespace, output: str) -> ExportedModel:
    """--model in --runtime; of a file that is not ours, the "logits" or "features"."""
    if is_ours(args.model):
        if given := [f"--{name}" for name in PIXELS if vars(args).get(name)]:
            raise ValueError(f"{args.model} says itself how its images are prepared: leave out {', '.join(given)}")
        return load_exported(args.model, runtime=args.runtime, trust=args.trust)
    return ForeignModel(Path(args.model), args.runtime, pixels(args), sizes(args), output)


def pixels(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of `Preprocessing` that a command was told; none of those of `vit bench`, which reads no pictures."""
    if not hasattr(args, "mean"):
        return {}
    if args.mean is None or args.std is None:
        raise ValueError(
            f"{args.model} does not say how its images are prepared: say --mean and --std, for pixels from 0 to 1,"
            " such as 0.5,0.5,0.5"
        )
    names = (*PIXELS, "crop_pct")
    return {name: value for name in names if (value := getattr(args, name)) is not None}


def sizes(args: argparse.Namespace) -> list[tuple[int, int]]:
    """--img-size, one or a list, as (height, width). What counts patches is refused."""
    asked = args.img_size if isinstance(args.img_size, list) else [args.img_size]
    given = ["--img-size native"] * ("native" in asked) + ["--mode native"] * (vars(args).get("mode") == "native")
    given += ["--max-tokens"] * bool(vars(args).get("max_tokens"))
    given += ["--plot"] * (args.command == "evaluate" and args.plot is not None)
    if given:
        raise ValueError(f"{args.model} does not show its patches, which {', '.join(given)} would need")
    return [(size, size) if isinstance(size, int) else size for size in asked if size is not None]
