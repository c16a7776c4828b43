"""safetensors files in and out: validated before a byte is used, written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import struct
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor


class CheckpointError(ValueError):
    """A checkpoint that cannot be used: the text names the file or key, and what was expected."""


@dataclass(frozen=True)
class Checkpoint:
    """A file's contents, as they stand in it."""

    path: Path
    tensors: dict[str, Tensor]
    metadata: dict[str, str]  # the header's `__metadata__`
    sha256: str  # of the whole file


_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


def read_safetensors(path: str | Path) -> Checkpoint:
    """Read a whole file, hashing it on the way.

    Each tensor is read into memory of its own, so the weights exist once, the hash is that of the bytes in use, and
    a file that changes later (as a memory-mapped one would) cannot change the model.

    Raises:
        FileNotFoundError, IsADirectoryError: as they say.
        CheckpointError: not a safetensors file, or a truncated or inconsistent one.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a directory, expected a .safetensors file")
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        with safetensors.safe_open(path, "pt"):  # checks the header: lengths, overlaps, offsets against the file's size
            pass
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{path} is not a complete safetensors file: {error}") from None
    digest = hashlib.sha256()
    with path.open("rb") as file:
        prefix = file.read(8)
        text = file.read(struct.unpack("<Q", prefix)[0])
        digest.update(prefix + text)
        header = json.loads(text)
        metadata = header.pop("__metadata__", None) or {}
        tensors = {}
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            tensors[name] = _read_tensor(file, digest, path, name, entry)
    return Checkpoint(path, tensors, metadata, digest.hexdigest())


def _read_tensor(file: BinaryIO, digest: hashlib._Hash, path: Path, name: str, entry: dict) -> Tensor:
    if entry["dtype"] not in _DTYPES:
        raise CheckpointError(f"{path}: {name} has dtype {entry['dtype']}, expected one of {', '.join(_DTYPES)}")
    if 0 in entry["shape"]:  # and other sides that no memory could hold, perhaps
        raise CheckpointError(f"{path}: {name} has shape {entry['shape']}: it has no values")
    tensor = torch.empty(entry["shape"], dtype=_DTYPES[entry["dtype"]])
    data = tensor.reshape(-1).view(torch.uint8).numpy().data
    if file.readinto(data) != data.nbytes:  # type: ignore[attr-defined]
        raise CheckpointError(f"{path} became shorter while it was read, at {name}")
    digest.update(data)
    return tensor


def write_checkpoint(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], config: dict | None = None
) -> None:
    """Write a safetensors file and, where there is one, the `config.json` beside it.

    Each is written under a temporary name and renamed, so that it holds all of its new content or all of its old;
    a failure before the last of the writing leaves both as they were.
    """
    whole: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        whole[name] = tensor.clone() if tensor.data_ptr() in seen else tensor  # a file cannot share, tied weights do
        seen.add(tensor.data_ptr())
    path.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        save_file(whole, stack.enter_context(_replacing(path)), metadata=dict(metadata))
        if config is not None:
            text = json.dumps(config, indent=2) + "\n"
            stack.enter_context(_replacing(path.parent / "config.json")).write_text(text, encoding="utf-8")


def read_json(path: str | Path) -> dict:
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


class _replacing:
    """A temporary path beside `path` that takes its name when the block ends well and is removed when it does not."""

    def __init__(self, path: Path) -> None:
        self.path = Path(os.path.realpath(path))  # a link stays, what it leads to is replaced
        self.temporary = self.path.with_name(f".{self.path.name}.{secrets.token_hex(4)}")

    def __enter__(self) -> Path:
        os.close(os.open(self.temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        return self.temporary

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            os.replace(self.temporary, self.path)
        else:
            self.temporary.unlink(missing_ok=True)
