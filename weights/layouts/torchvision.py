"""torchvision's `VisionTransformer`: its names today, and those of files from before version 0.13."""

from vit.metadata import Preprocessing

from ..keymap import Entry, Layout, pair, same

_BLOCK = "encoder.layers.encoder_layer_{}"


def _entries(fc1: str, fc2: str) -> tuple[Entry, ...]:
    return (
        *same("class_token", "class_token"),
        *same("position_embedding", "encoder.pos_embedding"),
        *pair("patch_embed.proj", "conv_proj"),
        *pair("blocks.{}.norm1", f"{_BLOCK}.ln_1"),
        *same("blocks.{}.attention.qkv.weight", f"{_BLOCK}.self_attention.in_proj_weight"),  # [3D, D], as ours
        *same("blocks.{}.attention.qkv.bias", f"{_BLOCK}.self_attention.in_proj_bias"),
        *pair("blocks.{}.attention.proj", f"{_BLOCK}.self_attention.out_proj"),
        *pair("blocks.{}.norm2", f"{_BLOCK}.ln_2"),
        *pair("blocks.{}.mlp.fc1", f"{_BLOCK}.mlp.{fc1}"),
        *pair("blocks.{}.mlp.fc2", f"{_BLOCK}.mlp.{fc2}"),
        *pair("norm", "encoder.ln"),
        *pair("head", "heads.head"),
    )


def _layout(name: str, about: str, fc1: str, fc2: str) -> Layout:
    return Layout(
        name,
        about,
        _entries(fc1, fc2),
        markers=("encoder.layers.encoder_layer_0.self_attention.in_proj_weight",
                 f"encoder.layers.encoder_layer_0.mlp.{fc1}.weight"),
        head_width=64,
        defaults={"position_rule": "torchvision"},
        needs={"dist_token": (False,), "global_pool": ("token",), "gelu": ("erf",), "in_chans": (3,)},
        square=True,
        preprocessing=Preprocessing(
            mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), interpolation="bilinear", crop_pct=0.875
        ),
    )  # fmt: skip


TORCHVISION = _layout("torchvision", "torchvision's VisionTransformer", "0", "3")
TORCHVISION_OLD = _layout("torchvision_old", "the same before torchvision 0.13", "linear_1", "linear_2")
