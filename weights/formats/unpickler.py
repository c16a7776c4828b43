"""A pickle read as data.

A pickle is a program that names classes and functions. Here none of them is looked up, imported or called: the few that
torch.save uses for tensors have stand-ins, which check every size against the bytes that the file holds, and any other
becomes an `ObjectStub`, of which only the name of its type is kept. `torch.load(weights_only=True)` would refuse most
of those, and trusts sizes.
"""

from __future__ import annotations

import io
import math
import os
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..checkpoint import CheckpointError

MOST_BYTES = 2**22  # bytes: ViT-H/14 with its optimizer's state needs 2**18, and one byte can take 100 in memory
# The opcodes that torch.save writes and torch's unpickler knows. Some of the others allocate any amount of memory.
OPCODES = b"()].}NQRGJKMUXabcehjqrstu\x80\x81\x85\x86\x87\x88\x89\x8a"
# Modules and functions that no checkpoint needs: a file that names them means to do something. The records that some of
# these functions return are data: os.uname() is among the settings of trainings.
_HOSTILE = {"os", "posix", "nt", "sys", "subprocess"}
_HOSTILE |= {
    f"{module}.{name}" for module in ("builtins", "__builtin__", "io", "_io") for name in ("eval", "exec", "open")
}
QUANTIZED = "a quantized tensor"
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


class Bounded:
    """A file for an unpickler, which never reads beyond the end or more than a state dict needs.

    `file.read(2**40)` would allocate the memory before it finds the end of the file.
    """

    def __init__(self, path: Path, file: io.BufferedReader | io.BytesIO) -> None:
        self._path = path
        self._file = file
        start = file.tell()
        self._end = min(file.seek(0, os.SEEK_END), start + MOST_BYTES)
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
class TensorStub:
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


class ObjectStub:
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


class DataUnpickler(pickle._Unpickler):  # Python's, because C's allocates a memo of any size that the file asks for
    """Runs a pickle with stand-ins for everything that it would create.

    Args:
        fields: how many a storage's id has.
        check: takes a storage's key and its number of bytes, and refuses what the file does not have.
    """

    dispatch: ClassVar[dict[int, Any]] = _Dispatch({code: pickle._Unpickler.dispatch[code] for code in OPCODES})
    stack: list[Any]
    append: Callable[[Any], None]
    pop_mark: Callable[[], list[Any]]

    def __init__(self, path: Path, file: Bounded, fields: int, check: Callable[[str, int], None]) -> None:
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
        return ObjectStub(name.rpartition(".")[2])

    def persistent_load(self, pid: Any) -> _Storage | ObjectStub:
        if type(pid) is tuple and len(pid) == 4 and pid[0] == "module" and isinstance(pid[1], ObjectStub):
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

    def _rebuild_tensor_v2(self, storage: Any, *args: Any) -> TensorStub | ObjectStub:
        if not isinstance(storage, _Storage):
            self._refuse("a tensor")
        return self._rebuild(storage, storage.dtype, *args)

    def _rebuild_tensor_v3(
        self, storage: Any, offset: Any, size: Any, stride: Any, gradient: Any, hooks: Any, dtype: Any
    ) -> TensorStub | ObjectStub:
        return self._rebuild(storage, dtype, offset, size, stride, gradient, hooks)

    def _rebuild(
        self, storage: Any, dtype: Any, offset: Any, size: Any, stride: Any, gradient: Any, hooks: Any
    ) -> TensorStub | ObjectStub:
        """Check that a tensor lies within its storage, because torch's set_() enlarges the storage as sizes require."""
        right = isinstance(storage, _Storage) and isinstance(dtype, torch.dtype) and _is_size(offset)
        right = right and type(size) is type(stride) is tuple and len(size) == len(stride) <= 64
        if not right or not all(map(_is_size, size + stride)) or type(gradient) is not bool or hooks:
            self._refuse("a tensor")
        if 0 in size:
            return ObjectStub("a tensor without values")
        last = offset + sum((side - 1) * step for side, step in zip(size, stride))
        room = storage.nbytes // dtype.itemsize
        if last >= room or math.prod(size) > room:
            raise CheckpointError(
                f"{self._path} has a tensor of shape {size}, strides {stride}, offset {offset}, but only {room} "
                "values for it"
            )
        return TensorStub(storage, dtype, offset, size, stride)

    def _rebuild_quantized(self, *args: Any) -> ObjectStub:
        return ObjectStub(QUANTIZED)

    def _rebuild_parameter(self, data: Any, gradient: Any, hooks: Any) -> TensorStub | ObjectStub:
        if not isinstance(data, (TensorStub, ObjectStub)) or type(gradient) is not bool or hooks:
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
        self.stack[-1] = ObjectStub(function.kind, args) if isinstance(function, ObjectStub) else function(*args)

    def load_newobj(self) -> None:
        args, kind = self.stack.pop(), self.stack.pop()
        if not isinstance(kind, ObjectStub):
            self._refuse("an object")
        self.append(ObjectStub(kind.kind, args))

    def load_build(self) -> None:
        """Attributes. A dictionary's, such as a state dict's `_metadata`, are left out."""
        state, instance = self.stack.pop(), self.stack[-1]
        if isinstance(instance, ObjectStub):
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
            if isinstance(target, ObjectStub):
                target.parts += [key, value]
            elif type(target) is not dict:
                self._refuse("a dictionary")
            elif type(key) in (str, int, float, bool) or isinstance(key, ObjectStub):
                target[key] = value
            else:
                target[ObjectStub(type(key).__name__)] = value

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
