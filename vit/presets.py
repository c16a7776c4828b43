"""Models by name: their configs, the preprocessing that their weights expect, and `create_model`."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from .checks import unknown
from .config import ViTConfig
from .metadata import Preprocessing
from .model import ViT


@dataclass(frozen=True)
class NamedModel:
    """The architecture of a named model, and the preprocessing that its weights expect."""

    config: ViTConfig
    preprocessing: Preprocessing = field(default_factory=Preprocessing)
    tag: str | None = "augreg_in21k_ft_in1k"  # of its weights on the Hub, timm/<name>.<tag>; None: they ship with us


_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_SMALL = ViTConfig()
_DINOV2 = _SMALL.override(img_size=518, patch_size=14, init_values=1e-5, num_classes=0)
_DIGITS = _SMALL.override(img_size=32, patch_size=4, embed_dim=96, depth=6, num_heads=3, num_classes=10)

# Architectures, evaluation settings and default tags are those of timm's models of the same name;
# `vit_digits_patch4_32` is this project's own, small enough to ship with its weights.
NAMED_MODELS: dict[str, NamedModel] = {
    "vit_small_patch16_224": NamedModel(_SMALL),
    "vit_small_patch16_384": NamedModel(_SMALL.override(img_size=384), Preprocessing(size=(384, 384), crop_pct=1.0)),
    "vit_small_patch32_224": NamedModel(_SMALL.override(patch_size=32)),
    "vit_small_patch14_dinov2": NamedModel(
        _DINOV2, Preprocessing(size=(518, 518), mean=_IMAGENET_MEAN, std=_IMAGENET_STD, crop_pct=1.0), "lvd142m"
    ),
    "vit_tiny_patch16_224": NamedModel(_SMALL.override(embed_dim=192, num_heads=3)),
    "vit_base_patch16_224": NamedModel(_SMALL.override(embed_dim=768, num_heads=12), tag="augreg2_in21k_ft_in1k"),
    "vit_digits_patch4_32": NamedModel(_DIGITS, Preprocessing(size=(32, 32), crop_pct=1.0), None),
}


def list_models(pretrained: bool = False) -> list[str]:
    """The names for `create_model`, sorted; with `pretrained` those for `load_pretrained`, with their default tags."""
    if not pretrained:
        return sorted(NAMED_MODELS)
    return sorted(f"{name}.{named.tag}" if named.tag else name for name, named in NAMED_MODELS.items())


def named_model(name: str) -> NamedModel:
    """The architecture and preprocessing of a named model.

    Raises:
        ValueError: an unknown name; the error gives the nearest known one.
    """
    if name not in NAMED_MODELS:
        raise ValueError(unknown("model", name, list_models()))
    return NAMED_MODELS[name]


def create_model(name: str, **overrides: Any) -> ViT:
    """Create a named model with random weights, in training mode.

    Args:
        name: one of `list_models()`.
        overrides: fields of `ViTConfig` to change: num_classes=10, in_chans=1, img_size=(256, 160) ...

    Raises:
        ValueError: an unknown name or field (the error gives the nearest one), or values that contradict each other.
    """
    named = named_model(name)
    model = ViT(named.config.override(**overrides))
    model.preprocessing = named.preprocessing.with_channels(model.config.in_chans)
    if "img_size" in overrides:
        model.preprocessing = replace(model.preprocessing, size=model.config.img_size)
    return model
