"""`vit export`, and the commands that run what it wrote."""

import json
import warnings

import pytest
import torch
from exporting_cases import small
from safetensors import safe_open

import vit
from vit.cli import timing

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
DIGITS = "vit_digits_patch4_32"


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """The bundled model for digits, exported with logits and features."""
    path = tmp_path_factory.mktemp("digits") / "digits.onnx"
    vit.export(vit.load_pretrained(DIGITS), path, outputs=("logits", "features"))
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return vit.save_checkpoint(small(), tmp_path_factory.mktemp("small") / "model.safetensors")


def test_two_commands_from_a_checkpoint_to_labels(checkpoint, digit_files, tmp_path, call):
    result = call("export", checkpoint, "-o", tmp_path / "model.onnx")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"{tmp_path / 'model.onnx'}: 0.")
    assert "any number of images, 3 x H x W, multiples of 4" in result.stdout
    assert "logits     noise 2 x 16 x 40" in result.stdout
    found, wanted = (
        [json.loads(line) for line in call("predict", digit_files, "--model", one, "--json").stdout.splitlines()]
        for one in (tmp_path / "model.onnx", checkpoint)
    )
    assert len(found) == 12
    for one, other in zip(found, wanted):
        assert one["path"] == other["path"]
        for answer, expected in zip(one["predictions"], other["predictions"]):
            assert answer["label"] == expected["label"]
            assert abs(answer["probability"] - expected["probability"]) < 1e-5


def test_all_options(checkpoint, tmp_path, call):
    result = call(
        "export", checkpoint, "-o", tmp_path / "model.onnx", "--img-size", "8x12", "-b", "3", "--half", "--opset", "18",
        "--outputs", "features,attention", "--no-check", "--set", "position_rule=timm", "--json",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["files"] == [str(tmp_path / "model.onnx")]
    with pytest.warns(UserWarning, match="without a check"):
        metadata = vit.load_exported(tmp_path / "model.onnx").metadata
    assert (metadata.size, metadata.batch, metadata.precision) == ((8, 12), 3, "float16")
    assert (metadata.outputs, metadata.config.position_rule) == (("features", "attention"), "timm")


def test_the_ending_decides_on_the_format(checkpoint, tmp_path, call):
    pytest.importorskip("openvino")
    result = call("export", checkpoint, "-o", tmp_path / "model.xml", "--dynamic")
    assert result.returncode == 0, result.stderr
    assert vit.load_exported(tmp_path / "model.xml").session.name == "openvino"


def test_a_file_beyond_its_bar_is_not_written(checkpoint, tmp_path, call, monkeypatch):
    monkeypatch.setattr(vit.exporting.gate, "BARS", {"float32": 0.0})
    result = call("export", checkpoint, "-o", tmp_path / "model.onnx", "--img-size", "8")
    assert result.returncode == 2
    assert result.stderr.startswith("vit export: on noise 1 x 8 x 8 the exported file's logits differ")
    assert not list(tmp_path.iterdir())


def test_evaluate(digits, digit_files, tmp_path, call):
    rows = []
    for model in (digits, DIGITS):
        result = call("evaluate", "digits", "--model", model, "--limit", "60", "--img-size", "32,24", "--json")
        assert result.returncode == 0, result.stderr
        rows.append([json.loads(line) for line in result.stdout.splitlines()])
    for found, wanted in zip(*rows):
        for name in ("size", "right", "right5", "tokens", "images", "digest"):
            assert found[name] == wanted[name]
    assert rows[0][0]["sha256"] != rows[1][0]["sha256"]  # so that --results never mixes them


@pytest.mark.parametrize("size", ["24x40", "native"])
def test_features(size, digits, digit_files, tmp_path, call):
    tensors = []
    for i, model in enumerate((digits, DIGITS)):
        output = tmp_path / f"{i}.safetensors"
        result = call("features", digit_files, "-o", output, "--model", model, "--img-size", size)
        assert result.returncode == 0, result.stderr
        with safe_open(output, "pt") as file:
            tensors.append(file.get_tensor("features"))
    assert tensors[0].shape == (12, 96)
    torch.testing.assert_close(*tensors, rtol=1e-4, atol=1e-5)


def test_bench(digits, call, monkeypatch):
    monkeypatch.setitem(timing.PEAK_SIDE, "cpu", 64)
    result = call("bench", "--model", digits, "-b", "1,2", "--img-size", "32,24x40", "--rounds", "2", "--json")
    assert result.returncode == 0, result.stderr
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [(row["batch"], row["size"]) for row in rows] == [(1, [32, 32]), (2, [32, 32]), (1, [24, 40]), (2, [24, 40])]
    assert all(row["ms"] > 0 and row["peak_mib"] is None for row in rows)
    assert "(onnxruntime) on" in call("bench", "--model", digits, "-b", "1", "--rounds", "1").stdout


def test_inspect_shows_the_proof(digits, call):
    result = call("inspect", digits)
    assert result.returncode == 0, result.stderr
    assert "outputs     logits, features" in result.stdout
    assert "logits     noise 1 x 4 x 4" in result.stdout
    assert json.loads(call("inspect", digits, "--json").stdout)["config"]["patch_size"] == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("attention", "IMAGE"), "is an exported file: vit.load_exported runs it"),
        (("probe", "digits"), "is an exported file, which predict, evaluate, features and bench run"),
        (
            ("features", "IMAGE", "-o", "f.safetensors", "--kind", "dense"),
            "gives pooled features only, not --kind dense",
        ),
        (("predict", "IMAGE", "--optimize", "float32"), "which holds all of that: leave out --optimize"),
        (("predict", "IMAGE", "--dtype", "bfloat16", "--set", "eps=1"), "leave out --set, --dtype"),
        (("predict", "IMAGE", "--layout", "timm", "--prefix", "a."), "leave out --layout, --prefix"),
        (("bench", "--attention", "sdpa"), "leave out --attention"),
        (("bench", "--optimize", "none,float32"), "leave out --optimize"),
        (("bench", "--profile"), "whose runtime --profile does not see into"),
    ],
)
def test_what_exported_files_refuse(arguments, message, digits, digit_files, tmp_path, call):
    image = next(digit_files.glob("*.png"))
    names = {"IMAGE": image, "f.safetensors": tmp_path / "f.safetensors"}
    result = call(*(names.get(one, one) for one in arguments), "--model", digits)
    assert result.returncode == 2
    assert message in result.stderr and result.stderr.count("\n") == 1


def test_an_exported_file_is_not_exported_or_converted(digits, tmp_path, call):
    for arguments in (("export", digits, "-o", tmp_path / "o.onnx"), ("convert", digits, tmp_path, "--to", "timm")):
        result = call(*arguments)
        assert result.returncode == 2
        assert "is an exported file" in result.stderr and result.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_another_onnx_file_stays_a_checkpoint(tmp_path, call):
    """Written by PyTorch's exporter alone: its weights are read."""
    model = small()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (torch.zeros(1, 3, 28, 20),), tmp_path / "model.onnx", dynamo=True, verbose=False)
    result = call("inspect", tmp_path / "model.onnx")
    assert "model.blocks.0" in result.stdout or "blocks.0" in result.stdout
    assert "checked" not in result.stdout


def test_pt2_is_run_only_with_trust_and_inspected_without(checkpoint, digit_files, tmp_path, call):
    result = call("export", checkpoint, "-o", tmp_path / "model.pt2", "--img-size", "8x12")
    assert result.returncode == 0, result.stderr
    image = next(digit_files.glob("*.png"))
    result = call("predict", image, "--model", tmp_path / "model.pt2")
    assert result.returncode == 2 and "can run code" in result.stderr and "--trust" in result.stderr
    found = json.loads(call("predict", image, "--model", tmp_path / "model.pt2", "--trust", "--json").stdout)
    wanted = json.loads(call("predict", image, "--model", checkpoint, "--img-size", "8x12", "--json").stdout)
    assert found["predictions"][0]["label"] == wanted["predictions"][0]["label"]
    assert "1 image, 3 x 8 x 12" in call("inspect", tmp_path / "model.pt2").stdout


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        pytest.param("uint8", "pixels, uint8, 3 channels last", marks=pytest.mark.slow),
        ("image", "whole pictures, uint8, H x W x 3, resized to 28 x 20"),
    ],
)
def test_files_that_take_pixels(kind, said, checkpoint, tmp_path, call):
    photograph = vit.load_image(vit.resources.DATA / "photographs" / "coffee.jpg")
    for i, shape in enumerate([(60, 40), (20, 33), (28, 70)]):
        for name in ("a 1", "a 3"):
            (tmp_path / "data" / name).mkdir(parents=True, exist_ok=True)
            photograph.resize(shape).rotate(90 * (name == "a 3")).save(tmp_path / "data" / name / f"{i}.png")
    file = tmp_path / "model.onnx"
    result = call("export", checkpoint, "-o", file, "--input", kind, "--outputs", "logits,features", "--no-check")
    assert result.returncode == 0, result.stderr
    assert said in result.stdout
    answers = []
    for model in (file, checkpoint):
        result = call("predict", tmp_path / "data", "--model", model, "--json")
        assert result.returncode == 0, result.stderr
        found = [json.loads(line)["predictions"][0] for line in result.stdout.splitlines()]
        result = call("evaluate", tmp_path / "data", "--model", model, "--json")
        assert result.returncode == 0, result.stderr
        answers.append((found, json.loads(result.stdout)["right"]))
        output = tmp_path / f"{len(answers)}.safetensors"
        assert call("features", tmp_path / "data", "-o", output, "--model", model).returncode == 0
    assert answers[0][1] == answers[1][1]
    for found, wanted in zip(*(found for found, _ in answers)):
        assert found["label"] == wanted["label"] and abs(found["probability"] - wanted["probability"]) < 1e-3
    with safe_open(tmp_path / "1.safetensors", "pt") as one, safe_open(tmp_path / "2.safetensors", "pt") as other:
        torch.testing.assert_close(one.get_tensor("features"), other.get_tensor("features"), rtol=2e-3, atol=2e-3)
    result = call("bench", "--model", file, "-b", "1", "--rounds", "1", "--json")
    assert result.returncode == 0 and json.loads(result.stdout)["ms"] > 0, result.stderr
    if kind == "image":
        result = call("predict", tmp_path / "data", "--model", file, "--img-size", "32")
        assert result.returncode == 2 and "this file resizes and crops images itself" in result.stderr


def test_what_a_page_does_not_take(checkpoint, tmp_path, call):
    for options, message in (
        (["--half"], "vit export: --half (half=True) with web: it computes in the type of its weights"),
        (["--runtime-folder", tmp_path], "does not hold ort-wasm-simd-threaded.wasm of ONNX Runtime Web"),
    ):
        result = call("export", checkpoint, "-o", tmp_path / "site", "--format", "web", *options)
        assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)
        assert message in result.stderr
    assert not list(tmp_path.iterdir())
