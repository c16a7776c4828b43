"""Models to files, bit for bit or not at all."""

import math

import numpy as np
import pytest
import torch
from checkpoints import CONFIG, TINY, same
from helpers import FLOAT32, difference, images, randomize, timm_twin
from safetensors.torch import load_file
from timm.utils import ModelEmaV3
from torch import nn
from torch.optim.swa_utils import AveragedModel

import vit
from vit.cli import main
from vit.weights import CheckpointError


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_our_files_come_back_to_the_bit(tmp_path, rectangular, dtype):
    rectangular.to(dtype)
    rectangular.preprocessing = vit.Preprocessing((32, 48), (0.1, 0.2, 0.3), (0.7, 0.8, 0.9), "lanczos", 0.75)
    rectangular.categories = ["ä", "b", "c", "d", "e", "f", 'g "quoted"']
    rectangular.provenance = vit.Provenance("somewhere", "0" * 64, "timm", "abc", "apache-2.0")
    again = vit.load_pretrained(vit.save_checkpoint(rectangular, tmp_path / "m.safetensors"))
    assert same(rectangular, again)
    assert again.config == rectangular.config and again.preprocessing == rectangular.preprocessing
    assert again.categories == rectangular.categories
    assert again.provenance.parent == rectangular.provenance and again.provenance.layout == "vit"
    assert again.provenance.license == "apache-2.0"
    second = vit.load_pretrained(vit.save_checkpoint(again, tmp_path / "m.safetensors"))
    assert same(rectangular, second) and second.provenance.parent == again.provenance


def test_saving_keeps_the_old_file_when_writing_fails(tmp_path, rectangular, monkeypatch):
    path = vit.save_checkpoint(rectangular, tmp_path / "m.safetensors")
    before = path.read_bytes()

    def full_disk(path, tensors, metadata):
        path.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr("vit.weights.save.write_safetensors", full_disk)
    with pytest.raises(OSError, match="no space left"):
        vit.save_checkpoint(rectangular, path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_what_does_not_fit_the_model_is_not_saved(tmp_path, rectangular):
    """A file that could not be read back, or would read back differently, is refused before anything is written."""
    original = rectangular.preprocessing
    for change, message in (
        (lambda: setattr(rectangular, "categories", ["a"]), "1 categories for 7 classes"),
        (lambda: setattr(rectangular, "categories", list(range(7))), "must be a list of strings"),
        (
            lambda: setattr(rectangular, "preprocessing", vit.Preprocessing(32, (0.5,), (0.5,))),
            "1 channels, the model has 3",
        ),
        (lambda: rectangular.norm.weight.data.fill_(math.nan), "norm.weight holds values that are not finite"),
    ):
        change()
        for layout in ("vit", "timm"):
            with pytest.raises(CheckpointError, match=message):
                vit.save_checkpoint(rectangular, tmp_path / "m", layout=layout)
        rectangular.categories, rectangular.preprocessing = None, original
    with pytest.raises(ValueError, match="expected a vit.ViT, got Linear"):
        vit.save_checkpoint(torch.nn.Linear(2, 2), tmp_path / "m")
    with pytest.raises(CheckpointError, match="has no values: .* on device meta"):
        vit.save_checkpoint(vit.ViT(CONFIG).to("meta"), tmp_path / "m")
    with pytest.raises(ValueError, match=r"x.safetensors must be a folder: the timm layout is"):
        vit.save_checkpoint(vit.ViT(CONFIG), tmp_path / "x.safetensors", layout="timm")
    assert list(tmp_path.iterdir()) == []


WRAPPED = {
    "compiled": (lambda m: torch.compile(m, backend="eager"), r"got OptimizedModule: save .*, its \._orig_mod$"),
    "average of weights": (AveragedModel, r"got AveragedModel: save the model in it, its \.module$"),
    "timm's average": (ModelEmaV3, r"got ModelEmaV3: .* its \.module$"),
    "both": (lambda m: nn.DataParallel(torch.compile(m, backend="eager")), r"its \.module\._orig_mod$"),
    "pyramid": (vit.FeaturePyramid, r"got FeaturePyramid: .* its \.model$"),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_wrappers_name_the_model_in_them(tmp_path, name):
    wrap, message = WRAPPED[name]
    wrapped = wrap(randomize(vit.ViT(CONFIG.override(patch_size=4, img_size=32))))
    with pytest.raises(ValueError, match=message) as error:
        vit.save_checkpoint(wrapped, tmp_path / "m")
    inner = wrapped.get_submodule(str(error.value).rpartition("its .")[2])
    assert vit.save_checkpoint(inner, tmp_path / "m").exists()  # what the message says works


def test_an_empty_name_is_not_the_current_folder(tmp_path, rectangular, monkeypatch, capsys):
    source = str(vit.save_checkpoint(rectangular, tmp_path / "m.safetensors"))
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(ValueError, match="expected a file or folder to write, got ''"):
        vit.save_checkpoint(rectangular, "")
    assert main(["convert", source, "", "--to", "vit"]) == 2
    assert "expected a file or folder to write, got ''" in capsys.readouterr().err
    assert not list((tmp_path / "empty").iterdir())


def test_tied_weights_are_written_out(tmp_path, rectangular):
    rectangular.blocks[1] = rectangular.blocks[0]
    again = vit.load_pretrained(vit.save_checkpoint(rectangular, tmp_path / "m.safetensors"))
    assert same(rectangular, again)


def test_a_link_stays_a_link(tmp_path, rectangular):
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "real.safetensors")
    vit.save_checkpoint(rectangular, tmp_path / "link.safetensors")
    assert (tmp_path / "link.safetensors").is_symlink() and same(
        rectangular, vit.load_pretrained(tmp_path / "real.safetensors")
    )


@torch.no_grad()
@pytest.mark.parametrize("layout", ["augreg", "big_vision", "big_vision_scanned"])
def test_npz_files(layout, tmp_path, model):
    file = vit.save_checkpoint(model, tmp_path / "m.npz", layout=layout)
    twin = timm_twin(TINY)
    twin.load_pretrained(str(file))
    x = images(2, 3, 32, 32)
    assert difference(model(x), twin(x)) <= FLOAT32
    again = vit.load_pretrained(file)
    assert same(model, again) and again.provenance.layout == layout
    assert (again.config.gelu, again.config.position_rule) == ("tanh", "jax")  # what an npz file cannot say
    assert vit.load_pretrained(file, gelu="erf", position_rule="timm").config == TINY
    assert all(key.count("/") for key in np.load(file) if key not in ("cls", "pos_embedding"))


def test_what_a_file_cannot_say_is_warned_of(tmp_path, model):
    with pytest.warns(UserWarning) as caught:
        vit.save_checkpoint(model, tmp_path / "m.npz", layout="augreg")
    said = " ".join(str(warning.message) for warning in caught)
    for name in ("gelu", "position_rule", "preprocessing", "categories"):
        assert f"cannot hold {name}" in said
    with pytest.raises(CheckpointError, match="an npz file cannot hold that the grid is 4x8"):
        vit.save_checkpoint(vit.ViT(TINY.override(img_size=(32, 64))), tmp_path / "n.npz", layout="augreg")
    assert [path.name for path in tmp_path.iterdir()] == ["m.npz"]
    vit.save_checkpoint(randomize(vit.ViT(TINY.override(depth=1))), tmp_path, layout="timm")
    assert vit.load_pretrained(tmp_path / "m.npz").config.depth == 2  # the config.json beside it is another's


@pytest.mark.parametrize("layout", ["vit", "timm", "transformers", "torchvision", "dinov2", "moco", "augreg"])
def test_files_that_we_wrote_carry_their_hash(tmp_path, layout):
    config = TINY.override(num_classes=0, init_values=0.5 if layout == "dinov2" else None)
    path = vit.save_checkpoint(randomize(vit.ViT(config)), tmp_path, layout=layout)
    whole = path.read_bytes()
    load_file(path)  # safetensors' own reader has no objection
    vit.load_pretrained(path)
    names = {name.encode() for name in load_file(path)}
    length = int.from_bytes(whole[:8], "little")
    for position in [*range(40, length, max(1, length // 23)), *range(8 + length, len(whole), 20_011)]:
        changed = bytearray(whole)
        changed[position] ^= 1
        path.write_bytes(changed)
        with pytest.raises(CheckpointError):
            vit.load_pretrained(path)
    assert len(names) > 20
    path.write_bytes(whole[:-4] + b"\1\2\3\4")
    with pytest.raises(CheckpointError, match="was changed after it was written"):
        vit.load_pretrained(path)
