"""A model to files."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vit.config import ViTConfig
from vit.files import replacing, write_json
from vit.metadata import Preprocessing, Provenance
from vit.model import ViT
from vit.resources import imagenet_categories

from .attention import settings_of, unnamed
from .checkpoint import Checkpoint, CheckpointError
from .convert import Converted, Ours, adapt_positions, from_model, to_ours, to_theirs, unrecorded
from .description import Attributes
from .detect import locate
from .formats.npz import read_npz, write_npz
from .formats.safetensors import read_safetensors, write_safetensors
from .layouts import get_layout, timm_config, transformers_config
from .layouts.google import AUGREG, BIG_VISION, BIG_VISION_SCANNED
from .layouts.vit import check_attributes, read_header, write_header
from .shapes import known_preprocessing

_NPZ = {layout.name for layout in (AUGREG, BIG_VISION, BIG_VISION_SCANNED)}
_TIMM = {"timm", "deit"}  # layouts with timm's config.json


def _is_transformers(layout: str) -> bool:
    return layout.startswith("transformers") and not layout.endswith("_memory")


def save_checkpoint(model: ViT, path: str | Path, layout: str = "vit") -> Path:
    """Write a model's weights, with all that `load_pretrained` needs to bring back the same model.

    Args:
        model: the model, on any device and in any floating dtype; both its weights and dtype are kept to the bit.
        path: a `.safetensors` file, or a folder in which `model.safetensors` is written. "timm", "deit" and
            transformers' layouts take a folder only, since their `config.json` speaks for all that lies beside it.
            Google's layouts also take an `.npz` file.
        layout: one of `vit.weights.LAYOUTS`. timm's and transformers' come with the `config.json` from which timm
            and transformers load them; the others carry config (with what was assumed of it), preprocessing,
            categories, provenance and the registered names of replaced attention in the file's header. Attention with
            weights of its own goes into "vit" alone. An npz file holds weights only: what it cannot say is
            listed by `vit convert`.

    Returns:
        The file that was written.

    Raises:
        ValueError: an unknown layout, a path with another ending, weights that are not finite, settings that
            contradict each other or that the layout cannot hold. Nothing is written then; a file that was there is
            replaced only by a whole one.
    """
    if not isinstance(model, ViT):
        raise ValueError(f"expected a vit.ViT, not {type(model).__name__}: save a model as it was before compiling")
    file = target_files(path, layout)[0]
    license = None if model.provenance is None else model.provenance.license
    attributes = Attributes(model.preprocessing, model.categories, license, attention=settings_of(model))
    converted = write(from_model(model), attributes, file, layout, lambda: model.provenance)
    for name, value in converted.report.unsaid.items():
        warnings.warn(f"{file} cannot say {name}, whose reader will assume {value!r}", stacklevel=2)
    return file


def target_files(path: str | Path, layout: str) -> list[Path]:
    """The files that are written: the weights, then the JSON files beside them where the layout has any."""
    get_layout(layout)
    if str(path) == "":
        raise ValueError("expected a file or folder to write, not ''")
    path = Path(path)
    is_folder = path.is_dir() or path.suffix.lower() not in (
        ".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".npz", ".npy", ".onnx", ".json", ".jpg", ".png",
    )  # fmt: skip
    beside = _beside(layout)
    if is_folder:
        return [path / "model.safetensors", *(path / name for name in beside)]
    if path.suffix != ".safetensors" and not (path.suffix == ".npz" and layout in _NPZ):
        kinds = ".safetensors, .npz" if layout in _NPZ else ".safetensors"
        raise ValueError(f"{path} must end in {kinds} or be a folder: other formats are not written as {layout}")
    if beside:
        raise ValueError(
            f"{path} must be a folder: the {layout} layout is model.safetensors with {beside[0]} beside it"
        )
    return [path]


def report_path(file: Path) -> Path:
    """Where the report on a converted file is written."""
    return file.with_name(f"{file.name}.report.json")


def _beside(layout: str) -> tuple[str, ...]:
    if layout in _TIMM:
        return ("config.json",)
    return ("config.json", "preprocessor_config.json") if _is_transformers(layout) else ()


def write(
    ours: Ours,
    attributes: Attributes,
    file: Path,
    layout: str,
    provenance: Callable[[], Provenance | None],
    report: Callable[[Converted, str], Mapping[str, Any]] | None = None,
) -> Converted:
    """Write weights that fit in a layout; what came of them and of each setting stands in the result's report.

    Each file is written under a temporary name and renamed, so that it holds all of its new content or all of its
    old; a failure before the last of the writing leaves all as they were. Where a `report` is asked for, the weights
    are read back and compared to the bit before that, and what it makes of the conversion and of the weights' sha256 is
    written beside them. `provenance` is asked for where a header holds it only: it waits for the hash of what was read.
    """
    target = get_layout(layout)
    converted = to_theirs(ours, target)
    check_attributes(converted.config, attributes)
    contents = _configs(converted.config, attributes, layout)
    if contents or file.suffix == ".npz":  # the others carry everything in their header
        _check_detected(converted, layout)
        converted.report.unsaid.update(_unsaid(ours, converted, attributes, layout, contents))
    header = {}
    if not contents and file.suffix != ".npz":
        header = write_header(converted.config, attributes, provenance())
        read_header(header)  # it must read back
    file.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        temporary = stack.enter_context(replacing(file))
        if file.suffix == ".npz":
            write_npz(temporary, converted.state_dict)
        else:
            write_safetensors(temporary, converted.state_dict, {"format": "pt", **header})
        if report is not None:
            read = read_npz if file.suffix == ".npz" else read_safetensors
            tensors = {**adapt_positions(ours.tensors, ours.config, target)[0], **ours.attention}
            sha256 = _verify(read(temporary), tensors, converted, layout)
            content = report(converted, sha256)
            write_json(stack.enter_context(replacing(report_path(file))), content)
        for name, content in contents.items():
            write_json(stack.enter_context(replacing(file.parent / name)), content)
    return converted


def _configs(config: ViTConfig, attributes: Attributes, layout: str) -> dict[str, dict[str, Any]]:
    """The JSON files that go with a layout, by name."""
    if layout in _TIMM:
        return {"config.json": timm_config.write_config(config, attributes)}
    if not _is_transformers(layout):
        return {}
    return {
        "config.json": transformers_config.write_config(config, attributes),
        "preprocessor_config.json": transformers_config.write_preprocessing(attributes),
    }


def _verify(written: Checkpoint, tensors: Mapping[str, Tensor], converted: Converted, layout: str) -> str:
    """What was written must come back to the bit; its sha256."""
    read = to_ours(written.tensors, layout, {"the writer": converted.config.to_dict()})
    again = {**read.tensors, **read.attention}
    odd = [
        name
        for name in {**tensors, **again}
        if name not in tensors or name not in again or not _same_bits(tensors[name], again[name])
    ]
    if odd:
        raise CheckpointError(f"{', '.join(odd)} did not come back as written in the {layout} layout")
    return written.sha256


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def _check_detected(converted: Converted, layout: str) -> None:
    """A file that says nothing of its layout must be taken for what it is."""
    found = locate(converted.state_dict).layout.name
    if found != layout:
        raise CheckpointError(f"written in the {layout} layout, this model would be read as {found}")


def _unsaid(
    ours: Ours, converted: Converted, attributes: Attributes, layout: str, contents: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """What files without our header cannot say of a model -> what their reader will take it to be."""
    config, target = converted.config, get_layout(layout)
    stated: Mapping[str, Any] = {}
    images = known_preprocessing(config, target)
    categories = imagenet_categories() if config.num_classes == 1000 else None
    if layout in _TIMM:
        read = timm_config.read_config(contents["config.json"], "config.json")
        stated, images, categories = read.declared, read.preprocessing or images, read.categories
    elif contents:
        read = transformers_config.read_config(contents["config.json"], "config.json")
        stated, categories = read.declared, read.categories
        images = transformers_config.read_preprocessing(
            contents["preprocessor_config.json"], "preprocessor_config.json"
        )
    elif config.grid[0] != config.grid[1]:
        raise CheckpointError(f"an npz file cannot say that its grid is {config.grid[0]}x{config.grid[1]}, not square")
    unsaid = unrecorded(ours, config, target, stated)
    if effect(images) != effect(attributes.preprocessing):
        unsaid["preprocessing"] = images
    if categories != attributes.categories:
        unsaid["categories"] = None if categories is None else f"{len(categories)} labels, {categories[0]!r} the first"
    if unnamed(attributes.attention):
        unsaid["attention"] = "sdpa"
    return unsaid


def effect(settings: Preprocessing) -> tuple:
    """What preprocessing does to images, the size they are resized to last: it may come of several crop_pct."""
    resized = [math.floor(side / settings.crop_pct) for side in settings.size] if settings.mode == "crop" else None
    return settings.size, settings.mean, settings.std, settings.interpolation, settings.mode, resized
