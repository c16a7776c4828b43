"""transformers' ViT, DeiT and DINOv2: the names in their files, and those that version 5 uses in memory."""

from dataclasses import replace

from vit.metadata import Preprocessing

from ..keymap import Entry, Layout, fused, pair, same

_IMAGENET = Preprocessing(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), crop_pct=0.875)
_POOLER = "the pooler of a model without a classifier, a layer that no classifier reads"


def _common(head: str) -> list[Entry]:
    return [
        *same("class_token", "embeddings.cls_token"),
        *same("position_embedding", "embeddings.position_embeddings"),
        *pair("patch_embed.proj", "embeddings.patch_embeddings.projection"),
        *pair("norm", "layernorm"),
        *pair("head", head),
    ]


def _qkv(block: str, on_disk: bool) -> list[Entry]:
    names = [f"attention.{name}" for name in ("query", "key", "value")] if on_disk else ["q_proj", "k_proj", "v_proj"]
    return [
        *fused("blocks.{}.attention.qkv", *(f"{block}.attention.{name}" for name in names)),
        *pair("blocks.{}.attention.proj", f"{block}.attention.{'output.dense' if on_disk else 'o_proj'}"),
    ]


def _vit(head: str, on_disk: bool) -> tuple[Entry, ...]:
    """ViT and DeiT."""
    block = "encoder.layer.{}" if on_disk else "layers.{}"
    return (
        *_common(head),
        *_qkv(block, on_disk),
        *pair("blocks.{}.norm1", f"{block}.layernorm_before"),
        *pair("blocks.{}.norm2", f"{block}.layernorm_after"),
        *pair("blocks.{}.mlp.fc1", f"{block}.{'intermediate.dense' if on_disk else 'mlp.fc1'}"),
        *pair("blocks.{}.mlp.fc2", f"{block}.{'output.dense' if on_disk else 'mlp.fc2'}"),
    )


def _dinov2(on_disk: bool) -> tuple[Entry, ...]:
    block = "encoder.layer.{}"
    return (
        *_common("classifier"),
        *_qkv(block, on_disk),
        *pair("blocks.{}.norm1", f"{block}.norm1"),
        *pair("blocks.{}.norm2", f"{block}.norm2"),
        *same("blocks.{}.scale1", f"{block}.layer_scale1.lambda1"),
        *same("blocks.{}.scale2", f"{block}.layer_scale2.lambda1"),
        *pair("blocks.{}.mlp.fc1", f"{block}.mlp.fc1"),
        *pair("blocks.{}.mlp.fc2", f"{block}.mlp.fc2"),
    )


def _distilled(on_disk: bool) -> tuple[Entry, ...]:
    token = same("dist_token", "embeddings.distillation_token")
    return (*_vit("cls_classifier", on_disk), *token, *pair("head_dist", "distillation_classifier"))


_MASK = {"embeddings.mask_token": "a stand-in for hidden patches, which is for training only"}


def _layouts(on_disk: bool) -> tuple[Layout, ...]:
    """The five layouts, by their names in files or in memory."""
    after = "" if on_disk else "_memory"
    where = "" if on_disk else ", as version 5 names it in memory"
    query = "attention.attention.query" if on_disk else "attention.q_proj"
    block = "encoder.layer.0" if on_disk else "layers.0"
    vit = Layout(
        f"transformers{after}",
        f"transformers' ViT{where}",
        _vit("classifier", on_disk),
        markers=(f"{block}.{query}.weight", f"{block}.layernorm_before.weight"),
        absent=("embeddings.distillation_token",),
        prefix="vit.",
        drops={"pooler.": _POOLER, **_MASK},
        head_width=64,
        defaults={"eps": 1e-12, "position_rule": "transformers"},
        needs={"dist_token": (False,), "global_pool": ("token",), "fc_norm": (False,)},
        preprocessing=Preprocessing(mode="squash", crop_pct=1.0, interpolation="bilinear"),
    )
    deit = replace(
        vit,
        name=f"transformers_deit{after}",
        about=f"transformers' DeiT with its two classifiers{where}",
        entries=_distilled(on_disk),
        markers=(*vit.markers, "embeddings.distillation_token"),
        absent=("classifier.",),
        prefix="deit.",
        defaults={**vit.defaults, "dist_token": True, "global_pool": "dist"},
        needs={"dist_token": (True,), "global_pool": ("dist",)},
        preprocessing=_IMAGENET,
    )
    plain_deit = replace(
        deit,
        name=f"transformers_deit_plain{after}",
        about=f"transformers' DeiT with one classifier{where}",
        entries=(*_vit("classifier", on_disk), *same("dist_token", "embeddings.distillation_token")),
        markers=(*deit.markers, "classifier.weight"),
        absent=(),
        defaults={**vit.defaults, "dist_token": True},
        needs={"dist_token": (True,), "global_pool": ("token",)},
        requires=("head.weight",),
    )
    dinov2 = Layout(
        f"transformers_dinov2{after}",
        f"transformers' DINOv2{where}",
        _dinov2(on_disk),
        markers=(f"encoder.layer.0.{query}.weight", "encoder.layer.0.layer_scale1.lambda1"),
        absent=("embeddings.register_tokens",),
        prefix="dinov2.",
        drops=_MASK,
        zeros={"embeddings.mask_token": (1, "embed_dim")},
        head_width=64,
        defaults={"position_rule": "transformers"},
        needs={"dist_token": (False,), "fc_norm": (False,)},
        requires=("blocks.{}.scale1",),
        head_pool="token_avg",
        square=True,
        preprocessing=_IMAGENET,
    )
    registers = replace(
        dinov2,
        name=f"transformers_dinov2_registers{after}",
        about=f"transformers' DINOv2 with registers{where}",
        entries=(*dinov2.entries, *same("register_tokens", "embeddings.register_tokens")),
        markers=(*dinov2.markers, "embeddings.register_tokens"),
        absent=(),
        prefix="dinov2_with_registers.",
        requires=("blocks.{}.scale1", "register_tokens"),
        defaults={"position_rule": "timm"},  # these resample with antialiasing, which is timm's rule
    )
    return vit, deit, plain_deit, dinov2, registers


TRANSFORMERS = (*_layouts(on_disk=True), *_layouts(on_disk=False))
