"""Our own layout: the model's own parameter names, and everything else in the file's header."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from vit.checks import unknown
from vit.config import ViTConfig
from vit.metadata import Preprocessing, Provenance

from ..checkpoint import CheckpointError
from ..description import ANSWERS, IMAGENET, AttentionSetting, Attributes, Description, assumptions, by_header
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


# What is wrong with a file of `vit.kernels.save`.
OPTIMIZED = (
    "it holds an optimized model, no checkpoint: vit.kernels.load reads it, and so do vit predict, features,"
    " evaluate and bench; convert, inspect and fine-tune the checkpoint that it was made of"
)

_PARTS = ("vit.config", "vit.assumed", "vit.preprocessing", "vit.categories", "vit.attention", "vit.provenance")


def write_header(config: ViTConfig, attributes: Attributes, provenance: Provenance | None) -> dict[str, str]:
    """What a file's header says of a model: its config, preprocessing, categories and provenance, each as JSON.

    What of it was assumed when the weights were first read is named too, so that a guess does not become a fact.
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
    """The inverse of `write_header`; a header that says nothing gives an empty description.

    Raises:
        CheckpointError: a part that is not what `write_header` writes; it is named. An optimized model's header.
    """
    if "vit.optimized" in metadata:
        raise CheckpointError(OPTIMIZED)
    parts: dict[str, Any] = {}
    for key in _PARTS:
        if key in metadata:
            try:
                parts[key] = json.loads(metadata[key])
            except (ValueError, RecursionError) as error:
                raise CheckpointError(f"the header's {key} is not JSON: {error}") from None
    try:
        declared = parts.get("vit.config", {})
        _check_fields("vit.config", declared, ViTConfig.field_names())
        guessed = _check_guessed(parts.get("vit.assumed", {}))
        settings = parts.get("vit.preprocessing")
        if settings is not None:
            _check_fields("vit.preprocessing", settings, [f.name for f in fields(Preprocessing)])
        parent = parts.get("vit.provenance")
        categories_from = by_header(IMAGENET) if guessed.pop("categories", None) else "from the file's header"
        return Description(
            where="the file's header" if "vit.config" in metadata else "",
            declared=declared,
            preprocessing=None if settings is None else Preprocessing(**settings),
            categories=_check_categories(parts.get("vit.categories")),
            categories_from=categories_from if "vit.categories" in metadata else "",
            license=parent["license"] if isinstance(parent, dict) and "license" in parent else None,
            parent=None if parent is None else Provenance.from_dict(parent),
            attention=_check_attention(parts.get("vit.attention")),
            guessed={name: by_header(whose) for name, whose in guessed.items()},
        )
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"the header is not one of ours: {error}") from None


def check_attributes(config: ViTConfig, attributes: Attributes) -> None:
    """What a header says of a model must read back, and fit the model: CheckpointError otherwise."""
    about = read_header(write_header(config, attributes, None))
    assert about.preprocessing is not None
    if len(about.preprocessing.mean) != config.in_chans:
        raise CheckpointError(
            f"preprocessing has {len(about.preprocessing.mean)} channels, the model {config.in_chans}"
        )
    if about.categories is not None and len(about.categories) != config.num_classes:
        raise CheckpointError(f"there are {len(about.categories)} categories for {config.num_classes} classes")


def _check_fields(key: str, values: object, known: list[str]) -> None:
    if not isinstance(values, dict):
        raise CheckpointError(f"the header's {key} is {values!r}, expected an object")
    for name in values:
        if name not in known:
            raise CheckpointError(f"the header's {key}: {unknown('field', name, known)}")


def _check_guessed(guessed: object) -> dict[str, str]:
    if not isinstance(guessed, dict) or not all(isinstance(whose, str) for whose in guessed.values()):
        raise CheckpointError("the header's vit.assumed is no object of texts")
    _check_fields("vit.assumed", guessed, [*ANSWERS, "categories"])
    return dict(guessed)


def _check_attention(settings: object) -> list[AttentionSetting] | None:
    kinds = {"name": str, "options": dict}
    if settings is None:
        return None
    for one in settings if isinstance(settings, list) else [None]:
        if not isinstance(one, dict) or {key: type(value) for key, value in one.items()} != kinds:
            raise CheckpointError("the header's vit.attention is no list of names with options")
    return [AttentionSetting(**one) for one in settings]  # type: ignore[attr-defined]


def _check_categories(categories: object) -> list[str] | None:
    if categories is None or (isinstance(categories, list) and all(isinstance(name, str) for name in categories)):
        return categories
    raise CheckpointError("the header's vit.categories is no list of texts")
