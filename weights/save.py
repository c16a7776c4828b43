"""A model to files."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vit.checks import inside
from vit.files import replacing, write_json
from vit.metadata import Preprocessing, Provenance
from vit.model import ViT
from vit.resources import imagenet_categories
from vit.trainable import LeftOut

from .attention import settings_of, unnamed
from .checkpoint import Checkpoint, CheckpointError
from .convert import Converted, adapt_positions, to_theirs, unrecorded
from .description import Attributes, Description
from .detect import locate
from .formats.npz import read_npz, write_npz
from .formats.safetensors import read_safetensors, write_safetensors
from .keymap import Layout
from .layouts import get_layout
from .layouts.vit import VIT, check_attributes, read_header, write_header
from .reading import Ours, to_ours
from .shapes import known_preprocessing


def save_checkpoint(model: ViT, path: str | Path, layout: str = "vit") -> Path:
    """Write a model's weights, with all that `load_pretrained` needs to load the same model.

    Args:
        model: the model, on any device and in any floating dtype; weights and dtype are kept bit for bit. If it is
            sharded (FSDP2), all processes must call this; the first one writes.
        path: a `.safetensors` file, or a folder in which `model.safetensors` is written. "timm", "deit" and
            transformers' layouts need a folder, because their `config.json` describes the folder's weights.
            Google's layouts also take an `.npz` file.
        layout: one of `vit.weights.LAYOUTS`. timm's and transformers' come with the `config.json` from which timm
            and transformers load them. In the others, the file's header holds config (and which of it was assumed),
            preprocessing, categories, provenance and the registered names of attention that was set. Only "vit" can
            hold attention with weights of its own. An npz file holds weights only; a warning names what is lost.

    Returns:
        The file that was written.

    Raises:
        ValueError: an unknown layout, a path with another ending, weights that are not finite, settings that
            contradict each other or that the layout cannot hold. Nothing is written then, and an existing file is
            only ever replaced by a complete one.
    """
    check_whole(model)
    file = target_files(path, layout)[0]
    license = None if model.provenance is None else model.provenance.license
    attributes = Attributes(model.preprocessing, model.categories, license, attention=settings_of(model))
    # checked as the weights of a file are; the config still says who stated what
    tensors, writes = _gathered(model)
    if not writes:
        return file
    ours = to_ours(tensors, VIT.name, {"the model": model.config.to_dict()})
    ours = replace(ours, config=replace(ours.config, sources={**ours.config.sources, **model.config.sources}))
    converted = write(ours, attributes, file, layout, lambda: model.provenance)
    for name, value in converted.report.unsaid.items():
        warnings.warn(f"{file} cannot hold {name}: readers will assume {value!r}", stacklevel=2)
    return file


def _gathered(model: ViT) -> tuple[dict[str, Tensor], bool]:
    """The weights without shards, and whether this process writes them: of a sharded model, only the first does."""
    state = model.state_dict()
    if not any(hasattr(tensor, "full_tensor") for tensor in state.values()):  # a DTensor, whose import takes a second
        return state, True
    whole = {key: tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor for key, tensor in state.items()}
    return whole, torch.distributed.get_rank() == 0


def check_whole(model: object) -> None:
    """ValueError for a wrapper around a model."""
    kind = type(model).__name__
    if kind == "FullyShardedDataParallel":
        raise ValueError(
            f"expected whole weights, got shards of them ({kind}): gather them with get_model_state_dict of"
            " torch.distributed.checkpoint.state_dict, full_state_dict=True, load them into a vit.ViT, and save that"
        )
    if not isinstance(model, ViT):
        held = inside(model, ViT)
        raise ValueError(f"expected a vit.ViT, got {kind}" + (f": save the model in it, its .{held}" if held else ""))
    if any(isinstance(module, LeftOut) for module in model.modules()):
        raise ValueError(
            "expected a whole model, got a backbone without its norm: save the model whose weights it shares"
        )


def target_files(path: str | Path, layout: str) -> list[Path]:
    """The files that are written: the weights, then the JSON files beside them if the layout has any."""
    files = get_layout(layout).files
    if path == "":  # as from an unset variable in a shell; as a path it would be the current folder
        raise ValueError("expected a file or folder to write, got ''")
    path = Path(path)
    is_folder = path.is_dir() or path.suffix.lower() not in (
        ".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".npz", ".npy", ".onnx", ".json", ".jpg", ".png",
    )  # fmt: skip
    if is_folder:
        return [path / "model.safetensors", *(path / name for name in files.beside)]
    if path.suffix != ".safetensors" and not (path.suffix == ".npz" and files.npz):
        kinds = ".safetensors, .npz" if files.npz else ".safetensors"
        raise ValueError(f"{path} must end in {kinds} or be a folder: other formats are not written as {layout}")
    if files.beside:
        raise ValueError(
            f"{path} must be a folder: the {layout} layout is model.safetensors with {files.beside[0]} beside it"
        )
    return [path]


def report_path(file: Path) -> Path:
    """Where the report on a converted file is written."""
    return file.with_name(f"{file.name}.report.json")


def write(
    ours: Ours,
    attributes: Attributes,
    file: Path,
    layout: str,
    provenance: Callable[[], Provenance | None],
    report: Callable[[Converted, str], Mapping[str, Any]] | None = None,
) -> Converted:
    """Write weights in a layout.

    Each file is written under a temporary name and renamed, so that it never holds a part of its content; if any of
    them cannot be written, all stay as they were.

    Args:
        ours: the weights.
        attributes: what the model carries besides weights and config.
        file: where the weights go, the first of `target_files`.
        layout: the layout to write.
        provenance: called only if a header is written; it waits for the hash of the source.
        report: asks for a proof: the weights are read back and compared bit for bit before the files get their names,
            and what `report` makes of the conversion and of the weights' sha256 is written beside them.

    Returns:
        What was written, and a report on each key and setting.
    """
    target = get_layout(layout)
    converted = to_theirs(ours, target)
    check_attributes(converted.config, attributes)
    is_npz = file.suffix == ".npz"
    contents = {} if target.files.write is None else target.files.write(converted.config, attributes)
    header = {}
    if contents or is_npz:
        _check_detected(converted, layout)
        converted.report.unsaid.update(_unsaid(ours, converted, attributes, target, contents))
    else:
        header = write_header(converted.config, attributes, provenance())
        read_header(header)  # raises if it could not be read back
    file.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        temporary = stack.enter_context(replacing(file))
        if is_npz:
            write_npz(temporary, converted.state_dict)
        else:
            write_safetensors(temporary, converted.state_dict, {"format": "pt", **header})
        if report is not None:
            tensors = {**adapt_positions(ours.tensors, ours.config, target)[0], **ours.attention}
            written = read_npz(temporary) if is_npz else read_safetensors(temporary)
            _check_same(written, tensors, converted, layout)
            write_json(stack.enter_context(replacing(report_path(file))), report(converted, written.sha256))
        for name, content in contents.items():
            write_json(stack.enter_context(replacing(file.parent / name)), content)
    return converted


def _check_same(written: Checkpoint, tensors: Mapping[str, Tensor], converted: Converted, layout: str) -> None:
    """CheckpointError unless the written tensors read back bit for bit."""
    read = to_ours(written.tensors, layout, {"the writer": converted.config.to_dict()})
    again = {**read.tensors, **read.attention}
    odd = [
        name
        for name in {**tensors, **again}
        if name not in tensors or name not in again or not _same_bits(tensors[name], again[name])
    ]
    if odd:
        raise CheckpointError(f"{', '.join(odd)} did not read back as written in the {layout} layout")


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def _check_detected(converted: Converted, layout: str) -> None:
    """CheckpointError if a file without our header would be taken for another layout."""
    found = locate(converted.state_dict).layout.name
    if found != layout:
        raise CheckpointError(f"written in the {layout} layout, this model would be read as {found}")


def _unsaid(
    ours: Ours,
    converted: Converted,
    attributes: Attributes,
    target: Layout,
    contents: Mapping[str, dict[str, Any]],
) -> dict[str, Any]:
    """The settings that files without our header cannot hold -> what their reader will assume instead."""
    config = converted.config
    if target.files.read is not None:
        about = target.files.read(contents)
    else:
        about = Description(categories=imagenet_categories() if config.num_classes == 1000 else None)
        if config.grid[0] != config.grid[1]:
            grid = f"{config.grid[0]}x{config.grid[1]}"
            raise CheckpointError(f"an npz file cannot hold that the grid is {grid}: readers assume a square")
    unsaid = unrecorded(ours, config, target, about.declared)
    images, categories = about.preprocessing or known_preprocessing(config, target), about.categories
    if effect(images) != effect(attributes.preprocessing):
        unsaid["preprocessing"] = images
    if categories != attributes.categories:
        unsaid["categories"] = None if categories is None else f"{len(categories)} labels, {categories[0]!r} the first"
    if unnamed(attributes.attention):
        unsaid["attention"] = "sdpa"
    return unsaid


def effect(settings: Preprocessing) -> tuple:
    """What preprocessing does to images. Last, the size to resize to: several crop_pct may give the same."""
    resized = [math.floor(side / settings.crop_pct) for side in settings.size] if settings.mode == "crop" else None
    return settings.size, settings.mean, settings.std, settings.interpolation, settings.mode, resized
