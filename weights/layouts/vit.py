"""Our own layout: the model's own parameter names, and everything else in the file's header."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from vit.config import ViTConfig
from vit.metadata import Preprocessing, Provenance

from ..checkpoint import CheckpointError, usable
from ..description import IMAGENET, AttentionSetting, Attributes, Description, assumptions, by_header
from ..keymap import Assumptions, Detection, Entry, Holds, Layout

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

# The error for a file of `vit.kernels.save`.
OPTIMIZED = (
    "it holds an optimized model, no checkpoint: vit.kernels.load reads it, and so do vit predict, features,"
    " evaluate and bench; convert, inspect and fine-tune the checkpoint that it was made from"
)

_PARTS = ("vit.config", "vit.assumed", "vit.preprocessing", "vit.categories", "vit.attention", "vit.provenance")


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
        "vit.provenance": None if provenance is None else asdict(provenance),
    }
    return {key: json.dumps(part) for key, part in parts.items() if part is not None}


def read_header(metadata: Mapping[str, str]) -> Description:
    """The inverse of `write_header`; missing parts are left out of the description.

    Raises:
        CheckpointError: a part that `write_header` does not write so, or the header of an optimized model.
    """
    if "vit.optimized" in metadata:
        raise CheckpointError(OPTIMIZED)
    with usable("the file's header"):
        parts: dict[str, Any] = {key: json.loads(metadata[key]) for key in _PARTS if key in metadata}
        guessed = dict(parts.get("vit.assumed", {}))
        settings = parts.get("vit.preprocessing")
        parent = parts.get("vit.provenance")
        categories, attention = parts.get("vit.categories"), parts.get("vit.attention")
        if attention is not None:
            attention = [AttentionSetting(one["name"], dict(one["options"])) for one in attention]
        if not isinstance(categories, list | None) or not all(isinstance(name, str) for name in categories or ()):
            raise ValueError(f"vit.categories must be a list of texts, not {repr(categories)[:40]}")
        categories_from = by_header(IMAGENET) if guessed.pop("categories", None) else "from the file's header"
        return Description(
            where="the file's header" if "vit.config" in metadata else "",
            declared=dict(parts.get("vit.config", {})),
            preprocessing=None if settings is None else Preprocessing(**settings),
            categories=categories,
            categories_from=categories_from if "vit.categories" in metadata else "",
            license=parent["license"] if isinstance(parent, dict) and "license" in parent else None,
            parent=None if parent is None else Provenance.from_dict(parent),
            attention=attention,
            guessed={name: by_header(whose) for name, whose in guessed.items()},
        )


def check_attributes(config: ViTConfig, attributes: Attributes) -> None:
    """CheckpointError unless a model's header can be read back and fits the model."""
    about = read_header(write_header(config, attributes, None))
    assert about.preprocessing is not None
    if (found := len(about.preprocessing.mean)) != config.in_chans:
        raise CheckpointError(f"preprocessing has {found} channels, the model has {config.in_chans}")
    if about.categories is not None and len(about.categories) != config.num_classes:
        raise CheckpointError(f"there are {len(about.categories)} categories for {config.num_classes} classes")
