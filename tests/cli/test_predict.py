"""`vit predict`: labels, probabilities, and what is reported."""

import json
import re
import shutil

import torch
from helpers import operations
from PIL import Image

import vit
from vit.cli import main
from vit.image import create_transform, load_image
from vit.resources import digit_images, imagenet_synsets

DIGITS = "vit_digits_patch4_32"


def test_predict_a_folder(digit_files, run):
    result = run("predict", digit_files, "--model", DIGITS, "-k", "2", "--mode", "squash")
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    blocks = re.findall(r"_is_(\d)\.png\n +([\d.]+)%  (\d)\n +([\d.]+)%  (\d)\n", result.stdout)
    assert len(blocks) == 12
    assert sum(truth == guess for truth, _, guess, _, _ in blocks) >= 11
    assert all(float(first) >= float(second) for _, first, _, second, _ in blocks)


def test_predict_equals_the_library(digit_files, call):
    result = call(
        "predict", digit_files / "*.png", "--model", DIGITS, "--json", "-b", "5", "--img-size", "40x48", "-k", "10"
    )
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [line["path"] for line in lines] == sorted(str(path) for path in digit_files.glob("*.png"))
    model = vit.load_pretrained(DIGITS)
    transform = create_transform(model, (40, 48))
    for line in lines:
        with torch.no_grad():
            expected = model(transform(load_image(line["path"]))[None]).softmax(dim=-1)[0]
        assert len(line["predictions"]) == 10
        for answer in line["predictions"]:
            assert answer["label"] == str(answer["class"])
            assert abs(answer["probability"] - expected[answer["class"]].item()) < 1e-5


def test_predict_names_imagenets_classes(digit_files, imagenet_file, call):
    result = call("predict", next(digit_files.glob("*.png")), "--model", imagenet_file, "--json", "--img-size", "64")
    (line,) = result.stdout.splitlines()
    for answer in json.loads(line)["predictions"]:
        assert answer["synset"] == imagenet_synsets()[answer["class"]]
        assert isinstance(answer["label"], str)
    table = call("predict", next(digit_files.glob("*.png")), "--model", imagenet_file, "--img-size", "64").stdout
    assert re.search(r"%  n\d{8}  \w", table)


def test_predict_native_sizes(tmp_path, digit_files, call):
    images, _ = digit_images()
    images[0].resize((30, 50)).save(tmp_path / "a.png")
    images[1].resize((61, 33)).save(tmp_path / "b.png")
    result = call("predict", tmp_path, "--model", DIGITS, "--img-size", "native", "--json")
    assert result.returncode == 0 and len(result.stdout.splitlines()) == 2
    model = vit.load_pretrained(DIGITS)
    transform = vit.create_transform(model, mode="native")
    for line, name in zip(result.stdout.splitlines(), ("a.png", "b.png")):
        with torch.inference_mode():
            expected = model(transform(vit.load_image(tmp_path / name))[None]).softmax(dim=-1)[0]
        for answer in json.loads(line)["predictions"]:
            assert abs(answer["probability"] - expected[answer["class"]].item()) < 1e-5
    result = call("predict", tmp_path, "--model", DIGITS, "--img-size", "native", "--max-tokens", "110")
    assert result.returncode == 1 and "makes 120 patches at 32 x 60, more than max_tokens=110" in result.stderr
    assert "a.png" in result.stdout and "b.png" not in result.stdout
    refused = call("predict", tmp_path, "--model", DIGITS, "--img-size", "native", "--mode", "squash")
    assert refused.returncode == 2 and "--mode squash cannot go with it" in refused.stderr


def test_predict_optimized(digit_files, tmp_path, optimized_dtype, capsys, kernels):
    """The same answers, also from a file that was optimized before."""
    dtype = optimized_dtype
    command = ["predict", str(digit_files), "--json", "-k", "10", "--model"]
    vit.kernels.save(vit.kernels.optimize(vit.load_pretrained(DIGITS), dtype), tmp_path / "fast.safetensors")
    found, codes = [], []
    for arguments in ([DIGITS], [DIGITS, "--optimize", dtype], [str(tmp_path / "fast.safetensors")]):
        ran = operations(lambda arguments=arguments: codes.append(main([*command, *arguments])))
        assert (kernels[dtype] in ran) == (arguments != [DIGITS])
        lines = capsys.readouterr().out.splitlines()
        found.append([json.loads(line)["predictions"] for line in lines])
    plain, fast, saved = found
    assert codes == [0, 0, 0] and fast == saved
    for ours, theirs in zip(fast, plain, strict=True):
        assert ours[0]["label"] == theirs[0]["label"]
        assert abs(ours[0]["probability"] - theirs[0]["probability"]) < (1e-5 if dtype == "float32" else 0.1)


def test_predict_reports_and_skips_what_it_cannot_read(tmp_path, digit_files, run):
    for path in sorted(digit_files.glob("*.png"))[:3]:
        shutil.copy(path, tmp_path)
    good = sorted(tmp_path.glob("*.png"))
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "cut.png").write_bytes(good[0].read_bytes()[:60])
    Image.new("F", (8, 8)).save(tmp_path / "float.tiff")
    result = run("predict", tmp_path, tmp_path / "gone.png", "--model", DIGITS, "--json")
    assert result.returncode == 1
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert sum("predictions" in line for line in lines) == 3 and sum("error" in line for line in lines) == 4
    errors = result.stderr.splitlines()
    assert len(errors) == 5 and errors[-1] == "vit predict: 4 of 7 images could not be used"
    for name in ("empty.png", "cut.png", "float.tiff", "gone.png"):
        assert sum(name in line for line in errors) == 1
    assert "Traceback" not in result.stderr


def test_one_logit_is_no_probability(digit_files, tmp_path, run):
    model = vit.load_pretrained(DIGITS)
    model.reset_classifier(1)
    vit.save_checkpoint(model, tmp_path / "one.safetensors")
    result = run("predict", digit_files, "--model", tmp_path / "one.safetensors")
    assert result.returncode == 2 and "gives one number, of which a softmax is 100 % for every image" in result.stderr
