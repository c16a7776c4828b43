"""To LiteRT, formerly TensorFlow Lite: one file for one size, for phones and small boards."""

from __future__ import annotations

import io
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from torch import Tensor, nn

from vit.model import ViT

from . import archive
from .converting import converting
from .graph import Graph, example, graph_of
from .metadata import Metadata
from .packages import need

NOTE = (
    "its converter needs torch below 2.15, so give it an environment of its own: python -m venv litert;"
    " litert/bin/pip install -e '.[litert]'; litert/bin/vit export ..."
)


class Named(nn.Module):
    """A graph whose outputs keep their names."""

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.named = graph

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """As `Graph`, {name: output}."""
        return dict(zip(self.named.names, self.named(images)))


def convert(model: ViT, metadata: Metadata) -> bytes:
    """A model as a flatbuffer; in int8 the weights are bytes, and activations become bytes as they come.

    Raises:
        ValueError: it cannot be converted.
    """
    converter = need("litert_torch", "litert", NOTE)
    graph, (images, _) = graph_of(model, metadata), example(metadata)
    progress = io.StringIO()
    with converting(model, "litert_torch cannot convert"), redirect_stdout(progress), redirect_stderr(progress):
        content = converter.convert(Named(graph).eval(), sample_kwargs={"images": images}).model_content()
        return quantized(content) if metadata.precision == "int8" else bytes(content)


def quantized(content: bytes) -> bytes:
    """Weights of products in bytes, a scale for each row."""
    quantizer, recipe = (need(f"ai_edge_quantizer.{name}", "litert", NOTE) for name in ("quantizer", "recipe"))
    one = quantizer.Quantizer(content)
    one.load_quantization_recipe(recipe.dynamic_wi8_afp32())
    return bytes(one.quantize().quantized_model)


def save(content: bytes, metadata: Metadata, path: Path) -> None:
    """Write a model with its metadata as a zip archive behind it, as tools for these files pack what belongs to one."""
    path.write_bytes(content)
    archive.add(path, metadata.to_strings())
