"""The folder for transformers.js: what it reads is there, and the graph in it gives what the model gives."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from exporting_cases import small
from helpers import FLOAT32, difference, images, refused_in_one_line

import vit
from vit.exporting.runtimes import is_exported

runtime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


@pytest.fixture(scope="module")
def square():
    model = small()
    model.preprocessing = replace(model.preprocessing, size=(28, 28), crop_pct=0.875, interpolation="bilinear")
    return model


@pytest.fixture(scope="module")
def folder(square, tmp_path_factory):
    path = tmp_path_factory.mktemp("js") / "model"
    vit.export(square, path, "transformersjs", outputs=("logits", "features"))
    return path


def test_what_transformers_js_reads(folder, square):
    assert sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()) == [
        "config.json", "onnx/model.onnx", "preprocessor_config.json",
    ]  # fmt: skip
    config, settings = (json.loads((folder / f"{name}config.json").read_text()) for name in ("", "preprocessor_"))
    assert (config["model_type"], config["architectures"]) == ("vit", ["ViTForImageClassification"])
    assert config["id2label"] == {str(i): f"a {i}" for i in range(5)}
    assert config["transformers.js_config"] == {"dtype": "fp32"}
    assert (settings["size"], settings["crop_size"]) == ({"shortest_edge": 32}, {"height": 28, "width": 28})
    assert (settings["image_mean"], settings["image_std"], settings["resample"]) == (
        [0.4, 0.5, 0.6],
        [0.2, 0.3, 0.25],
        2,
    )
    session, x = runtime.InferenceSession(str(folder / "onnx" / "model.onnx")), images(2, 3, 28, 28)
    assert [one.name for one in (*session.get_inputs(), *session.get_outputs())] == [
        "pixel_values", "logits", "features",
    ]  # fmt: skip
    with torch.no_grad():
        assert (
            difference(torch.from_numpy(session.run(["logits"], {"pixel_values": x.numpy()})[0]), square(x)) < FLOAT32
        )


def test_it_is_called_like_the_model(folder, square):
    loaded, x = vit.load_exported(folder), images(3, 3, 8, 40)
    with torch.no_grad():
        assert difference(loaded(x), square(x)) <= FLOAT32
    assert loaded.preprocessing == square.preprocessing
    assert is_exported(folder) and not is_exported(folder.parent)
    refused_in_one_line(
        lambda: vit.load_exported(folder.parent), "not a folder of `vit export --format transformersjs`"
    )
    refused_in_one_line(lambda: vit.load_exported(folder / "elsewhere"), "expected an exported file, .onnx or")


def test_other_precisions_lie_beside_it_and_other_files_stay(square, tmp_path):
    path = tmp_path / "model"
    vit.export(square, path, "transformersjs", dynamic=False)
    (path / "README.md").write_text("mine")
    with pytest.raises(FileExistsError, match="model is not empty: .*--force"):
        vit.export(square, path, "transformersjs", half=True, dynamic=False)
    report = vit.export(square, path, "transformersjs", half=True, dynamic=False, force=True)
    assert report.files[0] == str(path) and str(path / "onnx" / "model_fp16.onnx") in report.files
    assert vit.load_exported(path).metadata.precision == "float16"  # the last one, as config.json says
    assert (path / "onnx" / "model.onnx").is_file() and (path / "README.md").read_text() == "mine"


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({}, {"outputs": ("features", "logits")}, "reads logits first, and the outputs are features, logits"),
        ({"num_classes": 0}, {}, "reads logits first, and the outputs are features"),
        ({"in_chans": 1}, {}, "images of 3 channels, and this model takes 1"),
        ({}, {"img_size": (28, 20)}, "crops squares only, not 28 x 20"),
        ({}, {"path": "model.js"}, "expected the name of a folder without a dot to write, not"),
    ],
)
def test_what_transformers_js_does_not_take(changes, options, message, tmp_path):
    model = small(**changes)
    model.preprocessing = replace(model.preprocessing, size=(28, 28)).with_channels(model.config.in_chans)
    path = tmp_path / options.pop("path", "model")
    refused_in_one_line(lambda: vit.export(model, path, "transformersjs", **options), message)
    assert not list(tmp_path.iterdir())


def test_the_file_that_chooses_the_graph_comes_last(square, tmp_path, monkeypatch):
    """So that an export that is interrupted leaves a folder in which the old config opens the old graph."""
    moved, replace_file = [], os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (moved.append(Path(b).name), replace_file(a, b)))
    vit.export(square, tmp_path / "model", "transformersjs", check=False)
    assert moved[-3:] == ["model.onnx", "config.json", "preprocessor_config.json"]


def test_a_folder_of_another_model(tmp_path):
    model = small(img_size=(28, 28))
    model.preprocessing = replace(model.preprocessing, size=(28, 28))
    folder = tmp_path / "folder"
    vit.export(model, folder, "transformersjs", check=False)
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    model.categories = [f"another {i}" for i in range(5)]
    with pytest.raises(FileExistsError, match="model.onnx holds another model"):
        vit.export(model, folder, "transformersjs", half=True, force=True)
    assert before == {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    other = small(img_size=(28, 28))
    other.preprocessing, other.categories = model.preprocessing, ["a 0", "a 1", "a 2", "a 3", "a 4"]
    other.norm.weight.data *= 1.01
    with pytest.raises(FileExistsError, match="model.onnx holds another model"):  # the same but for its weights
        vit.export(other, folder, "transformersjs", half=True, force=True)
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "config.json").write_text('{"mine": 1}')
    with pytest.raises(FileExistsError, match="config.json that vit export did not write"):
        vit.export(model, tmp_path / "own", "transformersjs", force=True)
    assert (tmp_path / "own" / "config.json").read_text() == '{"mine": 1}'
