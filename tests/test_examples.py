"""The examples run, and what ships with the package is what they write."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from helpers import FLOAT32, difference, images
from PIL import Image

import vit
from vit.resources import DATA, digit_images

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(script: str, *args: object) -> str:
    command = [sys.executable, str(EXAMPLES / script), *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_training_on_digits(tmp_path):
    """One epoch of the eighty: it saves a model, and it holds out the images that ship with the package."""
    folders = ("--output", tmp_path / "model", "--heldout", tmp_path / "heldout")
    out = run("train_digits.py", "--epochs", 1, "--threads", 1, *folders)
    assert re.fullmatch(r"held-out accuracy at 32x32: [\d.]+% \(\d+ of 360\)", out.splitlines()[-1])
    model = vit.load_pretrained(tmp_path / "model")
    assert model.config == vit.load_pretrained("vit_digits_patch4_32").config
    assert model.categories == list("0123456789")
    for name in ("heldout.png", "heldout.txt"):
        new, shipped = tmp_path / "heldout" / name, DATA / "digits" / name
        if name.endswith("png"):
            assert np.array_equal(np.asarray(Image.open(new)), np.asarray(Image.open(shipped)))
        else:
            assert new.read_text() == shipped.read_text()


def test_the_shipped_model_reads_what_it_was_not_trained_on():
    model = vit.load_pretrained("vit_digits_patch4_32")
    digits, truth = digit_images()
    assert len(digits) == len(truth) == 360
    for size, least in (((32, 32), 0.98), ((24, 24), 0.97), ((48, 48), 0.97), ((32, 48), 0.97)):
        transform = vit.create_transform(model, size, mode="squash")
        with torch.inference_mode():
            guesses = model(torch.stack([transform(image) for image in digits])).argmax(dim=1)
        assert (guesses == truth).float().mean() >= least, size
    assert (guesses == truth.roll(1)).float().mean() < 0.3  # the labels do belong to the images


def test_timm_reads_the_shipped_model():
    """Trained weights, through timm's own loader: our file is a checkpoint of timm's."""
    import timm

    twin = timm.create_model(
        f"local-dir:{DATA / 'vit_digits_patch4_32'}", pretrained=True, dynamic_img_size=True
    ).eval()
    model = vit.load_pretrained("vit_digits_patch4_32")
    with torch.no_grad():
        for size in ((32, 32), (48, 24), (64, 64)):
            x = images(2, 3, *size)
            assert difference(model(x), twin(x)) <= 2 * FLOAT32


def test_patches(tmp_path):
    out = run("patches.py", "-o", tmp_path / "patches.png")
    assert str(tmp_path / "patches.png") in out
    new, shown = Image.open(tmp_path / "patches.png"), Image.open(EXAMPLES / "pictures" / "patches.png")
    assert np.array_equal(np.asarray(new), np.asarray(shown))
