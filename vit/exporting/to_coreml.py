"""To Core ML, for Apple's devices: a package for one size. Experimental: nothing but a Mac or a phone runs it."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence
from contextlib import redirect_stderr
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vit.model import ViT

from .converting import converting
from .graph import Graph, example, graph_of
from .metadata import Metadata
from .packages import need
from .to_pt2 import traced

CAVEAT = "converted, never run: nothing on this machine runs Core ML. Hold it against the model on a Mac"


class Picture(nn.Module):
    """A graph that takes pictures as Core ML hands them over, and gives probabilities if it gives logits alone."""

    mean: Tensor  # [C, 1, 1]
    std: Tensor

    def __init__(self, graph: Graph, metadata: Metadata) -> None:
        super().__init__()
        self.inside, self.softmax = graph, classifies(metadata)
        for name in ("mean", "std"):
            values = torch.tensor(getattr(metadata.preprocessing, name))
            self.register_buffer(name, values.view(-1, 1, 1))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """[1, C, H, W], 0 to 255 -> the outputs."""
        outputs = self.inside((images / 255 - self.mean) / self.std)
        return (outputs[0].softmax(dim=1),) if self.softmax else outputs


def classifies(metadata: Metadata) -> bool:
    """Whether the package is a classifier, as Apple's Vision takes it: a picture in, labels and probabilities out.

    With one class it is not: the softmax over one logit is 1.0 for every picture.
    """
    return metadata.input == "uint8" and metadata.outputs == ("logits",) and len(metadata.categories or ()) > 1


def unique(labels: Sequence[str]) -> list[str]:
    """Labels, each that occurs more than once with its class's number: "crane (134)" and "crane (517)" of ImageNet.

    Core ML gives probabilities as a dictionary by label, which would lose one of two classes with the same name.
    """
    labels = list(labels)
    while len(counts := Counter(labels)) < len(labels):  # again where "crane (134)" was another class's name
        labels = [f"{label} ({i})" if counts[label] > 1 else label for i, label in enumerate(labels)]
    return labels


def convert(model: ViT, metadata: Metadata) -> Any:
    """A model as a `coremltools.models.MLModel`, an ML program for iOS 18 or macOS 15 and later.

    A classifier's labels are the categories, those that occur more than once with the class's number behind them.

    Raises:
        ValueError: it cannot be converted, or several pictures a call.
    """
    tools = need("coremltools", "coreml")
    plain = replace(metadata, input="float32", precision="float32")  # coremltools makes halves itself
    graph, (images, _) = graph_of(model, plain), example(plain)
    options: dict[str, Any] = {"inputs": [tools.TensorType("images", shape=images.shape)]}
    if metadata.input == "uint8":
        if metadata.batch != 1:
            raise ValueError(f"Core ML takes one picture a call, not batch_size={metadata.batch}")
        layout = tools.colorlayout.RGB if model.config.in_chans == 3 else tools.colorlayout.GRAYSCALE
        options["inputs"] = [tools.ImageType("images", shape=images.shape, color_layout=layout)]
    options["outputs"] = [tools.TensorType(name) for name in metadata.outputs]
    if classifies(metadata):
        options["classifier_config"] = tools.ClassifierConfig(unique(metadata.categories or ()))
    precision = "FLOAT16" if metadata.precision == "float16" else "FLOAT32"
    options["compute_precision"] = getattr(tools.precision, precision)
    exported = traced(model, Picture(graph, metadata) if metadata.input == "uint8" else graph, images, {})
    with converting(model, "coremltools cannot convert"), redirect_stderr(io.StringIO()):  # its progress
        converted = tools.convert(
            without_aliases(exported.run_decompositions({})), convert_to="mlprogram", skip_model_load=True,
            minimum_deployment_target=tools.target.iOS18, **options,
        )  # fmt: skip
        return quantized(converted) if metadata.precision == "int8" else converted


def without_aliases(exported: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The same without `alias`, a slice that takes everything, which coremltools does not know."""
    graph = exported.graph_module.graph
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.alias.default):
        node.replace_all_uses_with(node.args[0])
        graph.erase_node(node)
    exported.graph_module.recompile()
    return exported


def quantized(converted: Any) -> Any:
    """The same with weights in bytes, a scale for each row; products are of floats."""
    coreml = need("coremltools.optimize.coreml", "coreml")
    each = coreml.OpLinearQuantizerConfig(mode="linear_symmetric", granularity="per_channel")
    return coreml.linear_quantize_weights(converted, config=coreml.OptimizationConfig(global_config=each))


def save(converted: Any, metadata: Metadata, path: Path) -> None:
    """Write the package, with its metadata where Xcode shows them."""
    converted.user_defined_metadata.update(metadata.to_strings())
    converted.save(str(path))
    (path / "executorch_debug_handle_mapping.json").unlink(missing_ok=True)  # notes for debugging
