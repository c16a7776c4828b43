"""Our own layout: the model's own parameter names, and everything else in the file's header."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any, TypeVar

from vit.config import ViTConfig
from vit.metadata import Preprocessing, Provenance

from ..checkpoint import CheckpointError, usable
from ..description import IMAGENET, AttentionSetting, Attributes, Description, assumptions, by_header
from ..keymap import Assumptions, Detection, Entry, Holds, Layout

T = TypeVar("T")

_OURS = (
    "class_token", "dist_token", "register_tokens", "position_embedding",
    "patch_embed.proj.weight", "patch_embed.proj.bias",
    "blocks.{}.norm1.weight", "blocks.{}.norm1.bias",
    "blocks.{}.attention.qkv.weight", "blocks.{}.attention.qkv.bias",
    "blocks.{}.attention.proj.weight", "blocks.{}.attention.proj.bias", "blocks.{}.scale1",
    "blocks.{}.norm2.weight", "blocks.{}.norm2.bias",
    "blocks.{}.mlp.fc1.weight", "blocks.{}.mlp.fc1.bias", "blocks.{}.mlp.fc2.weight", "blocks.{}.mlp.fc2.bias",
    "blocks.{}.scale2", "norm.weight", "norm.bias", "fc_norm.weight", "fc_norm.bias",
    "head.weight", "head.bias", "head_dist.weight", "head_dist.bias",
)  # fmt: skip

VIT = Layout(
    "vit",
    "this project's own",
    tuple(Entry(name, (name,)) for name in _OURS),
    Detection(("blocks.0.attention.qkv.weight",)),
    assumptions=Assumptions(class_rows="either"),
    holds=Holds(attention=True),
)

LAYOUTS = (VIT,)

OPTIMIZED_KEY = "vit.optimized"  # in the header of what vit.kernels.save writes
# The error for such a file.
NOT_A_CHECKPOINT = (
    "this is an optimized model, not a checkpoint: load it with vit.kernels.load, or use it in vit predict, features,"
    " evaluate and bench; convert, inspect and fine-tune the checkpoint that it was made from"
)


def write_header(config: ViTConfig, attributes: Attributes, provenance: Provenance | None) -> dict[str, str]:
    """A file's header for a model: its config, preprocessing, categories, attention and provenance, each as JSON.

    "vit.assumed" names the settings that were assumed when the weights were first read, so that a guess stays a guess.
    """
    parts = {
        "vit.config": config.to_dict(),
        "vit.assumed": assumptions(config, attributes.categories_from) or None,
        "vit.preprocessing": asdict(attributes.preprocessing),
        "vit.categories": attributes.categories,
        "vit.attention": None if attributes.attention is None else [asdict(one) for one in attributes.attention],
        "vit.provenance": None if provenance is None else provenance.to_dict(),
    }
    return {key: json.dumps(part) for key, part in parts.items() if part is not None}


def read_header(metadata: Mapping[str, str]) -> Description:
    """The inverse of `write_header`; missing parts are left out of the description.

    Raises:
        CheckpointError: a part that `write_header` does not write so (the error names it), or the header of an
            optimized model.
    """
    if OPTIMIZED_KEY in metadata:
        raise CheckpointError(NOT_A_CHECKPOINT)
    declared, guessed = _part(metadata, "vit.config", dict), _part(metadata, "vit.assumed", _guessed) or {}
    parent = _part(metadata, "vit.provenance", Provenance.from_dict)
    categories_from = by_header(IMAGENET) if guessed.pop("categories", None) else "from the file's header"
    return Description(
        where="" if declared is None else "the file's header",
        declared=declared or {},
        preprocessing=_part(metadata, "vit.preprocessing", lambda settings: Preprocessing(**settings)),
        categories=_part(metadata, "vit.categories", _categories),
        categories_from=categories_from if "vit.categories" in metadata else "",
        license=None if parent is None else parent.license,
        parent=parent,
        attention=_part(metadata, "vit.attention", _attention),
        guessed=guessed,
    )


def _part(metadata: Mapping[str, str], key: str, make: Callable[[Any], T]) -> T | None:
    """What `make` makes of a part of the header; None if the part is missing or null."""
    with usable(f"{key} in the file's header"):
        part = json.loads(metadata.get(key, "null"))
        return None if part is None else make(part)


def _guessed(sources: dict[str, str]) -> dict[str, str]:
    return {name: by_header(whose) for name, whose in sources.items()}


def _categories(names: object) -> list[str]:
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"categories must be a list of strings, not {repr(names)[:40]}")
    return names


def _attention(settings: list[dict[str, Any]]) -> list[AttentionSetting]:
    return [AttentionSetting(**{**one, "options": dict(one["options"])}) for one in settings]


def check_attributes(config: ViTConfig, attributes: Attributes) -> None:
    """CheckpointError unless a model's header can be read back and fits the model."""
    about = read_header(write_header(config, attributes, None))
    assert about.preprocessing is not None
    if (found := len(about.preprocessing.mean)) != config.in_chans:
        raise CheckpointError(f"preprocessing has {found} channels, the model has {config.in_chans}")
    if about.categories is not None and len(about.categories) != config.num_classes:
        raise CheckpointError(f"there are {len(about.categories)} categories for {config.num_classes} classes")
