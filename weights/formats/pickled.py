"""PyTorch's own files (.pth, .pt, .bin, .ckpt): a pickle and the tensors' memory, read as data only.

`unpickler.py` reads the pickle; this file knows the two formats around it, and checks what lies in them.
"""

from __future__ import annotations

import io
import os
import warnings
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint import Checkpoint, CheckpointError
from .npz import checked_entries, file_sha256, reading, unpack
from .unpickler import MOST_BYTES, QUANTIZED, Bounded, DataUnpickler, ObjectStub, TensorStub

_NAMES = 2**23  # characters of all names together: dictionaries that contain each other have endless names
_MAGIC = 0x1950A86A20F9469CFC6C  # begins the files of torch before 1.6


def read_pickled(path: Path) -> Checkpoint:
    """Read a file that torch.save wrote, from any torch since 0.4.

    Nested dictionaries, lists and tuples are flattened: "model.norm.weight", "optimizer.state.0.exp_avg". Values that
    are not dense tensors go to `others`, whatever class they are of (a path, a NumPy scalar, a module), and so do whole
    lists of numbers and texts, such as a log of losses. Warnings name objects that have tensors within, and quantized
    tensors. Tensors are contiguous, detached and on the CPU; views of larger memory are copied out of it; tied tensors
    stay tied.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: not such a file, a damaged one, one that calls the operating system (which is never run), one
            with wrong sizes, a TorchScript program, or one without tensors, as a whole pickled module is.
    """
    with reading(path, "a complete file of torch.save") as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(262)
        file.seek(0)
        if start.startswith(b"PK\x03\x04"):  # as torch.load distinguishes the formats
            content, memory = _read_zip(path, file)
        elif start.endswith(b"ustar"):
            raise CheckpointError(
                f"{path} is a tar file, as torch before 0.1.10 wrote it: save it again with a newer torch"
            )
        else:
            content, memory = _read_legacy(path, file, size)
        tensors, others = _flatten(path, content, memory)
        del content, memory
        return Checkpoint(path, _own(path, tensors, size), {}, file_sha256(file), others)


def _flatten(path: Path, content: Any, memory: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Nested containers -> tensors by name, and the types of all other values by name."""
    if not isinstance(content, dict):
        kind = content.kind if isinstance(content, ObjectStub) else type(content).__name__.removesuffix("Stub")
        raise CheckpointError(f"{path} holds {kind}, expected a dictionary of tensors: save model.state_dict()")
    tensors: dict[str, Tensor] = {}
    others: dict[str, str] = {}
    length = 0
    seen: set[int] = set()
    plain: dict[int, bool] = {}
    for name, value in _walk("", content, plain):
        length += len(name) + 1
        if length > _NAMES:
            raise CheckpointError(f"{path} has names of more than {_NAMES} characters in total")
        if name in tensors or (name in others and isinstance(value, TensorStub)):
            raise CheckpointError(f"{path} has two values named {name!r}")
        if isinstance(value, TensorStub):
            tensors[name] = value.of(memory)
        elif isinstance(value, ObjectStub):
            others[name] = value.kind
            if _has_tensors(value, seen):
                warnings.warn(f"{path}: the tensors within {name}, which is {value.kind}, are not read", stacklevel=4)
        elif not isinstance(value, dict) and _is_plain(value, plain):
            others[name] = type(value).__name__
    if quantized := [name for name, kind in others.items() if kind == QUANTIZED]:
        what = f"{quantized[0]} is quantized (of {len(quantized)} such tensors), so it is not read"
        warnings.warn(f"{path}: {what}; save the state dict of the model before quantization", stacklevel=4)
    if not tensors:
        found = ", ".join(f"{name} ({kind})" for name, kind in list(others.items())[:3]) or "nothing"
        raise CheckpointError(f"{path} holds no dense tensors, but {found}: save model.state_dict()")
    return tensors, others


def _walk(name: str, value: Any, plain: dict[int, bool]) -> Iterator[tuple[str, Any]]:
    """All values within a container, including containers, with their names. `plain` lists are not entered."""
    for i, (key, item) in enumerate(value.items() if isinstance(value, dict) else enumerate(value)):
        key = f"{key.kind}[{i}]" if isinstance(key, ObjectStub) else key
        inner = f"{name}.{key}" if name else str(key)
        yield inner, item
        if isinstance(item, dict) or (isinstance(item, (list, tuple)) and not _is_plain(item, plain)):
            yield from _walk(inner, item, plain)


def _is_plain(value: Any, known: dict[int, bool]) -> bool:
    """Whether all is data that Python has a literal for, without tensors and objects. `known`: containers seen."""
    if not isinstance(value, (dict, list, tuple)):
        return not isinstance(value, (TensorStub, ObjectStub))
    if id(value) not in known:
        known[id(value)] = True  # where it contains itself
        items = value.values() if isinstance(value, dict) else value
        known[id(value)] = all(_is_plain(item, known) for item in items)
    return known[id(value)]


def _has_tensors(value: ObjectStub, seen: set[int]) -> bool:
    """Whether a tensor is among an object's parts that were not `seen`, and are now."""
    waiting: list[Any] = [value]
    while waiting:
        part = waiting.pop()
        if isinstance(part, TensorStub):
            return True
        if id(part) not in seen and isinstance(part, (ObjectStub, dict, list, tuple)):
            seen.add(id(part))
            inner: Iterable[Any] = part.parts if isinstance(part, ObjectStub) else part
            waiting.extend(part.values() if isinstance(part, dict) else inner)
    return False


def _own(path: Path, tensors: dict[str, Tensor], size: int) -> dict[str, Tensor]:
    """The tensors, each with just the memory of its values. Copies may not take more than the file's size."""
    copied = 0
    for name, tensor in tensors.items():
        if tensor.untyped_storage().nbytes() != tensor.nbytes or not tensor.is_contiguous():
            copied += tensor.nbytes
            if copied > size:
                raise CheckpointError(f"{path} has views of tensors that take more memory than the file has bytes")
            tensors[name] = tensor.clone(memory_format=torch.contiguous_format)
    return tensors


def _read_zip(path: Path, file: io.BufferedReader) -> tuple[Any, dict[str, Tensor]]:
    """A zip file's content (torch >= 1.6: prefix/data.pkl, prefix/data/0, ...), and its memory by key, as bytes.

    Refuses what torch.load would read otherwise or must not read.
    """
    with zipfile.ZipFile(file) as archive:
        entries = checked_entries(path, file, archive)
        prefix = archive.namelist()[0].partition("/")[0]
        names = {entry.filename: entry for entry in entries}
        if len({name.lower() for name in names}) < len(names):  # which torch's reader confuses
            raise CheckpointError(f"{path} has two members whose names differ only in case")
        if f"{prefix}/constants.pkl" in names or any(name.startswith(f"{prefix}/code/") for name in names):
            raise CheckpointError(f"{path} is a TorchScript program, expected a state dict: save model.state_dict()")
        for name, entry in names.items():
            if not name.startswith(f"{prefix}/"):
                raise CheckpointError(f"{path} has a member {name!r}, expected all in the folder {prefix!r}")
            if entry.compress_type != zipfile.ZIP_STORED:
                raise CheckpointError(f"{path}: {name} is compressed, but torch.save compresses nothing")
        content = names.get(f"{prefix}/data.pkl")
        if content is None:
            raise CheckpointError(f"{path} has no {prefix}/data.pkl, expected a file of torch.save")
        if content.file_size > MOST_BYTES:
            raise CheckpointError(f"{path}: data.pkl has {content.file_size} bytes, expected at most {MOST_BYTES}")
        if not any(entry.CRC for entry in entries):  # torch can be set to compute none
            for entry in entries:
                del entry.CRC
        damaged = archive.testzip()
        if damaged is not None:
            raise CheckpointError(f"{path}: {damaged} is damaged: it does not match its CRC")

        version = names.get(f"{prefix}/version") or names.get(f"{prefix}/.data/version")
        if version is None or not archive.read(version).strip().isdigit():
            raise CheckpointError(f"{path} is damaged: it has no version of torch.save's format")
        order = names.get(f"{prefix}/byteorder")
        if order is not None and archive.read(order) != b"little":
            raise CheckpointError(f"{path} was written on a big-endian machine: load it there, and save safetensors")
        records: dict[str, zipfile.ZipInfo] = {}

        def check(key: str, nbytes: int) -> None:
            record = names.get(f"{prefix}/data/{key}")
            if record is None or record.file_size != nbytes:
                found = "none" if record is None else f"{record.file_size} bytes"
                raise CheckpointError(f"{path}: a tensor needs {nbytes} bytes at {key!r}, the file has {found}")
            records[key] = record

        state = DataUnpickler(path, Bounded(path, io.BytesIO(archive.read(content))), 5, check).load()
        return state, {
            key: unpack(f"{path}: {record.filename}", file, archive, record) for key, record in records.items()
        }


def _read_legacy(path: Path, file: io.BufferedReader, size: int) -> tuple[Any, dict[str, Tensor]]:
    """The same for a file of torch < 1.6: five pickles, then for each key of the last its length and its values."""
    storages: dict[str, int] = {}
    stream = Bounded(path, file)
    room = size

    def check(key: str, nbytes: int) -> None:
        nonlocal room
        room -= 0 if key in storages else nbytes
        if room < 0:
            raise CheckpointError(f"{path} has {size} bytes, but its tensors need more: it is truncated")
        if storages.setdefault(key, nbytes) != nbytes:
            raise CheckpointError(f"{path}: tensors disagree about the size of their shared memory {key!r}")

    def load() -> Any:
        return DataUnpickler(path, stream, 6, check).load()

    if load() != _MAGIC or load() != 1001:
        raise CheckpointError(f"{path} is not a file of torch.save, neither the zip format nor the one before it")
    load()  # the sizes of C types
    state = load()
    keys = load()
    if not isinstance(keys, list) or sorted(keys) != sorted(storages):
        raise CheckpointError(f"{path} lists memory that its tensors do not use, or lacks some")
    end = file.tell() + sum(8 + storages[key] for key in keys)
    if end != size:
        raise CheckpointError(f"{path} has {size} bytes, expected {end}")
    memory = {}
    for key in keys:
        count, nbytes = int.from_bytes(file.read(8), "little"), storages[key]
        if nbytes not in [count * itemsize for itemsize in (1, 2, 4, 8, 16)]:
            raise CheckpointError(f"{path}: the memory {key!r} has {count} values in {nbytes} bytes")
        memory[key] = torch.empty(nbytes, dtype=torch.uint8, device="cpu")
        file.readinto(memory[key].numpy().data)
    return state, memory
