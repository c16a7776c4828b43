"""`vit features`: one row of numbers per image, or one map, streamed to disk; or a picture of the maps' components."""

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from vit.image import ImageError, Transform, create_transform
from vit.model import ViT
from vit.training.distributed import rank_and_world

from . import loading, options, runtime
from .images import Decoded, batches, counted, decode, find_images, progress, usable
from .loading import Model
from .pca import draw_components
from .processes import gather, sharing
from .shards import check_files, name_files, read_metadata, state, write_file, write_index

KINDS = ("pooled", "class", "dense")
DTYPES = {"float32": torch.float32, "float16": torch.float16}
ROWS, MAPS, LARGE_MAPS = 10_000, 500, 50  # images per file: what an interrupted run loses, and what memory holds


def add_parser(commands: Any) -> None:
    """Declare the command and its options."""
    parser = commands.add_parser(
        "features",
        help="write features of images to disk",
        description="Write features of images to safetensors files. An interrupted run resumes at the first missing "
        "file.",
    )
    options.add_images(parser)
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="features.safetensors")
    parser.add_argument(
        "--kind", choices=KINDS, default=KINDS[0],
        help="pooled: what the classifier reads; class: the class token after the last norm; dense: the patch tokens "
        "after it, a map [D, h, w] per image; default: %(default)s",
    )  # fmt: skip
    parser.add_argument("--save-dtype", choices=DTYPES, default="float32", help="dtype on disk; default: %(default)s")
    parser.add_argument(
        "--shard",
        type=options.positive,
        metavar="N",
        help=f"images per file ({ROWS}; {MAPS} for maps, {LARGE_MAPS} for maps of images at their own sizes)",
    )
    parser.add_argument(
        "--pca", action="store_true", help="draw the maps' first three principal components as colours instead"
    )
    options.add_model(parser)
    loading.add_trust(parser)
    options.add_reading(parser)
    options.add_size(parser)
    options.add_compute(parser)
    loading.add_optimize(parser)
    runtime.add_runtime(parser, "features")
    runtime.add_pixels(parser)
    parser.set_defaults(run=run)


@sharing()
def run(args: argparse.Namespace) -> int:
    """Find the images, load the model, write one file after another."""
    if args.pca:
        if rank_and_world()[1] > 1:
            raise ValueError("--pca draws one picture, which several processes cannot share: run it without torchrun")
        options.check_picture(args.output)
        if args.kind != KINDS[0] or args.save_dtype != "float32" or args.shard:
            raise ValueError("--pca draws a picture, so --kind, --save-dtype and --shard cannot go with it")
        args.img_size = args.img_size or "native"
    elif args.output.suffix != ".safetensors" or args.output.is_dir():
        raise ValueError(f"--output must be a .safetensors file, got {args.output}")
    sizing = options.sizing(args)
    paths = list(dict.fromkeys(find_images(args.images)))  # each once
    model = loading.load(args, "features")
    check_kind(args, model)
    transform = create_transform(model, **sizing)
    if args.pca and isinstance(model, ViT):
        return draw_components(model, transform, paths, args.output)
    if args.kind == "dense":
        check_names(paths)
    return write(model, transform, paths, args)


def write(model: Model, transform: Transform, paths: list[Path], args: argparse.Namespace) -> int:
    """Write the files that do not exist yet, of which each process takes its share, and the index."""
    files = name_files(args.output, len(paths), args.shard or shard_size(args.kind, transform))
    settings = describe(model, transform, args)
    check_files(args.output, files, settings, paths)
    (done, *_) = gather([{file for file in files if file.exists()}])  # before any process writes
    args.output.parent.mkdir(parents=True, exist_ok=True)
    missing = [file for file in files if file not in done]
    rank, world = rank_and_world()
    if rank == 0 and 0 < len(missing) < world:
        print(
            f"vit features: {counted(len(missing), 'file')} to write, so {world - len(missing)} of {world} processes"
            " have nothing to do: a smaller --shard makes more files",
            file=sys.stderr,
        )
    own = missing[rank::world]
    with progress(sum(len(files[file]) for file in own)) as bar:
        for file in own:
            tensors, lists = compute(model, transform, [paths[i] for i in files[file]], args, bar)
            write_file(file, tensors, {**settings, **lists})
    gather([rank])  # wait until all files are there
    return finish(args.output, files, done, len(paths)) if rank == 0 else 0


def finish(output: Path, files: Iterable[Path], done: set[Path], images: int) -> int:
    """Write the index if there are several files, and report what is in them; `done` are those of earlier runs."""
    files, skipped = list(files), 0
    for file in files:
        reasons = json.loads(read_metadata(file)["skipped"])
        skipped += len(reasons)
        for reason in reasons.values() if file in done else ():
            print(f"vit features: {reason} (in an earlier run)", file=sys.stderr)
    if len(files) > 1:
        write_index(output, files)
    resumed = f", {len(done)} of them from an earlier run" if done else ""
    print(f"{counted(images - skipped, 'image')} in {counted(len(files), 'file')}{resumed}: {output}")
    if skipped:
        print(f"vit features: {skipped} of {counted(images, 'image')} could not be used", file=sys.stderr)
    return 1 if skipped else 0


def check_kind(args: argparse.Namespace, model: Model) -> None:
    """Refuse, before an image is read, features that an exported file does not give."""
    if isinstance(model, ViT):
        return
    if args.kind != "pooled" or args.pca:
        what = "--pca" if args.pca else f"--kind {args.kind}"
        raise ValueError(f"{args.model} is an exported file, which gives pooled features only, not {what}")
    model.require("features")


def shard_size(kind: str, transform: Transform) -> int:
    """How many images go into a file by default."""
    if kind != "dense":
        return ROWS
    return LARGE_MAPS if transform.mode == "native" else MAPS


def describe(model: Model, transform: Transform, args: argparse.Namespace) -> dict[str, str]:
    """All settings that the numbers depend on, besides the images."""
    sha256 = None if model.provenance is None else model.provenance.sha256
    return {
        "kind": args.kind, "dtype": args.save_dtype, "model": args.model, "model_sha256": str(sha256),
        "model_config": json.dumps(model.config.to_dict()), "transform": repr(transform), "computed": args.dtype,
        "optimize": str(loading.optimized(model)), "prefix": args.prefix or "",  # which of two models in one file
        "part": str(model.provenance and model.provenance.part),  # the same, chosen by rank
    } | ({"runtime": args.runtime} if args.runtime else {})  # fmt: skip


def check_names(paths: Iterable[Path]) -> None:
    """Maps are named by their paths: refuse a path that is not UTF-8, which safetensors cannot store."""
    for path in paths:
        name = str(path).encode("utf-8", "backslashreplace").decode()  # a byte that is not UTF-8 is a lone surrogate
        if name != str(path):
            raise ValueError(f"{name} cannot name a tensor in a safetensors file: rename the image")


def compute(
    model: Model, transform: Transform, paths: list[Path], args: argparse.Namespace, bar: tqdm
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The features of one file's images.

    Returns:
        The tensors: "features" [rows, D], or a map [D, h, w] under each image's path. And JSON lists for the metadata:
        "paths" of the rows in order, "images" that were asked for with their bytes and modification times, and
        "skipped", the images that could not be used with the reason.
    """
    rows: dict[str, Tensor] = {}
    skipped: dict[str, str] = {}
    for batch in batches(decode(paths, transform), args.batch_size, transform):
        for path, outcome in extract(model, batch, args.kind, packed=transform.mode == "native"):
            if isinstance(outcome, ImageError):
                skipped[str(path)] = str(outcome)
                bar.write(f"vit features: {outcome}", file=sys.stderr)
            else:
                rows[str(path)] = lower(outcome, DTYPES[args.save_dtype], path)
            bar.update()
    lists = {"paths": [*rows], "images": [state(path) for path in paths], "skipped": skipped}
    tensors = rows if args.kind == "dense" else {"features": join(model, args, list(rows.values()))}
    return tensors, {name: json.dumps(value) for name, value in lists.items()}


def join(model: Model, args: argparse.Namespace, rows: list[Tensor]) -> Tensor:
    """Rows [D] -> [rows, D]; [0, D] if there are none."""
    if rows:
        return torch.stack(rows)
    double = args.kind == "pooled" and model.config.global_pool == "token_avg"
    return torch.empty(0, model.config.embed_dim * (1 + double), dtype=DTYPES[args.save_dtype])


@torch.inference_mode()
def extract(model: Model, batch: list[Decoded], kind: str, packed: bool) -> Iterator[tuple[Path, Tensor | ImageError]]:
    """Each image's features, [D] or [D, h, w] float32 on the CPU, in the batch's order; `packed` for several sizes."""
    images = usable(batch, model)
    rows = iter(compute_features(model, images, kind, packed) if images else ())
    for path, outcome in batch:
        yield path, outcome if isinstance(outcome, ImageError) else next(rows).float().cpu()


def compute_features(model: Model, images: list[Tensor], kind: str, packed: bool) -> Iterable[Tensor]:
    """The features of some images, each [D] or [D, h, w]."""
    if not isinstance(model, ViT):
        parts = [image[None] for image in images] if packed else [torch.stack(images)]  # each [B, C, H, W]
        return torch.cat([model.run(part)["features"] for part in parts])  # [images, D]
    inputs: Any = images if packed else torch.stack(images)  # a list of [C, H, W], or [B, C, H, W]
    if kind == "dense":
        forward: Any = model.forward_intermediates_packed if packed else model.forward_intermediates
        return forward(inputs, [-1], norm=True)[0]  # each [D, h, w]
    forward = model.forward_features_packed if packed else model.forward_features
    tokens = forward(inputs)  # each [P + N, D]
    return (one[0] if kind == "class" else model.forward_head(one[None], pre_logits=True)[0] for one in tokens)


def lower(values: Tensor, dtype: torch.dtype, path: Path) -> Tensor:
    """Values in another dtype; ValueError if it cannot hold them."""
    result = values.to(dtype)
    if not result.isfinite().all():
        raise ValueError(f"the features of {path} reach {values.abs().max():.3g}, which {dtype} cannot hold")
    # A copy: a class token would otherwise be a view that keeps all tokens of its batch in memory.
    return result.clone(memory_format=torch.contiguous_format)
