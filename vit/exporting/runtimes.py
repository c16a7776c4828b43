"""The runtimes: a file opened for the CPU, from arrays to arrays. Each package is imported when it is used."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from .packages import need
from .to_openvino import DIGEST, SECTION


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
        return self.session.run(None, {port.name: array for port, array in zip(self.inputs, arrays)})


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


RUNTIMES: dict[str, Callable[[Path, int], Session]] = {"onnxruntime": OnnxRuntime, "openvino": OpenVINO}
FORMATS = {".onnx": ("onnxruntime", "openvino"), ".xml": ("openvino",)}  # what reads a file; the first one by default


def open_file(path: Path, threads: int | None = None, runtime: str | None = None) -> Session:
    """Open a file in a runtime (that of its format), with a number of threads (as many as PyTorch uses)."""
    if path.suffix not in FORMATS:
        raise ValueError(f"expected an exported file, {' or '.join(FORMATS)}, not {str(path)!r}")
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file")
    readers = FORMATS[path.suffix]
    if runtime not in (None, *readers):
        raise ValueError(f"{path} can be opened by {' or '.join(readers)}, not by {runtime!r}")
    return RUNTIMES[runtime or readers[0]](path, threads or torch.get_num_threads())
