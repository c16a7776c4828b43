"""From a name, a file or a folder to a model."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vit.checks import require_int, unknown
from vit.config import NAMED_MODELS, ViTConfig, list_models
from vit.metadata import Provenance
from vit.model import ViT
from vit.resources import bundled_checkpoint, imagenet_categories

from . import own, timm
from .convert import convert, skeleton
from .description import Description
from .files import Checkpoint, CheckpointError, read_json, read_safetensors
from .hub import FILE_SUFFIXES, download, parse_name
from .layouts import detect_layout
from .shapes import known_preprocessing


@dataclass(frozen=True)
class Source:
    """Where a checkpoint lies."""

    name: str  # for the provenance
    weights: Path
    config: Path | None = None  # a config.json, where there is one
    commit: str | None = None
    sha256: str | None = None  # what it must be, where that is known
    license: str | None = None  # where it is known without the file


def load_pretrained(
    source: str | Path,
    *,
    num_classes: int | None = None,
    in_chans: int | None = None,
    layout: str | None = None,
    revision: str | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    **overrides: Any,
) -> ViT:
    """Load a model with its weights, in eval mode.

    Args:
        source: one of `vit.list_models(pretrained=True)`, "hf-hub:organization/name", a `.safetensors` file, or a
            folder with `model.safetensors` and `config.json`.
        num_classes: another number of classes than the checkpoint's: a new head with random weights takes the place
            of its own, and a warning says so. 0 removes the head.
        in_chans: another number of channels: the patch projection is adapted as timm does it (summed for one
            channel; otherwise repeated and scaled).
        layout: how the file names its weights; None detects it.
        revision: a branch, tag or commit of the Hub's repository.
        device: where the model goes.
        dtype: what the weights are cast to; None keeps the file's.
        overrides: fields of `ViTConfig` that the file cannot know or says wrongly (num_heads=12, eps=1e-5 ...), or
            that are the user's to choose (drop_path_rate, grad_checkpointing).

    Raises:
        FileNotFoundError, HubError (an OSError): nothing is there, or the Hub cannot be reached.
        CheckpointError (a ValueError): the file cannot be used; see `vit.weights.convert`.
        ValueError: an unknown name or override.
    """
    ViTConfig.check_names(overrides)
    for name, value, least in (("num_classes", num_classes, 0), ("in_chans", in_chans, 1)):
        if value is not None:
            require_int(name, value, least)
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype must be a floating torch.dtype such as torch.bfloat16, not {dtype!r}")
    found = find(source, revision)
    checkpoint = read(found)
    try:
        layout = detect_layout(checkpoint.tensors) if layout is None else layout
        about = describe(found, checkpoint, layout, overrides)
        converted = convert(checkpoint.tensors, layout, "vit", about.declared | overrides)
        model = build(converted.state_dict, converted.config, about, in_chans)
    except CheckpointError as error:
        raise CheckpointError(f"{found.weights}: {error}") from None
    license = about.license or found.license
    model.provenance = Provenance(found.name, checkpoint.sha256, layout, found.commit, license, parent=about.parent)
    if num_classes is not None and num_classes != model.config.num_classes:
        new = f"a new one for {num_classes} with random weights: train it" if num_classes else "none"
        warnings.warn(f"the head for {model.config.num_classes} classes is replaced by {new}", stacklevel=2)
        model.reset_classifier(num_classes)
    return model.to(device=device, dtype=dtype).eval()


def read(found: Source) -> Checkpoint:
    """Read the weights, and hold them against the sha256 that is known of them."""
    checkpoint = read_safetensors(found.weights)
    if found.sha256 not in (None, checkpoint.sha256):
        # The cache holds a link to the bytes: they are what has to go.
        raise CheckpointError(
            f"{found.weights.resolve()} has sha256 {checkpoint.sha256}, but the Hub says {found.sha256}: "
            "the download is damaged, delete it and try again"
        )
    return checkpoint


def find(source: str | Path, revision: str | None = None) -> Source:
    """The files behind a name or path, downloaded where they have to be."""
    if not isinstance(source, (str, Path)) or source == "":
        raise ValueError(f"expected the name of a model, a file or a folder, not {source!r}")
    path, name = Path(source), str(source)
    if revision is not None and (path.exists() or bundled_checkpoint(name)):
        raise ValueError(f"revision={revision!r} is for repositories of the Hub, and {name} is a local file or folder")
    if path.is_dir():
        return _in_folder(path, name)
    if path.is_file():
        beside = path.parent / "config.json"
        return Source(name, path, beside if beside.is_file() else None)
    if bundled := bundled_checkpoint(name):
        return _in_folder(bundled, name)
    if name in NAMED_MODELS:
        name = f"{name}.{NAMED_MODELS[name].tag}"
    if (parsed := parse_name(name)) is None:
        if path.suffix in FILE_SUFFIXES or len(path.parts) > 1:
            raise FileNotFoundError(f"{name} does not exist (a repository of the Hub is written hf-hub:{name})")
        raise ValueError(unknown("model", name, list_models(pretrained=True)))
    repo, asked = parsed
    if revision is not None and asked is not None:
        raise ValueError(f"{name} names a revision already, so revision={revision!r} cannot go with it")
    files = download(repo, asked if revision is None else revision)
    license = "apache-2.0" if name in list_models(pretrained=True) else None  # as timm's own table has it
    return Source(f"hf-hub:{repo}", files.weights, files.config, files.commit, files.sha256, license)


def _in_folder(folder: Path, name: str) -> Source:
    weights, config = folder / "model.safetensors", folder / "config.json"
    if not weights.is_file():
        raise FileNotFoundError(f"{folder} holds no model.safetensors")
    return Source(name, weights, config if config.is_file() else None)


def describe(found: Source, checkpoint: Checkpoint, layout: str, overrides: Mapping[str, Any]) -> Description:
    """What the checkpoint's header or its config.json says of the model."""
    if layout == "vit":
        return own.read_header(checkpoint.metadata)
    if found.config is not None:
        return timm.read_config(read_json(found.config), str(found.config), known_heads="num_heads" in overrides)
    return Description()


def build(tensors: dict[str, Tensor], config: ViTConfig, about: Description, in_chans: int | None = None) -> ViT:
    """A model around weights that fit: they become its parameters without being copied."""
    categories = about.categories
    if categories is None and about == Description() and config.num_classes == 1000:
        categories = imagenet_categories()  # what timm, too, takes 1,000 classes to be
    if categories is not None and len(categories) != config.num_classes:
        raise CheckpointError(f"there are {len(categories)} categories for {config.num_classes} classes")
    preprocessing = about.preprocessing or known_preprocessing(config)
    if len(preprocessing.mean) != config.in_chans:
        raise CheckpointError(f"preprocessing has {len(preprocessing.mean)} channels, the weights {config.in_chans}")
    if in_chans is not None and in_chans != config.in_chans:
        weight = tensors["patch_embed.proj.weight"]
        tensors = tensors | {"patch_embed.proj.weight": adapt_channels(weight, in_chans)}
        config = config.override(in_chans=in_chans)
    model = skeleton(config)
    model.load_state_dict(tensors, assign=True)
    model.preprocessing = preprocessing.with_channels(config.in_chans)
    model.categories = categories
    return model


def adapt_channels(weight: Tensor, channels: int) -> Tensor:
    """A patch projection [D, 3, p, p] for another number of channels, as timm adapts it: [D, channels, p, p].

    One channel gets the sum over the three, so that grey images give what they gave as RGB; more channels repeat
    the three in turn, scaled so that the sum keeps its size.
    """
    if weight.shape[1] != 3:
        raise ValueError(f"in_chans={channels}: only 3 channels can be adapted, the checkpoint has {weight.shape[1]}")
    if channels == 1:
        return weight.float().sum(dim=1, keepdim=True).to(weight.dtype)
    repeated = weight.float().repeat(1, math.ceil(channels / 3), 1, 1)[:, :channels]
    return (repeated * (3 / channels)).to(weight.dtype)
