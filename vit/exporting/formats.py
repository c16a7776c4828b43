"""The formats: what each needs, and which options it takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from . import to_coreml, to_executorch, to_litert, to_onnx, to_openvino, to_pt2, to_transformersjs, to_web
from .pixels import INPUTS


@dataclass(frozen=True)
class Format:
    """What a format needs, and what can be asked of it."""

    module: ModuleType  # has `convert` and `save`
    endings: tuple[str, ...]  # of its files; the first is the one to open; "": a folder
    packages: tuple[str, ...]
    extra: str  # of this package, which installs those
    takes: tuple[str, ...]  # of the names in WHY_NOT
    inputs: tuple[str, ...] = INPUTS  # kinds of images
    folder: bool = False  # several files in a folder, which `export` gets as its path
    runs: bool = True  # something here can run it
    caveat: str = ""  # for the report
    note: str = ""  # on how to install those
    twin: bool = True  # int8 is made here, by `vit.exporting.int8`; else the format's own packages make it


FORMATS = {
    "onnx": Format(
        to_onnx, (".onnx",), ("onnx", "onnxscript", "onnxruntime"), "onnx",
        ("dynamic", "half", "int8", "reduce_range", "opset"),
    ),
    "openvino": Format(
        to_openvino, (".xml", ".bin"), ("openvino", "onnx", "onnxscript"), "openvino",
        ("dynamic", "half", "int8", "reduce_range"),
    ),
    "pt2": Format(to_pt2, (".pt2",), (), "", ("dynamic", "aot")),
    "transformersjs": Format(
        to_transformersjs, ("",), ("onnx", "onnxscript", "onnxruntime"), "onnx", ("dynamic", "half", "int8", "opset"),
        inputs=("float32",), folder=True,
    ),
    "web": Format(
        to_web, ("",), ("onnx", "onnxscript", "onnxruntime"), "onnx", ("dynamic", "int8", "runtime_folder", "example"),
        folder=True,
    ),
    "litert": Format(
        to_litert, (".tflite",), ("litert_torch", "ai_edge_quantizer", "ai_edge_litert"), "litert", ("int8",),
        inputs=("float32", "uint8"), twin=False, note=to_litert.NOTE,
    ),
    "executorch": Format(
        to_executorch, (".pte",), ("executorch",), "executorch", ("int8",),
        inputs=("float32", "uint8"), twin=False, caveat=to_executorch.CAVEAT,
    ),
    "coreml": Format(
        to_coreml, (".mlpackage",), ("coremltools",), "coreml", ("half", "int8"),
        inputs=("float32", "uint8"), folder=True, twin=False, runs=False, caveat=to_coreml.CAVEAT,
    ),
}  # fmt: skip
WHY_NOT = {  # why a format does not take an option
    "dynamic": "it has one size a file: export several",
    "half": "it computes in the type of its weights, on most CPUs slowly",
    "int8": "it has no products of bytes here",
    "reduce_range": "its products of bytes do not overflow, or are not made here",
    "opset": "that is a number of ONNX's",
    "aot": "that is PyTorch's compiler",
    "runtime_folder": "that is for a page's ONNX Runtime Web",
    "example": "that is the picture that a page opens with",
}


def check_taken(format: str, given: Mapping[str, Any], input: str) -> dict[str, Any]:
    """Refuse options that a format does not take; those that it does."""
    takes, inputs = FORMATS[format].takes, FORMATS[format].inputs
    if input not in inputs:
        raise ValueError(f"--input {input} (input={input!r}) with {format}: it takes {', '.join(inputs)}")
    for name, value in given.items():
        if value is not None and value is not False and name not in takes:
            others = ", ".join(other for other, form in FORMATS.items() if name in form.takes)
            option = f"--{name.replace('_', '-')} ({name}={value!r})"
            raise ValueError(f"{option} with {format}: {WHY_NOT[name]}; formats that take it: {others}")
    return {name: value for name, value in given.items() if name in takes}


def by_ending(path: Path) -> str:
    """The format of a file, by its ending; ValueError if that says none, as that of a folder."""
    endings = {form.endings[0]: name for name, form in FORMATS.items() if form.endings[0]}
    if path.suffix not in endings:
        raise ValueError(
            f"the name {str(path)!r} says no format: end it in {', '.join(endings)}, or give format=... (--format):"
            f" {', '.join(FORMATS)}"
        )
    return endings[path.suffix]
