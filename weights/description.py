"""What the files around the weights say of a model, every part of which may be unknown, and what is assumed of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from vit.config import ViTConfig
from vit.metadata import Preprocessing, Provenance

# The fields of ViTConfig that shapes do not tell and that change what a model answers.
ANSWERS = ("num_heads", "eps", "gelu", "global_pool", "position_rule")
IMAGENET = "assumed to be ImageNet-1k's"  # where 1,000 categories come from if nothing names them
_ASSUMED, _BY_HEADER = "layout's default", ", by way of the file's header"


def layout_default(layout: str) -> str:
    """Where a field comes from that nothing states, for `ViTConfig.sources`."""
    return f"the {layout} {_ASSUMED}"


def by_header(whose: str) -> str:
    """The same, once a file of ours has carried it."""
    return whose + _BY_HEADER


def assumed(config: ViTConfig) -> dict[str, dict[str, Any]]:
    """The fields that change a model's answers and that nobody stated -> their "value", and "from" whom it is."""
    sources = {name: config.sources.get(name, "") for name in ANSWERS}
    return {
        name: {"value": getattr(config, name), "from": whose} for name, whose in sources.items() if _ASSUMED in whose
    }


def assumptions(config: ViTConfig, categories_from: str) -> dict[str, str]:
    """What a file of ours is to remember as assumed -> by whom it was, before any file carried it."""
    names = {"categories": IMAGENET} if categories_from.startswith(IMAGENET) else {}
    return {name: entry["from"].removesuffix(_BY_HEADER) for name, entry in assumed(config).items()} | names


@dataclass(frozen=True)
class AttentionSetting:
    """How a block was told to attend: `model.set_attention(name, **options)`."""

    name: str
    options: dict[str, Any]


@dataclass(frozen=True)
class Description:
    """Read from a file's own header, or from a `config.json` of timm's or transformers'."""

    where: str = ""  # where it was read
    declared: dict[str, Any] = field(default_factory=dict)  # fields of ViTConfig
    assumed: dict[str, Any] = field(default_factory=dict)  # what goes without saying in a model of that name
    preprocessing: Preprocessing | None = None
    categories: list[str] | None = None
    categories_from: str = ""  # "from config.json", or IMAGENET
    license: str | None = None
    parent: Provenance | None = None
    attention: list[AttentionSetting] | None = None  # of each block; None: as ever
    guessed: dict[str, str] = field(default_factory=dict)  # of the declared fields: what was assumed -> by whom


@dataclass(frozen=True)
class Attributes:
    """What a model carries beside its weights and config, for the files that are written with them."""

    preprocessing: Preprocessing
    categories: list[str] | None = None
    license: str | None = None
    categories_from: str = ""  # as in `Description`
    attention: list[AttentionSetting] | None = None  # of each block, where not all are as ever
