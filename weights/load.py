"""From a name, a file or a folder to a model."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from vit.checks import as_dtype, require_int, whole_patches
from vit.config import ViTConfig
from vit.metadata import Provenance
from vit.model import ViT
from vit.resources import imagenet_categories

from .attention import restore_attention
from .beside import describe
from .checkpoint import Checkpoint, CheckpointError, NotATensor
from .description import IMAGENET, Attributes, Description
from .formats import read_checkpoint
from .patch import adapt_channels, resample_patch_projection
from .reading import Ours, skeleton, to_ours
from .shapes import ASSUMED, known_preprocessing
from .source import Source, find

# The fields of Preprocessing that a caller may state.
_SETTINGS = ("size", "mean", "std", "interpolation", "crop_pct", "mode")


@dataclass(frozen=True)
class Loaded:
    """A checkpoint that was read: its weights in our names, and what the files say of the model."""

    found: Source
    checkpoint: Checkpoint
    about: Description
    ours: Ours
    attributes: Attributes

    @property
    def provenance(self) -> Provenance:
        """Where the weights came from. Waits for the file's hash."""
        return Provenance(
            self.found.name, self.checkpoint.sha256, self.ours.layout.name, self.found.commit,
            self.attributes.license, self.about.parent, self.ours.part,
        )  # fmt: skip


def load_pretrained(
    source: str | Path,
    *,
    num_classes: int | None = None,
    in_chans: int | None = None,
    patch_size: int | None = None,
    layout: str | None = None,
    prefix: str | None = None,
    sha256: str | None = None,
    revision: str | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str | None = None,
    categories: Sequence[str] | None = None,
    **overrides: Any,
) -> ViT:
    """Load a model with its weights, in eval mode.

    Call `model.train()` before fine-tuning, also with Lightning, whose `fit` keeps eval mode: drop path is off in it.

    Args:
        source: one of `vit.list_models(pretrained=True)`, "hf-hub:organization/name", a file (.safetensors, its
            .index.json, .npz, .pth, .pt, .bin, .ckpt, .onnx), or a folder as timm and transformers write them.
        num_classes: another number of classes than the checkpoint's: its head is replaced by a new one with random
            weights, and a warning says so. 0 removes the head.
        in_chans: another number of channels: the patch projection is adapted as timm does it (summed for one
            channel; otherwise repeated and scaled).
        patch_size: another side of patches, in pixels: the patch projection is resampled (FlexiViT,
            arXiv:2212.08013). The stored grid stays, so the model's own image size changes with it.
        layout: how the file names its weights; None detects it.
        prefix: take only the weights whose names begin with it, out of a larger model ("backbone."); a warning lists
            the others. A config.json beside them is used where it describes this part; if not, a warning says so.
        sha256: the file's expected hash, in hexadecimal.
        revision: a branch, tag or commit of the Hub's repository.
        device: where the model goes.
        dtype: what the weights are cast to, as torch.bfloat16 or "bfloat16"; None keeps the file's.
        categories: the names of the classes, in order, which are saved with the model; None: as the files say.
        overrides: fields of `ViTConfig` that the file cannot hold or has wrong (num_heads=12, eps=1e-5 ...), or that
            are the user's choice (drop_path_rate, grad_checkpointing); `model.config.sources` says where each value
            came from. And fields of `Preprocessing` (mean=..., std=...): size=384 prepares images at 384 px; the
            stored grid stays at the size that it was trained at, as it does for any size.

    Raises:
        FileNotFoundError, HubError (an OSError): nothing was found, or the Hub cannot be reached.
        CheckpointError (a ValueError): the file cannot be used; see `vit.weights.convert`.
        ValueError: an unknown name or override, or not one category for each class.
    """
    for name, value, least in (
        ("num_classes", num_classes, 0),
        ("in_chans", in_chans, 1),
        ("patch_size", patch_size, 1),
    ):
        if value is not None:
            require_int(name, value, least)
    dtype = None if dtype is None else as_dtype(dtype)
    loaded = load(find(source, revision), layout, prefix, sha256, overrides)
    for note in loaded.ours.notes:
        warnings.warn(note, stacklevel=2)
    if prefix and loaded.ours.left:
        warnings.warn(f"left behind: {_summary(loaded.ours.left)}", stacklevel=2)
    model = build(loaded, in_chans, patch_size)
    if num_classes is not None and num_classes != model.config.num_classes:
        new = f"a new one for {num_classes} with random weights: train it" if num_classes else "none"
        warnings.warn(f"the head for {model.config.num_classes} classes is replaced by {new}", stacklevel=2)
        model.reset_classifier(num_classes)
        model.config = _stated(model.config, num_classes=num_classes)
    if categories is not None:
        model.categories = _checked(categories, model.config.num_classes)
    return model.to(device=device, dtype=dtype).eval()


def load(
    found: Source,
    layout: str | None = None,
    prefix: str | None = None,
    sha256: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    categories: Sequence[str] | None = None,
) -> Loaded:
    """Read a checkpoint and convert it to our names; the arguments are those of `load_pretrained`."""
    overrides = dict(overrides or {})
    if "strict" in overrides:
        raise ValueError("there is no `strict`: checkpoints map completely or not at all (prefix=... takes a part)")
    settings = {name: overrides.pop(name) for name in list(overrides) if name in _SETTINGS}
    ViTConfig.check_names(overrides)
    checkpoint = read(found, sha256)
    try:
        about = describe(found, checkpoint, prefix)
        # values that are not tensors are passed on, so that they are refused under the model's own keys
        state = checkpoint.tensors | {name: NotATensor(kind) for name, kind in checkpoint.others.items()}
        about, ours = _convert(state, layout, prefix, overrides, about)
        attributes = _attributes(found, about, ours, categories)
    except ValueError as error:
        raise CheckpointError(f"{found.weights}: {error}") from None
    if "size" in settings:  # the caller's values, so errors in them do not name the file
        settings["size"] = whole_patches(settings["size"], ours.config.patch_size)
    attributes = replace(attributes, preprocessing=replace(attributes.preprocessing, **settings))
    return Loaded(found, checkpoint, about, ours, attributes)


def read(found: Source, sha256: str | None = None) -> Checkpoint:
    """Read the weights, and compare their hash with those that the caller and the Hub state."""
    if sha256 is not None and not re.fullmatch("[0-9a-fA-F]{64}", sha256):
        raise ValueError(f"sha256 must be 64 hexadecimal digits, got {sha256!r}")
    checkpoint = read_checkpoint(found.weights)
    if sha256 is not None and sha256.lower() != checkpoint.sha256:
        raise CheckpointError(f"{found.weights} has sha256 {checkpoint.sha256}, expected {sha256.lower()}")
    if found.sha256 is not None and found.sha256 != checkpoint.sha256:
        # the cache holds a link to the file, which is what has to be deleted
        raise CheckpointError(
            f"{found.weights.resolve()} has sha256 {checkpoint.sha256}, but the Hub says {found.sha256}: "
            "the download is damaged, delete it and try again"
        )
    return checkpoint


def _convert(
    state: Mapping[str, Any], layout: str | None, prefix: str | None, stated: Mapping[str, Any], about: Description
) -> tuple[Description, Ours]:
    """The weights in our names, and what is known of them: nothing by a config.json that contradicts a stated part."""
    try:
        claims = {"the caller": stated, about.where: about.declared, ASSUMED: about.assumed}
        return about, _remember(to_ours(state, layout, claims, prefix), about)
    except CheckpointError as error:
        if not prefix or about.where != "config.json":
            raise
        ours = to_ours(state, layout, {"the caller": stated}, prefix)
        about = Description(notes=(*about.notes, f"config.json does not describe {prefix!r} and was not used: {error}"))
        return about, _remember(ours, about)


def _remember(ours: Ours, about: Description) -> Ours:
    """Add what the files say of themselves: which settings in a header were assumed, which files were not used."""
    sources = dict(ours.config.sources)
    sources |= {name: whose for name, whose in about.guessed.items() if sources.get(name) == about.where}
    return replace(ours, config=replace(ours.config, sources=sources), notes=[*about.notes, *ours.notes])


def _attributes(found: Source, about: Description, ours: Ours, stated: Sequence[str] | None) -> Attributes:
    """What the model carries besides weights and config: from the caller, the files, or else the layout."""
    config = ours.config
    categories, whence = (about.categories, about.categories_from) if config.num_classes else (None, "")
    if stated is not None:
        categories, whence = _checked(stated, config.num_classes), "from the caller"
    elif categories is None and config.num_classes == 1000 and _says_nothing(about):
        categories, whence = imagenet_categories(), IMAGENET  # as timm assumes for 1,000 classes
    if categories is not None and len(categories) != config.num_classes:
        raise CheckpointError(f"there are {len(categories)} categories for {config.num_classes} classes")
    preprocessing = about.preprocessing or known_preprocessing(config, ours.layout)
    preprocessing = preprocessing if about.sized else replace(preprocessing, size=config.img_size)
    if len(preprocessing.mean) != config.in_chans:
        raise CheckpointError(
            f"preprocessing has {len(preprocessing.mean)} channels, the weights have {config.in_chans}"
        )
    if about.attention is not None and (count := len(about.attention)) != config.depth:
        raise CheckpointError(f"the header names the attention of {count} blocks, but the model has {config.depth}")
    return Attributes(preprocessing, categories, about.license or found.license, whence, about.attention)


def _says_nothing(about: Description) -> bool:
    """Whether no file describes the model, at most how its images are prepared."""
    return replace(about, notes=(), preprocessing=None, sized=True) == Description()


def _checked(categories: Sequence[str], num_classes: int) -> list[str]:
    """The caller's names for the classes; ValueError if they are not strings, one for each class."""
    if not isinstance(categories, (list, tuple)) or not all(isinstance(name, str) for name in categories):
        raise ValueError(f"categories must be a list of strings, one for each of the {num_classes} classes")
    if len(categories) != num_classes:
        raise ValueError(f"there are {len(categories)} categories for {num_classes} classes")
    return list(categories)


def build(loaded: Loaded, in_chans: int | None = None, patch_size: int | None = None) -> ViT:
    """The model of a checkpoint. Its weights become the parameters without being copied."""
    config, tensors, preprocessing = loaded.ours.config, loaded.ours.tensors, loaded.attributes.preprocessing
    weight = tensors["patch_embed.proj.weight"]
    if in_chans is not None and in_chans != config.in_chans:
        weight, config = adapt_channels(weight, in_chans), _stated(config, in_chans=in_chans)
    if patch_size is not None and patch_size != config.patch_size:
        weight, (h, w) = resample_patch_projection(weight, patch_size), config.grid
        whose = config.sources["img_size"]  # the grid stays, and so does what is known of it
        config = _stated(config, patch_size=patch_size, img_size=(h * patch_size, w * patch_size))
        config = replace(config, sources={**config.sources, "img_size": whose})
        if preprocessing.size == loaded.ours.config.img_size:
            preprocessing = replace(preprocessing, size=config.img_size)
        whole_patches(preprocessing.size, patch_size)
    model = skeleton(config)
    model.load_state_dict({**tensors, "patch_embed.proj.weight": weight}, assign=True)
    restore_attention(model, loaded.attributes.attention, loaded.ours.attention)
    model.preprocessing = preprocessing.with_channels(config.in_chans)
    model.categories = loaded.attributes.categories
    model.provenance = loaded.provenance
    return model


def _stated(config: ViTConfig, **values: Any) -> ViTConfig:
    """The config with values that the caller states."""
    return replace(config.override(**values), sources={**config.sources, **dict.fromkeys(values, "the caller")})


def _summary(keys: list[str]) -> str:
    """Keys, counted by their first part."""
    counts = Counter(re.split(r"[./]", key)[0] for key in keys)
    return ", ".join(f"{name} ({count})" for name, count in counts.most_common())
