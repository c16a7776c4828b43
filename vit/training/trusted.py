"""Reading states without running code: PyTorch's reader unpickles, so a state from elsewhere could run anything."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

# All that the index of a state of tensors names.
_NAMES = {
    ("pathlib", "PosixPath"), ("pathlib._local", "PosixPath"), ("torch", "Size"), ("torch", "device"),
    ("torch.serialization", "_get_layout"), ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    *(("torch", f"{kind}{bits}") for kind in ("float", "int") for bits in (16, 32, 64)),
    ("torch", "bfloat16"), ("torch", "uint8"), ("torch", "bool"),
    *(
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            "Metadata", "MetadataIndex", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata",
            "StorageMeta", "_MEM_FORMAT_ENCODING",
        )
    ),
}  # fmt: skip


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _NAMES:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which a state does not hold")
        return super().find_class(module, name)


class Reader(dcp.FileSystemReader):
    """Reads a state's index with only the classes that tensors need; for any other value PyTorch would unpickle it."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / ".metadata").open("rb") as file:
            metadata = _Unpickler(file).load()
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata
