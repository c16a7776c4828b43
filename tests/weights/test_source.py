"""Names, files and folders that checkpoints are loaded from."""

import warnings

import pytest

import vit


def test_paths_that_lead_nowhere(tmp_path, rectangular):
    (tmp_path / "empty").mkdir()
    for source, kind, message in (
        (tmp_path / "empty", FileNotFoundError, "empty holds none of model.safetensors"),
        (tmp_path / "gone.safetensors", FileNotFoundError, "gone.safetensors does not exist"),
        ("timm/vit_small_patch16_224.augreg_in21k_ft_in1k", FileNotFoundError, "is written hf-hub:timm/vit_small"),
        ("vit_smal_patch16_224.augreg_in21k_ft_in1k", ValueError, "Did you mean 'vit_small_patch16_224.augreg_in21k"),
        ("resnet50", ValueError, "unknown model 'resnet50'. Known: .* no file or folder named 'resnet50' either"),
        ("nodir/", FileNotFoundError, "^nodir/ does not exist$"),
    ):
        with pytest.raises(kind, match=message):
            vit.load_pretrained(source)
    for source in ("", None):  # as from an unset environment variable
        with pytest.raises(ValueError, match=f"expected the name of a model, a file or a folder, got {source!r}"):
            vit.load_pretrained(source)
    with pytest.raises(ValueError, match="revision='main' is for repositories on the Hub"):
        vit.load_pretrained(tmp_path / "empty", revision="main")
    with pytest.raises(ValueError, match="already contains a revision"):
        vit.load_pretrained("hf-hub:a/b@main", revision="main")
    with pytest.raises(ValueError, match=r"unknown layout 'tim'. Did you mean 'timm'"):
        vit.save_checkpoint(rectangular, tmp_path / "m.safetensors", layout="tim")
    with pytest.raises(
        ValueError, match="must end in .safetensors or be a folder: other formats are not written as vit"
    ):
        vit.save_checkpoint(rectangular, tmp_path / "m.pth")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty"]


def test_the_folder_of_a_training_run_has_two_models(rectangular, tmp_path):
    vit.save_checkpoint(rectangular, tmp_path / "run" / "model.safetensors", layout="vit")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vit.load_pretrained(tmp_path / "run")
    vit.save_checkpoint(rectangular, tmp_path / "run" / "model_best.safetensors", layout="vit")
    with pytest.warns(
        UserWarning, match=r"run holds the last weights, .* for the best, name .*run/model_best.safetensors"
    ):
        vit.load_pretrained(tmp_path / "run")
