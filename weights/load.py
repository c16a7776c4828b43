"""From a name, a file or a folder to a model."""

from __future__ import annotations

import os
import re
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from vit.checks import require_int, unknown, whole_patches
from vit.config import ViTConfig
from vit.metadata import Provenance
from vit.model import ViT
from vit.presets import NAMED_MODELS, list_models
from vit.resources import bundled_checkpoint, imagenet_categories

from .attention import restore_attention
from .checkpoint import Checkpoint, CheckpointError, NotATensor, read_json
from .convert import Ours, skeleton, to_ours
from .description import IMAGENET, Attributes, Description
from .formats import read_checkpoint
from .hub import FILE_SUFFIXES, download, parse_name
from .layouts import timm_config, transformers_config, vit
from .patch import adapt_channels, resample_patch_projection
from .shapes import ASSUMED, known_preprocessing


@dataclass(frozen=True)
class Source:
    """Where a checkpoint lies."""

    name: str  # for the provenance
    weights: Path
    config: Path | None = None  # a config.json, where there is one
    preprocessor: Path | None = None  # a preprocessor_config.json of transformers
    commit: str | None = None
    sha256: str | None = None  # what it must be, where that is known
    license: str | None = None  # where it is known without the file


_SETTINGS = (
    "size",
    "mean",
    "std",
    "interpolation",
    "crop_pct",
    "mode",
)  # fields of Preprocessing that a caller may state


@dataclass(frozen=True)
class Loaded:
    """A checkpoint that was read and fits: the weights in our names, and what goes with them."""

    found: Source
    checkpoint: Checkpoint
    about: Description
    ours: Ours
    attributes: Attributes

    @property
    def provenance(self) -> Provenance:
        """Where the weights came from; waits for the file's hash."""
        return Provenance(
            self.found.name, self.checkpoint.sha256, self.ours.layout.name, self.found.commit,
            self.attributes.license, self.about.parent,
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
    dtype: torch.dtype | None = None,
    categories: Sequence[str] | None = None,
    **overrides: Any,
) -> ViT:
    """Load a model with its weights, in eval mode.

    Args:
        source: one of `vit.list_models(pretrained=True)`, "hf-hub:organization/name", a file (.safetensors, its
            .index.json, .npz, .pth, .pt, .bin, .ckpt, .onnx), or a folder as timm and transformers write them.
        num_classes: another number of classes than the checkpoint's: a new head with random weights takes the place
            of its own, and a warning says so. 0 removes the head.
        in_chans: another number of channels: the patch projection is adapted as timm does it (summed for one
            channel; otherwise repeated and scaled).
        patch_size: another side of patches, in pixels: the patch projection is resampled (FlexiViT,
            arXiv:2212.08013). The stored grid stays, so the model's own image size changes with it.
        layout: how the file names its weights; None detects it.
        prefix: take only the weights whose names begin so, out of a larger model ("backbone."); a warning lists
            what is left behind.
        sha256: what the file must have, in hexadecimal.
        revision: a branch, tag or commit of the Hub's repository.
        device: where the model goes.
        dtype: what the weights are cast to; None keeps the file's.
        categories: the names of the classes, in order, which are saved with the model; None: as the files say.
        overrides: fields of `ViTConfig` that the file cannot know or says wrongly (num_heads=12, eps=1e-5 ...), or
            that are the user's to choose (drop_path_rate, grad_checkpointing); `model.config.sources` tells of each
            field where its value came from. And the fields of `Preprocessing` (mean=..., std=...): size=384 prepares
            images at 384 px; the stored grid stays what it was trained at, as at any other size.

    Raises:
        FileNotFoundError, HubError (an OSError): nothing is there, or the Hub cannot be reached.
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
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype must be a floating torch.dtype such as torch.bfloat16, not {dtype!r}")
    loaded = load(find(source, revision), layout, prefix, sha256, overrides)
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
        about = describe(found, checkpoint, "num_heads" in overrides, prefix)
        claims = {"the caller": overrides, about.where: about.declared, ASSUMED: about.assumed}
        # what is no tensor comes along, so that it is refused where the model's own keys hold it
        state = checkpoint.tensors | {name: NotATensor(kind) for name, kind in checkpoint.others.items()}
        ours = _remember(to_ours(state, layout, claims, prefix), about)
        attributes = _attributes(found, about, ours, categories)
        if "size" in settings:
            settings["size"] = whole_patches(settings["size"], ours.config.patch_size)
        attributes = replace(attributes, preprocessing=replace(attributes.preprocessing, **settings))
    except ValueError as error:
        raise CheckpointError(f"{found.weights}: {error}") from None
    return Loaded(found, checkpoint, about, ours, attributes)


def read(found: Source, sha256: str | None = None) -> Checkpoint:
    """Read the weights, and hold them against the sha256 that is known of them."""
    if sha256 is not None and (not isinstance(sha256, str) or not re.fullmatch("[0-9a-fA-F]{64}", sha256)):
        raise ValueError(f"sha256 must be 64 hexadecimal digits, not {sha256!r}")
    checkpoint = read_checkpoint(found.weights)
    if sha256 is not None and sha256.lower() != checkpoint.sha256:
        raise CheckpointError(f"{found.weights} has sha256 {checkpoint.sha256}, expected {sha256.lower()}")
    if found.sha256 is not None and found.sha256 != checkpoint.sha256:
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
        return _with_configs(name, path)
    if bundled := bundled_checkpoint(name):
        return _in_folder(bundled, name)
    if name in NAMED_MODELS:
        name = f"{name}.{NAMED_MODELS[name].tag}"
    if (parsed := parse_name(name)) is None:
        if path.suffix in FILE_SUFFIXES or name.endswith(("/", os.sep)):
            raise FileNotFoundError(f"{name} does not exist")
        if len(path.parts) > 1:
            raise FileNotFoundError(f"{name} does not exist (a repository of the Hub is written hf-hub:{name})")
        raise ValueError(unknown("model", name, list_models(pretrained=True)))
    repo, asked = parsed
    if revision is not None and asked is not None:
        raise ValueError(f"{name} names a revision already, so revision={revision!r} cannot go with it")
    files = download(repo, asked if revision is None else revision)
    license = "apache-2.0" if name in list_models(pretrained=True) else None  # as timm's own table has it
    return Source(
        f"hf-hub:{repo}", files.weights, files.config, files.preprocessor, files.commit, files.sha256, license
    )


# The weights in a folder, the first that is there.
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")


def _in_folder(folder: Path, name: str) -> Source:
    for file in WEIGHT_FILES:
        if (folder / file).is_file():
            return _with_configs(name, folder / file)
    raise FileNotFoundError(f"{folder} holds none of {', '.join(WEIGHT_FILES)}")


def _with_configs(name: str, weights: Path) -> Source:
    if weights.suffix.lower() == ".npz":  # Google's files have none, so that one lying there is another's
        return Source(name, weights)
    config, preprocessor = (weights.parent / file for file in ("config.json", "preprocessor_config.json"))
    return Source(name, weights, config if config.is_file() else None, preprocessor if preprocessor.is_file() else None)


def describe(
    found: Source, checkpoint: Checkpoint, known_heads: bool = False, prefix: str | None = None
) -> Description:
    """What the checkpoint's header or the config.json beside it says of the model: the header, where there is one.

    Under a prefix, a config.json speaks of the larger model; its "backbone_config" is the part that counts.
    """
    if any(key.startswith("vit.") for key in checkpoint.metadata):
        return vit.read_header(checkpoint.metadata)
    if found.config is None:
        return Description()
    content, where = read_json(found.config), str(found.config)
    if prefix:
        content = content.get("backbone_config") or {}
        if not isinstance(content, dict) or not content:
            return Description()
    if "model_type" not in content:
        return timm_config.read_config(content, where, known_heads)
    about = transformers_config.read_config(content, where)
    if found.preprocessor is None:
        return about
    settings = transformers_config.read_preprocessing(read_json(found.preprocessor), str(found.preprocessor))
    return replace(about, preprocessing=settings)


def _remember(ours: Ours, about: Description) -> Ours:
    """Of what a header declares, it also says what was assumed and by whom."""
    sources = dict(ours.config.sources)
    sources |= {name: whose for name, whose in about.guessed.items() if sources[name] == about.where}
    return replace(ours, config=replace(ours.config, sources=sources))


def _attributes(found: Source, about: Description, ours: Ours, stated: Sequence[str] | None) -> Attributes:
    """What the model carries, as the caller or the files say it or as it is usual."""
    config = ours.config
    categories, whence = (about.categories, about.categories_from) if config.num_classes else (None, "")
    if stated is not None:
        categories, whence = _checked(stated, config.num_classes), "from the caller"
    elif categories is None and about == Description() and config.num_classes == 1000:
        categories, whence = imagenet_categories(), IMAGENET  # what timm, too, takes 1,000 classes to be
    if categories is not None and len(categories) != config.num_classes:
        raise CheckpointError(f"there are {len(categories)} categories for {config.num_classes} classes")
    preprocessing = about.preprocessing or known_preprocessing(config, ours.layout)
    if len(preprocessing.mean) != config.in_chans:
        raise CheckpointError(f"preprocessing has {len(preprocessing.mean)} channels, the weights {config.in_chans}")
    if about.attention is not None and len(about.attention) != config.depth:
        raise CheckpointError(f"the header names the attention of {len(about.attention)} blocks, of {config.depth}")
    return Attributes(preprocessing, categories, about.license or found.license, whence, about.attention)


def _checked(categories: Sequence[str], num_classes: int) -> list[str]:
    """The caller's names for the classes; ValueError where these are no names, or not one for each class."""
    if not isinstance(categories, (list, tuple)) or not all(isinstance(name, str) for name in categories):
        raise ValueError(f"categories must be a list of texts, one for each of the {num_classes} classes")
    if len(categories) != num_classes:
        raise ValueError(f"there are {len(categories)} categories for {num_classes} classes")
    return list(categories)


def build(loaded: Loaded, in_chans: int | None = None, patch_size: int | None = None) -> ViT:
    """A model around weights that fit: they become its parameters without being copied."""
    config, tensors, preprocessing = loaded.ours.config, loaded.ours.tensors, loaded.attributes.preprocessing
    weight = tensors["patch_embed.proj.weight"]
    if in_chans is not None and in_chans != config.in_chans:
        weight, config = adapt_channels(weight, in_chans), _stated(config, in_chans=in_chans)
    if patch_size is not None and patch_size != config.patch_size:
        weight, (h, w) = resample_patch_projection(weight, patch_size), config.grid
        config = _stated(config, patch_size=patch_size, img_size=(h * patch_size, w * patch_size))
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
    """Keys, counted by how they begin."""
    counts = Counter(re.split(r"[./]", key)[0] for key in keys)
    return ", ".join(f"{name} ({count})" for name, count in counts.most_common())
