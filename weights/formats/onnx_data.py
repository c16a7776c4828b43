"""The files beside an ONNX graph that hold its weights, as PyTorch's exporter writes them (model.onnx.data).

ONNX calls this external data: a tensor names a file in the graph's folder or below it, an offset and a length
(https://github.com/onnx/onnx/blob/main/docs/ExternalData.md).
"""

from __future__ import annotations

import io
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint import CheckpointError
from .npz import file_sha256

_EXTERNAL = 1  # TensorProto.DataLocation


class DataFiles:
    """The files that a graph's tensors name, opened when they are first named and closed with the block."""

    def __init__(self, graph: Path) -> None:
        self._graph = graph
        self._open: dict[str, tuple[io.BufferedReader, os.stat_result]] = {}
        self._stack = ExitStack()
        self._room = 0

    def __enter__(self) -> DataFiles:
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    def holds(self, proto: Any) -> bool:
        """Whether a tensor's values lie in another file.

        Raises:
            CheckpointError: it is said to be in two places, or in none.
        """
        external = proto.data_location == _EXTERNAL
        if external != bool(proto.external_data) or (external and proto.HasField("raw_data")):
            raise CheckpointError(f"{self._graph} is damaged: it does not say clearly where {proto.name} is")
        return external

    def count(self, proto: Any) -> None:
        """Refuse tensors that together are twice as large as the files, which must not become a thousand weights."""
        length = self._place(proto)[2]  # which opens the file
        self._room -= length
        if self._room < 0:
            raise CheckpointError(f"{self._graph} repeats its weights until they outgrow its files: {proto.name}")

    def read(self, proto: Any, shape: list[int], dtype: torch.dtype, nbytes: int) -> Tensor:
        """A tensor's values, which take `nbytes`."""
        file, offset, length = self._place(proto)
        if length != nbytes:
            raise CheckpointError(f"{self._graph}: {proto.name} has {length} bytes of data, expected {nbytes}")
        tensor = torch.empty(shape, dtype=dtype, device="cpu")
        file.seek(offset)
        file.readinto(tensor.reshape(-1).view(torch.uint8).numpy().data)
        return tensor

    def sha256s(self) -> dict[str, str]:
        """The hash of each file by its name. Call it last: files that changed while they were read are refused."""
        digests = {name: file_sha256(file) for name, (file, _) in self._open.items()}
        for name, (file, before) in self._open.items():
            after = os.fstat(file.fileno())
            if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
                raise CheckpointError(f"{self._graph.parent / name} changed while it was read")
        return digests

    def _place(self, proto: Any) -> tuple[io.BufferedReader, int, int]:
        """The file of a tensor's values, where they begin in it, and their number of bytes."""
        entries = {entry.key: entry.value for entry in proto.external_data}
        name = self._checked(proto.name, entries.get("location", ""))
        if name not in self._open:
            file = self._stack.enter_context(self._found(name).open("rb"))
            self._open[name] = file, os.fstat(file.fileno())
            self._room += 2 * self._open[name][1].st_size  # equal weights are kept once, and copied by Identity nodes
        file, status = self._open[name]
        numbers = {key: entries[key] for key in ("offset", "length") if key in entries}
        if not all(number.isascii() and number.isdigit() and len(number) < 20 for number in numbers.values()):
            raise CheckpointError(f"{self._graph} is damaged: {proto.name} lies at {numbers} in {name}")
        offset = int(numbers.get("offset", 0))
        length = int(numbers.get("length", max(0, status.st_size - offset)))
        if offset + length > status.st_size:
            raise CheckpointError(
                f"{self._graph.parent / name} has {status.st_size} bytes, but {proto.name} ends at {offset + length}: "
                "it is another model's or was cut off, get it again"
            )
        return file, offset, length

    def _checked(self, tensor: str, name: str) -> str:
        """A file's path from the graph's folder, in one spelling: a graph from elsewhere must not read other files."""
        path = Path(name)
        if not name.isprintable() or "\\" in name or path.anchor or ".." in path.parts or not path.name:
            raise CheckpointError(
                f"{self._graph}: {tensor} is in {name!r}, expected a file in the graph's folder: export it again, with "
                "its data beside it"
            )
        return path.as_posix()

    def _found(self, name: str) -> Path:
        """The path of a file that exists in the graph's folder or below it."""
        path = self._graph.parent / name
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} does not exist, but holds the weights of {self._graph.name}: copy it, too, or export with "
                "external_data=False"
            )
        # in the Hub's cache, both are links into one folder
        folders = (self._graph.parent.resolve(), self._graph.resolve().parent)
        if not any(path.resolve().is_relative_to(folder) for folder in folders):
            raise CheckpointError(
                f"{path} is a link to {path.resolve()}, expected a file in the folder of {self._graph.name}"
            )
        return path
