"""Configs from the shapes of weights."""

import pytest
import torch
from checkpoints import CONFIG, TINY, same
from helpers import randomize, timm_twin
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


GUESS = "the timm layout's default"
STRIP = TINY.override(img_size=(128, 32), num_classes=0)  # a grid of 16x4: 64 rows, and the class token's


def test_a_grid_that_is_guessed_is_called_a_guess(tmp_path):
    """64 rows are read as 8x8, which nothing proves; a size that is stated settles it."""
    state = timm_twin(STRIP).state_dict()
    found = vit.weights.convert(state)
    assert found.config.grid == (8, 8) and found.report.assumed["img_size"] == {"value": (64, 64), "from": GUESS}
    assert found.config.sources["img_size"] == found.config.sources["class_position"] == GUESS
    assert found.config.sources["embed_dim"] == "the shapes"
    for size in ((128, 32), (32, 128)):
        settled = vit.weights.convert(state, config={"img_size": size})
        assert settled.config.img_size == size and settled.config.sources["img_size"] == "the caller"
        assert settled.config.sources["class_position"] == "the shapes"
        assert not {"img_size", "class_position"} & set(settled.report.assumed)
    with pytest.raises(CheckpointError, match="65 rows, which does not fit img_size 128x128"):
        vit.weights.convert(state, config={"img_size": 128})
    save_file(state, tmp_path / "bare.safetensors")
    guess = vit.load_pretrained(tmp_path / "bare.safetensors")
    again = vit.load_pretrained(vit.save_checkpoint(guess, tmp_path / "ours.safetensors"))  # stays a guess
    assert again.config.sources["img_size"] == f"{GUESS}, by way of the file's header"
    again = vit.load_pretrained(tmp_path / "ours.safetensors", img_size=(128, 32))
    assert again.config.grid == (16, 4) and again.config.sources["img_size"] == "the caller"


def test_other_patches_leave_a_guessed_grid_a_guess(tmp_path):
    save_file(timm_twin(STRIP).state_dict(), tmp_path / "bare.safetensors")
    config = vit.load_pretrained(tmp_path / "bare.safetensors", patch_size=4).config
    assert config.grid == (8, 8) and config.img_size == (32, 32) and config.sources["img_size"] == GUESS


def test_pooling_before_a_norm_is_a_guess():
    """A norm after the pooling goes with the average as a rule; timm allows it after the class token too."""
    config = TINY.override(global_pool="token", fc_norm=True)
    state = timm_twin(config).state_dict()
    found = vit.weights.convert(state)
    assert found.config.global_pool == "avg" and found.report.assumed["global_pool"]["from"] == GUESS
    assert vit.weights.convert(state, config={"global_pool": "token"}).config.global_pool == "token"


def test_files_that_state_the_size_settle_the_grid(tmp_path):
    ours = randomize(vit.ViT(STRIP))
    for layout, source in (("timm", "config.json"), ("transformers", "config.json"), ("vit", "the file's header")):
        found = vit.load_pretrained(vit.save_checkpoint(ours, tmp_path / f"{layout}/", layout=layout)).config
        assert found.grid == (16, 4) and found.sources["img_size"] == source


def test_layouts_that_have_square_grids_only_guess_nothing():
    state = vit.weights.convert(randomize(vit.ViT(TINY)).state_dict(), "vit", "torchvision", TINY).state_dict
    found = vit.weights.convert(state)
    assert found.config.sources["img_size"] == "the shapes" and "img_size" not in found.report.assumed


def test_rows_that_are_square_with_and_without_a_token():
    """LayerScale: 17 rows are 4x4 and the class token's (DINOv2), 16 are 4x4 (DeiT-III); both could be rectangles."""
    for class_position in (True, False):
        config = TINY.override(init_values=0.5, class_position=class_position)
        found = vit.weights.convert(timm_twin(config).state_dict()).config
        assert (found.grid, found.class_position) == ((4, 4), class_position)
        assert found.sources["class_position"] == GUESS


@pytest.mark.parametrize(("width", "heads"), [(1024, 16), (1152, 16), (1280, 16), (1408, 16), (1536, 24), (1664, 16)])
def test_wide_models_have_the_heads_that_are_usual_at_their_width(width, heads):
    """ViT-H has 16 heads, 80 wide, in timm, torchvision and MAE; others that are wider than ViT-L likewise."""
    config = TINY.override(embed_dim=width, num_heads=heads, mlp_ratio=1.0, depth=1)
    with torch.device("meta"):
        state = vit.ViT(config).state_dict()
    state = {name: torch.zeros(1).expand(tensor.shape) for name, tensor in state.items()}
    state = vit.weights.convert(state, "vit", "torchvision", config).state_dict
    assert vit.weights.convert(state).config.num_heads == heads
