"""timm's names for architectures: a name is read if it is a plain ViT's, and refused otherwise."""

import json

import pytest
import timm
import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from timm_names import folder_of, load, names, stated_by_the_caller
from torch import nn

import vit
from vit.weights import CheckpointError
from vit.weights.layouts.timm_config import read_config


def accepted(name: str) -> dict | None:
    """What the name alone says of a model, or None if it is refused."""
    try:
        about = read_config({"architecture": name}, "config.json")
        return about.declared | about.assumed
    except CheckpointError:
        return None


def test_a_name_says_what_timm_builds():
    """Of all of timm's names, those of plain ViTs are read, with the heads, eps and GELU that timm gives them."""
    read = {name: known for name in timm.list_models() if (known := accepted(name)) is not None}
    assert len(read) == 54 and set(read) < set(names())
    for name, known in read.items():
        with torch.device("meta"):
            model = timm.create_model(name, depth=1)
        assert type(model) in (VisionTransformer, VisionTransformerDistilled), name
        block = model.blocks[0]
        assert block.mlp.fc1.out_features == block.mlp.fc2.in_features, name  # not SwiGLU
        assert known["num_heads"] == block.attn.num_heads and known["embed_dim"] == model.num_features, name
        norms = [module for module in model.modules() if isinstance(module, nn.LayerNorm)]
        assert {norm.eps for norm in norms} == {known["eps"]} and isinstance(model.norm_pre, nn.Identity), name
        assert type(block.mlp.act) is nn.GELU and block.mlp.act.approximate == "none" and known["gelu"] == "erf", name


PLAIN = [
    "vit_tiny_patch16_224", "vit_base_patch16_plus_240", "vit_small_patch16_36x1_224", "flexivit_small",
    "vit_small_patch14_reg4_dinov2", "deit3_medium_patch16_224", "deit_tiny_distilled_patch16_224", "test_vit",
]  # fmt: skip
OTHERS = [
    "vit_small_patch16_rope_ape_224", "vit_small_patch16_rope_mixed_ape_224", "vit_small_patch16_dinov3",
    "vit_xsmall_patch16_clip_224", "vit_base_patch16_siglip_224", "vit_wee_patch16_reg1_gap_256",
    "vit_small_patch16_18x2_224", "vit_base_patch16_224_miil", "test_vit3", "test_vit4", "test_vit_relpos",
    "eva02_tiny_patch14_224", "vit_pe_core_tiny_patch16_384",
]  # fmt: skip


@pytest.mark.parametrize("name", PLAIN)
def test_plain_vits_load_by_name(name, tmp_path):
    outcome = load(folder_of(name, tmp_path), tmp_path)
    assert outcome.result == "equal", outcome


@pytest.mark.parametrize("name", OTHERS)
def test_what_computes_otherwise_is_refused_whatever_the_caller_states(name, tmp_path):
    """With true values for all that errors ask for; the weights of the first load as DeiT-III's and are wrong."""
    twin = folder_of(name, tmp_path)
    for stated in ({}, stated_by_the_caller(twin)):
        outcome = load(twin, tmp_path, **stated)
        assert outcome.result == "refused" and f"the architecture '{name}' is not one of" in outcome.why, outcome


@pytest.mark.parametrize("name", ["vit_small_patch16_ropeless_224", "my_vit", "vit_base_patch16_224_new"])
@pytest.mark.parametrize("args", [{}, {"num_heads": 6, "act_layer": "gelu"}])
def test_a_name_that_timm_may_have_one_day_is_refused(name, args, tmp_path):
    folder_of("vit_small_patch16_224", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architecture": name, "model_args": args}))
    with pytest.raises(CheckpointError, match=f"'{name}' is not one of .* write the name of a plain ViT of its size"):
        vit.load_pretrained(tmp_path, num_heads=6, eps=1e-6, gelu="erf")


@pytest.mark.parametrize("name", ["vit_base_patch16_224", "vit_base_patch8_224"])
def test_weights_of_another_width_than_the_name_says_are_refused(name, tmp_path):
    """Older exports of timm leave out model_args; at another width the heads of the name would be a wrong guess."""
    folder_of("vit_small_patch16_224", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"architecture": name, "pretrained_cfg": {}}))
    for stated in ({}, {"num_heads": 6}):
        with pytest.raises(CheckpointError, match="embed_dim is declared to be 768, but the weights have 384"):
            vit.load_pretrained(tmp_path, **stated)
    settled = vit.load_pretrained(tmp_path, num_heads=6, embed_dim=384).config
    assert (settled.num_heads, settled.embed_dim) == (6, 384)


def test_another_width_keeps_the_heads_of_the_name(tmp_path):
    twin = timm.create_model("vit_base_patch16_224", depth=1, embed_dim=384, num_classes=7)
    for name in ("vit_base_patch16_224", "vit_base_patch8_224"):  # the second is known by the words of its name only
        config = read_config({"architecture": name, "model_args": {"embed_dim": 384}}, "config.json")
        assert config.assumed["num_heads"] == twin.blocks[0].attn.num_heads == 12
