"""State dicts in any layout to our names: completely or not at all."""

import argparse
import math
import time
from pathlib import Path

import pytest
import torch
from checkpoints import CONFIG, TINY, raw, same
from helpers import timm_twin
from safetensors.torch import save_file

import vit
from vit.weights import CheckpointError

# Damage to a state dict of timm's -> the error that names it
BAD_TENSORS = {
    "missing keys: blocks.1.norm2.bias": lambda sd: sd.pop("blocks.1.norm2.bias"),
    "missing keys: pos_embed": lambda sd: sd.pop("pos_embed"),
    "missing keys: head.bias": lambda sd: sd.pop("head.bias"),
    "unexpected keys: attn_pool.weight, norm3.bias": lambda sd: sd.update(
        {"attn_pool.weight": torch.ones(64), "norm3.bias": torch.ones(64)}
    ),
    "unexpected keys: norm.(weight|bias), norm": lambda sd: sd.update(
        {"fc_norm.weight": torch.ones(64), "fc_norm.bias": torch.ones(64)}
    ),
    "norm_pre.weight belongs to a ViT with a norm before its blocks": lambda sd: sd.update(
        {"norm_pre.weight": torch.ones(64)}
    ),
    r"missing keys: .*blocks.1.norm1.weight.*unexpected keys: .*blocks.7.norm1.weight": lambda sd: [
        sd.update({key.replace("blocks.1.", "blocks.7."): sd.pop(key)}) for key in list(sd) if "blocks.1." in key
    ],
    "unexpected keys: blocks.01.norm1.weight": lambda sd: sd.update({"blocks.01.norm1.weight": torch.ones(64)}),
    r"wrong shapes: norm.bias \[63\], expected \[64\]": lambda sd: sd.update({"norm.bias": torch.ones(63)}),
    r"wrong shapes: blocks.0.attn.qkv.weight \[64, 192\], expected \[192, 64\]": lambda sd: sd.update(
        {"blocks.0.attn.qkv.weight": sd["blocks.0.attn.qkv.weight"].T.contiguous()}
    ),
    "blocks.0.mlp.fc2.bias holds values that are not finite": lambda sd: sd["blocks.0.mlp.fc2.bias"][3].fill_(math.nan),
    "head.weight holds values that are not finite": lambda sd: sd["head.weight"][0, 0].fill_(-math.inf),
    "norm.weight has dtype torch.int64, expected one of": lambda sd: sd.update(
        {"norm.weight": torch.ones(64, dtype=torch.int64)}
    ),
    r"several dtypes, expected one: torch.float32 \(.*\), torch.float16 \(norm.weight\)": lambda sd: sd.update(
        {"norm.weight": torch.ones(64, dtype=torch.float16)}
    ),
    "position_embedding has 26 rows, which does not fit img_size": lambda sd: sd.update(
        {"pos_embed": torch.ones(1, 26, 64)}
    ),
    "position_embedding has shape .*, expected 3 dimensions": lambda sd: sd.update({"pos_embed": torch.ones(25, 64)}),
    "unknown layout: the nearest is timm, which has the keys blocks.0": lambda sd: sd.pop("blocks.0.attn.qkv.weight"),
    "unexpected keys: blocks.0.attention.qkv.weight": lambda sd: sd.update(
        {"blocks.0.attention.qkv.weight": torch.ones(192, 64)}
    ),
}


@pytest.mark.parametrize("message", BAD_TENSORS)
def test_a_checkpoint_maps_completely_or_not_at_all(message, tmp_path):
    state_dict = {name: tensor.clone() for name, tensor in timm_twin(CONFIG).state_dict().items()}
    known = {"num_heads": 1, "img_size": (32, 48)}
    vit.weights.convert(state_dict, config=known)  # it is sound before
    BAD_TENSORS[message](state_dict)
    with pytest.raises(CheckpointError, match=message):
        vit.weights.convert(state_dict, config=known)
    save_file(state_dict, tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match="m.safetensors: .*" + message):
        vit.load_pretrained(tmp_path / "m.safetensors", **known)


def test_an_error_lists_every_problem():
    state_dict = timm_twin(CONFIG).state_dict()
    state_dict["stranger"] = state_dict.pop("norm.bias")
    state_dict["head.bias"] = torch.ones(3)
    with pytest.raises(CheckpointError) as error:
        vit.weights.convert(state_dict, config=CONFIG)
    for part in ("missing keys: norm.bias", "unexpected keys: stranger", "wrong shapes: head.bias [3], expected [7]"):
        assert part in str(error.value)


def test_thousands_of_tiny_blocks_are_refused_quickly(tmp_path):
    tensors = {f"blocks.{i}.attn.qkv.weight": ([1], b"\0" * 4) for i in range(20_000)}
    start = time.perf_counter()
    with pytest.raises(CheckpointError, match="missing keys"):
        vit.load_pretrained(raw(tmp_path / "m.safetensors", tensors))
    assert time.perf_counter() - start < 20


def torch_file(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


def test_training_checkpoints(tmp_path, model):
    state = vit.weights.convert(model.state_dict(), target="timm", config=TINY).state_dict
    optimizer = {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    worse = {key: tensor + 1 for key, tensor in state.items()}
    module = {f"module.{key}": tensor for key, tensor in state.items()}
    backbone = {f"backbone.{key}": t for key, t in state.items() if not key.startswith("head")}
    for content, kind in (
        (state, "timm"),
        ({"model": state, "optimizer": optimizer, "args": argparse.Namespace(lr=0.1), "epoch": 3}, "timm"),
        ({"state_dict": worse, "state_dict_ema": module, "optimizer": optimizer}, "timm"),
        ({"teacher": backbone | {"head.last_layer.weight_v": torch.ones(2)}, "student": worse, "epoch": 1}, "dino"),
    ):
        again = vit.load_pretrained(torch_file(tmp_path / "c.pth", content))
        assert again.provenance.layout == kind
        assert torch.equal(again.blocks[1].mlp.fc2.weight, model.blocks[1].mlp.fc2.weight)
    with pytest.raises(CheckpointError, match="epoch is of type int, expected a tensor"):
        vit.load_pretrained(torch_file(tmp_path / "c.pth", state | {"epoch": 3}))


def test_a_backbone_out_of_a_larger_model(tmp_path, model):
    state = {f"backbone.{name}": tensor for name, tensor in model.state_dict().items()}
    state |= {"decoder.0.weight": torch.ones(3), "decoder.0.bias": torch.ones(3), "aux.weight": torch.ones(2)}
    save_file(state, tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match=r"unexpected keys: .*decoder.0.bias"):
        vit.load_pretrained(tmp_path / "m.safetensors", num_heads=2)
    with pytest.warns(UserWarning, match=r"left behind: decoder \(2\), aux \(1\)"):
        again = vit.load_pretrained(tmp_path / "m.safetensors", prefix="backbone.", num_heads=2)
    assert same(model, again)
