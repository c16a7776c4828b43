"""What the files around the weights say of a model; every part may be unknown."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from vit.metadata import Preprocessing, Provenance


@dataclass(frozen=True)
class Description:
    """Read from a file's own header (`own.py`) or from a `config.json` (`timm.py`)."""

    declared: dict[str, Any] = field(default_factory=dict)  # fields of ViTConfig
    preprocessing: Preprocessing | None = None
    categories: list[str] | None = None
    license: str | None = None
    parent: Provenance | None = None
