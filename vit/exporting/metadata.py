"""What an exported file says of itself: all that is needed to run it, and the proof that it was run."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

from vit.config import ViTConfig
from vit.metadata import EXPORTED_KEY, Preprocessing, Provenance
from vit.model import ViT

VERSION = 1  # of this record
PAGE = "page"  # an `input`: a picture and two sizes, see `vit.exporting.page_graph`
PREFIX = EXPORTED_KEY.removesuffix("version")


@dataclass(frozen=True)
class Metadata:
    """The record in an exported file. Each field is a key of the file's own metadata, as JSON, after "vit."."""

    config: ViTConfig
    preprocessing: Preprocessing
    categories: list[str] | None
    outputs: tuple[str, ...]  # in the order of the graph's
    precision: str  # of the weights: "float32", "float16", "int8"
    input: str  # "float32": normalised images [B, C, H, W]; "uint8": pixels [B, H, W, C]; "image": whole pictures
    size: tuple[int, int] | None  # (H, W), the only one that it takes; None: any, in multiples of the patch
    batch: int | None  # images per call; None: any number
    source: Provenance | None  # of the model that was exported
    versions: Mapping[str, str]  # of what wrote and checked it
    processor: str  # the instruction set on which it was checked
    parity: tuple[Mapping[str, Any], ...] | None  # the gate's rows; None: not checked
    reduce_range: bool = False  # of int8: weights in 7 bits
    weights: str | None = None  # the model's `digest`

    def to_strings(self) -> dict[str, str]:
        """As keys and values for a file, with those that ultralytics' tools read."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values |= {"version": VERSION, "preprocessing": asdict(self.preprocessing)}
        values["config"] = self.config.to_dict() | {"sources": dict(self.config.sources)}
        values["source"] = self.source and self.source.to_dict()
        strings = {PREFIX + name: json.dumps(value) for name, value in values.items()}
        names = self.categories or [f"class{i}" for i in range(self.config.num_classes)]
        strings |= {"names": repr(dict(enumerate(names))), "stride": str(self.config.patch_size)}
        return strings | {"imgsz": str(list(self.size or self.preprocessing.size))}

    @classmethod
    def from_strings(cls, strings: Mapping[str, str]) -> Metadata:
        """The inverse of `to_strings`.

        Raises:
            ValueError: keys that are missing or hold something else; the message says which.
        """
        if EXPORTED_KEY not in strings:
            raise ValueError("it has no metadata of `vit export`")
        if (found := strings[EXPORTED_KEY]) != str(VERSION):
            raise ValueError(f"its metadata have version {found}, and this release reads version {VERSION}")
        values = {}
        for f in fields(cls):
            try:
                values[f.name] = _READERS.get(f.name, lambda value: value)(json.loads(strings[PREFIX + f.name]))
            except KeyError:
                raise ValueError(f"its metadata have no {PREFIX}{f.name}") from None
            except (ValueError, TypeError, IndexError, RecursionError) as error:
                raise ValueError(f"its metadata {PREFIX}{f.name} cannot be read: {error}") from None
        return cls(**values)


def _pair(value: Any) -> tuple[int, int] | None:
    return value and (int(value[0]), int(value[1]))


_READERS = {
    "config": lambda value: ViTConfig(**value),
    "preprocessing": lambda value: Preprocessing(**value),
    "source": lambda value: value and Provenance.from_dict(value),
    "categories": lambda value: None if value is None else [*value],
    "outputs": tuple,
    "size": _pair,
    "parity": lambda value: value and tuple(value),
}


def digest(model: ViT) -> str:
    """The SHA-256 of a model's tensors, on the CPU, and their names."""
    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        found.update(name.encode())
        found.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()


def processor() -> str:
    """The instruction set that PyTorch uses on this machine's processor: "AVX512", "AVX2", "NEON" ..., and VNNI."""
    vnni = " VNNI" if torch.cpu._is_vnni_supported() else ""  # sums products of bytes in 32 bits
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}{vnni}"
