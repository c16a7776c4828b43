"""What a file's header or a config.json says about a model, any part of which may be missing.

It also tells which settings were assumed instead, and where the assumed values come from.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from vit.config import ViTConfig
from vit.metadata import Preprocessing, Provenance

# The fields of ViTConfig that change a model's results and that shapes do not give, or only for square grids.
ANSWERS = ("num_heads", "eps", "gelu", "global_pool", "position_rule", "img_size", "class_position")
IMAGENET = "assumed to be ImageNet-1k's"  # the source of 1,000 categories that no file names
_ASSUMED, _BY_HEADER = "layout's default", ", by way of the file's header"


def layout_default(layout: str) -> str:
    """The source of a field that nothing states, for `ViTConfig.sources`."""
    return f"the {layout} {_ASSUMED}"


def by_header(whose: str) -> str:
    """The same after a file of ours has recorded it."""
    return whose + _BY_HEADER


def assumed(config: ViTConfig) -> dict[str, dict[str, Any]]:
    """The fields that change a model's results and that nothing states -> their "value" and its source, "from"."""
    sources = {name: config.sources.get(name, "") for name in ANSWERS}
    return {
        name: {"value": getattr(config, name), "from": whose} for name, whose in sources.items() if _ASSUMED in whose
    }


def assumptions(config: ViTConfig, categories_from: str) -> dict[str, str]:
    """What a file of ours records as assumed -> the original source of the assumption."""
    names = {"categories": IMAGENET} if categories_from.startswith(IMAGENET) else {}
    return {name: entry["from"].removesuffix(_BY_HEADER) for name, entry in assumed(config).items()} | names


@dataclass(frozen=True)
class AttentionSetting:
    """The attention of a block: `model.set_attention(name, **options)`."""

    name: str
    options: dict[str, Any]


@dataclass(frozen=True)
class Description:
    """What a file's own header says of a model, or a `config.json` of timm or transformers."""

    where: str = ""  # where it was read
    declared: dict[str, Any] = field(default_factory=dict)  # fields of ViTConfig
    assumed: dict[str, Any] = field(default_factory=dict)  # the defaults of a named model
    preprocessing: Preprocessing | None = None
    sized: bool = True  # whether `preprocessing` has a size that was stated; if not, the weights' own is taken
    categories: list[str] | None = None
    categories_from: str = ""  # "from config.json", or IMAGENET
    license: str | None = None
    parent: Provenance | None = None
    attention: list[AttentionSetting] | None = None  # of each block; None: the default
    guessed: dict[str, str] = field(default_factory=dict)  # declared fields that were assumed -> their source
    notes: tuple[str, ...] = ()  # on files beside the weights that were not used


@dataclass(frozen=True)
class Attributes:
    """What a model carries besides weights and config, for the files that are written."""

    preprocessing: Preprocessing
    categories: list[str] | None = None
    license: str | None = None
    categories_from: str = ""  # as in `Description`
    attention: list[AttentionSetting] | None = None  # of each block; None: the default
