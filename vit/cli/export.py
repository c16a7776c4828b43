"""`vit export`: a checkpoint to a file for another runtime, checked there before it gets its name."""

import argparse
import json
import sys
from pathlib import Path
from random import Random
from typing import Any

from torch import Tensor

from vit.exporting import FORMATS, Metadata, Report, export
from vit.exporting.graph import OUTPUTS
from vit.exporting.int8 import MOST
from vit.exporting.metadata import PAGE
from vit.exporting.pixels import INPUTS
from vit.exporting.to_onnx import DEFAULT_OPSET
from vit.image import ImageError, Transform, create_transform

from . import loading, options, runtime
from .images import decode, find_images, progress


def add_parser(commands: Any) -> None:
    """Declare the command and its options."""
    parser = commands.add_parser(
        "export",
        help="write a model for another runtime",
        description="Write a checkpoint as a file for another runtime, with its preprocessing and categories inside. "
        "The file gets its name only after it was run against the model; `vit predict --model FILE` then runs it.",
    )
    parser.add_argument("model", metavar="MODEL", help="a name, a file or a folder, as for vit predict")
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="FILE",
        help="model.onnx, model.xml, model.pt2 ...; for web and transformersjs a folder",
    )  # fmt: skip
    parser.add_argument(
        "--format",
        choices=FORMATS,
        help="web: a page that shows what the model sees; default: by the ending of FILE",
    )
    parser.add_argument(
        "--dynamic", action="store_true", help="one file for all sizes and batches, the default without a size"
    )
    parser.add_argument(
        "--img-size", type=options.fixed_size, metavar="SIZE",
        help="224 or 224x448 (height x width), the only size that the file takes; faster than a dynamic file",
    )  # fmt: skip
    parser.add_argument(
        "-b", "--batch-size", type=options.positive, metavar="N",
        help="images per call of a file for one size, no more and no less; default: 1",
    )  # fmt: skip
    parser.add_argument("--half", action="store_true", help="weights in float16; images and outputs stay float32")
    parser.add_argument(
        "--int8", action="store_true", help="matrix products of bytes: a quarter of the bytes, and fast on a CPU"
    )
    parser.add_argument(
        "--calibrate", nargs="+", metavar="IMAGE",
        help="for int8, 40 to 640 images like those to come: files, folders or globs; a fifth is held out for the "
        "check; default: parts of seven photographs that ship",
    )  # fmt: skip
    parser.add_argument(
        "--reduce-range", action="store_true", help="for int8, weights in 7 bits, for processors without VNNI"
    )
    parser.add_argument(
        "--opset", type=options.positive, metavar="N",
        help=f"of ONNX, 18 to 23; 20 has GELU as one operation, 23 attention; default: {DEFAULT_OPSET}",
    )  # fmt: skip
    parser.add_argument("--aot", action="store_true", help="of pt2, compiled to native code for this processor")
    parser.add_argument(
        "--outputs", type=options.listed(options.one_of(*OUTPUTS)), metavar="LIST",
        help="logits,features,attention: features are what the classifier reads, attention is the class token's in the "
        "last block; default: logits, or features of a model without a classifier",
    )  # fmt: skip
    parser.add_argument(
        "--input", choices=INPUTS, default="float32",
        help="what the file takes: float32, images resized, cropped and normalised; uint8, the same not normalised; "
        "image, whole pictures of any size; default: %(default)s",
    )  # fmt: skip
    parser.add_argument(
        "--runtime-folder", type=Path, metavar="DIR",
        help="for the web, the files of ONNX Runtime Web; default: npm fetches them, once, into a cache",
    )  # fmt: skip
    parser.add_argument(
        "--example", type=Path, metavar="IMAGE", help="for the web, the picture that the page opens with"
    )
    parser.add_argument("--no-check", action="store_true", help="do not run the file; its metadata say so")
    parser.add_argument("--force", action="store_true", help="replace FILE, after the check")
    parser.add_argument("--json", action="store_true", help="print the whole report")
    options.add_reading(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Load, export, print the report."""
    from vit.weights import load_pretrained

    if runtime.is_ours(args.model):
        raise ValueError(f"{args.model} {loading.EXPORTED}")
    model = load_pretrained(args.model, **options.reading(args))
    images = None if args.calibrate is None else read_images(args.calibrate, create_transform(model, args.img_size))
    report = export(
        model, args.output, args.format, dynamic=args.dynamic or None, int8=args.int8, calibrate=images,
        reduce_range=args.reduce_range,
        img_size=args.img_size, batch_size=args.batch_size, half=args.half, opset=args.opset, aot=args.aot,
        outputs=args.outputs, input=args.input, check=not args.no_check, force=args.force,
        runtime_folder=args.runtime_folder, example=args.example,
    )  # fmt: skip
    print(json.dumps(report.to_dict(), indent=2) if args.json else as_text(report))
    return 0


def read_images(names: list[str], transform: Transform) -> list[Tensor]:
    """Images to calibrate on; of many, `MOST` drawn with a seed."""
    paths = find_images(names)
    if len(paths) > MOST:
        print(f"vit export: calibrating on {MOST} of {len(paths)} images, drawn with a seed", file=sys.stderr)
        paths = sorted(Random(0).sample(paths, MOST))
    found = []
    with progress(len(paths)) as bar:
        for _, outcome in decode(paths, transform):
            if isinstance(outcome, ImageError):
                raise outcome
            found.append(outcome)
            bar.update()
    return found


def as_text(report: Report) -> str:
    """What was written, what it takes and gives, and how far it is from its model."""
    page = report.metadata.input == PAGE
    name = f"{Path(report.files[0]).parent}/" if page else report.files[0]
    lines = [f"{name}: {report.bytes / 1e6:.1f} MB", *describe(report.metadata)]
    if report.caveat:
        lines.append(f"note        {report.caveat}")
    if page:
        if report.metadata.precision != "int8":  # each visitor loads it
            size = next(Path(file).stat().st_size for file in report.files if file.endswith(".onnx"))
            lines.append(f"to load faster: --int8 --force makes the model, {size / 1e6:.1f} MB of it, about a quarter")
        lines.append(f"to see it: python -m http.server -d {name}, and open localhost:8000")
    return "\n".join(lines)


def describe(metadata: Metadata) -> list[str]:
    """What an exported file takes and gives, and how far it was from its model, in lines."""
    channels, size = metadata.config.in_chans, f"H x W, multiples of {metadata.config.patch_size}"
    if metadata.size is not None:
        size = "{} x {}".format(*metadata.size)
    shape = {
        "float32": f"{channels} x {size}",
        "uint8": f"pixels, uint8, {channels} channels last, {size}",
        "image": f"whole pictures, uint8, H x W x {channels}, resized to {{}} x {{}}".format(
            *metadata.preprocessing.size
        ),
        PAGE: "a whole picture, uint8, H x W x 3, the number of patches and the pixels to resize it to",
    }[metadata.input]
    batch = "any number of images" if metadata.batch is None else f"{metadata.batch} image{'s' * (metadata.batch > 1)}"
    prepared = metadata.preprocessing
    how = f"{prepared.mode}, {prepared.interpolation}"
    how += f", crop_pct {prepared.crop_pct:g}" if prepared.mode == "crop" else ""
    mean, std = (", ".join(f"{x:g}" for x in values) for values in (prepared.mean, prepared.std))
    lines = [
        f"from        {metadata.source.source if metadata.source else 'a model in memory'}",
        f"images      {batch}, {shape}",
        f"prepared    {how}; mean {mean}; std {std}",
        f"outputs     {', '.join(metadata.outputs)}",
        f"labels      {shortened(metadata.categories) if metadata.categories else 'none'}",
        f"weights     {metadata.precision}{', in 7 bits' * metadata.reduce_range}",
    ]
    if metadata.parity is None:
        return [*lines, "checked     no"]
    versions = ", ".join(f"{name} {number}" for name, number in metadata.versions.items())
    lines.append(f"checked     {metadata.processor}; {versions}")
    int8 = metadata.precision == "int8"
    lines.append(
        "least cosine with the model:" if int8 else "largest difference from the model, over its largest value:"
    )
    for row in metadata.parity:
        lines.append(f"  {row['value']:{'.5f' if int8 else '.1e'}}   {row['output']:10} {row['input']}")
    return lines


def shortened(names: list[str]) -> str:
    """The number of labels and the first of them."""
    return f"{len(names)}: {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}"
