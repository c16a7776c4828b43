"""PyTorch's own files (.pth, .pt, .bin, .ckpt): a pickle and the tensors' memory, read as data only.

A pickle is a program that names classes and functions. Here none of them is looked up, imported or called: the few that
torch.save uses for tensors have stand-ins, which check every size against the bytes that the file holds, and any other
becomes an `_Object`, of which only the name of its type is kept. `torch.load(weights_only=True)` would refuse most of
those, and trusts sizes.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..checkpoint import Checkpoint, CheckpointError
from .npz import checked_entries, file_sha256, reading, unpack

_PICKLE = 2**22  # bytes: ViT-H/14 with its optimizer's state needs 2**18, and one byte can take 100 in memory
_NAMES = 2**23  # characters of all names together: dictionaries that contain each other have endless names
_MAGIC = 0x1950A86A20F9469CFC6C  # begins the files of torch before 1.6
# The opcodes that torch.save writes and torch's unpickler knows. Some of the others allocate any amount of memory.
_OPCODES = b"()].}NQRGJKMUXabcehjqrstu\x80\x81\x85\x86\x87\x88\x89\x8a"
# Modules and functions that no checkpoint needs: a file that names them means to do something. The records that some of
# these functions return are data: os.uname() is among the settings of trainings.
_HOSTILE = {"os", "posix", "nt", "sys", "subprocess"}
_HOSTILE |= {
    f"{module}.{name}" for module in ("builtins", "__builtin__", "io", "_io") for name in ("eval", "exec", "open")
}
_QUANTIZED = "a quantized tensor"
_RECORDS = {"stat_result", "statvfs_result", "terminal_size", "times_result", "uname_result"}

_STORAGES = {
    ("torch", "DoubleStorage"): torch.float64, ("torch", "FloatStorage"): torch.float32,
    ("torch", "HalfStorage"): torch.float16, ("torch", "BFloat16Storage"): torch.bfloat16,
    ("torch", "LongStorage"): torch.int64, ("torch", "IntStorage"): torch.int32,
    ("torch", "ShortStorage"): torch.int16, ("torch", "CharStorage"): torch.int8,
    ("torch", "ByteStorage"): torch.uint8, ("torch", "BoolStorage"): torch.bool,
    ("torch", "ComplexFloatStorage"): torch.complex64, ("torch", "ComplexDoubleStorage"): torch.complex128,
    ("torch.storage", "UntypedStorage"): torch.uint8,
    ("torch", "QInt8Storage"): torch.int8, ("torch", "QInt32Storage"): torch.int32,  # quantized: only passed over
    ("torch", "QUInt8Storage"): torch.uint8, ("torch", "QUInt4x2Storage"): torch.uint8,
    ("torch", "QUInt2x4Storage"): torch.uint8,
}  # fmt: skip


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
        kind = content.kind if isinstance(content, _Object) else type(content).__name__.strip("_")
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
        if name in tensors or (name in others and isinstance(value, _Tensor)):
            raise CheckpointError(f"{path} has two values named {name!r}")
        if isinstance(value, _Tensor):
            tensors[name] = value.of(memory)
        elif isinstance(value, _Object):
            others[name] = value.kind
            if _has_tensors(value, seen):
                warnings.warn(f"{path}: the tensors within {name}, which is {value.kind}, are not read", stacklevel=4)
        elif not isinstance(value, dict) and _is_plain(value, plain):
            others[name] = type(value).__name__
    if quantized := [name for name, kind in others.items() if kind == _QUANTIZED]:
        what = f"{quantized[0]} is quantized (of {len(quantized)} such tensors), so it is not read"
        warnings.warn(f"{path}: {what}; save the state dict of the model before quantization", stacklevel=4)
    if not tensors:
        found = ", ".join(f"{name} ({kind})" for name, kind in list(others.items())[:3]) or "nothing"
        raise CheckpointError(f"{path} holds no dense tensors, but {found}: save model.state_dict()")
    return tensors, others


def _walk(name: str, value: Any, plain: dict[int, bool]) -> Iterator[tuple[str, Any]]:
    """All values within a container, including containers, with their names. `plain` lists are not entered."""
    for i, (key, item) in enumerate(value.items() if isinstance(value, dict) else enumerate(value)):
        key = f"{key.kind}[{i}]" if isinstance(key, _Object) else key
        inner = f"{name}.{key}" if name else str(key)
        yield inner, item
        if isinstance(item, dict) or (isinstance(item, (list, tuple)) and not _is_plain(item, plain)):
            yield from _walk(inner, item, plain)


def _is_plain(value: Any, known: dict[int, bool]) -> bool:
    """Whether all is data that Python has a literal for, without tensors and objects. `known`: containers seen."""
    if not isinstance(value, (dict, list, tuple)):
        return not isinstance(value, (_Tensor, _Object))
    if id(value) not in known:
        known[id(value)] = True  # where it contains itself
        items = value.values() if isinstance(value, dict) else value
        known[id(value)] = all(_is_plain(item, known) for item in items)
    return known[id(value)]


def _has_tensors(value: _Object, seen: set[int]) -> bool:
    """Whether a tensor is among an object's parts that were not `seen`, and are now."""
    waiting: list[Any] = [value]
    while waiting:
        part = waiting.pop()
        if isinstance(part, _Tensor):
            return True
        if id(part) not in seen and isinstance(part, (_Object, dict, list, tuple)):
            seen.add(id(part))
            inner: Iterable[Any] = part.parts if isinstance(part, _Object) else part
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
        if content.file_size > _PICKLE:
            raise CheckpointError(f"{path}: data.pkl has {content.file_size} bytes, expected at most {_PICKLE}")
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

        state = _Unpickler(path, _Bounded(path, io.BytesIO(archive.read(content))), 5, check).load()
        return state, {
            key: unpack(f"{path}: {record.filename}", file, archive, record) for key, record in records.items()
        }


def _read_legacy(path: Path, file: io.BufferedReader, size: int) -> tuple[Any, dict[str, Tensor]]:
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
        return _Unpickler(path, stream, 6, check).load()

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
        raise CheckpointError(
            f"{self._path} is damaged: its pickle does not end within {self._end} bytes: get it again"
        )


@dataclass(frozen=True)
class _StorageType:
    """Stands for a storage's class."""

    dtype: torch.dtype


@dataclass(frozen=True)
class _Storage:
    """Stands for a storage: the file's memory by this key."""

    key: str
    dtype: torch.dtype
    nbytes: int


@dataclass(frozen=True, eq=False, slots=True)
class _Tensor:
    """Stands for a tensor, which lies within its storage."""

    storage: _Storage
    dtype: torch.dtype
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def of(self, memory: dict[str, Tensor]) -> Tensor:
        """The tensor, in the memory of its storage."""
        values = torch.empty(0, dtype=self.dtype, device="cpu")
        return values.set_(memory[self.storage.key].untyped_storage(), self.offset, self.size, self.stride)


class _Object:
    """Stands for a class or a function that the file names, or for what would come of it: not data, so not made."""

    __slots__ = ("kind", "parts")

    def __init__(self, kind: str, *parts: Any) -> None:
        self.kind = kind  # its name
        self.parts = list(parts)  # arguments, attributes, items

    def append(self, part: Any) -> None:
        """An item of a list's subclass."""
        self.parts.append(part)


class _Dispatch(dict):
    """The unpickler's methods by opcode."""

    def __missing__(self, code: int) -> Any:
        raise pickle.UnpicklingError(f"opcode {code:#04x}, which torch.save does not write (by its default protocol)")


class _Unpickler(pickle._Unpickler):  # Python's, because C's allocates a memo of any size that the file asks for
    """Runs a pickle with stand-ins for everything that it would create.

    Args:
        fields: how many a storage's id has.
        check: takes a storage's key and its number of bytes, and refuses what the file does not have.
    """

    dispatch: ClassVar[dict[int, Any]] = _Dispatch({code: pickle._Unpickler.dispatch[code] for code in _OPCODES})
    stack: list[Any]
    append: Callable[[Any], None]
    pop_mark: Callable[[], list[Any]]

    def __init__(self, path: Path, file: _Bounded, fields: int, check: Callable[[str, int], None]) -> None:
        super().__init__(file, encoding="utf-8")
        self._path = path
        self._fields = fields
        self._check = check
        self._functions = {
            ("collections", "OrderedDict"): _dictionary,
            ("collections", "defaultdict"): _defaultdict,
            ("torch._utils", "_rebuild_tensor_v2"): self._rebuild_tensor_v2,
            ("torch._utils", "_rebuild_tensor_v3"): self._rebuild_tensor_v3,
            ("torch._utils", "_rebuild_qtensor"): self._rebuild_quantized,
            ("torch._utils", "_rebuild_parameter"): self._rebuild_parameter,
            ("torch", "Size"): self._size,
        }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _STORAGES:
            return _StorageType(_STORAGES[module, name])
        if (module, name) in self._functions:
            return self._functions[module, name]
        dtype = vars(torch).get(name) if module == "torch" else None
        if isinstance(dtype, torch.dtype) and not name.startswith("q"):  # quantized
            return dtype
        if (module.partition(".")[0] in _HOSTILE and name not in _RECORDS) or f"{module}.{name}" in _HOSTILE:
            raise CheckpointError(
                f"{self._path} contains {module}.{name}, which is not data but code that a checkpoint has no need of "
                "(it was not run): do not trust this file"
            )
        return _Object(name.rpartition(".")[2])

    def persistent_load(self, pid: Any) -> _Storage | _Object:
        if type(pid) is tuple and len(pid) == 4 and pid[0] == "module" and isinstance(pid[1], _Object):
            return pid[1]  # a module's class, with its source, in files of torch < 1.6
        if type(pid) is not tuple or len(pid) != self._fields or pid[0] != "storage":
            self._refuse("a storage")
        _, kind, key, location, count = pid[:5]
        if pid[5:] not in ((), (None,)) or not isinstance(kind, _StorageType) or not _is_size(count):
            self._refuse("a storage")
        if type(key) is not str or type(location) is not str:
            self._refuse("a storage")
        storage = _Storage(key, kind.dtype, count * kind.dtype.itemsize)
        self._check(key, storage.nbytes)
        return storage

    def _rebuild_tensor_v2(self, storage: Any, *args: Any) -> _Tensor | _Object:
        if not isinstance(storage, _Storage):
            self._refuse("a tensor")
        return self._rebuild(storage, storage.dtype, *args)

    def _rebuild_tensor_v3(
        self, storage: Any, offset: Any, size: Any, stride: Any, gradient: Any, hooks: Any, dtype: Any
    ) -> _Tensor | _Object:
        return self._rebuild(storage, dtype, offset, size, stride, gradient, hooks)

    def _rebuild(
        self, storage: Any, dtype: Any, offset: Any, size: Any, stride: Any, gradient: Any, hooks: Any
    ) -> _Tensor | _Object:
        """Check that a tensor lies within its storage, because torch's set_() enlarges the storage as sizes require."""
        right = isinstance(storage, _Storage) and isinstance(dtype, torch.dtype) and _is_size(offset)
        right = right and type(size) is type(stride) is tuple and len(size) == len(stride) <= 64
        if not right or not all(map(_is_size, size + stride)) or type(gradient) is not bool or hooks:
            self._refuse("a tensor")
        if 0 in size:
            return _Object("a tensor without values")
        last = offset + sum((side - 1) * step for side, step in zip(size, stride))
        room = storage.nbytes // dtype.itemsize
        if last >= room or math.prod(size) > room:
            raise CheckpointError(
                f"{self._path} has a tensor of shape {size}, strides {stride}, offset {offset}, but only {room} "
                "values for it"
            )
        return _Tensor(storage, dtype, offset, size, stride)

    def _rebuild_quantized(self, *args: Any) -> _Object:
        return _Object(_QUANTIZED)

    def _rebuild_parameter(self, data: Any, gradient: Any, hooks: Any) -> _Tensor | _Object:
        if not isinstance(data, (_Tensor, _Object)) or type(gradient) is not bool or hooks:
            self._refuse("a parameter")
        return data

    def _size(self, sides: Any) -> tuple[int, ...]:
        if type(sides) is not tuple:
            self._refuse("a size")
        return sides

    def _refuse(self, what: str) -> None:
        raise CheckpointError(f"{self._path} is damaged: torch.save does not describe {what} like this")

    def load_reduce(self) -> None:
        """Call a function; the arguments of an object's are kept without a copy, because many may share one tuple."""
        args, function = self.stack.pop(), self.stack[-1]
        if type(args) is not tuple:
            self._refuse("a call")
        self.stack[-1] = _Object(function.kind, args) if isinstance(function, _Object) else function(*args)

    def load_newobj(self) -> None:
        args, kind = self.stack.pop(), self.stack.pop()
        if not isinstance(kind, _Object):
            self._refuse("an object")
        self.append(_Object(kind.kind, args))

    def load_build(self) -> None:
        """Attributes. A dictionary's, such as a state dict's `_metadata`, are left out."""
        state, instance = self.stack.pop(), self.stack[-1]
        if isinstance(instance, _Object):
            instance.append(state)
        elif type(instance) is not dict:
            self._refuse("an object")

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set([key, value])

    def load_setitems(self) -> None:
        self._set(self.pop_mark())

    def _set(self, items: list[Any]) -> None:
        """Simple keys name tensors; any other gets a stand-in, because hashing a deeply nested tuple crashes Python."""
        target = self.stack[-1]
        for key, value in zip(items[::2], items[1::2], strict=True):
            if isinstance(target, _Object):
                target.parts += [key, value]
            elif type(target) is not dict:
                self._refuse("a dictionary")
            elif type(key) in (str, int, float, bool) or isinstance(key, _Object):
                target[key] = value
            else:
                target[_Object(type(key).__name__)] = value

    dispatch |= {
        pickle.REDUCE[0]: load_reduce,
        pickle.NEWOBJ[0]: load_newobj,
        pickle.BUILD[0]: load_build,
        pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems,
    }


def _is_size(value: Any) -> bool:
    return type(value) is int and value >= 0


def _dictionary() -> dict[Any, Any]:
    return {}


def _defaultdict(factory: Any = None) -> dict[Any, Any]:
    return {}
