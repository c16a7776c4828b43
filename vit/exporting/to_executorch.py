"""To ExecuTorch, for phones and boards without Python: one file for one size, its products by XNNPACK. Experimental."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from vit.attend import Attend
from vit.model import ViT

from . import archive
from .converting import converting
from .metadata import Metadata
from .packages import need
from .to_pt2 import program

CAVEAT = "experimental: run here, on this machine's processor, and never on a phone"


class TanhGELU(nn.Module):
    """The tanh approximation of GELU (arXiv:1606.08415) by plain operations.

    ExecuTorch 1.5's partitioner hands `aten.gelu` to XNNPACK without its argument `approximate`, and XNNPACK computes
    the exact form: up to 5e-4 away.
    """

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))


def convert(model: ViT, metadata: Metadata) -> bytes:
    """A model as a program; in int8 the weights are bytes, and activations become bytes as they come.

    Raises:
        ValueError: it cannot be converted.
    """
    exir = need("executorch.exir", "executorch")
    copied = copy.deepcopy(model)
    usual = [i for i, one in enumerate(copied.attends) if isinstance(one, Attend) and one.choice.called == "sdpa"]
    copied.set_attention("reference", usual)  # sdpa's parts look for rows without keys, which XNNPACK does not
    if model.config.gelu == "tanh":
        for block in cast(Any, copied.blocks):
            block.mlp.act = TanhGELU()
    exported = program(copied, metadata)
    with converting(model, "ExecuTorch cannot convert"):
        if metadata.precision == "int8":
            exported = quantized(exported)
        lowered = exir.to_edge_transform_and_lower(exported, partitioner=[partitioner()])
        return bytes(lowered.to_executorch().buffer)


def partitioner() -> Any:
    """What hands parts of a graph to XNNPACK."""
    return need("executorch.backends.xnnpack.partition.xnnpack_partitioner", "executorch").XnnpackPartitioner()


def quantized(exported: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The same with weights of products in bytes, a scale for each row."""
    xnnpack = need("executorch.backends.xnnpack.quantizer.xnnpack_quantizer", "executorch")
    steps = need("torchao.quantization.pt2e.quantize_pt2e", "executorch")
    (images,), _ = exported.example_inputs
    how = xnnpack.get_symmetric_quantization_config(is_per_channel=True, is_dynamic=True)
    prepared = steps.prepare_pt2e(exported.module(), xnnpack.XNNPACKQuantizer().set_global(how))
    prepared(images)
    return torch.export.export(steps.convert_pt2e(prepared), (images,))


def save(content: bytes, metadata: Metadata, path: Path) -> None:
    """Write a program with its metadata as a zip archive behind it."""
    path.write_bytes(content)
    archive.add(path, metadata.to_strings())
