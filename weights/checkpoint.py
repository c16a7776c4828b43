"""A checkpoint file's contents, its hash, and the error for a file that cannot be used."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from .content import mistaken


class CheckpointError(ValueError):
    """A checkpoint that cannot be used. The text, one line, names the file or key and what was expected."""

    def __init__(self, text: str) -> None:
        # names come from files, and may contain control characters
        super().__init__("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text))


@dataclass(frozen=True)
class NotATensor:
    """A value in a checkpoint that is not a tensor: a number, a text, an optimizer's options."""

    kind: str  # the name of its type

    @property
    def plain(self) -> bool:
        """Whether it is a number, a text or nothing, and not an object, which may hold tensors."""
        return self.kind in ("NoneType", "bool", "int", "float", "complex", "str", "bytes", "scalar")  # NumPy's scalar


@dataclass(frozen=True)
class Checkpoint:
    """A file's contents, unchanged."""

    path: Path
    tensors: dict[str, Tensor]  # dictionaries within dictionaries are joined by dots: "model.norm.weight"
    metadata: Mapping[str, str]  # the header's `__metadata__`, if it has one
    hash: str | Hash  # of the whole file; a `Hash` may still be running
    others: Mapping[str, str] = field(default_factory=dict)  # values that are not tensors, by name -> their type

    @property
    def sha256(self) -> str:
        """Of the whole file; of several, of their hashes in hexadecimal, one per line, ordered by file name."""
        return self.hash if isinstance(self.hash, str) else self.hash.hexdigest()


class Hash:
    """A sha256 computed in its own thread, while the next bytes are read or written."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self._thread = ThreadPoolExecutor(1)
        self._waiting = _Batch()

    def update(self, data: bytes | memoryview) -> None:
        """Add bytes, which must not change afterwards."""
        if self._waiting.add(data):
            self._thread.submit(self._update, self._waiting.take())

    def hexdigest(self) -> str:
        """Wait for the hash of all bytes. Ends the thread."""
        if parts := self._waiting.take():
            self._thread.submit(self._update, parts)
        self._thread.shutdown()
        return self._digest.hexdigest()

    def _update(self, parts: list[Any]) -> None:
        for part in parts:
            self._digest.update(part)


class JointHash:
    """The sha256 of the parts' sha256s in hexadecimal, one per line. Two threads share the work."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(2)
        self._waiting = _Batch()
        self._digests: list[Future[list[str]]] = []

    def update(self, part: bytes | memoryview) -> None:
        """Add a part, which must not change afterwards."""
        if self._waiting.add(part):
            self._hand_over()

    def hexdigest(self) -> str:
        """Wait for the hash of all parts. Ends the threads."""
        self._hand_over()
        self._threads.shutdown()
        return joint_sha256(digest for future in self._digests for digest in future.result())

    def _hand_over(self) -> None:
        if parts := self._waiting.take():
            self._digests.append(self._threads.submit(_hash_each, parts))


class _Batch:
    """Bytes that wait to be hashed: passing each bias to a thread by itself would cost more than hashing it."""

    def __init__(self) -> None:
        self._parts: list[Any] = []
        self._size = 0

    def add(self, part: bytes | memoryview) -> bool:
        """Add a part; whether there is enough to hand over."""
        self._parts.append(part)
        self._size += len(part)
        return self._size >= 2**20

    def take(self) -> list[Any]:
        parts, self._parts, self._size = self._parts, [], 0
        return parts


def _hash_each(parts: list[Any]) -> list[str]:
    return [hashlib.sha256(part).hexdigest() for part in parts]


def joint_sha256(digests: Iterable[str]) -> str:
    """The sha256 of several in hexadecimal, one per line."""
    return hashlib.sha256("".join(f"{digest}\n" for digest in digests).encode()).hexdigest()


@contextmanager
def usable(where: str) -> Iterator[None]:
    """Turn the errors that unexpected values in a file cause inside the block into a CheckpointError that names it."""
    try:
        yield
    except CheckpointError:
        raise
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
        what = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{where} cannot be used: {what}") from None


def read_json(path: str | Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: not JSON in UTF-8, or not an object.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, too long a number, nested too deep
        raise CheckpointError(mistaken(Path(path), ".json") or f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds {type(content).__name__}, expected an object")
    return content
