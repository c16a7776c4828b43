"""safetensors files, one or several."""

import hashlib
import json

import pytest
import torch
from checkpoints import TINY, raw, same
from helpers import randomize
from layout_cases import _transformers

import vit
from vit.weights import CheckpointError


@pytest.mark.parametrize("shape", [[0], [10**17, 0], [2**63, 0], [3, 0, 5]])
def test_shapes_without_values_are_refused(tmp_path, shape):
    with pytest.raises(CheckpointError, match="has no values|not a complete safetensors file"):
        vit.load_pretrained(raw(tmp_path / "m.safetensors", {"blocks.0.attn.qkv.weight": (shape, b"")}))


def test_shards(tmp_path):
    theirs, _ = _transformers("ViTForImageClassification")(TINY)
    randomize(theirs).save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3 and not (tmp_path / "model.safetensors").exists()
    ours = vit.load_pretrained(tmp_path)
    assert torch.equal(ours.head.weight, theirs.classifier.weight)
    index = tmp_path / "model.safetensors.index.json"
    assert same(ours, vit.load_pretrained(index))
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    lines = "".join(f"{hashlib.sha256(shard.read_bytes()).hexdigest()}\n" for shard in shards)
    assert ours.provenance.sha256 == hashlib.sha256(lines.encode()).hexdigest()

    content = json.loads(index.read_text())
    for change, message in (
        (lambda m: m.update({"extra": shards[0].name}), "disagree about which tensors it holds: extra"),
        (lambda m: m.update({"vit.layernorm.bias": "../x.safetensors"}), "names '../x.safetensors', expected"),
        (lambda m: m.update({"vit.layernorm.bias": "gone.safetensors"}), "has no file 'gone.safetensors', but"),
    ):
        broken = json.loads(json.dumps(content))
        change(broken["weight_map"])
        index.write_text(json.dumps(broken))
        with pytest.raises((CheckpointError, FileNotFoundError), match=message):
            vit.load_pretrained(tmp_path)
    index.write_text('{"weight_map": 3}')
    with pytest.raises(CheckpointError, match="has no weight_map"):
        vit.load_pretrained(tmp_path)
