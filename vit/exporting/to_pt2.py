"""To PyTorch itself, without this package: torch.export's program, or compiled to native code by AOTInductor."""

from __future__ import annotations

import io
import json
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vit.model import ViT

from . import archive
from .converting import converting
from .graph import example, graph_of
from .metadata import Metadata

ROOT = "archive/"  # the folder in the archive in which PyTorch looks for everything
PORTS = ("pt2.inputs", "pt2.outputs")  # keys in the metadata
INSTRUCTIONS = "pt2.instructions"  # another: those of the processor that native code was compiled for
# which a compiler does not use unless the code asks for them
UNASKED = ("aes", "clflush", "clflushopt", "clwb", "fma4", "sha", "sha1", "sha2", "sse4a")


class Package(NamedTuple):
    """A .pt2 archive without metadata."""

    content: bytes
    facts: dict[str, str]  # PORTS and INSTRUCTIONS, as JSON


def convert(model: ViT, metadata: Metadata, aot: bool) -> Package:
    """A model as a .pt2 archive that takes and gives what the metadata say.

    Raises:
        ValueError: PyTorch cannot export it, or has no compiler for `aot`.
    """
    exported = program(model, metadata)
    content = compiled(model, exported) if aot else saved(exported)
    needed = json.dumps(instructions() if aot else [])
    return Package(content, ports(exported, metadata) | {INSTRUCTIONS: needed})


def program(model: ViT, metadata: Metadata) -> torch.export.ExportedProgram:
    """A model as PyTorch's graph."""
    return traced(model, graph_of(model, metadata), *example(metadata))


def traced(
    model: ViT, graph: torch.nn.Module, images: torch.Tensor, dynamic: dict[int, Any]
) -> torch.export.ExportedProgram:
    """A graph of a model's, traced with images; without notes on where its code lies on this machine."""
    with converting(model, "PyTorch cannot export"):
        exported = torch.export.export(graph, (images,), dynamic_shapes=(dynamic,))
    for part in exported.graph_module.modules():
        for node in part.graph.nodes if isinstance(part, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)
    return exported


def ports(exported: torch.export.ExportedProgram, metadata: Metadata) -> dict[str, str]:
    """Names, dtypes and shapes of what a program takes and gives, which the compiled one does not say."""
    (image,) = exported.graph_signature.user_inputs
    inputs = [node for node in exported.graph.nodes if node.name == image]
    found = {}
    for key, names, nodes in zip(PORTS, (["images"], metadata.outputs), (inputs, exported.graph.output_node().args[0])):
        values = [node.meta["val"] for node in nodes]
        shapes = [[side if isinstance(side, int) else None for side in value.shape] for value in values]
        dtypes = [str(value.dtype).removeprefix("torch.") for value in values]
        found[key] = json.dumps(list(zip(names, dtypes, shapes)))
    return found


def saved(exported: torch.export.ExportedProgram) -> bytes:
    """The program as torch.export.load reads it."""
    exported.example_inputs = None  # which it would pickle
    buffer = io.BytesIO()
    torch.export.save(exported, buffer)
    return buffer.getvalue()


def compiled(model: ViT, exported: torch.export.ExportedProgram) -> bytes:
    """The program as native code for this machine's processor."""
    with tempfile.TemporaryDirectory() as folder, converting(model, "AOTInductor cannot compile"):
        file = Path(folder) / f"{ROOT[:-1]}.pt2"  # whose name becomes that of the folder in the archive
        torch._inductor.aoti_compile_and_package(exported, package_path=str(file))
        return file.read_bytes()


def instructions() -> list[str]:
    """The sets of instructions of this machine's processor that a compiler may use, if PyTorch names them: avx2 ..."""
    found = torch.cpu.get_capabilities()
    names = [name for name, value in found.items() if value is True and name not in UNASKED]
    return sorted([str(found.get("architecture")), *names])


def save(package: Package, metadata: Metadata, path: Path) -> None:
    """Write an archive with its metadata, where `torch.export.load` finds them as an extra file."""
    path.write_bytes(package.content)
    archive.add(path, metadata.to_strings() | package.facts, f"{ROOT}extra/")
