"""Options that several commands share, and their values checked."""

import argparse

import torch

DEFAULT_MODEL = "vit_small_patch16_224.augreg_in21k_ft_in1k"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def add_model(parser: argparse.ArgumentParser) -> None:
    """--model: a name, a file or a folder."""
    parser.add_argument("--model", default=DEFAULT_MODEL, metavar="NAME_OR_PATH", help="default: %(default)s")


def add_compute(parser: argparse.ArgumentParser) -> None:
    """--device, --dtype and -b/--batch-size."""
    parser.add_argument("--device", type=device, default="cpu", help="cpu, cuda, cuda:1, mps ... default: %(default)s")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="default: %(default)s")
    parser.add_argument("-b", "--batch-size", type=positive, default=32, help="default: %(default)s")


def positive(text: str) -> int:
    """A whole number above 0, for argparse."""
    if not text.isascii() or not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text!r}")
    return int(text)


def image_size(text: str) -> int | tuple[int, int] | str:
    """ "384", "224x448" (height x width) or "native", for argparse."""
    if text == "native":
        return text
    height, by, width = text.partition("x")
    return (positive(height), positive(width)) if by else positive(text)


def device(text: str) -> torch.device:
    """A device that this machine has, for argparse."""
    try:
        torch.empty(1, device=text).item()
    except Exception as error:  # each device type has its own way of not being there
        raise argparse.ArgumentTypeError(f"{text!r} cannot be used here: {str(error).splitlines()[0]}") from None
    return torch.device(text)
