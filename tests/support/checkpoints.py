"""Configs of tiny models, and when two models are the same."""

import torch

import vit
from vit.config import ViTConfig
from vit.presets import NAMED_MODELS

TINY = ViTConfig(img_size=32, patch_size=8, embed_dim=128, depth=2, num_heads=2, num_classes=5)
CONFIG = ViTConfig(img_size=(32, 48), patch_size=8, embed_dim=64, depth=2, num_heads=1, num_classes=7, init_values=0.5)
SMALL = NAMED_MODELS["vit_small_patch16_224"].config.override(depth=2)


def same(a: vit.ViT, b: vit.ViT) -> bool:
    """Whether names, dtypes and bits of all weights are equal."""
    one, two = a.state_dict(), b.state_dict()
    return one.keys() == two.keys() and all(
        one[name].dtype == two[name].dtype and torch.equal(one[name], two[name]) for name in one
    )
