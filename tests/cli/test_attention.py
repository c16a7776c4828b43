"""`vit attention`: what is drawn, and where."""

import numpy as np
import pytest
from PIL import Image

import vit
from vit.cli import attention, main
from vit.draw import scale
from vit.image import create_transform

DIGITS = "vit_digits_patch4_32"
TEXT, BAR = 22 + 2, 2 + 12 + 22  # pixels: a caption above a picture, a scale below it


@pytest.mark.parametrize("options", [[], ["--img-size", "48x24", "--block", "0"], ["--img-size", "64"]])
def test_attention_draws_the_photograph_and_each_head(tmp_path, options, capsys):
    photo = Image.effect_noise((61, 33), 80)
    photo.save(tmp_path / "a.png")
    output = tmp_path / "below" / "out.png"
    assert main(["attention", str(tmp_path / "a.png"), "--model", DIGITS, "-o", str(output), *options]) == 0
    picture = Image.open(output)
    model = vit.load_pretrained(DIGITS)
    size = {0: {"mode": "native"}, 4: {"size": (48, 24)}, 2: {"size": 64}}[len(options)]
    H, W = create_transform(model, **size)(photo).shape[1:]
    assert f"{H // 4} x {W // 4} patches, block {5 if len(options) < 4 else 0}, 3 heads" in capsys.readouterr().out
    stretch = 420 / max(H, W)
    width, height = round(W * stretch), round(H * stretch)  # each picture's, 8 pixels apart: 5 of them, 4 in a row
    cell = max(width, attention.NARROWEST)
    assert picture.size == (8 + 4 * (cell + 8), 8 + 22 + 8 + 2 * (TEXT + height + BAR + 8))
    lefts, top = (8, cell + 16, 2 * cell + 24), 8 + 22 + 8 + TEXT
    photo_shown, mean, head = (np.asarray(picture.crop((x, top, x + width, top + height))) for x in lefts)
    assert np.array_equal(photo_shown[..., 0], photo_shown[..., 1])  # grey
    assert not np.array_equal(mean[..., 0], mean[..., 1]) and not np.array_equal(mean, head)  # in colour


def test_several_images_in_one_picture(tmp_path, capsys):
    """Each has a group of rows of its own, the same as alone."""
    for name, size in (("a", (61, 33)), ("b", (24, 48))):
        Image.effect_noise(size, 80).save(tmp_path / f"{name}.png")
    files, outputs = [tmp_path / "a.png", tmp_path / "b.png"], [tmp_path / f"{i}.webp" for i in range(3)]
    for images, output in zip(([files[0]], [files[1]], files), outputs):
        assert main(["attention", *map(str, images), "--model", DIGITS, "-o", str(output)]) == 0
    assert "a.png: 8 x 15 patches" in (out := capsys.readouterr().out) and "b.png: 12 x 6 patches" in out
    a, b, both = (Image.open(output).size for output in outputs)
    assert both == (max(a[0], b[0]), a[1] + b[1] - 2 * 8 + 24)


def test_attention_is_drawn_where_it_falls(monkeypatch):
    """A model that looks at one patch only: it is the brightest spot, in each head and on average, in grey, too."""
    weights = np.full((2, 4, 6), 1e-6)
    weights[:, 1, 4] = 1
    drawn = []
    monkeypatch.setattr(attention, "overlay", lambda *args: drawn.append(vit.draw.overlay(*args)) or drawn[-1])
    attention.draw(Image.new("RGB", (60, 40), "grey"), weights, "title")
    assert len(drawn) == 3
    for picture in drawn:
        assert picture.size == (420, 280)
        light = np.asarray(picture.convert("L")).astype(int)
        y, x = np.unravel_index(light.argmax(), light.shape)
        assert 280 / 4 < y < 280 / 2 and 420 * 4 / 6 < x < 420 * 5 / 6


def test_captions_and_scales_say_what_is_drawn(monkeypatch):
    captions, scales = [], []
    monkeypatch.setattr(attention, "caption", lambda text, w: captions.append(text) or vit.draw.caption(text, w))
    monkeypatch.setattr(attention, "scale", lambda w, texts: scales.append(texts) or vit.draw.scale(w, texts))
    weights = np.stack([np.full((4, 6), 0.04), np.full((4, 6), 0.0002)])
    attention.draw(Image.new("RGB", (60, 40)), weights, "a.png")
    assert captions == ["photograph", "mean of the heads", "head 0", "head 1", "a.png"]
    assert scales == [["0", f"{low} %", f"{high} % or more"] for low, high in ((0.5, 2), (1, 4), (0.005, 0.02))]


def test_the_numbers_of_the_narrowest_scale_do_not_overlap():
    bar = np.asarray(scale(attention.NARROWEST, ["0", "0.0042 %", "0.0088 % or more"]))[12:]
    columns = (bar < 128).any(axis=(0, 2))  # with ink
    empty = np.diff(np.flatnonzero(columns)) - 1  # pixels between neighbouring letters
    assert (empty > 7).sum() == 2


def test_weights_that_vanish_are_drawn():
    assert np.asarray(attention.draw(Image.new("RGB", (60, 40)), np.zeros((2, 4, 6)), "a.png")).shape[2] == 3
