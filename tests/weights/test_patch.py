"""The patch projection for other patch sizes and channels, against timm's and against its purpose."""

import pytest
import timm
import torch
from checkpoints import CONFIG, same
from helpers import FLOAT32, difference, images, randomize
from layout_cases import BASE
from safetensors.torch import load_file
from timm.layers.patch_embed import resample_patch_embed
from timm.models._manipulate import adapt_input_conv
from torch.nn.functional import conv2d, interpolate

import vit
from vit.weights.patch import resample_patch_projection

SIZES = [(old, new) for old in (16, 14) for new in (8, 12, 14, 15, 16, 24, 32) if new != old]


@pytest.mark.parametrize("chans", [1, 3, 4])
@pytest.mark.parametrize(("old", "new"), SIZES)
def test_equals_timm(old, new, chans):
    weight = images(8, chans, old, old)
    assert difference(resample_patch_projection(weight, new), resample_patch_embed(weight, [new, new])) <= FLOAT32


@pytest.mark.parametrize(("old", "new"), [(old, new) for old, new in SIZES if new > old])
def test_enlarged_patches_give_the_same_tokens(old, new):
    weight, patches = images(8, 3, old, old), images(5, 3, old, old, seed=2)
    enlarged = interpolate(patches, size=(new, new), mode="bicubic", antialias=True)
    tokens = conv2d(patches, weight)
    assert difference(conv2d(enlarged, resample_patch_projection(weight, new)), tokens) <= FLOAT32

    like_a_picture = interpolate(weight, size=(new, new), mode="bicubic", antialias=True)
    assert difference(conv2d(enlarged, like_a_picture), tokens) > 0.1  # the test can fail


@pytest.mark.parametrize(("old", "new"), [(16, 8), (16, 14), (14, 12)])
def test_no_other_weights_are_nearer_when_shrinking(old, new):
    """The mean of (<x, w> - <Bx, w'>)^2 over white noise x is |w - B^T w'|^2, whose gradient vanishes."""
    weight = images(8, 3, old, old).double()
    basis = torch.eye(old * old, dtype=torch.float64).reshape(old * old, 1, old, old)
    B = interpolate(basis, size=(new, new), mode="bicubic", antialias=True).reshape(old * old, -1).T  # [p'p', pp]
    shrunk = resample_patch_projection(weight, new).reshape(24, -1)
    residual = weight.reshape(24, -1) - shrunk @ B
    assert residual.abs().max() > 0.1
    assert (residual @ B.T).abs().max() <= FLOAT32


def test_the_same_size_is_the_identity():
    weight = images(8, 3, 16, 16)
    assert resample_patch_projection(weight, 16) is weight


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_keeps_the_dtype_and_rounds_once(dtype):
    weight = images(8, 3, 16, 16).to(dtype)
    resized = resample_patch_projection(weight, 12)
    assert resized.dtype == dtype
    assert torch.equal(resized, resample_patch_projection(weight.double(), 12).to(dtype))


def test_patches_enlarged_twice_still_give_the_same_tokens():
    weight, patches = images(8, 3, 14, 14), images(5, 3, 14, 14, seed=2)
    tokens = conv2d(patches, weight)
    for size in (16, 24):
        weight = resample_patch_projection(weight, size)
        patches = interpolate(patches, size=(size, size), mode="bicubic", antialias=True)
    assert difference(conv2d(patches, weight), tokens) <= FLOAT32


@pytest.mark.parametrize("channels", [1, 2, 4, 7])
def test_other_channels_are_adapted_as_timm_adapts_them(timm_file, channels):
    model = vit.load_pretrained(timm_file, in_chans=channels)
    original = load_file(timm_file)["patch_embed.proj.weight"]
    assert torch.equal(model.patch_embed.proj.weight, adapt_input_conv(channels, original))
    assert len(model.preprocessing.mean) == channels
    assert model(images(1, channels, 32, 32)).shape == (1, 1000)
    if channels == 1:
        grey = images(1, 1, 32, 32)
        rgb = vit.load_pretrained(timm_file)(grey.expand(-1, 3, -1, -1))
        assert difference(model(grey), rgb) < 1e-5


def test_only_three_channels_can_be_adapted(tmp_path):
    path = vit.save_checkpoint(vit.ViT(CONFIG.override(in_chans=5)), tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match="in_chans=4: only 3 channels can be adapted, the checkpoint has 5"):
        vit.load_pretrained(path, in_chans=4)


@torch.no_grad()
@pytest.mark.parametrize("size", [8, 14, 20])
def test_another_patch_size(tmp_path, size):
    config = BASE.override(depth=1, num_classes=3)
    model = randomize(vit.ViT(config)).eval()
    path = vit.save_checkpoint(model, tmp_path / "m.safetensors")
    other = vit.load_pretrained(path, patch_size=size)
    assert other.config.patch_size == size and other.config.grid == config.grid
    assert other.preprocessing.size == other.config.img_size == (4 * size, 4 * size)
    expected = timm.layers.patch_embed.resample_patch_embed(model.patch_embed.proj.weight, [size, size])
    assert difference(other.patch_embed.proj.weight, expected) <= FLOAT32
    assert torch.equal(other.position_embedding, model.position_embedding)
    assert other(images(1, 3, 2 * size, 5 * size)).shape == (1, 3)
    again = vit.load_pretrained(vit.save_checkpoint(other, tmp_path / "o.safetensors"))
    assert same(other, again) and again.config == other.config
    with pytest.raises(ValueError, match="patch_size must be a whole number of at least 1, not 0"):
        vit.load_pretrained(path, patch_size=0)
