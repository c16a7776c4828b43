"""`vit features`: one row of numbers per image, or one map, streamed to disk; and pictures of their components."""

import argparse
import json
import re
import sys
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from vit.files import replacing, write_json
from vit.image import ImageError, Transform, create_transform
from vit.model import ViT

from . import loading, options
from .pca import draw_components
from .predict import Decoded, batches, decode, find_images

KINDS = ("pooled", "class", "dense")
DTYPES = {"float32": torch.float32, "float16": torch.float16}
ROWS, MAPS, LARGE_MAPS = 10_000, 500, 50  # images per file: what is lost when a run is cut off, and held in memory
INDEX_START = b'{\n  "shards": ['  # as `write_index` writes it


def add_parser(commands: Any) -> None:
    """Declare the command and its options."""
    parser = commands.add_parser(
        "features",
        help="write features of images to disk",
        description="Write features of images to safetensors files. A run that was cut off goes on where it stopped.",
    )
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="files, folders (searched through) or globs")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="features.safetensors")
    parser.add_argument(
        "--kind", choices=KINDS, default=KINDS[0],
        help="pooled: what the classifier reads; class: the class token after the last norm; dense: the patch tokens "
        "after it, a map [D, h, w] per image (%(default)s)",
    )  # fmt: skip
    parser.add_argument("--save-dtype", choices=DTYPES, default="float32", help="of the numbers on disk (%(default)s)")
    parser.add_argument(
        "--shard",
        type=options.positive,
        metavar="N",
        help=f"images per file ({ROWS}, {MAPS} for maps, {LARGE_MAPS} for maps of images at their own sizes)",
    )
    parser.add_argument("--pca", action="store_true", help="draw the maps' three main components as colours instead")
    options.add_model(parser)
    options.add_reading(parser)
    options.add_size(parser)
    options.add_compute(parser)
    loading.add_optimize(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Find the images, load the model, write one file after another."""
    if args.pca:
        options.check_picture(args.output)
        if args.kind != KINDS[0] or args.save_dtype != "float32" or args.shard:
            raise ValueError("--pca draws a picture, so --kind, --save-dtype and --shard cannot go with it")
        args.img_size = args.img_size or "native"
    elif args.output.suffix != ".safetensors" or args.output.is_dir():
        raise ValueError(f"--output must be a .safetensors file, not {args.output}")
    sizing = options.sizing(args)
    paths = list(dict.fromkeys(find_images(args.images)))  # each once
    model = loading.load(args)
    transform = create_transform(model, **sizing)
    if args.pca:
        return draw_components(model, transform, paths, args.output)

    files = name_files(args.output, len(paths), args.shard or shard_size(args.kind, transform))
    settings = describe(model, transform, args)
    check_others(args.output, files)
    if args.kind == "dense":
        check_names(paths)
    for file, numbers in files.items():  # all of them before the first is computed
        check_file(file, settings, [paths[i] for i in numbers])
    done = {file for file in files if file.exists()}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    shown = sys.stderr is not None and sys.stderr.isatty()
    skipped = 0
    with warnings.catch_warnings(), tqdm(total=len(paths), unit="image", leave=False, disable=not shown) as bar:
        warnings.filterwarnings("ignore", module="PIL")  # what cannot be read is reported; the rest was read
        for file, numbers in files.items():
            if file not in done:
                write_file(file, model, transform, [paths[i] for i in numbers], settings, args, bar)
            bar.update(len(numbers) if file in done else 0)
            reasons = json.loads(read_metadata(file)["skipped"])
            skipped += len(reasons)
            for reason in reasons.values() if file in done else ():
                bar.write(f"vit features: {reason} (in an earlier run)", file=sys.stderr)
    if len(files) > 1:
        write_index(args.output, files)
    resumed = f", {len(done)} of them from an earlier run" if done else ""
    print(f"{len(paths) - skipped} images in {len(files)} file{'s' * (len(files) > 1)}{resumed}: {args.output}")
    if skipped:
        print(f"vit features: {skipped} of {len(paths)} could not be used", file=sys.stderr)
    return 1 if skipped else 0


def shard_size(kind: str, transform: Transform) -> int:
    """How many images go into a file by default."""
    if kind != "dense":
        return ROWS
    return LARGE_MAPS if transform.mode == "native" else MAPS


def name_files(output: Path, count: int, per_file: int) -> dict[Path, range]:
    """The files to write and the numbers of their images: one, or features-00001-of-00003.safetensors and so on."""
    parts = [range(start, min(start + per_file, count)) for start in range(0, count, per_file)]
    if len(parts) == 1:
        return {output: parts[0]}
    names = (f"{output.stem}-{i:05}-of-{len(parts):05}.safetensors" for i in range(1, len(parts) + 1))
    return {output.with_name(name): part for name, part in zip(names, parts)}


def describe(model: ViT, transform: Transform, args: argparse.Namespace) -> dict[str, str]:
    """All that the numbers depend on besides the images."""
    sha256 = None if model.provenance is None else model.provenance.sha256
    return {
        "kind": args.kind, "dtype": args.save_dtype, "model": args.model, "model_sha256": str(sha256),
        "model_config": json.dumps(model.config.to_dict()), "transform": repr(transform), "computed": args.dtype,
        "optimize": str(loading.optimized(model)), "prefix": args.prefix or "",  # of two models in one file, which one
    }  # fmt: skip


def check_others(output: Path, files: Iterable[Path]) -> None:
    """What lies beside `output` under such names must be of this run; ValueError names what is not.

    Another list of images, or another --shard, gives files of other names: both sets side by side would be read as one.
    """
    index = output.with_name(f"{output.name}.index.json")
    if index.exists() and not index.read_bytes().startswith(INDEX_START):
        raise ValueError(f"{index} is there already and is no index of features: choose another --output")
    beside = output.parent.iterdir() if output.parent.exists() else ()
    shard = re.compile(re.escape(output.stem) + r"-\d{5}-of-\d{5}\.safetensors")
    others = [path for path in beside if (shard.fullmatch(path.name) or path == output) and path not in files]
    if others:
        raise ValueError(
            f"{min(others)} is there already, of another list of images or another --shard: remove it and what belongs"
            " to it, or choose another --output"
        )


def check_names(paths: Iterable[Path]) -> None:
    """Maps are named by their paths: ValueError for one that safetensors cannot hold as a name."""
    for path in paths:
        name = str(path).encode("utf-8", "backslashreplace").decode()  # a lone surrogate: not UTF-8 on disk
        if name != str(path) or name == "__metadata__":
            raise ValueError(f"{name} cannot name a tensor in a safetensors file: rename the image")


def state(path: Path) -> list[Any]:
    """What an image is known by in a later run: its path, bytes and time of change."""
    try:
        facts = path.stat()
    except OSError:
        return [str(path), None, None]
    return [str(path), facts.st_size, facts.st_mtime_ns]


def check_file(file: Path, settings: dict[str, str], paths: list[Path]) -> None:
    """A file that is there already must be what this run would write; ValueError names what differs."""
    if not file.exists():
        return
    found = read_metadata(file)
    for name, value in settings.items():
        if str(found.get(name)) != value:  # files from before --optimize do not name it
            raise ValueError(
                f"{file} is there already, and its {name} is {found.get(name)}, not {value}: remove it, or choose"
                " another --output"
            )
    before, now = json.loads(found["images"]), [state(path) for path in paths]
    if [one[0] for one in before] != [one[0] for one in now]:
        raise ValueError(f"{file} is there already, of other images: remove it, or choose another --output")
    if before != now:
        changed = next(new[0] for old, new in zip(before, now) if old != new)
        raise ValueError(f"{file} is there already, and {changed} has changed since: remove it to write it again")


def read_metadata(file: Path) -> dict[str, str]:
    """The metadata of a safetensors file; ValueError where it is none."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as opened:
            return opened.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{file} is there already and is no safetensors file: {error}") from None


def write_file(
    file: Path,
    model: ViT,
    transform: Transform,
    paths: list[Path],
    settings: dict[str, str],
    args: argparse.Namespace,
    bar: tqdm,
) -> None:
    """Compute the features of some images and write them: "features" [rows, D], or a map [D, h, w] by each path.

    The metadata say what they are: `paths`, of the rows in order, `images`, all that were asked for with their bytes
    and times of change, and `skipped`,
    the others with the reason. The file gets its name when all of it is written.
    """
    from vit.weights.formats.safetensors import write_safetensors

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
    names = {"paths": [*rows], "images": [state(path) for path in paths], "skipped": skipped}
    metadata = {**settings, **{name: json.dumps(value) for name, value in names.items()}}
    tensors = rows if args.kind == "dense" else {"features": join(model, args, list(rows.values()))}
    sweep(file)
    with replacing(file) as temporary:
        write_safetensors(temporary, tensors, metadata)


def join(model: ViT, args: argparse.Namespace, rows: list[Tensor]) -> Tensor:
    """Rows [D] -> [rows, D], [0, D] where there are none."""
    if rows:
        return torch.stack(rows)
    double = args.kind == "pooled" and model.config.global_pool == "token_avg"
    return torch.empty(0, model.config.embed_dim * (1 + double), dtype=DTYPES[args.save_dtype])


def sweep(file: Path) -> None:
    """Remove the temporary files that killed runs have left of this one."""
    for path in file.parent.iterdir():
        if re.fullmatch(rf"\.{re.escape(file.name)}\.[0-9a-f]{{8}}", path.name):
            path.unlink(missing_ok=True)


@torch.inference_mode()
def extract(model: ViT, batch: list[Decoded], kind: str, packed: bool) -> Iterator[tuple[Path, Tensor | ImageError]]:
    """Each image's features, [D] or [D, h, w] float32 on the CPU, in the batch's order; `packed` where sizes differ."""
    weights = model.patch_embed.proj.weight
    images = [outcome.to(weights.device, weights.dtype) for _, outcome in batch if isinstance(outcome, Tensor)]
    found: Iterator[Tensor] = iter(())
    if images and kind == "dense":
        found = iter(
            model.forward_intermediates_packed(images, [-1], norm=True)[0]
            if packed
            else model.forward_intermediates(torch.stack(images), [-1], norm=True)[0]
        )
    elif images:
        tokens = model.forward_features_packed(images) if packed else model.forward_features(torch.stack(images))
        found = (one[0] if kind == "class" else model.forward_head(one[None], pre_logits=True)[0] for one in tokens)
    for path, outcome in batch:
        yield path, outcome if isinstance(outcome, ImageError) else next(found).float().cpu()


def lower(values: Tensor, dtype: torch.dtype, path: Path) -> Tensor:
    """Values in a dtype that must be able to hold them."""
    result = values.to(dtype)
    if not result.isfinite().all():
        raise ValueError(f"the features of {path} reach {values.abs().max():.3g}, which {dtype} cannot hold")
    # A copy: a class token would otherwise be a view that keeps all tokens of its batch in memory.
    return result.clone(memory_format=torch.contiguous_format)


def write_index(output: Path, files: dict[Path, range]) -> None:
    """The list of the files, written when all of them are there: <output>.index.json."""
    shards = [{"file": file.name, "paths": json.loads(read_metadata(file)["paths"])} for file in files]
    with replacing(output.with_name(f"{output.name}.index.json")) as temporary:
        write_json(temporary, {"shards": shards})
