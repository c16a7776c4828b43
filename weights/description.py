"""What the files around the weights say of a model; every part may be unknown."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from vit.metadata import Preprocessing, Provenance


@dataclass(frozen=True)
class Description:
    """Read from a file's own header, or from a `config.json` of timm's or transformers'."""

    where: str = ""  # where it was read
    declared: dict[str, Any] = field(default_factory=dict)  # fields of ViTConfig
    assumed: dict[str, Any] = field(default_factory=dict)  # what goes without saying in a model of that name
    preprocessing: Preprocessing | None = None
    categories: list[str] | None = None
    license: str | None = None
    parent: Provenance | None = None


@dataclass(frozen=True)
class Attributes:
    """What a model carries beside its weights and config, for the files that are written with them."""

    preprocessing: Preprocessing
    categories: list[str] | None = None
    license: str | None = None
