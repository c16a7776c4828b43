"""Fixtures that the commands' tests share."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from helpers import randomize
from PIL import Image

import vit
from vit.cli import main
from vit.resources import digit_images, imagenet_categories


@pytest.fixture(scope="session")
def run() -> Callable[..., subprocess.CompletedProcess]:
    """The installed command, `vit`, without a terminal and without a network."""

    def run(*args: object, **env: str) -> subprocess.CompletedProcess:
        command = Path(sys.executable).with_name("vit")
        return subprocess.run(
            [str(command), *map(str, args)],
            capture_output=True,
            text=True,
            timeout=120,
            env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **env},
        )

    return run


@pytest.fixture
def call(capsys):
    """Like `run`, but in this process, which is faster."""

    def call(*args: object) -> subprocess.CompletedProcess:
        capsys.readouterr()
        try:
            code = main([str(arg) for arg in args])
        except SystemExit as stop:  # argparse's own
            code = stop.code
        return subprocess.CompletedProcess(args, code, *capsys.readouterr())

    return call


@pytest.fixture(scope="session")
def kernels() -> dict[str, str]:
    """PyTorch's name of the operation that multiplies in models optimized to each dtype, and in no other models."""
    return {"float32": "mkldnn::_linear_pointwise", "int8": "onednn::qlinear_pointwise"}


@pytest.fixture(scope="session")
def digit_files(tmp_path_factory) -> Path:
    """Twelve digits as PNG files, one of them in a sub-folder, beside a text file."""
    folder = tmp_path_factory.mktemp("digits")
    (folder / "below").mkdir()
    images, truth = digit_images()
    for i in range(12):
        place = folder / "below" if i == 11 else folder
        images[i].save(place / f"{i:02}_is_{truth[i]}.png")
    (folder / "notes.txt").write_text("no image")
    return folder


@pytest.fixture(scope="session")
def imagenet_file(tmp_path_factory) -> Path:
    """A shallow ViT-S/16 with random weights and ImageNet's classes, in timm's layout."""
    folder = tmp_path_factory.mktemp("imagenet")
    model = randomize(vit.create_model("vit_small_patch16_224", depth=1))
    return vit.save_checkpoint(model, folder / "model", layout="timm")


@pytest.fixture(scope="session")
def digits() -> vit.ViT:
    """The bundled model."""
    return vit.load_pretrained("vit_digits_patch4_32")


@pytest.fixture(scope="session")
def labelled(tmp_path_factory) -> Path:
    """Forty digits at several shapes, in one sub-folder per class or one folder below it, beside a text file."""
    folder = tmp_path_factory.mktemp("data")
    images, truth = digit_images()
    for i in range(40):
        below = folder / str(truth[i].item()) / ("below" if i % 7 == 0 else "")
        below.mkdir(parents=True, exist_ok=True)
        images[i].resize((24 + i % 3 * 9, 24 + i % 4 * 7)).save(below / f"{i:02}.png")
    (folder / "notes.txt").write_text("no image")
    return folder


@pytest.fixture(scope="session")
def imagenet(tmp_path_factory) -> tuple[vit.ViT, Path]:
    """A model with ImageNet's classes and a random head, whose outputs differ from digit to digit; and its file."""
    model = vit.load_pretrained("vit_digits_patch4_32")
    model.reset_classifier(1000)
    randomize(model.head)
    model.categories = imagenet_categories()
    return model, vit.save_checkpoint(model, tmp_path_factory.mktemp("imagenet") / "m.safetensors")


@pytest.fixture
def rows(call) -> Callable[..., tuple[int, list[dict], list[str]]]:
    """Runs `vit evaluate --json`: its exit code, its rows, and its lines on stderr."""

    def rows(*args: object) -> tuple[int, list[dict], list[str]]:
        done = call("evaluate", *args, "--json")
        return done.returncode, [json.loads(line) for line in done.stdout.splitlines()], done.stderr.splitlines()

    return rows


@pytest.fixture(scope="session")
def place() -> Callable[[Path, Iterable[Image.Image], Iterable[str]], None]:
    """Writes images into the sub-folders of the given names."""

    def place(folder: Path, images: Iterable[Image.Image], names: Iterable[str]) -> None:
        for i, (image, name) in enumerate(zip(images, names)):
            (folder / name).mkdir(parents=True, exist_ok=True)
            image.save(folder / name / f"{i:03}.png")

    return place
