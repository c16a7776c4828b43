"""The built-in functions, and attention in checkpoints."""

import copy
import json

import pytest
import torch
from attention_cases import TINY, Scaled, sharp
from helpers import (
    FLOAT32,
    difference,
    images,
    randomize,
)
from torch import nn

import vit
from vit.attention import reference, sdpa
from vit.registry import get_attention
from vit.weights import CheckpointError


@pytest.fixture
def tiny() -> vit.ViT:
    return randomize(vit.ViT(TINY)).eval()


def test_attention_bias_agrees_with_the_reference():
    q, k, v = (images(2, 3, 19, 8, seed=s).double() for s in (1, 2, 3))
    for shape in ((2, 3, 19, 19), (1, 3, 19, 19), (19, 19), (2, 1, 1, 19)):
        bias = torch.randn(*shape, dtype=torch.float64)
        expected = vit.attention.reference(q, k, v, bias=bias)
        assert difference(vit.attention.sdpa(q, k, v, bias=bias), expected) < 1e-12
        assert difference(vit.attention.reference(q, k, v), expected) > 1e-2


def test_a_learned_bias_under_autocast(tiny):
    tiny.set_attention("sdpa", bias=torch.randn(1, 2, 1, 67))
    x = images(1, 3, 32, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert difference(tiny(x).float(), tiny(x).float()) == 0
    q = images(2, 3, 5, 8)
    for shape in ((), (1,), (5,), (3, 1, 5), (3, 5, 5)):
        bias = torch.randn(shape)
        assert difference(sdpa(q, q, q, bias=bias), reference(q, q, q, bias=bias)) <= FLOAT32
        assert difference(get_attention("flash")(q, q, q, bias=bias), reference(q, q, q, bias=bias)) <= FLOAT32


# Checkpoints


def test_checkpoints_remember_names_options_and_weights(tiny, registered, tmp_path):
    x = images(2, 3, 24, 40)
    tiny.set_attention(registered("scaled", Scaled), start=0.5)
    tiny.set_attention("reference", [0])
    randomize(tiny, 3)
    expected = tiny(x)
    file = vit.save_checkpoint(tiny, tmp_path / "m.safetensors")
    again = vit.load_pretrained(file)
    assert torch.equal(again(x), expected)
    assert [attend.name for attend in again.attends] == ["reference", "scaled", "scaled"]
    assert again.attends[2].options == {"start": 0.5}
    converted = vit.weights.convert(again.state_dict(), "vit", "vit", TINY)
    assert converted.state_dict.keys() == tiny.state_dict().keys()
    for layout in ("timm", "dinov2", "transformers_dinov2_registers"):
        with pytest.raises(CheckpointError, match=r"cannot hold .*blocks.\*.attention.attend.fn.order, .*fn.scale"):
            vit.save_checkpoint(tiny, tmp_path / layout, layout=layout)
    tiny.set_attention("sdpa")
    vit.load_pretrained(vit.save_checkpoint(tiny, tmp_path / "timm", layout="timm"))


def test_checkpoints_that_cannot_be_restored(tiny, registered, tmp_path):
    file = tmp_path / "m.safetensors"
    tiny.set_attention(Scaled, [1])
    with pytest.raises(CheckpointError, match=r"block 1: attention 'Scaled' has weights and has no registered name"):
        vit.save_checkpoint(tiny, file)
    tiny.set_attention(registered("scaled", Scaled), [1])
    vit.save_checkpoint(tiny, file)
    registered("scaled", lambda config, block: nn.ModuleDict({"no": nn.Linear(2, 2)}).requires_grad_())
    with pytest.raises(CheckpointError, match="block 1 has attention 'scaled': .*register it before loading"):
        vit.load_pretrained(file)
    registered("scaled", sharp)
    with pytest.raises(CheckpointError, match="weights blocks.1.attention.attend.fn.*, but attention .* has none"):
        vit.load_pretrained(file)

    class More(Scaled):
        def __init__(self, config, block):
            super().__init__(config, block)
            self.more = nn.Parameter(torch.zeros(2))

    registered("scaled", More)
    with pytest.raises(CheckpointError, match=r"has weights .*, expected .*more \[2\]"):
        vit.load_pretrained(file)
    del vit.registry._registry["scaled"]
    with pytest.raises(CheckpointError, match="block 1 has attention 'scaled': unknown attention .*register it before"):
        vit.load_pretrained(file)


def test_options_that_json_cannot_hold(tiny, registered, tmp_path):
    registered("sharp", sharp)
    tiny.set_attention("sharp", power=torch.ones(1))
    with pytest.warns(
        UserWarning, match="blocks 0, 1, 2: attention 'sharp' has options that JSON cannot hold: set it again"
    ):
        vit.save_checkpoint(tiny, tmp_path / "m.safetensors")
    tiny.set_attention("sharp", power=1.5)
    with pytest.warns(UserWarning, match="cannot hold attention: readers will assume 'sdpa'"):
        vit.save_checkpoint(tiny, tmp_path / "timm", layout="timm")
    assert vit.load_pretrained(vit.save_checkpoint(tiny, tmp_path / "m.safetensors")).attends[1].options == {
        "power": 1.5
    }


@pytest.mark.parametrize(
    "bad", [{}, [1], [{"name": 1, "options": {}}], [{"name": "sdpa"}], [{"name": "sdpa", "options": {}}]]
)
def test_contradictory_headers_are_refused(tiny, tmp_path, bad):
    from safetensors.torch import load_file, save_file

    file = vit.save_checkpoint(tiny, tmp_path / "m.safetensors")
    config = {"vit.config": json.dumps(TINY.to_dict()), "vit.attention": json.dumps(bad)}
    save_file(load_file(file), file, config)
    with pytest.raises(CheckpointError, match=r"header cannot be used|attention of [01] blocks, but the model"):
        vit.load_pretrained(file)


def test_saving_warns_of_a_name_registered_again(tiny, registered, tmp_path):
    registered("mine", sharp)
    tiny.set_attention("mine")
    expected = tiny(images(1, 3, 32, 32))
    registered("mine", lambda q, k, v, *, bias=None: v)
    assert torch.equal(copy.deepcopy(tiny)(images(1, 3, 32, 32)), expected)
    with pytest.warns(UserWarning, match="'mine' has a name that was registered again since"):
        vit.save_checkpoint(tiny, tmp_path / "m.safetensors")
