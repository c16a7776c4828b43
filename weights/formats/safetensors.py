"""safetensors files in and out, one file or several with an index, validated before a byte is used.

The format (https://huggingface.co/docs/safetensors): 8 bytes with the header's length, the header in JSON, the data.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import safetensors
import torch
from torch import Tensor

from ..checkpoint import Checkpoint, CheckpointError, Hash, JointHash, joint_sha256, read_json
from ..content import mistaken

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}

# Files that we write carry under this name in their header the sha256 of the sha256s of their parts: of everything
# before the data, with zeros in place of the seal, and of each tensor.
_SEAL = "vit.seal"
_UNSEALED = "0" * 64


def read_safetensors(path: Path) -> Checkpoint:
    """Read a whole file, and hash it meanwhile.

    Each tensor is read into its own memory, so the weights exist once, the hash is of the bytes in use, and changing
    the file later does not change the model, as it would with a memory map.

    Raises:
        CheckpointError: not a safetensors file, a truncated or inconsistent one, or one of ours whose content was
            changed.
    """
    try:
        with safetensors.safe_open(path, "pt"):  # checks the header: lengths, overlaps, offsets within the file
            pass
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{path} is not a complete safetensors file: {error}: get it again") from None
    with path.open("rb") as file:
        start = file.read(8)
        text = file.read(struct.unpack("<Q", start)[0])
        header = _parse(path, text)
        metadata = header.pop("__metadata__", None) or {}
        for name, entry in header.items():  # the library also accepts a list in the order of the fields
            if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
                raise CheckpointError(f"{path}: {name} is described by {entry}, expected dtype, shape and data_offsets")
        whole, parts = Hash(), JointHash()
        seal = metadata.pop(_SEAL, None)
        whole.update(start + text)
        parts.update(start + text.replace(str(seal).encode(), _UNSEALED.encode(), 1))
        tensors = {}
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            tensors[name] = tensor = _empty(path, name, entry)
            data = _bytes(tensor)
            if file.readinto(data) != data.nbytes:
                raise CheckpointError(f"{path} was truncated while it was read, at {name}")
            whole.update(data)
            if seal is not None:
                parts.update(data)
    if seal is not None and (content := parts.hexdigest()) != seal:
        raise CheckpointError(
            f"{path} was changed after it was written: its seal would be {content}, its header says {seal}"
        )
    return Checkpoint(path, tensors, metadata, whole)


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    """The header's JSON, in which each name must be unique: the library would take the last of equal ones."""

    def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        if len(set(names)) < len(names):
            twice = next(name for i, name in enumerate(names) if name in names[:i])
            raise CheckpointError(f"{path}: its header has two entries named {twice}")
        return dict(pairs)

    return json.loads(text, object_pairs_hook=without_duplicates)


def _empty(path: Path, name: str, entry: dict) -> Tensor:
    """Memory for a tensor, of the size in the header, which was checked to lie within the file."""
    if entry["dtype"] not in _DTYPES:
        raise CheckpointError(f"{path}: {name} has dtype {entry['dtype']}, expected one of {', '.join(_DTYPES)}")
    if 0 in entry["shape"]:  # and perhaps other sides too large for any memory
        raise CheckpointError(f"{path}: {name} has shape {entry['shape']}: it has no values")
    return torch.empty(entry["shape"], dtype=_DTYPES[entry["dtype"]])


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def read_sharded(index: Path) -> Checkpoint:
    """Read the files that a `model.safetensors.index.json` lists, all of them beside it.

    Raises:
        CheckpointError: not an index, or one that names files elsewhere or disagrees with them.
        FileNotFoundError: a file that it names is missing.
    """
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(name, str) for name in where.values()):
        raise CheckpointError(f"{index} has no weight_map from tensor names to file names")
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    hashes = []
    for name in sorted(set(where.values())):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(f"{index} names {name!r}, expected .safetensors files beside it")
        if not (index.parent / name).is_file():
            raise FileNotFoundError(f"{index.parent} has no file {name!r}, but {index.name} names it")
        if text := mistaken(index.parent / name, ".safetensors"):
            raise CheckpointError(text)
        shard = read_safetensors(index.parent / name)
        promised = {key for key, file in where.items() if file == name}
        if promised != shard.tensors.keys():
            odd = ", ".join(sorted(promised ^ shard.tensors.keys())[:5])
            raise CheckpointError(f"{index} and {name} disagree about which tensors it holds: {odd}")
        tensors |= shard.tensors
        metadata |= shard.metadata
        hashes.append(shard.sha256)
    return Checkpoint(index, tensors, metadata, joint_sha256(hashes))


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a file, sealed with the hash of its content. Weights are copied only from other devices."""
    header: dict[str, object] = {"__metadata__": {**metadata, _SEAL: _UNSEALED}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the format's own writer aligns the data too
    with path.open("xb") as file:  # a new file: overwriting one makes ext4 flush it when it is closed
        parts = JointHash()
        _write(file, parts, struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            _write(file, parts, _bytes(tensor.detach().cpu().contiguous()))
        seal = parts.hexdigest()
        file.seek(8 + text.index(f'"{_SEAL}": "{_UNSEALED}"'.encode()) + len(f'"{_SEAL}": "'))
        file.write(seal.encode())


def _write(file: BinaryIO, parts: JointHash, data: bytes | memoryview) -> None:
    parts.update(data)
    file.write(data)
