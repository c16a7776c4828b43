"""What travels with a model beside its weights."""

import pytest

import vit


def test_preprocessing_refuses_nonsense():
    for message, values in {
        "std must be above 0": {"std": (0.5, 0.0, 0.5)},
        "mean has 1 channels and std 3": {"mean": (0.5,)},
        "unknown interpolation 'bicubik'. Did you mean 'bicubic'": {"interpolation": "bicubik"},
        r"crop_pct must lie in \(0, 1\], not 1.5": {"crop_pct": 1.5},
        "each value of mean must be a finite number, not nan": {"mean": (float("nan"), 0.5, 0.5)},
    }.items():
        with pytest.raises(ValueError, match=message):
            vit.Preprocessing(**values)
