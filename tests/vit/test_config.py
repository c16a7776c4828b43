"""What a config refuses."""

import pytest

from vit.config import ViTConfig

TINY = ViTConfig(img_size=32, patch_size=4, embed_dim=64, depth=2, num_heads=2, num_classes=7, init_values=0.5)

BAD_CONFIGS = {
    "embed_dim 65 is not a multiple of num_heads 2": {"embed_dim": 65},
    "img_size 30x32 is not a multiple of patch_size 4": {"img_size": (30, 32)},
    "depth must be a whole number of at least 1, not 0": {"depth": 0},
    "num_classes must be a whole number of at least 0, not -1": {"num_classes": -1},
    "num_heads must be a whole number of at least 1, not 2.0": {"num_heads": 2.0},
    "embed_dim must be a whole number of at least 1, not True": {"embed_dim": True},
    "is not a whole number": {"mlp_ratio": 1.23},
    "eps must be above 0.0, not 0": {"eps": 0},
    "eps must be a finite number, not nan": {"eps": float("nan")},
    "unknown global_pool 'mean'": {"global_pool": "mean"},
    "unknown gelu 'tan'. Did you mean 'tanh'": {"gelu": "tan"},
    "unknown position_rule 'tim'. Did you mean 'timm'": {"position_rule": "tim"},
    r"drop_path_rate must lie in \[0, 1\), not 1.0": {"drop_path_rate": 1.0},
    "class_position must be True or False, not 1": {"class_position": 1},
    "img_size must be a whole number above 0 or a pair": {"img_size": (32, 32, 3)},
    "unknown config field 'num_class'. Did you mean 'num_classes'": {"num_class": 3},
}


@pytest.mark.parametrize("message", BAD_CONFIGS)
def test_contradictory_configs_are_refused(message):
    with pytest.raises(ValueError, match=message):
        TINY.override(**BAD_CONFIGS[message])
