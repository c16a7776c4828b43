"""A checkpoint file's contents and its hash."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor


class CheckpointError(ValueError):
    """A checkpoint that cannot be used: the text names the file or key, and what was expected, in one line."""

    def __init__(self, text: str) -> None:
        # names come out of files, and may hold what spoils a terminal
        super().__init__("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text))


@dataclass(frozen=True)
class NotATensor:
    """What stands in a checkpoint where a tensor might: a number, a text, an optimiser's options."""

    kind: str  # the name of its type


@dataclass(frozen=True)
class Checkpoint:
    """A file's contents, as they stand in it."""

    path: Path
    tensors: dict[str, Tensor]  # dictionaries within dictionaries are joined by dots: "model.norm.weight"
    metadata: Mapping[str, str]  # the header's `__metadata__`, where there is one
    hash: str | Hash  # of the whole file; it may still be computed
    others: Mapping[str, str] = field(default_factory=dict)  # what is no tensor, by name -> its type

    @property
    def sha256(self) -> str:
        """Of the whole file; of a sharded one, of its shards' hashes in hexadecimal, one per line, by name."""
        return self.hash if isinstance(self.hash, str) else self.hash.hexdigest()


class Hash:
    """A sha256 that is computed in a thread of its own, while the next bytes are read or written."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self._thread = ThreadPoolExecutor(1)
        self._waiting = _Batch()

    def update(self, data: bytes | memoryview) -> None:
        """Take more bytes, which must not change any more."""
        if self._waiting.add(data):
            self._thread.submit(self._update, self._waiting.take())

    def hexdigest(self) -> str:
        """Wait for the hash of all that was taken. Ends the thread."""
        if parts := self._waiting.take():
            self._thread.submit(self._update, parts)
        self._thread.shutdown()
        return self._digest.hexdigest()

    def _update(self, parts: list[Any]) -> None:
        for part in parts:
            self._digest.update(part)


class JointHash:
    """The sha256 of the sha256s of parts, one in hexadecimal per line: two threads share what one `Hash` would do."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(2)
        self._waiting = _Batch()
        self._digests: list[Future[list[str]]] = []

    def update(self, part: bytes | memoryview) -> None:
        """Take one more part, which must not change any more."""
        if self._waiting.add(part):
            self._hand_over()

    def hexdigest(self) -> str:
        """Wait for the hash of all that was taken. Ends the threads."""
        self._hand_over()
        self._threads.shutdown()
        return joint_sha256(digest for future in self._digests for digest in future.result())

    def _hand_over(self) -> None:
        if parts := self._waiting.take():
            self._digests.append(self._threads.submit(_hash_each, parts))


class _Batch:
    """Bytes that wait to be hashed: handing over each bias by itself would cost more than hashing it."""

    def __init__(self) -> None:
        self._parts: list[Any] = []
        self._size = 0

    def add(self, part: bytes | memoryview) -> bool:
        """Take it; is it time to hand over?"""
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


def read_json(path: str | Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: not JSON in UTF-8, or not an object.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, numbers without end, nested without end
        raise CheckpointError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds {type(content).__name__}, expected an object")
    return content
