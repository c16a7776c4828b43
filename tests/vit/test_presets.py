"""Named models: sizes, names and overrides."""

import pytest
import torch
from helpers import images

import vit
from vit.presets import NAMED_MODELS


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("vit_small_patch16_224", 22_050_664),
        ("vit_small_patch16_384", 22_196_584),
        ("vit_small_patch32_224", 22_878_952),
        ("vit_small_patch14_dinov2", 22_056_192),
        ("vit_tiny_patch16_224", 5_717_416),
        ("vit_base_patch16_224", 86_567_656),
    ],
)
def test_parameter_counts(name, parameters):
    with torch.device("meta"):
        model = vit.create_model(name)
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_the_small_model_has_152_tensors():
    with torch.device("meta"):
        assert len(vit.create_model("vit_small_patch16_224").state_dict()) == 152


def test_names():
    assert "vit_small_patch16_224" in vit.list_models()
    assert "vit_small_patch16_224.augreg_in21k_ft_in1k" in vit.list_models(pretrained=True)
    with pytest.raises(ValueError, match="unknown model 'vit_smal_patch16_224'. Did you mean 'vit_small_patch16_224'"):
        vit.create_model("vit_smal_patch16_224")


def test_create_model_overrides():
    model = vit.create_model("vit_small_patch16_224", num_classes=10, in_chans=1, img_size=(64, 96), depth=1)
    assert model.training and model.provenance is None and model.categories is None
    assert model.preprocessing.size == (64, 96) and model.preprocessing.mean == (0.5,)
    assert model(images(1, 1, 64, 96)).shape == (1, 10)


def test_named_models_agree_with_their_preprocessing():
    for name, named in NAMED_MODELS.items():
        assert named.preprocessing.size == named.config.img_size, name
