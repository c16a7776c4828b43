"""A model to files."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vit.attention import SOFTMAX
from vit.config import ViTConfig
from vit.metadata import Preprocessing, Provenance
from vit.model import ViT

from .checkpoint import Checkpoint, CheckpointError, replacing, write_json
from .convert import Converted, Ours, adapt_positions, from_model, to_ours, to_theirs, unrecorded
from .description import Attributes
from .formats.npz import read_npz, write_npz
from .formats.safetensors import read_safetensors, write_safetensors
from .layouts import get_layout, timm_config, transformers_config
from .layouts.google import AUGREG, BIG_VISION, BIG_VISION_SCANNED
from .layouts.own import check_attributes, read_header, write_header

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
            and transformers load them; the others carry config, preprocessing, categories and provenance in the
            file's header. An npz file holds weights only: what it cannot say is listed by `vit convert`.

    Returns:
        The file that was written.

    Raises:
        ValueError: an unknown layout, a path with another ending, weights that are not finite, settings that
            contradict each other or that the layout cannot hold. Nothing is written then; a file that was there is
            replaced only by a whole one.
    """
    if not isinstance(model, ViT):
        raise ValueError(f"expected a vit.ViT, not {type(model).__name__}: save a model as it was before compiling")
    if any(block.attention.attend not in SOFTMAX for block in model.select_blocks()):
        warnings.warn("an attention function is no part of a checkpoint: set it again after loading", stacklevel=2)
    file = target_files(path, layout)[0]
    license = None if model.provenance is None else model.provenance.license
    attributes = Attributes(model.preprocessing, model.categories, license)
    write(from_model(model), attributes, file, layout, lambda: model.provenance)
    return file


def target_files(path: str | Path, layout: str) -> list[Path]:
    """The files that are written: the weights, then the JSON files beside them where the layout has any."""
    get_layout(layout)
    path = Path(path)
    is_folder = path.is_dir() or path.suffix not in (
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
    verify: bool = False,
) -> tuple[Converted, str]:
    """Write weights that fit in a layout; what came of them and of each setting stands in the result's report.

    Each file is written under a temporary name and renamed, so that it holds all of its new content or all of its
    old; a failure before the last of the writing leaves all as they were. With `verify` the weights are read back
    and compared to the bit before that, and their sha256 is returned ("" otherwise). `provenance` is asked for where a
    header holds it only, since it waits for the hash of what was read.
    """
    target = get_layout(layout)
    converted = to_theirs(ours, target)
    check_attributes(converted.config, attributes)
    contents = _configs(converted.config, attributes, layout)
    if contents or file.suffix == ".npz":  # the others carry everything in their header
        stated = _stated(converted.config, layout, contents.get("config.json"))
        converted.report.notes.extend(unrecorded(ours, converted.config, target, stated))
        if "preprocessor_config.json" in contents:
            converted.report.notes.extend(_other_images(attributes.preprocessing, contents["preprocessor_config.json"]))
    header = {}
    if not contents and file.suffix != ".npz":
        header = write_header(converted.config, attributes, provenance())
        read_header(header)  # it must read back
    sha256 = ""
    file.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        temporary = stack.enter_context(replacing(file))
        if file.suffix == ".npz":
            write_npz(temporary, converted.state_dict)
        else:
            write_safetensors(temporary, converted.state_dict, {"format": "pt", **header})
        if verify:
            read = read_npz if file.suffix == ".npz" else read_safetensors
            sha256 = _verify(read(temporary), adapt_positions(ours.tensors, ours.config, target)[0], converted, layout)
        for name, content in contents.items():
            write_json(stack.enter_context(replacing(file.parent / name)), content)
    return converted, sha256


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
    again = to_ours(written.tensors, layout, {"the writer": converted.config.to_dict()}).tensors
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


def _stated(config: ViTConfig, layout: str, content: dict[str, Any] | None) -> Mapping[str, Any]:
    """What a reader without our header is told of the config."""
    if content is None:
        return {"img_size": config.img_size}
    reader = timm_config if layout in _TIMM else transformers_config
    return reader.read_config(content, "config.json").declared


def _other_images(settings: Preprocessing, content: dict[str, Any]) -> list[str]:
    """How images would be prepared otherwise than the model has it, by what is written of that."""
    read = transformers_config.read_preprocessing(content, "preprocessor_config.json")
    square = settings.size[0] == settings.size[1]
    if settings.mode == "squash" or (
        square and int(settings.size[0] / settings.crop_pct) == int(read.size[0] / read.crop_pct)
    ):
        return []
    return [f"the file cannot say crop_pct={settings.crop_pct} for {settings.size}: it has the short side resized"]
