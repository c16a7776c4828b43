"""torchvision's `VisionTransformer`: its names today, and those of files from before version 0.13."""

from dataclasses import replace

from vit.metadata import Preprocessing

from ..keymap import Assumptions, Detection, Entry, Holds, Layout, pair, same

TORCHVISION = Layout(
    "torchvision",
    "torchvision's VisionTransformer",
    (
        *same("class_token", "class_token"),
        *same("position_embedding", "encoder.pos_embedding"),
        *pair("patch_embed.proj", "conv_proj"),
        *pair("blocks.{}.norm1", "encoder.layers.encoder_layer_{}.ln_1"),
        # [3D, D] with rows of q, then k, then v, as ours
        *same("blocks.{}.attention.qkv.weight", "encoder.layers.encoder_layer_{}.self_attention.in_proj_weight"),
        *same("blocks.{}.attention.qkv.bias", "encoder.layers.encoder_layer_{}.self_attention.in_proj_bias"),
        *pair("blocks.{}.attention.proj", "encoder.layers.encoder_layer_{}.self_attention.out_proj"),
        *pair("blocks.{}.norm2", "encoder.layers.encoder_layer_{}.ln_2"),
        *pair("blocks.{}.mlp.fc1", "encoder.layers.encoder_layer_{}.mlp.0"),
        *pair("blocks.{}.mlp.fc2", "encoder.layers.encoder_layer_{}.mlp.3"),
        *pair("norm", "encoder.ln"),
        *pair("head", "heads.head"),
    ),
    Detection((
        "encoder.layers.encoder_layer_0.self_attention.in_proj_weight",
        "encoder.layers.encoder_layer_0.mlp.0.weight",
    )),
    assumptions=Assumptions(
        head_width=64,
        defaults={"position_rule": "torchvision"},
        preprocessing=Preprocessing(
            mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), interpolation="bilinear", crop_pct=0.875
        ),
    ),
    holds=Holds({"dist_token": (False,), "global_pool": ("token",), "gelu": ("erf",), "in_chans": (3,)}, square=True),
    library="torchvision",
)  # fmt: skip


def _old(key: str) -> str:
    return key.replace(".mlp.0", ".mlp.linear_1").replace(".mlp.3", ".mlp.linear_2")


TORCHVISION_OLD = replace(
    TORCHVISION,
    name="torchvision_old",
    about="the same before torchvision 0.13",
    entries=tuple(Entry(entry.ours, tuple(map(_old, entry.theirs)), entry.transform) for entry in TORCHVISION.entries),
    detection=Detection(tuple(map(_old, TORCHVISION.detection.markers))),
)

LAYOUTS = (TORCHVISION, TORCHVISION_OLD)
