"""PyTorch's own files (.pth, .pt, .bin, .ckpt): a pickle and the tensors' memory, read as data only.

`torch.load(weights_only=True)` runs no foreign code, but trusts the file: wrong sizes let it allocate any amount of
memory, or read beyond it. So the pickle is read twice, the first time without allocating any tensor, to check every
size against the bytes that the file holds.
"""

from __future__ import annotations

import argparse
import io
import math
import os
import pickle
import threading
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..checkpoint import Checkpoint, CheckpointError
from .npz import checked_entries, file_sha256, reading

_PICKLE = 2**22  # bytes: ViT-H/14 with its optimizer's state needs 2**18, and one byte can take 100 in memory
_NAMES = 2**22  # characters of all names together: dictionaries that contain each other have endless names
_MAGIC = 0x1950A86A20F9469CFC6C  # begins the files of torch before 1.6
# The opcodes that torch.save writes and torch's unpickler knows. Some of the others allocate any amount of memory.
_OPCODES = b"()].}NQRGJKMUXabcehjqrstu\x80\x81\x85\x86\x87\x88\x89\x8a"
_SAFE = threading.Lock()  # all threads share torch's list of safe classes

_STORAGES = {
    ("torch", "DoubleStorage"): torch.float64, ("torch", "FloatStorage"): torch.float32,
    ("torch", "HalfStorage"): torch.float16, ("torch", "BFloat16Storage"): torch.bfloat16,
    ("torch", "LongStorage"): torch.int64, ("torch", "IntStorage"): torch.int32,
    ("torch", "ShortStorage"): torch.int16, ("torch", "CharStorage"): torch.int8,
    ("torch", "ByteStorage"): torch.uint8, ("torch", "BoolStorage"): torch.bool,
    ("torch", "ComplexFloatStorage"): torch.complex64, ("torch", "ComplexDoubleStorage"): torch.complex128,
    ("torch.storage", "UntypedStorage"): torch.uint8,
}  # fmt: skip


def read_pickled(path: Path) -> Checkpoint:
    """Read a file that torch.save wrote, from any torch since 0.4.

    Nested dictionaries, lists and tuples are flattened: "model.norm.weight", "optimizer.state.0.exp_avg". Values that
    are not tensors go to `others`. Tensors are contiguous, detached and on the CPU; views of larger memory are copied
    out of it; tied tensors stay tied.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: not such a file, a damaged one, one that contains anything but data (which is never run), one
            with wrong sizes, a TorchScript program, or a whole pickled module.
    """
    with reading(path, "a complete file of torch.save") as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(262)
        file.seek(0)
        if start.startswith(b"PK\x03\x04"):  # as torch.load distinguishes the formats
            _check_zip(path, file)
        elif start.endswith(b"ustar"):
            raise CheckpointError(
                f"{path} is a tar file, as torch before 0.1.10 wrote it: save it again with a newer torch"
            )
        else:
            _check_legacy(path, file, size)
        file.seek(0)
        with _SAFE:
            known = torch.serialization.get_safe_globals()
            with torch.serialization.safe_globals([argparse.Namespace] if argparse.Namespace not in known else []):
                content = torch.load(file, map_location="cpu", weights_only=True, mmap=False)
        tensors, others = _flatten(path, content)
        del content
        return Checkpoint(path, _own(path, tensors, size), {}, file_sha256(file), others)


def _flatten(path: Path, content: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Nested containers -> tensors by name, and the types of all other values by name."""
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds {type(content).__name__}, expected a dictionary of tensors")
    tensors: dict[str, Tensor] = {}
    others: dict[str, str] = {}
    length = 0
    for name, value in _walk("", content):
        length += len(name) + 1
        if length > _NAMES:
            raise CheckpointError(f"{path} has names of more than {_NAMES} characters in total")
        if name in tensors or name in others:
            raise CheckpointError(f"{path} has two values named {name!r}")
        if isinstance(value, Tensor):
            tensors[name] = value.detach()
        elif not isinstance(value, (dict, list, tuple)):
            others[name] = type(value).__name__
    return tensors, others


def _walk(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """All values within a container, including containers, with their names."""
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        inner = f"{name}.{key}" if name else str(key)
        yield inner, item
        if isinstance(item, (dict, list, tuple)):
            yield from _walk(inner, item)


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


def _check_zip(path: Path, file: io.BufferedReader) -> None:
    """Refuse a zip file (torch >= 1.6: prefix/data.pkl, prefix/data/0, ...) that torch.load must not read."""
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
        if content.file_size > _PICKLE:
            raise CheckpointError(f"{path}: data.pkl has {content.file_size} bytes, expected at most {_PICKLE}")
        if not any(entry.CRC for entry in entries):  # torch can be set to compute none
            for entry in entries:
                del entry.CRC
        damaged = archive.testzip()
        if damaged is not None:
            raise CheckpointError(f"{path}: {damaged} is damaged: it does not match its CRC")

        def check(key: str, nbytes: int) -> None:
            record = names.get(f"{prefix}/data/{key}")
            if record is None or record.file_size != nbytes:
                found = "none" if record is None else f"{record.file_size} bytes"
                raise CheckpointError(f"{path}: a tensor needs {nbytes} bytes at {key!r}, the file has {found}")

        _DryUnpickler(path, _Bounded(path, io.BytesIO(archive.read(content))), 5, check).load()


def _check_legacy(path: Path, file: io.BufferedReader, size: int) -> None:
    """The same for a file of torch < 1.6: five pickles, then for each key of the last its length and its values."""
    storages: dict[str, int] = {}
    stream = _Bounded(path, file)
    room = size

    def check(key: str, nbytes: int) -> None:
        nonlocal room
        room -= 0 if key in storages else nbytes
        if room < 0:
            raise CheckpointError(f"{path} has {size} bytes, but its tensors need more: it is truncated")
        if storages.setdefault(key, nbytes) != nbytes:
            raise CheckpointError(f"{path}: tensors disagree about the size of their shared memory {key!r}")

    def load() -> Any:
        return _DryUnpickler(path, stream, 6, check).load()

    if load() != _MAGIC or load() != 1001:
        raise CheckpointError(f"{path} is not a file of torch.save, neither the zip format nor the one before it")
    load()  # the sizes of C types
    load()
    keys = load()
    if not isinstance(keys, list) or sorted(keys) != sorted(storages):
        raise CheckpointError(f"{path} lists memory that its tensors do not use, or lacks some")
    end = file.tell() + sum(8 + storages[key] for key in keys)  # torch compares the lengths, which are 8 bytes each
    if end != size:
        raise CheckpointError(f"{path} has {size} bytes, expected {end}")


class _Bounded:
    """A file for an unpickler, which never reads beyond the end or more than a state dict needs.

    `file.read(2**40)` would allocate the memory before it finds the end of the file.
    """

    def __init__(self, path: Path, file: io.BufferedReader | io.BytesIO) -> None:
        self._path = path
        self._file = file
        start = file.tell()
        self._end = min(file.seek(0, os.SEEK_END), start + _PICKLE)
        file.seek(start)

    def read(self, count: int) -> bytes:
        if self._file.tell() + count > self._end:
            self._refuse()
        return self._file.read(count)

    def readline(self) -> bytes:
        line = self._file.readline(self._end - self._file.tell())
        if not line.endswith(b"\n"):
            self._refuse()
        return line

    def _refuse(self) -> None:
        raise CheckpointError(f"{self._path} is damaged: its pickle does not end within {self._end} bytes")


@dataclass(frozen=True)
class _StorageType:
    """Stands for a storage's class in the dry run."""

    dtype: torch.dtype


@dataclass(frozen=True)
class _Storage:
    """Stands for a storage in the dry run."""

    dtype: torch.dtype
    nbytes: int


class _Tensor:
    """Stands for a tensor in the dry run."""


class _Namespace:
    """Stands for an argparse.Namespace in the dry run."""


class _DryUnpickler(pickle._Unpickler):  # Python's, because C's allocates a memo of any size that the file asks for
    """Runs a state dict's pickle with stand-ins for everything that torch would create, allocating none of it.

    It accepts less than torch's unpickler: what it refuses, torch never reads; what it accepts, torch reads alike.

    Args:
        fields: how many a storage's id has.
        check: takes a storage's key and its number of bytes, and refuses what the file does not have.
    """

    dispatch: ClassVar[dict[int, Any]] = {code: pickle._Unpickler.dispatch[code] for code in _OPCODES}
    stack: list[Any]
    append: Callable[[Any], None]
    pop_mark: Callable[[], list[Any]]

    def __init__(self, path: Path, file: _Bounded, fields: int, check: Callable[[str, int], None]) -> None:
        super().__init__(file, encoding="utf-8")
        self._path = path
        self._fields = fields
        self._check = check
        self._functions = {
            ("collections", "OrderedDict"): _ordered,
            ("torch._utils", "_rebuild_tensor_v2"): self._rebuild_tensor_v2,
            ("torch._utils", "_rebuild_tensor_v3"): self._rebuild_tensor_v3,
            ("torch._utils", "_rebuild_parameter"): self._rebuild_parameter,
            ("torch", "Size"): self._size,
            ("torch", "device"): _device,
            ("argparse", "Namespace"): _Namespace,
        }
        self._copied = 0

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _STORAGES:
            return _StorageType(_STORAGES[module, name])
        if (module, name) in self._functions:
            return self._functions[module, name]
        dtype = vars(torch).get(name) if module == "torch" else None
        if isinstance(dtype, torch.dtype) and not name.startswith("q"):  # quantized
            return dtype
        raise CheckpointError(
            f"{self._path} contains {module}.{name}, which is not data: expected dense tensors, numbers, strings and "
            "dictionaries of them, as in model.state_dict()"
        )

    def persistent_load(self, pid: Any) -> _Storage:
        if type(pid) is not tuple or len(pid) != self._fields or pid[0] != "storage":
            self._refuse("a storage")
        _, kind, key, location, count = pid[:5]
        if pid[5:] not in ((), (None,)) or not isinstance(kind, _StorageType) or not _is_size(count):
            self._refuse("a storage")
        if type(key) is not str or type(location) is not str:
            self._refuse("a storage")
        storage = _Storage(kind.dtype, count * kind.dtype.itemsize)
        self._check(key, storage.nbytes)
        return storage

    def _rebuild_tensor_v2(self, storage: Any, *args: Any) -> _Tensor:
        if not isinstance(storage, _Storage):
            self._refuse("a tensor")
        return self._rebuild(storage, storage.dtype, *args)

    def _rebuild_tensor_v3(
        self, storage: Any, offset: Any, size: Any, stride: Any, gradient: Any, hooks: Any, dtype: Any
    ) -> _Tensor:
        return self._rebuild(storage, dtype, offset, size, stride, gradient, hooks)

    def _rebuild(
        self, storage: Any, dtype: Any, offset: Any, size: Any, stride: Any, gradient: Any, hooks: Any
    ) -> _Tensor:
        """Check that a tensor lies within its storage, because torch's set_() enlarges the storage as sizes require."""
        right = isinstance(storage, _Storage) and isinstance(dtype, torch.dtype) and _is_size(offset)
        right = right and type(size) is type(stride) is tuple and len(size) == len(stride) <= 64
        if not right or not all(map(_is_size, size + stride)) or type(gradient) is not bool or hooks:
            self._refuse("a tensor")
        if 0 in size:
            raise CheckpointError(f"{self._path} has a tensor of shape {size}: it has no values")
        last = offset + sum((side - 1) * step for side, step in zip(size, stride))
        room = storage.nbytes // dtype.itemsize
        if last >= room or math.prod(size) > room:
            raise CheckpointError(
                f"{self._path} has a tensor of shape {size}, strides {stride}, offset {offset}, but only {room} "
                "values for it"
            )
        return _Tensor()

    def _rebuild_parameter(self, data: Any, gradient: Any, hooks: Any) -> _Tensor:
        if not isinstance(data, _Tensor) or type(gradient) is not bool or hooks:
            self._refuse("a parameter")
        return data

    def _size(self, sides: Any) -> tuple[int, ...]:
        self._copy(sides)
        return tuple(sides)

    def _copy(self, values: Any) -> None:
        """Count what torch copies, because many copies of one long list take much more memory than the file."""
        self._copied += len(values)
        if self._copied > _PICKLE // 16:
            self._refuse("too many objects")

    def _refuse(self, what: str) -> None:
        raise CheckpointError(f"{self._path} is damaged: torch.save does not describe {what} like this")

    def load_newobj(self) -> None:
        args, kind = self.stack.pop(), self.stack.pop()
        if kind is not _Namespace or args != ():
            self._refuse("an object")
        self.append(_Namespace())

    def load_build(self) -> None:
        """Attributes: a Namespace's values, a state dict's `_metadata`."""
        state, instance = self.stack.pop(), self.stack[-1]
        if type(state) is not dict or type(instance) not in (_Namespace, OrderedDict):
            self._refuse("an object")
        if type(instance) is OrderedDict and not state.keys() <= {"_metadata"}:
            self._refuse("a dictionary")
        self._copy(state)

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set([key, value])

    def load_setitems(self) -> None:
        self._set(self.pop_mark())

    def _set(self, items: list[Any]) -> None:
        """Refuse all but simple keys: hashing a deeply nested tuple crashes Python."""
        target = self.stack[-1]
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(target) not in (dict, OrderedDict) or type(key) not in (str, int, float, bool):
                self._refuse("a dictionary")
            target[key] = value

    dispatch |= {
        pickle.NEWOBJ[0]: load_newobj,
        pickle.BUILD[0]: load_build,
        pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems,
    }


def _is_size(value: Any) -> bool:
    return type(value) is int and value >= 0


def _ordered() -> OrderedDict:
    return OrderedDict()


def _device(*_: Any) -> None:
    return None
