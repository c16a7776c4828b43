"""Tiny models and state dicts for the tests of weights."""

import json
import struct

import torch
from helpers import randomize

import vit
from vit.config import ViTConfig
from vit.presets import NAMED_MODELS
from vit.weights import LAYOUTS, convert

TINY = ViTConfig(img_size=32, patch_size=8, embed_dim=128, depth=2, num_heads=2, num_classes=5)
CONFIG = ViTConfig(img_size=(32, 48), patch_size=8, embed_dim=64, depth=2, num_heads=1, num_classes=7, init_values=0.5)
SMALL = NAMED_MODELS["vit_small_patch16_224"].config.override(depth=2)


def same(a: vit.ViT, b: vit.ViT) -> bool:
    """Whether names, dtypes and bits of all weights are equal."""
    one, two = a.state_dict(), b.state_dict()
    return one.keys() == two.keys() and all(
        one[name].dtype == two[name].dtype and torch.equal(one[name], two[name]) for name in one
    )


def holdable(layout: str) -> vit.ViTConfig:
    """A tiny config that a layout can hold."""
    holds = LAYOUTS[layout].holds
    config = TINY.override(**{name: values[0] for name, values in holds.needs.items()})
    return config.override(
        init_values=0.5 if "blocks.{}.scale1" in holds.requires else None,
        reg_tokens=3 if "register_tokens" in holds.requires else 0,
        global_pool=holds.head_pool or config.global_pool,
        class_position=LAYOUTS[layout].assumptions.class_rows != "never",
    )


def timm_state(**changes: object) -> dict[str, torch.Tensor]:
    return convert(
        randomize(vit.ViT(TINY.override(**changes))).state_dict(), "vit", "timm", TINY.override(**changes)
    ).state_dict


def under(prefix: str, state: dict) -> dict:
    return {prefix + key: tensor for key, tensor in state.items()}


def raw(path, tensors):
    """A safetensors file that claims shapes of float32 tensors and holds `data` for each."""
    entries, data = {}, b""
    for name, (shape, content) in tensors.items():
        entries[name] = {"dtype": "F32", "shape": shape, "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    text = json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path
