"""Options that several commands share, and checks of their values."""

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from vit.image import MODES

DEFAULT_MODEL = "vit_small_patch16_224.augreg_in21k_ft_in1k"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def add_images(parser: argparse.ArgumentParser) -> None:
    """IMAGE, one or more, for `images.find_images`."""
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="files, folders (searched recursively) or globs")


def add_model(parser: argparse.ArgumentParser) -> None:
    """--model: a name, a file or a folder."""
    parser.add_argument(
        "--model", default=DEFAULT_MODEL, metavar="NAME_OR_PATH",
        help="a name, or a checkpoint: a file or a folder in any known layout; default: %(default)s",
    )  # fmt: skip


def add_reading(parser: argparse.ArgumentParser) -> None:
    """--layout, --prefix, --sha256 and --set: what the checkpoint itself does not tell."""
    parser.add_argument(
        "--layout", metavar="LAYOUT", help="how the checkpoint names its weights, such as timm; default: detected"
    )
    parser.add_argument(
        "--prefix", metavar="TEXT", help="read only weights whose names begin with TEXT, such as backbone."
    )
    parser.add_argument("--sha256", metavar="HEX", help="refuse the file unless this is its SHA-256")
    parser.add_argument(
        "--set", dest="settings", type=setting, action="append", default=[], metavar="FIELD=VALUE",
        help="state what the checkpoint does not tell: num_heads=12, eps=1e-5, img_size=224x448 ...; repeatable",
    )  # fmt: skip


def reading(args: argparse.Namespace) -> dict[str, Any]:
    """The options of `add_reading` as arguments of `load_pretrained`."""
    return {"layout": args.layout, "prefix": args.prefix, "sha256": args.sha256, **dict(args.settings)}


def setting(text: str) -> tuple[str, Any]:
    """ "num_heads=12" -> ("num_heads", 12), for argparse."""
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"expected FIELD=VALUE such as num_heads=12, got {text!r}")
    if name == "img_size":
        return name, image_size(value)
    try:
        return name, json.loads(value)
    except (ValueError, RecursionError):
        return name, value


def add_size(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    """--img-size, --mode, --crop-pct and --max-tokens: how images are brought to size."""
    parser.add_argument(
        "--img-size", type=image_size, default=default, metavar="SIZE",
        help="384, 224x448 (height x width), or native: the image's own size, each side rounded to whole patches; "
        f"default: {default or 'the size the model was trained at'}",
    )  # fmt: skip
    parser.add_argument(
        "--mode", choices=MODES,
        help="crop cuts out the middle, squash changes the proportions, native keeps the proportions and the whole "
        "image and makes SIZE its short side; default: native if SIZE is native, else the model's own",
    )  # fmt: skip
    add_crop_pct(parser)
    parser.add_argument(
        "--max-tokens", type=positive, metavar="N",
        help="refuse images with more patches: the cost of attention grows with the square of their number",
    )  # fmt: skip


def add_crop_pct(parser: argparse.ArgumentParser) -> None:
    """--crop-pct."""
    parser.add_argument(
        "--crop-pct", type=float, metavar="SHARE", help="the share of the resized image that a crop keeps"
    )


def sizing(args: argparse.Namespace) -> dict[str, Any]:
    """The options of `add_size` as arguments of `create_transform`."""
    if args.img_size != "native":
        return {
            "size": args.img_size, "crop_pct": args.crop_pct, "mode": args.mode, "max_tokens": args.max_tokens
        }  # fmt: skip
    if args.mode not in (None, "native") or args.crop_pct is not None:
        what = "--crop-pct" if args.mode in (None, "native") else f"--mode {args.mode}"
        raise ValueError(f"--img-size native neither crops nor squashes, so {what} cannot go with it")
    return {"mode": "native", "max_tokens": args.max_tokens}


def add_compute(parser: argparse.ArgumentParser) -> None:
    """--device, --dtype and -b/--batch-size."""
    add_device(parser)
    parser.add_argument("-b", "--batch-size", type=positive, default=32, help="images per call; default: %(default)s")


def add_device(parser: argparse.ArgumentParser) -> None:
    """--device and --dtype."""
    parser.add_argument("--device", type=device, default="cpu", help="cpu, cuda, cuda:1, mps ... default: %(default)s")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="of weights and images; default: %(default)s"
    )


def check_picture(path: Path) -> None:
    """Refuse an --output that is not the name of a picture."""
    if path.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp") or path.is_dir():
        raise ValueError(f"--output must be a .png, .jpg or .webp file, got {path}")


def listed(convert: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """A list without repetitions, such as "1,8" -> [1, 8], for argparse."""

    def parse(text: str) -> list[Any]:
        return list(dict.fromkeys(convert(part) for part in text.split(",")))

    return parse


def one_of(*names: str) -> Callable[[str], str]:
    """One of some names, for argparse; in a list, where argparse's own `choices` do not work."""

    def check(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(f"expected one of {', '.join(names)}, got {text!r}")
        return text

    return check


def positive(text: str) -> int:
    """A whole number above 0, for argparse."""
    if not text.isascii() or not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text!r}")
    return int(text)


def natural(text: str) -> int:
    """A whole number from 0 on, for argparse."""
    if not text.isascii() or not text.isdigit():
        raise argparse.ArgumentTypeError(f"expected a whole number from 0 on, got {text!r}")
    return int(text)


def image_size(text: str) -> int | tuple[int, int] | str:
    """ "384", "224x448" (height x width) or "native", for argparse."""
    if text == "native":
        return text
    height, by, width = text.partition("x")
    try:
        return (positive(height), positive(width)) if by else positive(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"expected 384, 224x448 (height x width) or native, got {text!r}") from None


def fixed_size(text: str) -> tuple[int, int]:
    """ "224" -> (224, 224), "224x448" -> (224, 448), for argparse."""
    found = image_size(text)
    if isinstance(found, str):
        raise argparse.ArgumentTypeError(f"expected 384 or 224x448 (height x width), got {text!r}")
    return (found, found) if isinstance(found, int) else found


def auto_device(text: str) -> torch.device:
    """A device of this machine, or "auto": a GPU where there is one, else the CPU, for argparse."""
    return device(("cuda" if torch.cuda.is_available() else "cpu") if text == "auto" else text)


def device(text: str) -> torch.device:
    """A device of this machine, for argparse; "cuda" is a GPU of its own in each process of torchrun."""
    if text == "cuda" and "LOCAL_RANK" in os.environ:
        text = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        torch.empty(1, device=text).item()
    except Exception as error:  # PyTorch raises a different error for each device type
        raise argparse.ArgumentTypeError(f"{text!r} cannot be used here: {str(error).splitlines()[0]}") from None
    return torch.device(text)
