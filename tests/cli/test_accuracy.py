"""Accuracy: the interval, and NaN among logits."""

import pytest
import torch

import vit
from vit.cli.accuracy import measure, wilson
from vit.image import create_transform
from vit.resources import digit_images

DIGITS = "vit_digits_patch4_32"


def test_the_interval():
    """Against Newcombe (1998), table I, method 3; and at 0 % and 100 %."""
    for right, total, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (1, 29, 0.0061, 0.1718)):
        assert wilson(right, total) == pytest.approx((low, high), abs=6e-5)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=6e-5)
    assert wilson(20, 20) == pytest.approx((0.8389, 1.0), abs=6e-5)
    for total in range(1, 400):  # whatever the rounding
        assert wilson(0, total)[0] == 0.0 and wilson(total, total)[1] == 1.0


def test_nan_logits_have_no_accuracy():
    model = vit.create_model(DIGITS, depth=1).eval()
    torch.nn.init.constant_(model.head.bias, float("nan"))
    with pytest.raises(ValueError, match="NaN"):
        measure(model, create_transform(model), digit_images()[0][:2], torch.tensor([0, 1]), 2, set())
