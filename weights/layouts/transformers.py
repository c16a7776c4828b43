"""transformers' ViT, DeiT and DINOv2: the names in their files, and those that version 5 uses in memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from torch import Tensor

from vit.metadata import Preprocessing

from ..keymap import Assumptions, Detection, Entry, Files, Holds, Layout, Naming, fused, pair, same
from .transformers_config import FILES

_IMAGENET = Preprocessing(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), crop_pct=0.875)
_POOLER = "the pooler of a model without a classifier, whose output no classifier reads"
_MASK = {"embeddings.mask_token": "the token that replaces hidden patches, which is for training only"}
_DECODERS = {
    **dict.fromkeys(("decoder.decoder_", "decoder.mask_token"), "MAE's decoder, which is for training only"),
    "decoder.0.": "the decoder of ViTForMaskedImageModeling, which is for training only",
}

_VIT_BODY = (
    *same("class_token", "embeddings.cls_token"),
    *same("position_embedding", "embeddings.position_embeddings"),
    *pair("patch_embed.proj", "embeddings.patch_embeddings.projection"),
    *fused(
        "blocks.{}.attention.qkv",
        "encoder.layer.{}.attention.attention.query",
        "encoder.layer.{}.attention.attention.key",
        "encoder.layer.{}.attention.attention.value",
    ),
    *pair("blocks.{}.attention.proj", "encoder.layer.{}.attention.output.dense"),
    *pair("blocks.{}.norm1", "encoder.layer.{}.layernorm_before"),
    *pair("blocks.{}.norm2", "encoder.layer.{}.layernorm_after"),
    *pair("blocks.{}.mlp.fc1", "encoder.layer.{}.intermediate.dense"),
    *pair("blocks.{}.mlp.fc2", "encoder.layer.{}.output.dense"),
    *pair("norm", "layernorm"),
)

_DINOV2 = (
    *same("class_token", "embeddings.cls_token"),
    *same("position_embedding", "embeddings.position_embeddings"),
    *pair("patch_embed.proj", "embeddings.patch_embeddings.projection"),
    *fused(
        "blocks.{}.attention.qkv",
        "encoder.layer.{}.attention.attention.query",
        "encoder.layer.{}.attention.attention.key",
        "encoder.layer.{}.attention.attention.value",
    ),
    *pair("blocks.{}.attention.proj", "encoder.layer.{}.attention.output.dense"),
    *pair("blocks.{}.norm1", "encoder.layer.{}.norm1"),
    *pair("blocks.{}.norm2", "encoder.layer.{}.norm2"),
    *same("blocks.{}.scale1", "encoder.layer.{}.layer_scale1.lambda1"),
    *same("blocks.{}.scale2", "encoder.layer.{}.layer_scale2.lambda1"),
    *pair("blocks.{}.mlp.fc1", "encoder.layer.{}.mlp.fc1"),
    *pair("blocks.{}.mlp.fc2", "encoder.layer.{}.mlp.fc2"),
    *pair("norm", "layernorm"),
    *pair("head", "classifier"),
)


def _join(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without `vit.` if the blocks lack it: version 5 writes a ViTMSN's so, and all else of its model with it."""
    names = {key: key.removeprefix("vit.") for key in state_dict}
    bare = any(key.startswith("encoder.") for key in state_dict)
    if not bare or len(set(names.values())) < len(names) or any(key.startswith("vit.encoder.") for key in state_dict):
        return dict(state_dict)
    return {names[key]: tensor for key, tensor in state_dict.items()}


_VIT_MARKERS = (
    "encoder.layer.0.attention.attention.query.weight",
    "encoder.layer.0.layernorm_before.weight",
)
_DINOV2_MARKERS = (
    "encoder.layer.0.attention.attention.query.weight",
    "encoder.layer.0.layer_scale1.lambda1",
)

TRANSFORMERS = Layout(
    "transformers",
    "transformers' ViT",
    (*_VIT_BODY, *pair("head", "classifier")),
    Detection(_VIT_MARKERS, absent=("embeddings.distillation_token",)),
    Naming(prefix="vit.", drops={"pooler.": _POOLER, **_MASK, **_DECODERS}, unpack=_join),
    Assumptions(
        head_width=64,
        defaults={"eps": 1e-12, "position_rule": "transformers"},
        preprocessing=Preprocessing(mode="squash", crop_pct=1.0, interpolation="bilinear"),
    ),
    Holds({"dist_token": (False,), "global_pool": ("token",), "fc_norm": (False,)}),
    FILES,
    library="transformers",
)

DEIT = replace(
    TRANSFORMERS,
    name="transformers_deit",
    about="transformers' DeiT with its two classifiers",
    entries=(
        *_VIT_BODY,
        *pair("head", "cls_classifier"),
        *same("dist_token", "embeddings.distillation_token"),
        *pair("head_dist", "distillation_classifier"),
    ),
    detection=Detection((*_VIT_MARKERS, "embeddings.distillation_token"), absent=("classifier.",)),
    naming=Naming(prefix="deit.", drops={"pooler.": _POOLER, **_MASK, **_DECODERS}),
    assumptions=Assumptions(
        head_width=64,
        defaults={"eps": 1e-12, "position_rule": "transformers", "dist_token": True, "global_pool": "dist"},
        preprocessing=_IMAGENET,
    ),
    holds=Holds({"dist_token": (True,), "global_pool": ("dist",)}),
)

DEIT_PLAIN = replace(
    DEIT,
    name="transformers_deit_plain",
    about="transformers' DeiT with one classifier",
    entries=(
        *_VIT_BODY,
        *pair("head", "classifier"),
        *same("dist_token", "embeddings.distillation_token"),
    ),
    detection=Detection((*_VIT_MARKERS, "embeddings.distillation_token", "classifier.weight")),
    assumptions=Assumptions(
        head_width=64,
        defaults={"eps": 1e-12, "position_rule": "transformers", "dist_token": True},
        preprocessing=_IMAGENET,
    ),
    holds=Holds({"dist_token": (True,), "global_pool": ("token",)}, requires=("head.weight",)),
)

DINOV2 = Layout(
    "transformers_dinov2",
    "transformers' DINOv2",
    _DINOV2,
    Detection(_DINOV2_MARKERS, absent=("embeddings.register_tokens",)),
    Naming(prefix="dinov2.", drops=_MASK, zeros={"embeddings.mask_token": (1, "embed_dim")}),
    Assumptions(head_width=64, defaults={"position_rule": "transformers"}, preprocessing=_IMAGENET),
    Holds(
        {"dist_token": (False,), "fc_norm": (False,)},
        requires=("blocks.{}.scale1",),
        head_pool="token_avg",
        square=True,
    ),
    FILES,
    library="transformers",
)

DINOV2_REGISTERS = replace(
    DINOV2,
    name="transformers_dinov2_registers",
    about="transformers' DINOv2 with registers",
    entries=(*_DINOV2, *same("register_tokens", "embeddings.register_tokens")),
    detection=Detection((*_DINOV2_MARKERS, "embeddings.register_tokens")),
    naming=replace(DINOV2.naming, prefix="dinov2_with_registers."),
    # these models resample with antialiasing, which is timm's rule
    assumptions=replace(DINOV2.assumptions, defaults={"position_rule": "timm"}),
    holds=replace(DINOV2.holds, requires=("blocks.{}.scale1", "register_tokens")),
)

# What version 5 renames when it loads a file: each part of a key -> its name in memory, in this order.
_RENAMES = (
    ("attention.attention.query", "attention.q_proj"),
    ("attention.attention.key", "attention.k_proj"),
    ("attention.attention.value", "attention.v_proj"),
    ("attention.output.dense", "attention.o_proj"),
    ("intermediate.dense", "mlp.fc1"),
    ("output.dense", "mlp.fc2"),
)
_RENAMED_BLOCKS = ("encoder.layer.", "layers.")  # not in DINOv2


def _in_memory(layout: Layout, renames: Iterable[tuple[str, str]]) -> Layout:
    def renamed(keys: tuple[str, ...]) -> tuple[str, ...]:
        for old, new in renames:
            keys = tuple(key.replace(old, new) for key in keys)
        return keys

    return replace(
        layout,
        name=f"{layout.name}_memory",
        about=f"{layout.about}, as version 5 names it in memory",
        entries=tuple(Entry(entry.ours, renamed(entry.theirs), entry.transform) for entry in layout.entries),
        detection=replace(layout.detection, markers=renamed(layout.detection.markers)),
        files=Files(),
    )


LAYOUTS = (
    TRANSFORMERS, DEIT, DEIT_PLAIN, DINOV2, DINOV2_REGISTERS,
    *(_in_memory(layout, (*_RENAMES, _RENAMED_BLOCKS)) for layout in (TRANSFORMERS, DEIT, DEIT_PLAIN)),
    *(_in_memory(layout, _RENAMES) for layout in (DINOV2, DINOV2_REGISTERS)),
)  # fmt: skip
