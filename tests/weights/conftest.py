"""Models and files that several tests of weights share."""

from pathlib import Path

import pytest
from checkpoints import CONFIG, SMALL, TINY
from helpers import randomize, timm_twin
from safetensors.torch import save_file

import vit


@pytest.fixture
def model() -> vit.ViT:
    """A square model with categories."""
    model = randomize(vit.ViT(TINY)).eval()
    model.categories = ["ant", "bee", "cat", "dog", "eel"]
    return model


@pytest.fixture
def rectangular() -> vit.ViT:
    """A model with a grid of 4 x 6 and LayerScale."""
    return randomize(vit.ViT(CONFIG)).eval()


@pytest.fixture
def timm_file(tmp_path: Path) -> Path:
    """A bare state dict of timm's, as people save it: no header, no config.json."""
    path = tmp_path / "plain" / "model.safetensors"
    path.parent.mkdir()
    save_file(timm_twin(SMALL).state_dict(), path)
    return path
