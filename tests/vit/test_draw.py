"""Pictures: a colour map that reads the same in grey, and weights where they belong."""

import numpy as np
import pytest
from PIL import Image

from vit.draw import MAGMA, PHOTOGRAPH, colours, mosaic, overlay, scale

LUMINANCE = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601's, as Pillow converts to grey


def test_luminance_rises_all_the_way():
    assert (np.diff(colours(np.linspace(0, 1, 1000)) @ LUMINANCE) > 0).all()
    grey = np.asarray(scale(400, ["0", "1"]).convert("L"))[0].astype(int)
    assert (np.diff(grey[::8]) > 0).all() and grey[-1] - grey[0] > 150  # neighbours may round to the same


def test_colours_are_matplotlibs_magma():
    magma = pytest.importorskip("matplotlib").colormaps["magma"]
    assert np.abs(np.array(magma(np.linspace(0, 1, len(MAGMA))))[:, :3] * 255 - MAGMA).max() < 0.51
    x = np.linspace(0, 1, 256)
    assert np.abs(colours(x) - magma(x)[:, :3]).max() < 0.01


def test_lightness_rises_evenly():
    """In CIE L*, which "perceptually uniform" means: no part of the map is much steeper than another."""
    linear = np.where(colours(x := np.linspace(0, 1, 32)) <= 0.04045, colours(x) / 12.92,
                      ((colours(x) + 0.055) / 1.055) ** 2.4)  # fmt: skip
    Y = linear @ np.array([0.2126, 0.7152, 0.0722])
    steps = np.diff(116 * np.cbrt(Y) - 16)[2:]  # near black L* is linear in Y, not a cube root
    assert steps.max() / steps.min() < 1.6


def test_weights_lie_where_they_belong():
    """[h, w] on a picture that is not square: the brightest and the darkest spot, over any photograph."""
    weights = np.full((2, 5), 0.5)
    weights[0, 3], weights[1, 1] = 3, 0
    for shade in (0, 128, 255):
        picture = overlay(Image.new("RGB", (7, 9), (shade,) * 3), weights, (200, 80))
        assert picture.size == (200, 80)
        grey = np.asarray(picture.convert("L")).astype(int)
        for found, (row, column) in ((grey.argmax(), (0, 3)), (grey.argmin(), (1, 1))):
            y, x = np.unravel_index(found, grey.shape)
            assert (y // 40, x // 40) == (row, column)


def test_the_photograph_shows_and_does_not_hide_the_weights():
    photograph = Image.fromarray(np.array([[0, 255]], dtype=np.uint8)).resize((80, 40), Image.Resampling.NEAREST)
    pictures = [overlay(photograph, np.full((1, 1), weight), (80, 40)).convert("L") for weight in (0, 1)]
    none, most = (np.asarray(picture).astype(int) for picture in pictures)
    assert none[20, 70] - none[20, 10] == pytest.approx(255 * PHOTOGRAPH, abs=2)
    assert most[20, 10] > none[20, 70] + 50  # the largest weight on black, beside none on white


def test_mosaic():
    pictures = [Image.new("RGB", size, "red") for size in ((10, 20), (30, 10), (5, 5))]
    sheet = mosaic(pictures, columns=2, gap=4)
    assert sheet.size == (30 + 4 + 30, 20 + 4 + 5)
    assert [sheet.getpixel(at) for at in ((9, 19), (10, 0), (34, 9), (34, 10), (0, 24))] == [
        (255, 0, 0), (255, 255, 255), (255, 0, 0), (255, 255, 255), (255, 0, 0),
    ]  # fmt: skip
