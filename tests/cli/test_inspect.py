"""`vit inspect`: what it shows of a checkpoint."""

import json

import torch
from safetensors.torch import save_file

import vit


def test_inspect(tmp_path, imagenet_file, call):
    shown = call("inspect", imagenet_file).stdout
    for part in ("blocks.0.attn.qkv.weight", "1152x384", "layout", "timm", "num_heads = 6", "crop_pct = 0.9", "sha256"):
        assert part in shown
    facts = json.loads(call("inspect", imagenet_file, "--json").stdout)
    assert facts["layout"] == "timm" and facts["config"]["depth"] == {"value": 1, "from": "config.json"}
    assert facts["parameters"] == sum(p.numel() for p in vit.load_pretrained(imagenet_file).parameters())


def test_inspect_shows_a_checkpoint_that_cannot_be_loaded(tmp_path, call):

    save_file({"conv1.weight": torch.ones(3, 4)}, tmp_path / "m.safetensors")
    result = call("inspect", tmp_path / "m.safetensors")
    assert result.returncode == 2
    assert "conv1.weight" in result.stdout and "3x4" in result.stdout
    assert (
        "cannot be loaded" in result.stderr
        and "unknown layout" in result.stderr
        and len(result.stderr.splitlines()) == 1
    )
