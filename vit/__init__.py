"""A Vision Transformer Small in plain PyTorch: any resolution, and attention that one line replaces.

model = vit.load_pretrained("vit_small_patch16_224.augreg_in21k_ft_in1k")
transform = vit.create_transform(model)
logits = model(transform(image)[None])
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .activations import patch, record
from .config import ViTConfig
from .image import create_transform, load_image
from .maps import attention_maps
from .metadata import Preprocessing, Provenance
from .model import ViT
from .presets import create_model, list_models
from .pyramid import FeaturePyramid
from .registry import attention_names, register_attention

if TYPE_CHECKING:
    from vit import kernels, weights
    from vit.exporting import export, load_exported
    from vit.weights import load_pretrained, save_checkpoint

    __version__: str

__all__ = [
    "FeaturePyramid", "Preprocessing", "Provenance", "ViT", "ViTConfig", "attention_maps", "attention_names",
    "create_model", "create_transform", "export", "kernels", "list_models", "load_exported", "load_image",
    "load_pretrained", "patch", "record",
    "register_attention", "save_checkpoint", "weights",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import what the model does not need on first use: `vit.weights`, `vit.kernels`, and the version."""
    if name == "__version__":
        return import_module("importlib.metadata").version("vit-small")
    if name in ("load_pretrained", "save_checkpoint"):
        return getattr(_import("vit.weights"), name)
    if name in ("export", "load_exported"):
        return getattr(import_module("vit.exporting"), name)
    if name in ("weights", "kernels"):
        return _import(f"vit.{name}")
    raise AttributeError(f"module 'vit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__


def _import(name: str) -> Any:
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        # The folders weights/ and kernels/ lie beside vit/ and become vit.weights and vit.kernels when installed.
        hint = f"{name} is not installed: run `pip install -e .` in the repository"
        raise ModuleNotFoundError(hint, name=name) from None
