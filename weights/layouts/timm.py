"""timm's names for a ViT's parameters, and those of the projects derived from it: DeiT, DINO, DINOv2, MAE, MoCo."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from vit.metadata import Preprocessing

from ..checkpoint import CheckpointError
from ..keymap import Assumptions, Detection, Entry, Holds, Layout, Naming, pair, same
from .timm_config import FILES

_IMAGENET = Preprocessing(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), crop_pct=0.875)


def _entries(scale: str = "ls{}.gamma", registers: str = "reg_token") -> tuple[Entry, ...]:
    """timm's table; other projects have other names for LayerScale and registers."""
    return (
        *same("class_token", "cls_token"),
        *same("register_tokens", registers),
        *same("position_embedding", "pos_embed"),
        *pair("patch_embed.proj", "patch_embed.proj"),
        *pair("blocks.{}.norm1", "blocks.{}.norm1"),
        *pair("blocks.{}.attention.qkv", "blocks.{}.attn.qkv"),  # [3D, D]: rows of q, then k, then v
        *pair("blocks.{}.attention.proj", "blocks.{}.attn.proj"),
        *same("blocks.{}.scale1", "blocks.{}." + scale.format(1)),
        *pair("blocks.{}.norm2", "blocks.{}.norm2"),
        *pair("blocks.{}.mlp.fc1", "blocks.{}.mlp.fc1"),
        *pair("blocks.{}.mlp.fc2", "blocks.{}.mlp.fc2"),
        *same("blocks.{}.scale2", "blocks.{}." + scale.format(2)),
        *pair("norm", "norm"),
        *pair("head", "head"),
    )


_QKV = "blocks.0.attn.qkv.weight"
_DISTILLED = (*same("dist_token", "dist_token"), *pair("head_dist", "head_dist"))
_PRE_LOGITS = "the representation layer of older ImageNet-21k files, which timm's models do not use either"
_USUAL = Assumptions(head_width=64, preprocessing=_IMAGENET)  # heads are 64 wide in ViT-Ti, S, B and L
_BACKBONE = {"dist_token": (False,), "global_pool": ("token",), "fc_norm": (False,), "num_classes": (0,)}
_PLAIN_BACKBONE = {**_BACKBONE, "reg_tokens": (0,)}

TIMM = Layout(
    "timm",
    "timm's ViT, DeiT and DeiT-III",
    (*_entries(), *pair("fc_norm", "fc_norm")),
    Detection(
        (_QKV,),
        absent=(
            "dist_token", "blocks.0.gamma_1", "mask_token", "decoder_", "base_encoder.", "momentum_encoder.",
            "head.mlp.", "head.last_layer.", "register_tokens",
        ),
    ),
    Naming(drops={"pre_logits.": _PRE_LOGITS}),
    Assumptions(head_width=64, class_rows="unless registers"),
    Holds({"dist_token": (False,), "global_pool": ("token", "avg")}),
    FILES,
    library="timm",
)  # fmt: skip

DEIT = Layout(
    "deit",
    "distilled DeiT, timm's and Meta's",
    (*_entries(), *_DISTILLED),
    Detection((_QKV, "dist_token")),
    assumptions=replace(_USUAL, defaults={"dist_token": True, "global_pool": "dist"}),
    holds=Holds({"dist_token": (True,), "global_pool": ("dist",), "reg_tokens": (0,)}),
    files=FILES,
    library="timm",
)

DEIT3 = Layout(
    "deit3",
    "Meta's DeiT-III",
    _entries(scale="gamma_{}"),
    Detection((_QKV, "blocks.0.gamma_1")),
    assumptions=replace(_USUAL, class_rows="never"),
    holds=Holds(
        {"dist_token": (False,), "global_pool": ("token",), "fc_norm": (False,), "reg_tokens": (0,)},
        requires=("blocks.{}.scale1",),
    ),
    library="timm",
)

DINO = Layout(
    "dino",
    "DINO, Meta's full checkpoints",
    _entries()[:-2],  # without a head
    Detection((_QKV, "head.last_layer.")),  # weight_v, or parametrizations.weight.original1 by a newer torch
    Naming(
        prefix="backbone.",
        always_prefixed=True,
        # neither is how a classifier's keys begin: head.weight, head.bias
        drops=dict.fromkeys(("head.mlp.", "head.last_layer."), "DINO's projection head, which is for training only"),
    ),
    replace(_USUAL, defaults={"position_rule": "dinov2"}),  # DINO resamples as DINOv2 does
    Holds(_PLAIN_BACKBONE),
    library="timm",
)

MAE = Layout(
    "mae",
    "MAE, Meta's pretrained checkpoints",
    _entries(),
    Detection((_QKV, "decoder_pos_embed")),
    Naming(drops=dict.fromkeys(("decoder_", "mask_token"), "MAE's decoder, which is for training only")),
    _USUAL,
    Holds(_PLAIN_BACKBONE),
    library="timm",
)

MOCO = Layout(
    "moco",
    "MoCo-v3, Meta's full checkpoints",
    _entries()[:-2],
    Detection((_QKV, f"base_encoder.{_QKV}")),
    Naming(
        prefix="base_encoder.",
        always_prefixed=True,
        drops={
            # its layers have numbers, and a classifier has none
            **dict.fromkeys(
                (f"base_encoder.head.{i}" for i in range(10)), "MoCo's projector, which is for training only"
            ),
            "momentum_encoder.": "MoCo's moving average of the encoder, which is for training only",
            "predictor.": "MoCo's predictor, which is for training only",
        },
    ),
    Assumptions(heads=12, preprocessing=_IMAGENET),  # its ViT-S has 12 heads too, where others have 6
    Holds(_PLAIN_BACKBONE),
    library="timm",
)


def without_chunk(key: str) -> str:
    """`blocks.0.7.norm1` -> `blocks.7.norm1`, behind any prefix."""
    return re.sub(r"(^|\.)blocks\.[0-9]+\.([0-9]+)\.", r"\1blocks.\2.", key)


def _without_chunks(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same for a whole state dict: large DINOv2 models were trained with their blocks in chunks."""
    result: dict[str, Tensor] = {}
    for key, tensor in state_dict.items():
        name = without_chunk(key)
        if name in result:
            raise CheckpointError(f"{key} and another key are both {name}")
        result[name] = tensor
    return result


DINOV2 = Layout(
    "dinov2",
    "DINOv2's own files, with and without registers",
    _entries(registers="register_tokens"),
    Detection((_QKV, "mask_token"), absent=("decoder_",)),
    Naming(
        drops={
            "mask_token": "DINOv2's token that replaces hidden patches, which is for training only",
            **dict.fromkeys(("dino_head.", "ibot_head."), "DINOv2's projection heads, which are for training only"),
        },
        zeros={"mask_token": (1, "embed_dim")},
        unpack=_without_chunks,
    ),
    replace(
        _USUAL,
        defaults={"position_rule": "dinov2"},
        # its register models resample with antialiasing and without the offset, which is timm's rule
        register_defaults={"position_rule": "timm"},
    ),
    Holds(_BACKBONE, requires=("blocks.{}.scale1",)),
    library="timm",
)

LAYOUTS = (TIMM, DEIT, DEIT3, DINO, DINOV2, MAE, MOCO)
