"""The model that a command runs, loaded and optimized as its options say."""

import argparse
import hashlib
from contextlib import suppress
from pathlib import Path

from vit.exporting import ExportedModel, load_exported
from vit.metadata import Provenance
from vit.model import ViT

from . import options, runtime

Model = ViT | ExportedModel  # what `load` returns
EXPORTED = (
    "is an exported file, which predict, evaluate, features and bench run: name the checkpoint that it was made from"
)
OPTIMIZE = ("float32", "int8", "bfloat16", "float16")


def add_optimize(parser: argparse.ArgumentParser) -> None:
    """--optimize: the dtype to optimize the model to."""
    parser.add_argument(
        "--optimize", choices=OPTIMIZE,
        help="run the model faster: on a CPU with packed float32 products (same results up to rounding) or in int8"
        " (nearly the same), on an NVIDIA GPU with fused kernels in bfloat16 or float16",
    )  # fmt: skip


def add_trust(parser: argparse.ArgumentParser) -> None:
    """--trust: for exported files that can run code while they are opened."""
    parser.add_argument(
        "--trust", action="store_true", help="open a .pt2 file, which can run code: if you know who wrote it"
    )


def load(args: argparse.Namespace, output: str = "logits") -> Model:
    """The model that --model names, in --dtype, optimized to --optimize; or an exported file, in a runtime.

    Args:
        output: "logits" or "features", of a file that only --runtime makes a model.

    Raises:
        ValueError, OSError: those of `load_pretrained`, `load_exported`, `vit.kernels.load` and `vit.kernels.optimize`.
    """
    from vit.weights import load_pretrained

    if vars(args).get("runtime"):
        check_exported(args)
        return runtime.load(args, output)
    runtime.check_unused(args)
    if runtime.is_ours(args.model):
        check_exported(args)
        return load_exported(args.model, trust=args.trust)
    if is_optimized_file(args.model):
        return load_optimized(args)
    if args.optimize:
        check(args, args.optimize)  # before a large file is read
    dtype = options.DTYPES[args.dtype]
    try:
        model = load_pretrained(args.model, device=args.device, dtype=dtype, **options.reading(args))
    except ValueError as error:
        if args.model.endswith(".onnx") and hasattr(args, "runtime"):
            raise ValueError(f"{error}; to run its graph in place of reading its weights, say --runtime") from error
        raise
    if not args.optimize:
        return model
    from vit import kernels

    return kernels.optimize(model, args.optimize)


def load_vit(args: argparse.Namespace) -> ViT:
    """As `load`, for commands that read what lies inside a model."""
    if runtime.is_ours(args.model):
        raise ValueError(f"{args.model} {EXPORTED}")
    model = load(args)
    assert isinstance(model, ViT)
    return model


def optimized(model: Model) -> str | None:
    """The dtype that a model was optimized to, such as "int8"; None for any other model."""
    return getattr(model, "optimized", None)


def title(args: argparse.Namespace, model: Model) -> str:
    """--model and the dtype it is optimized to, for the head of a table."""
    return args.model + (f" optimized in {optimized(model)}" if optimized(model) else "")


def check(args: argparse.Namespace, dtype: str) -> None:
    """Refuse a --device or --dtype that does not fit a model optimized to `dtype`."""
    from vit.kernels.optimize import machine

    if args.device.type != machine(dtype):
        why = f"--device {args.device} cannot go with it"
        raise ValueError(f"a model optimized in {dtype} runs on {machine(dtype)}, so {why}")
    if args.dtype != "float32":
        raise ValueError(f"an optimized model takes images in float32, so --dtype {args.dtype} cannot go with it")


def check_exported(args: argparse.Namespace) -> None:
    """Refuse options of the model that an exported file has settled."""
    given = [f"--{name}" for name in ("optimize", "attention", "layout", "prefix", "sha256") if vars(args).get(name)]
    given += ["--set"] * bool(args.settings) + ["--dtype"] * (args.dtype != "float32")
    if given:
        raise ValueError(f"{args.model} is an exported file, which holds all of that: leave out {', '.join(given)}")
    if args.device.type != "cpu":
        raise ValueError(f"{args.model} is an exported file, which runs on the CPU here, not on {args.device}")


def is_optimized_file(name: str) -> bool:
    """Whether `vit.kernels.save` wrote it."""
    from safetensors import SafetensorError, safe_open

    from vit.weights.layouts.vit import OPTIMIZED_KEY

    if not name.endswith(".safetensors") or not Path(name).is_file():
        return False
    with suppress(SafetensorError), safe_open(name, "pt") as file:  # a broken file: load_pretrained says what is wrong
        return OPTIMIZED_KEY in (file.metadata() or {})
    return False


def load_optimized(args: argparse.Namespace) -> ViT:
    """A file that `vit.kernels.save` wrote. Its provenance is this file, with the original checkpoint as parent."""
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
