"""The runtimes: a file opened for the CPU, from arrays to arrays. Each package is imported when it is used."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from . import archive
from .packages import need
from .to_onnx import is_ours
from .to_openvino import DIGEST, SECTION
from .to_pt2 import INSTRUCTIONS, PORTS, instructions
from .to_transformersjs import INPUT, graph_in


class Port(NamedTuple):
    """An input or output of a graph."""

    name: str
    dtype: str  # numpy's name
    shape: tuple[int | None, ...]  # None: any


class Session(Protocol):
    """A graph that was opened by a runtime."""

    name: str  # of the runtime
    inputs: list[Port]
    outputs: list[Port]
    metadata: dict[str, str]

    def run(self, *arrays: np.ndarray) -> list[np.ndarray]:
        """The inputs, in order -> the outputs, in order."""
        ...


class OnnxRuntime:
    """ONNX Runtime on the CPU, in the precision of the file."""

    name = "onnxruntime"

    def __init__(self, path: Path, threads: int) -> None:
        runtime = need("onnxruntime", "onnx")
        options = runtime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 3
        try:
            self.session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # it has a class for each kind of failure, without a common base
            raise ValueError(f"onnxruntime cannot open {path}: {' '.join(str(error).split())}") from error
        self.inputs, self.outputs = (
            [Port(x.name, _numpy_name(x.type), _numbers(x.shape)) for x in ports]
            for ports in (self.session.get_inputs(), self.session.get_outputs())
        )
        self.metadata = dict(self.session.get_modelmeta().custom_metadata_map)

    def run(self, *arrays: np.ndarray) -> list[np.ndarray]:
        """As `Session.run`."""
        return self.session.run(None, {port.name: array for port, array in zip(self.session.get_inputs(), arrays)})


class TransformersJs(OnnxRuntime):
    """The ONNX file in a folder for transformers.js, in ONNX Runtime: its preprocessing is not used."""

    name = "transformersjs"

    def __init__(self, path: Path, threads: int) -> None:
        super().__init__(graph_in(path), threads)
        self.inputs = [port._replace(name={INPUT: "images"}.get(port.name, port.name)) for port in self.inputs]


class OpenVINO:
    """OpenVINO on the CPU, with its own files or ONNX. It computes in float32 where it would choose bfloat16."""

    name = "openvino"

    def __init__(self, path: Path, threads: int) -> None:
        runtime = need("openvino", "openvino")
        options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
        weights = path.with_suffix(".bin")
        if path.suffix == ".xml" and not weights.is_file():
            raise FileNotFoundError(f"{weights}, which holds the weights of {path}, is not there: copy both files")
        name = SECTION if path.suffix == ".xml" else "framework"  # where OpenVINO puts the metadata of ONNX
        try:
            model = runtime.Core().read_model(path)
            section = model.get_rt_info([name]).value if model.has_rt_info([name]) else {}
            self.metadata = {key: str(value) for key, value in section.items()}
            digest = self.metadata.get(DIGEST)  # only an .xml has it
            if digest is not None and digest != hashlib.sha256(weights.read_bytes()).hexdigest():
                raise ValueError(f"{weights} does not hold the weights of {path}: copy both files, or export again")
            self.compiled = runtime.compile_model(model, "CPU", options)
            self.turn = Lock()  # calls share one request: without it, threads get each other's answers
        except RuntimeError as error:
            raise ValueError(f"openvino cannot open {path}: {' '.join(str(error).split())}") from error
        self.inputs, self.outputs = (
            [Port(_name(x), x.element_type.to_dtype().name, _shape(x.partial_shape)) for x in ports]
            for ports in (self.compiled.inputs, self.compiled.outputs)
        )

    def run(self, *arrays: np.ndarray) -> list[np.ndarray]:
        """As `Session.run`."""
        with self.turn:
            return list(self.compiled(arrays).to_tuple())


def _name(port: Any) -> str:
    """OpenVINO's name of an input or output, which may have none."""
    return port.any_name if port.names else f"number {port.index}"


class LiteRT:
    """LiteRT's interpreter on the CPU, with XNNPACK."""

    name = "litert"

    def __init__(self, path: Path, threads: int) -> None:
        runtime = need("ai_edge_litert", "litert", "pip install ai-edge-litert runs the file")
        interpreter = import_module(f"{runtime.__name__}.interpreter").Interpreter
        self.metadata, self.turn = archive.read(path), Lock()  # calls share buffers
        try:
            self.signature = interpreter(model_path=str(path), num_threads=threads).get_signature_runner()
            self.names = json.loads(self.metadata.get("vit.outputs", "[]"))
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"litert cannot open {path}: {' '.join(str(error).split())}") from error
        self.inputs, found = (
            [Port(name, np.dtype(one["dtype"]).name, tuple(map(int, one["shape"]))) for name, one in details.items()]
            for details in (self.signature.get_input_details(), self.signature.get_output_details())
        )
        order = {name: i for i, name in enumerate(self.names)}
        self.outputs = sorted(found, key=lambda port: order.get(port.name, len(order)))  # they come by name

    def run(self, *arrays: np.ndarray) -> list[np.ndarray]:
        """As `Session.run`."""
        with self.turn:
            found = self.signature(**{port.name: array for port, array in zip(self.inputs, arrays)})
        return [found[port.name] for port in self.outputs]


class ExecuTorch:
    """ExecuTorch on the CPU, with XNNPACK.

    Its threads are the process's: opening another file sets them again. A call holds Python's own lock.
    """

    name = "executorch"

    def __init__(self, path: Path, threads: int) -> None:
        runtime = need("executorch.runtime", "executorch")
        library = import_module("executorch.extension.pybindings.portable_lib")
        self.metadata = archive.read(path)
        names = json.loads(self.metadata.get("vit.outputs", "[]"))
        if library._threadpool_get_thread_count() != threads:
            library._unsafe_reset_threadpool(threads)
        try:
            self.method = runtime.Runtime.get().load_program(path).load_method("forward")
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"executorch cannot open {path}: {' '.join(str(error).split())}") from error
        about, kinds = self.method.metadata, {6: "float32", 0: "uint8"}  # PyTorch's numbers of dtypes
        tensors = [about.input_tensor_meta(i) for i in range(about.num_inputs())]
        found = [about.output_tensor_meta(i) for i in range(about.num_outputs())]
        self.inputs, self.outputs = (
            [Port(name, kinds.get(one.dtype(), "?"), tuple(one.sizes())) for name, one in zip(known, ones)]
            for known, ones in ((["images", "?"], tensors), ([*names, *["?"] * len(found)], found))
        )

    def run(self, *arrays: np.ndarray) -> list[np.ndarray]:
        """As `Session.run`."""
        return [output.numpy().copy() for output in self.method.execute([*map(torch.from_numpy, arrays)])]


class PyTorch:
    """PyTorch's exported program, or the native code that was compiled of it; run without this package's model.

    Opening one can run code: `torch.export.load` unpickles examples and objects, evaluates shapes as Python, and calls
    functions by their names.
    """

    name = "torch"

    def __init__(self, path: Path, threads: int) -> None:
        self.metadata = archive.read(path)
        if threads != (ours := torch.get_num_threads()):
            raise ValueError(f"{path} runs on PyTorch's own threads, {ours} now: set them by torch.set_num_threads")
        try:
            ports = [json.loads(self.metadata[key]) for key in PORTS]
            made, versions = (json.loads(self.metadata[key]) for key in (INSTRUCTIONS, "vit.versions"))
            missing = sorted({*made} - {*instructions()})
            self.inputs, self.outputs = (
                [Port(name, kind, tuple(shape)) for name, kind, shape in each] for each in ports
            )
            with zipfile.ZipFile(path) as file:
                native = any("/aotinductor/" in name for name in file.namelist())
        except (KeyError, ValueError, TypeError) as error:
            raise ValueError(f"{path} cannot be used: its metadata cannot be read: {error}") from error
        if native and missing:
            raise ValueError(
                f"{path} is native code for a processor with {', '.join(missing)}, which this one lacks: export it here"
            )
        try:
            self.model = torch._inductor.aoti_load_package(str(path)) if native else torch.export.load(path).module()
        except Exception as error:  # of the schema, of JSON, RuntimeError from C++ ...
            raise ValueError(
                f"PyTorch {torch.__version__} cannot open {path}, which {versions['torch']} wrote:"
                f" {' '.join(str(error).split())[:300]}"
            ) from error

    @torch.inference_mode()
    def run(self, *arrays: np.ndarray) -> list[np.ndarray]:
        """As `Session.run`."""
        return [output.numpy() for output in self.model(*map(torch.from_numpy, arrays))]


def _numpy_name(kind: str) -> str:
    """ "tensor(float)" -> "float32"."""
    name = kind.removeprefix("tensor(").removesuffix(")")
    return {"float": "float32", "double": "float64"}.get(name, name)


def _numbers(shape: list[Any]) -> tuple[int | None, ...]:
    """ONNX Runtime's shape: None for a side that has a name."""
    return tuple(side if isinstance(side, int) else None for side in shape)


def _shape(shape: Any) -> tuple[int | None, ...]:
    """OpenVINO's partial shape: None for a side that is dynamic."""
    return tuple(None if side.is_dynamic else side.get_length() for side in shape)


RUNTIMES: dict[str, Callable[[Path, int], Session]] = {
    "onnxruntime": OnnxRuntime, "openvino": OpenVINO, "torch": PyTorch, "transformersjs": TransformersJs,
    "litert": LiteRT, "executorch": ExecuTorch,
}  # fmt: skip
FORMATS = {  # what reads a file, by its ending; the first one by default; "": a folder
    ".onnx": ("onnxruntime", "openvino"), ".xml": ("openvino",), ".pt2": ("torch",), ".tflite": ("litert",),
    ".pte": ("executorch",), "": ("transformersjs",),
}  # fmt: skip
UNSAFE = (".pt2",)  # endings of files that can run code while they are opened


def is_exported(path: Path) -> bool:
    """Whether `vit.export` wrote it; any other .onnx file is a checkpoint, and so is any other folder."""
    if not path.suffix:
        with suppress(ValueError):
            return path.is_dir() and is_ours(graph_in(path))
        return False
    return path.suffix in FORMATS and path.is_file() and (path.suffix != ".onnx" or is_ours(path))


def open_file(path: Path, threads: int | None = None, runtime: str | None = None, trust: bool = False) -> Session:
    """Open a file in a runtime (that of its format), with a number of threads (as many as PyTorch uses)."""
    if path.suffix not in FORMATS or not (path.suffix or path.is_dir()):
        raise ValueError(f"expected an exported file, {' or '.join(filter(None, FORMATS))}, not {str(path)!r}")
    if path.suffix and not path.is_file():
        raise FileNotFoundError(f"{path} is not a file")
    readers = FORMATS[path.suffix]
    if runtime not in (None, *readers):
        raise ValueError(f"{path} can be opened by {' or '.join(readers)}, not by {runtime!r}")
    if path.suffix in UNSAFE and not trust:
        raise ValueError(f"{path} can run code while it is opened: if you know who wrote it, use trust=True (--trust)")
    return RUNTIMES[runtime or readers[0]](path, threads or torch.get_num_threads())
