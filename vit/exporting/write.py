"""A model to a file for another runtime: converted, checked, then named."""

from __future__ import annotations

import copy
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from vit.checks import inside, require_int, unknown, whole_patches
from vit.files import check_place, replace_folder
from vit.metadata import Preprocessing, Provenance
from vit.model import ViT

from . import gate, page_graph, to_onnx, to_transformersjs, to_web
from .converting import in_turns
from .formats import FORMATS, Format, by_ending, check_taken
from .graph import check_outputs
from .int8 import FULL, REDUCED, Images, images_for, quantized
from .metadata import PAGE, Metadata, digest, processor
from .packages import need
from .pixels import check_input
from .read import ExportedModel


@dataclass(frozen=True)
class Report:
    """What `export` wrote."""

    files: tuple[str, ...]  # the first is the one to open
    bytes: int  # of all of them
    metadata: Metadata  # as it is in the file; its `parity` has the figures of the check
    seconds: dict[str, float]  # "convert" and "check"
    caveat: str = ""  # what the check could not show

    def to_dict(self) -> dict[str, Any]:
        """As plain data, for JSON."""
        return asdict(self)


@in_turns()
@torch.autocast("cpu", enabled=False)
def export(
    model: ViT,
    path: str | Path,
    format: str | None = None,
    *,
    dynamic: bool | None = None,
    img_size: int | tuple[int, int] | None = None,
    batch_size: int | None = None,
    half: bool = False,
    int8: bool = False,
    calibrate: Tensor | Sequence[Tensor] | None = None,
    reduce_range: bool = False,
    opset: int | None = None,
    aot: bool = False,
    outputs: Sequence[str] | None = None,
    input: str = "float32",
    check: bool = True,
    force: bool = False,
    runtime_folder: str | Path | None = None,
    example: str | Path | Image.Image | None = None,
) -> Report:
    """Write a model as a file for another runtime, and run it there against the model before it gets its name.

    The file holds all that is needed to use it: preprocessing, categories, what it takes and gives, and the figures of
    that check; `load_exported` opens it. In ONNX the same model, versions and threads give the same bytes.

    Args:
        model: in float32. It is exported as it is in eval mode, and not changed.
        path: the file to write: `.onnx`, `.pt2`, `.tflite`, `.pte`, or `.xml` for OpenVINO, which gets a `.bin` beside
            it; a folder for web and transformersjs, and one with the ending `.mlpackage` for Core ML.
        format: one of `vit.exporting.FORMATS`; None: by the ending of `path`. "web" is a page that shows in a browser
            what the model sees.
        dynamic: one file for all sizes and batches; None: unless a size or a batch size is given.
        img_size: (H, W) or one number for a square, the only size that the file will take, in multiples of the patch;
            None, if the file is not dynamic: the model's own.
        batch_size: images per call, no more and no less; None, if the file is not dynamic: 1.
        half: weights in float16. Images and outputs stay float32.
        int8: weights and the inputs of matrix products in bytes, see `vit.exporting.int8`.
        calibrate: for int8, 40 to 640 images like those to come, normalised as `model.preprocessing` says, [n, C, H, W]
            or a list of [C, H, W]. A fifth, drawn with a seed, is held out for the check. None: parts of seven
            photographs that ship with the package, one of which is held out.
        reduce_range: for int8, weights in 7 bits, for processors without VNNI, on which the sums of two products of
            whole bytes overflow.
        opset: of ONNX, 18 to 23, with int8 to 20; None for 20. 20 has GELU as one operation, 23 attention.
        aot: of pt2, compiled to native code for this machine's processor.
        outputs: one or more of "logits", "features" (what the head reads) and "attention" (of the class token in the
            last block, [B, A, h, w]); None for logits, or for features if the model has no head.
        input: "float32": normalised images [B, C, H, W], as the model takes them; "uint8": their pixels, uint8
            [B, H, W, C], resized and cropped, which the file normalises; "image": whole pictures, uint8 [B, H, W, C] of
            any H and W, which the file resizes, crops and normalises, to `img_size` or the model's own size.
        check: run the file against the model: noise of several sizes and a photograph, prepared as the file's own
            preprocessing says. At most 1e-5 of the largest value may differ, with `half` or whole pictures 2e-3. In
            int8 it runs the images that were held out: the cosine of each output must reach 0.998.
        force: replace files that exist; only after the check.
        runtime_folder: for the web, holds the files of ONNX Runtime Web; None to fetch them with npm, once.
        example: for the web, the picture that the page opens with, a file or a PIL image; None for one that ships.

    Returns:
        What was written, with the figures.

    Raises:
        ParityError: a ValueError: the file does not compute what the model does. Nothing is written.
        ValueError: a model, option or path that does not fit, a missing package, attention that cannot be exported.
        FileExistsError: a file exists, and `force` is False.
        PermissionError, NotADirectoryError: nothing can be written at `path`.
    """
    format = by_ending(Path(path)) if format is None else format
    if format not in FORMATS:
        raise ValueError(unknown("format", format, FORMATS))
    form = FORMATS[format]
    options = {"dynamic": dynamic, "half": half, "int8": int8, "reduce_range": reduce_range, "opset": opset, "aot": aot}
    options = check_taken(format, options | {"runtime_folder": runtime_folder, "example": example}, input)
    if reduce_range and not int8:
        raise ValueError("a reduced range of weights is for int8: ask for int8=True (--int8) or leave it out")
    if format == "web":
        if dynamic is False or batch_size is not None or outputs is not None or input != "float32":
            raise ValueError(
                "a page takes one picture at a time, of any size, and shows all that it can: leave out dynamic,"
                " batch_size, outputs and input"
            )
        return export_page(model, path, img_size, int8, calibrate, check, force, runtime_folder, example)
    path = check_path(path, form, force)
    check_model(model)
    names = check_outputs(outputs, model)
    if "dynamic" not in form.takes and dynamic is None:
        dynamic = False
    size, batch = shape(model, dynamic, img_size, batch_size)
    preprocessing = replace(model.preprocessing, size=size or model.preprocessing.size)
    if check_input(input, model) == "image":
        size, batch = None, batch_size  # pictures of any size, and what they are resized to is in the preprocessing
    precision = check_precision(model, names, half, int8, calibrate)
    if calibrate is not None and not form.runs:
        raise ValueError(f"{format} is int8 without images, and not checked here: leave out calibrate (--calibrate)")
    options = {name: options[name] for name in ("opset", "aot") if name in options}  # for the conversion
    if "opset" in options:
        options["opset"] = check_opset(opset, int8)
    for package in form.packages:
        need(package, form.extra, form.note)

    start = time.perf_counter()
    model = copy.deepcopy(model).cpu().eval().requires_grad_(False)
    metadata = describe(model, format, preprocessing, names, precision, input, size, batch)
    metadata = replace(metadata, reduce_range=reduce_range)
    if format == "transformersjs":
        to_transformersjs.check_folder(path, metadata)
    sized = copy.copy(model)  # with the same weights: calibrated at the size that the file takes
    sized.preprocessing = preprocessing
    images = images_for(sized, calibrate) if int8 and form.runs else Images([], [])
    twin = quantized(model, images.used, REDUCED if reduce_range else FULL) if int8 and form.twin else None
    converted = form.module.convert(twin or model, metadata, **options)
    seconds = {"convert": time.perf_counter() - start}
    compare = partial(gate.compare, model, held_out=images.held_out, twin=twin) if form.runs and check else None
    return save(form, converted, metadata, path, compare, force, seconds)


def save(
    form: Format,
    converted: Any,
    metadata: Metadata,
    path: Path,
    compare: Callable[[ExportedModel], list[dict[str, Any]]] | None,
    force: bool,
    seconds: dict[str, float],
) -> Report:
    """Write the files under a temporary name, open and check them, and give them their own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        file = Path(folder) / path.name
        form.module.save(converted, metadata, file)
        if form.runs:
            exported = ExportedModel(file, trust=True)  # that it opens
        if compare is not None:
            start = time.perf_counter()
            rows = compare(exported)
            gate.judge(rows)
            metadata = replace(metadata, parity=tuple(rows))
            form.module.save(converted, metadata, file)
            ExportedModel(file, trust=True)  # that it opens
            seconds["check"] = time.perf_counter() - start
        if not force:
            check_new(path, form)  # again: another process may have written one in between
        return Report(*publish(Path(folder), path), metadata, seconds, form.caveat)


def export_page(
    model: ViT,
    path: str | Path,
    img_size: int | tuple[int, int] | None,
    int8: bool,
    calibrate: Tensor | Sequence[Tensor] | None,
    check: bool,
    force: bool,
    runtime_folder: str | Path | None,
    example: str | Path | Image.Image | None,
) -> Report:
    """`export` to a folder for a browser."""
    path = Path(os.path.realpath(path))
    check_model(model)
    to_web.check(model)
    to_web.check_folder(path, force)
    names = page_graph.output_names(model)
    precision = check_precision(model, names, False, int8, calibrate)
    for package in FORMATS["web"].packages:
        need(package, FORMATS["web"].extra)
    size = model.preprocessing.size if img_size is None else whole_patches(img_size, model.config.patch_size)
    model = copy.deepcopy(model).cpu().eval().requires_grad_(False)
    model.preprocessing = replace(model.preprocessing, size=size)
    metadata = describe(model, "web", model.preprocessing, names, precision, PAGE, None, 1)
    return Report(*to_web.write(model, path, metadata, calibrate, runtime_folder, example, check, force))


def describe(
    model: ViT, format: str, preprocessing: Preprocessing, outputs: tuple[str, ...], precision: str, input: str,
    size: tuple[int, int] | None, batch: int | None,
) -> Metadata:  # fmt: skip
    """What a file will say of itself, not yet checked."""
    return Metadata(
        config=model.config,
        preprocessing=preprocessing,
        categories=model.categories,
        outputs=outputs,
        precision=precision,
        input=input,
        size=size,
        batch=batch,
        source=without_folders(model.provenance),
        versions={name: version(name) for name in ("vit-small", "torch", *FORMATS[format].packages)},
        processor=processor(),
        parity=None,
        weights=digest(model),
    )


def publish(folder: Path, path: Path) -> tuple[tuple[str, ...], int]:
    """Move files to their final names, that of `path` last; returns the names, that of `path` first, and the bytes.

    If `path` is a folder, other files in it stay, and what lies on top and says which file to open comes last; but a
    package, a folder with an ending, is replaced as a whole.
    """
    found = (file for file in folder.rglob("*") if file.is_file())
    files = sorted(found, key=lambda file: (file.name == path.name, -len(file.parts), file))
    total = sum(file.stat().st_size for file in files)
    targets = [path.parent / file.relative_to(folder) for file in files]
    if path.suffix and (folder / path.name).is_dir():
        replace_folder(folder / path.name, path)
    else:
        for file, target in zip(files, targets):
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, target)
    return tuple(dict.fromkeys(map(str, (path, *reversed(targets))))), total


def check_path(path: str | Path, form: Format, force: bool) -> Path:
    """The file or folder to write, through a symbolic link to its target."""
    real, ending = Path(os.path.realpath(path)), form.endings[0]
    kind = f"{ending} file" if not form.folder else f"{ending} folder" if ending else "folder without a dot"
    wrong = real.is_file() if form.folder else real.is_dir()
    if Path(path).suffix != ending or real.suffix != ending or wrong:
        raise ValueError(f"expected the name of a {kind} to write, not {str(path)!r}")
    check_place(real)
    if not force:
        check_new(real, form)
    return real


def check_new(path: Path, form: Format) -> None:
    """FileExistsError if one of the files is there, or anything in the folder."""
    if form.folder and path.is_dir() and any(path.iterdir()):
        what = "it" if path.suffix else "files in it"
        raise FileExistsError(f"{path} is not empty: force=True (--force) replaces {what}, after the check")
    for file in () if form.folder else map(path.with_suffix, form.endings):
        if file.exists():
            raise FileExistsError(f"{file} exists: force=True (--force) replaces it, after the check")


def without_folders(source: Provenance | None) -> Provenance | None:
    """A record with the names of files only: the folders are this machine's own."""
    if source is None or source.source.startswith("hf-hub:"):
        return source
    return replace(source, source=Path(source.source).name, parent=without_folders(source.parent))


def check_model(model: object) -> None:
    """ValueError for what cannot be exported, with what to do instead."""
    if not isinstance(model, ViT):
        where = inside(model, ViT)
        hint = f": export the ViT in it, model.{where}" if where else ""
        raise ValueError(f"expected a vit.ViT to export, not {type(model).__name__}{hint}")
    if model.categories is not None and len(model.categories) != model.config.num_classes:
        found, wanted = len(model.categories), model.config.num_classes
        raise ValueError(f"the model has {wanted} classes and {found} categories: set model.categories to its names")
    if kind := getattr(model, "optimized", None):
        raise ValueError(f"this model is optimized in {kind} for PyTorch: export the model that it was made from")
    if model.class_token.dtype != torch.float32:
        raise ValueError(
            f"expected a model in float32, not {model.class_token.dtype}: use model.float(), and half=True (--half) for"
            " weights in float16"
        )


def shape(
    model: ViT, dynamic: bool | None, img_size: int | tuple[int, int] | None, batch_size: int | None
) -> tuple[tuple[int, int] | None, int | None]:
    """((H, W), images) that a file will take; None and None for all."""
    if batch_size is not None:
        require_int("batch_size", batch_size, 1)
    size = None if img_size is None else whole_patches(img_size, model.config.patch_size)
    given = [f"img_size={img_size!r}"] * (size is not None) + [f"batch_size={batch_size!r}"] * (batch_size is not None)
    if dynamic and given:
        raise ValueError(f"a dynamic file takes all sizes and batches, so {' and '.join(given)} cannot go with it")
    if dynamic is None:
        dynamic = not given
    return (None, None) if dynamic else (size or model.preprocessing.size, batch_size or 1)


def check_precision(model: ViT, outputs: Sequence[str], half: bool, int8: bool, calibrate: object) -> str:
    """The precision of the weights: "float32", "float16" or "int8"."""
    if half and int8:
        raise ValueError("weights are either in float16 or in int8: leave out half (--half) or int8 (--int8)")
    if int8 and model.config.num_classes == 1 and "logits" in outputs:
        raise ValueError("int8 is judged by cosines, and one logit has none: ask for features, or export in float32")
    if calibrate is not None and not int8:
        raise ValueError("images to calibrate on are for int8: ask for int8=True (--int8) or leave them out")
    return "int8" if int8 else "float16" if half else "float32"


def check_opset(opset: int | None, int8: bool) -> int:
    """The opset of ONNX to convert to."""
    if opset is None:
        return to_onnx.DEFAULT_OPSET
    if isinstance(opset, bool) or opset not in to_onnx.OPSETS:
        raise ValueError(f"opset must lie between {to_onnx.OPSETS[0]} and {to_onnx.OPSETS[-1]}, not {opset!r}")
    if int8 and opset > to_onnx.DEFAULT_OPSET:  # ONNX Runtime 1.32 takes the signed bytes of such a file for unsigned
        raise ValueError(
            f"opset={opset} cannot go with int8, which ONNX Runtime reads at {to_onnx.DEFAULT_OPSET} or less"
        )
    return opset
