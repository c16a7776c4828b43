"""To ONNX, by PyTorch's own exporter: one file, without what it says of the machine that wrote it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from vit.metadata import EXPORTED_KEY
from vit.model import ViT

from .converting import converting
from .graph import example, graph_of
from .metadata import Metadata
from .packages import need

if TYPE_CHECKING:
    from onnx import ModelProto

OPSETS = range(18, 24)  # 20 has GELU as one operation, 23 attention
DEFAULT_OPSET = 20
LARGEST = 2**31 - 1  # bytes of a protobuf message


def convert(model: ViT, metadata: Metadata, opset: int) -> ModelProto:
    """A model as an ONNX graph that takes and gives what the metadata say.

    Raises:
        ValueError: PyTorch cannot export it; or the weights are larger than one ONNX file can be.
    """
    graph = graph_of(model, metadata)
    weights = sum(tensor.nbytes for tensor in graph.parameters())
    if weights > LARGEST:
        raise ValueError(
            f"the weights take {weights / 2**30:.1f} GiB, and one ONNX file holds less than 2 GiB: half=True (--half)"
            " halves them"
        )
    images, dynamic = example(metadata)
    with converting(model, "PyTorch cannot export"):
        program = torch.onnx.export(
            graph, (images,), dynamo=True, dynamic_shapes=(dynamic,), opset_version=opset,
            input_names=["images"], output_names=list(metadata.outputs), verbose=False,
        )  # fmt: skip
    assert program is not None
    return tidy(program.model_proto, metadata)


def tidy(model: ModelProto, metadata: Metadata) -> ModelProto:
    """Take out stack traces and other notes, which hold paths of this machine; name the sides that are dynamic."""
    graph = model.graph
    for part in (model, graph, *graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer):
        part.doc_string = ""
        part.ClearField("metadata_props")
    if metadata.size is None:
        graph.ClearField("value_info")  # shapes in symbols of PyTorch's; a runtime infers its own
        sides = (
            ("batch", None, "height", "width") if metadata.input == "float32" else ("batch", "height", "width", None)
        )
        grid = ("rows", "columns")
        names = {"images": sides, "grid": grid, "cover": ("y", "x"), "attention": ("batch", None, *grid)}
        for value in (*graph.input, *graph.output):
            dims = value.type.tensor_type.shape.dim
            for dim, name in zip(dims, names.get(value.name, ("batch", None))):
                if dim.dim_param and name is not None:
                    dim.dim_param = name
    return model


def save(model: ModelProto, metadata: Metadata, path: Path) -> None:
    """Write a graph with its weights and metadata to one file."""
    model.ClearField("metadata_props")
    for key, value in metadata.to_strings().items():
        model.metadata_props.add(key=key, value=value)
    path.write_bytes(model.SerializeToString(deterministic=True))


def is_ours(path: Path) -> bool:
    """Whether `vit.export` wrote an ONNX file; False for a damaged one."""
    onnx = need("onnx", "onnx")
    try:
        return any(one.key == EXPORTED_KEY for one in onnx.load(path, load_external_data=False).metadata_props)
    except Exception:  # protobuf's DecodeError, mostly
        return False
