"""Configs from the shapes of weights."""

import pytest
import torch
from checkpoints import CONFIG, same
from helpers import timm_twin
from safetensors.torch import save_file

import vit
from vit.cli.options import setting
from vit.presets import NAMED_MODELS
from vit.weights import CheckpointError


@pytest.mark.parametrize("name", sorted(NAMED_MODELS))
def test_configs_are_read_from_shapes(name):
    config = NAMED_MODELS[name].config
    with torch.device("meta"):
        tensors = vit.ViT(config).state_dict()
    tensors = {name: torch.zeros(1).expand(tensor.shape) for name, tensor in tensors.items()}
    declared = {"num_heads": config.num_heads}
    found = vit.weights.convert(tensors, config=declared).config
    assert found == config.override(init_values=found.init_values)
    assert (found.init_values is None) == (config.init_values is None)


def test_what_shapes_cannot_tell_is_asked_for():
    square = timm_twin(CONFIG.override(img_size=32)).state_dict()
    assert vit.weights.convert(square).config.num_heads == 1  # 64 wide
    wide = timm_twin(CONFIG.override(embed_dim=96, num_heads=3)).state_dict()
    with pytest.raises(CheckpointError, match="the number of heads is not known for the width 96: state num_heads"):
        vit.weights.convert(wide)
    with pytest.raises(CheckpointError, match=r"25 rows, which do not make a square grid: state img_size="):
        vit.weights.convert(timm_twin(CONFIG.override(init_values=None)).state_dict())
    registers = CONFIG.override(img_size=40, reg_tokens=2, class_position=False)
    assert vit.weights.convert(timm_twin(registers).state_dict()).config.img_size == (40, 40)
    no_row = timm_twin(CONFIG.override(img_size=40, class_position=False)).state_dict()
    assert not vit.weights.convert(no_row, config={"img_size": (40, 40)}).config.class_position


def test_our_own_names_without_our_header_say_nothing_of_heads(tmp_path, rectangular):
    save_file(rectangular.state_dict(), tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match="the number of heads is not known for the width 64"):
        vit.load_pretrained(tmp_path / "m.safetensors", img_size=(32, 48))
    assert same(rectangular, vit.load_pretrained(tmp_path / "m.safetensors", img_size=(32, 48), num_heads=1))


@pytest.mark.parametrize("value", ["False", "null", "[]"])
def test_class_position_of_another_kind(tmp_path, model, value):
    path = vit.save_checkpoint(model, tmp_path / "m", layout="timm")
    with pytest.raises(CheckpointError, match="class_position must be True or False"):
        vit.load_pretrained(path, **dict([setting(f"class_position={value}")]))
