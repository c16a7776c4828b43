"""To transformers.js: a folder with our ONNX and the two texts from which it makes a pipeline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from vit.files import write_json
from vit.model import ViT

from . import to_onnx
from .metadata import Metadata
from .packages import need

if TYPE_CHECKING:
    from onnx import ModelProto

INPUT = "pixel_values"  # its name for images
FILES = {"float32": "model.onnx", "float16": "model_fp16.onnx", "int8": "model_int8.onnx"}  # by precision
SAME = ("vit.config", "vit.weights", "vit.categories", "vit.preprocessing")  # in all graphs of a folder
DTYPES = {"float32": "fp32", "float16": "fp16", "int8": "int8"}  # its names of them, which choose the file


class Folder(NamedTuple):
    """What the folder will hold."""

    graph: ModelProto
    texts: dict[str, dict[str, Any]]  # name: JSON


def convert(model: ViT, metadata: Metadata, opset: int) -> Folder:
    """A model as an ONNX graph from `pixel_values`, with its config and preprocessing in transformers' words.

    Raises:
        ValueError: as `to_onnx.convert`; no logits, channels other than 3, or a crop that is not a square.
    """
    from vit.weights.description import Attributes
    from vit.weights.layouts.transformers_config import write_config, write_preprocessing

    settings, (height, width) = metadata.preprocessing, metadata.preprocessing.size
    if metadata.outputs[0] != "logits":
        raise ValueError(f"transformers.js reads logits first, and the outputs are {', '.join(metadata.outputs)}")
    if model.config.in_chans != 3:
        raise ValueError(f"transformers.js prepares images of 3 channels, and this model takes {model.config.in_chans}")
    if settings.mode == "crop" and height != width:
        raise ValueError(
            f"transformers.js crops squares only, not {height} x {width}: give a square size, or set mode='squash' in"
            " model.preprocessing"
        )
    graph = to_onnx.convert(model, metadata, opset)
    graph.graph.input[0].name = INPUT
    for node in graph.graph.node:
        node.input[:] = [INPUT if name == "images" else name for name in node.input]
    about = Attributes(settings, model.categories)
    config = write_config(model.config.override(img_size=settings.size), about)
    config["transformers.js_config"] = {"dtype": DTYPES[metadata.precision]}
    return Folder(graph, {"config.json": config, "preprocessor_config.json": write_preprocessing(about)})


def save(folder: Folder, metadata: Metadata, path: Path) -> None:
    """Write the folder; metadata as in any ONNX file."""
    (path / "onnx").mkdir(parents=True, exist_ok=True)
    to_onnx.save(folder.graph, metadata, path / "onnx" / FILES[metadata.precision])
    for name, content in folder.texts.items():
        write_json(path / name, content)


def check_folder(path: Path, metadata: Metadata) -> None:
    """FileExistsError if a folder holds another model: its config would be replaced, and its graphs would stay."""
    if (path / "config.json").exists():
        try:
            graph_in(path)
        except ValueError:
            raise FileExistsError(
                f"{path} holds a config.json that vit export did not write: give another folder"
            ) from None
    ours = metadata.to_strings()
    for file in sorted((path / "onnx").glob("model*.onnx")):
        found = {one.key: one.value for one in need("onnx", "onnx").load(file, load_external_data=False).metadata_props}
        if any(found.get(key) != ours[key] for key in SAME):
            raise FileExistsError(
                f"{file} holds another model, or the same with other labels or preprocessing: give another folder, or"
                " remove it"
            )


def graph_in(path: Path) -> Path:
    """The ONNX file of a folder, as its config chooses it.

    Raises:
        ValueError: the folder is not one of these.
    """
    try:
        dtype = json.loads((path / "config.json").read_text("utf-8"))["transformers.js_config"]["dtype"]
        return path / "onnx" / next(FILES[precision] for precision, name in DTYPES.items() if name == dtype)
    except (OSError, ValueError, KeyError, TypeError, StopIteration):
        raise ValueError(f"{path} is not a folder of `vit export --format transformersjs`") from None
