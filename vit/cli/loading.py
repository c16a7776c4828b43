"""The model that a command runs: a checkpoint as its options say, optimized where they ask for it."""

import argparse
import hashlib
from contextlib import suppress
from pathlib import Path

from vit.metadata import Provenance
from vit.model import ViT

from . import options

OPTIMIZE = ("float32", "int8", "bfloat16", "float16")
OPTIMIZED = "vit.optimized"  # in the header of what vit.kernels.save writes


def add_optimize(parser: argparse.ArgumentParser) -> None:
    """--optimize: into what `vit.kernels.optimize` makes of a model."""
    parser.add_argument(
        "--optimize", choices=OPTIMIZE,
        help="run it faster: on the CPU by packed float32 products (the same numbers) or in int8 (nearly), on an NVIDIA"
        " GPU by fused kernels in bfloat16 or float16",
    )  # fmt: skip


def load(args: argparse.Namespace) -> ViT:
    """What --model names, in the dtype asked for, and optimized as --optimize says.

    Raises:
        ValueError, OSError: as `load_pretrained`, `vit.kernels.load` and `optimize`.
    """
    from vit.weights import load_pretrained

    if is_optimized_file(args.model):
        return load_optimized(args)
    if args.optimize:
        check(args, args.optimize)  # before a large file is read
        check_machine(args.optimize)
    dtype = options.DTYPES[args.dtype]
    model = load_pretrained(args.model, device=args.device, dtype=dtype, **options.reading(args))
    if not args.optimize:
        return model
    from vit import kernels

    return kernels.optimize(model, args.optimize)


def optimized(model: ViT) -> str | None:
    """What a model was optimized to, such as "int8"; None for one as it was."""
    return getattr(model, "optimized", None)


def title(args: argparse.Namespace, model: ViT) -> str:
    """--model, and what it was optimized to, for the head of a table."""
    return args.model + (f" optimized in {optimized(model)}" if optimized(model) else "")


def check(args: argparse.Namespace, dtype: str) -> None:
    """ValueError for a --device or --dtype that cannot go with a model optimized to `dtype`."""
    from vit.kernels.optimize import machine

    if args.device.type != machine(dtype):
        why = f"--device {args.device} cannot go with it"
        raise ValueError(f"a model optimized in {dtype} runs on {machine(dtype)}, so {why}")
    if args.dtype != "float32":
        raise ValueError(f"an optimized model takes images in float32, so --dtype {args.dtype} cannot go with it")


def check_machine(dtype: str) -> None:
    """ValueError where this machine cannot run a model optimized to `dtype`."""
    import torch

    from vit.kernels.optimize import machine, missing

    if reason := missing(dtype, torch.device(machine(dtype))):
        raise ValueError(f"this machine cannot run {dtype}: {reason}")


def is_optimized_file(name: str) -> bool:
    """Did `vit.kernels.save` write it?"""
    from safetensors import SafetensorError, safe_open

    if not name.endswith(".safetensors") or not Path(name).is_file():
        return False
    with suppress(SafetensorError), safe_open(name, "pt") as file:  # load_pretrained says what is wrong with it
        return OPTIMIZED in (file.metadata() or {})
    return False


def load_optimized(args: argparse.Namespace) -> ViT:
    """What `vit.kernels.save` wrote. Its provenance is the file, with that of the checkpoint before as its parent."""
    from vit import kernels

    if args.optimize:
        raise ValueError(f"{args.model} is optimized already, so --optimize cannot go with it")
    if any((args.layout, args.prefix, args.sha256, args.settings)):
        raise ValueError(f"{args.model} is optimized: --layout, --prefix, --sha256 and --set are for checkpoints")
    model = kernels.load(args.model)
    check(args, model.optimized)
    sha256 = hashlib.sha256(Path(args.model).read_bytes()).hexdigest()
    model.provenance = Provenance(args.model, sha256, "optimized", parent=model.provenance)
    return model
