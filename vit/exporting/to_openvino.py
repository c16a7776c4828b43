"""To OpenVINO, from our ONNX: an .xml with the graph and a .bin with the weights."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

from vit.model import ViT

from . import to_onnx
from .metadata import Metadata
from .packages import need

SECTION = "model_info"  # of the .xml, where OpenVINO's own tools keep labels and preprocessing
DIGEST = "vit.bin_sha256"  # of the .bin


def convert(model: ViT, metadata: Metadata) -> Any:
    """A model as an `openvino.Model`; as `to_onnx.convert`. Weights in float16 are rounded when they are saved."""
    openvino = need("openvino", "openvino")
    graph = to_onnx.convert(model, replace(metadata, precision="float32"), to_onnx.OPSETS[-1])
    return openvino.Core().read_model(BytesIO(graph.SerializeToString()))


def save(model: Any, metadata: Metadata, path: Path) -> None:
    """Write a graph with its metadata to `path` and its weights beside it."""
    openvino = need("openvino", "openvino")
    strings = metadata.to_strings()
    if metadata.categories:  # as OpenVINO's Model API reads them
        strings["labels"] = " ".join(name.replace(" ", "_") for name in metadata.categories)
    half = metadata.precision == "float16"
    for _ in range(2):  # the second time with the digest of what the first time wrote
        for key, value in strings.items():
            model.set_rt_info(value, [SECTION, key])
        openvino.save_model(model, path, compress_to_fp16=half)
        strings[DIGEST] = hashlib.sha256(path.with_suffix(".bin").read_bytes()).hexdigest()
