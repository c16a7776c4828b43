"""`vit evaluate`: the figures against direct computations, results that are reused, and what is refused."""

import json
import re
import shutil
import warnings

import pytest
import timm
import torch
from PIL import Image
from torchvision.datasets import ImageFolder

import vit
from vit.cli import evaluate, main
from vit.cli.accuracy import count
from vit.image import create_transform
from vit.resources import digit_images

DIGITS = "vit_digits_patch4_32"


# The figures


def test_the_digits_have_the_readmes_accuracies(capsys):
    """Two rows of README.md's table, exactly; tests/test_readme.py compares all of them."""
    expected = {"24x24": 356, "32x48": 358}
    assert main(["evaluate", "digits", "--model", DIGITS, "--img-size", "24,32x48"]) == 0
    out = capsys.readouterr().out
    right = {size: int(count) for size, count in re.findall(r"^(\d+x\d+) .*\((\d+) of 360\)$", out, re.M)}
    assert right == expected
    assert "98.89%" in out and "matched by the model's categories" in out


def test_the_figures_equal_a_direct_computation(labelled, digits, rows):
    """timm's own evaluation transform, images in torchvision's order, one at a time, and their largest logits."""
    args = (labelled, "--model", DIGITS, "--img-size", "24,32x48", "--crop-pct", "0.8", "-b", "7")
    code, found, _ = rows(*args)
    assert code == 0 and [row["size"] for row in found] == ["24x24", "32x48"]
    settings = digits.preprocessing
    for row, size in zip(found, ((24, 24), (32, 48))):
        transform = timm.data.create_transform(
            (3, *size), crop_pct=0.8, interpolation=settings.interpolation, mean=settings.mean, std=settings.std
        )
        right = right5 = 0
        for path, label in ImageFolder(labelled).samples:
            with torch.no_grad():
                logits = digits(transform(Image.open(path).convert("RGB"))[None])[0]
            right += int(logits.argmax()) == label
            right5 += int((logits > logits[label]).sum()) < 5
        assert (row["right"], row["right5"], row["images"]) == (right, right5, 40)
        assert 0 < right < right5 < 41  # neither is trivial
        assert row["top1"] == right / 40 and row["top5"] == right5 / 40
        assert row["tokens"] == 1 + size[0] * size[1] // 16 and row["ms_per_image"] > 0
        assert (row["mode"], row["crop_pct"]) == ("crop", 0.8)


def test_native_sizes(labelled, digits, rows):
    code, (row,), _ = rows(labelled, "--model", DIGITS, "--img-size", "native", "-b", "9")
    transform = create_transform(digits, mode="native")
    right = tokens = 0
    for path, label in ImageFolder(labelled).samples:
        with torch.no_grad():
            image = transform(vit.load_image(path))[None]
            right += int(digits(image).argmax()) == label
            tokens += digits.forward_features(image).shape[1]
    assert code == 0 and row["right"] == right > 0 and row["tokens"] == tokens / 40 and row["size"] == "native"


def test_modes(labelled, rows):
    """A folder's default is the model's own mode, that of the digits is "squash"; "native" takes neither."""
    for data, own in ((labelled, "crop"), ("digits", "squash")):
        for option, mode in (([], own), (["--mode", "squash"], "squash"), (["--mode", "crop"], "crop")):
            args = (data, "--model", DIGITS, "--img-size", "16,native", *option, "--limit", "1")
            assert [row["mode"] for row in rows(*args)[1]] == [mode, "native"]
    _, (row,), _ = rows("digits", "--model", DIGITS, "--crop-pct", "0.9", "--limit", "1")
    assert (row["mode"], row["crop_pct"]) == ("crop", 0.9)


# Unreadable images, kept results, refusals


def test_unreadable_images_are_reported_once_and_left_out(tmp_path, rows, place):
    images, truth = digit_images()
    place(tmp_path, images[:30], [str(label.item()) for label in truth[:30]])
    _, clean, _ = rows(tmp_path, "--model", DIGITS, "--img-size", "32,48", "--mode", "squash")
    (tmp_path / "0" / "000.png").write_bytes(b"")  # before all others, so that labels would shift
    (tmp_path / "3" / "cut.png").write_bytes((tmp_path / "3" / "002.png").read_bytes()[:60])
    code, found, errors = rows(tmp_path, "--model", DIGITS, "--img-size", "32,48", "--mode", "squash", "-b", 4)
    assert code == 1 and len(errors) == 3
    assert (
        "000.png" in errors[0]
        and "cut.png" in errors[1]
        and errors[2] == "vit evaluate: 2 of 32 images could not be used"
    )
    for before, row in zip(clean, found):
        assert (row["images"], row["unreadable"], row["right"]) == (30, 2, before["right"])
    for path in tmp_path.rglob("*.png"):
        path.write_bytes(b"")
    code, found, errors = rows(tmp_path, "--model", DIGITS)
    assert code == 2 and found == [] and errors[-1] == "vit evaluate: none of the 32 images can be used"


def test_results_are_kept_and_taken_up(tmp_path, labelled, capsys, monkeypatch, rows):
    file = tmp_path / "results.jsonl"
    args = (labelled, "--model", DIGITS, "--results", file)
    _, first, _ = rows(*args, "--img-size", "24,32")
    assert [json.loads(text) | {"reused": False} for text in file.read_text().splitlines()] == first
    measured = []
    monkeypatch.setattr(evaluate, "count", lambda *args: measured.append(args[1].size) or count(*args))
    _, again, _ = rows(*args, "--img-size", "32,40,24")
    assert measured == [(40, 40)]
    assert [row["reused"] for row in again] == [True, False, True] and len(file.read_text().splitlines()) == 3
    assert again[0] == first[1] | {"reused": True}
    assert main(["evaluate", *map(str, args), "--img-size", "24"]) == 0
    assert re.search(rf"^24x24 .*   from {re.escape(str(file))}$", capsys.readouterr().out, re.M)

    (tmp_path / "map.txt").write_text("\n".join("9876543210"))
    for other in (
        ["--class-map", tmp_path / "map.txt"],
        ["--mode", "squash"],
        ["--limit", "30"],
        ["--dtype", "bfloat16"],
        ["--crop-pct", "0.7"],
    ):
        measured.clear()
        rows(*args, "--img-size", "24", *other)
        assert measured == [(24, 24)], other
    (moved := tmp_path / "moved").symlink_to(labelled)  # the same images elsewhere
    assert rows(moved, *args[1:], "--img-size", "24")[1][0]["reused"]
    shutil.copytree(labelled, copy := tmp_path / "copy")
    (renamed := copy / "3" / "02.png").rename(copy / "3" / "02b.png")
    assert not rows(copy, *args[1:], "--img-size", "24")[1][0]["reused"]
    renamed.write_bytes((copy / "3" / "02b.png").read_bytes() + b" ")
    (copy / "3" / "02b.png").unlink()
    assert not rows(copy, *args[1:], "--img-size", "24")[1][0]["reused"]


def test_optimized(optimized_dtype, tmp_path, capsys, monkeypatch, rows):
    dtype = optimized_dtype
    file = tmp_path / "results.jsonl"
    args = ("digits", "--model", DIGITS, "--limit", "200", "--results", file)
    _, (plain,), _ = rows(*args)
    measured = []
    monkeypatch.setattr(evaluate, "count", lambda *args: measured.append(args[0].optimized) or count(*args))
    code, (fast,), _ = rows(*args, "--optimize", dtype)
    assert code == 0 and measured == [dtype] and not fast["reused"]  # the plain model's results are not reused
    assert (plain["optimize"], fast["optimize"]) == (None, dtype)
    assert abs(fast["right"] - plain["right"]) <= (0 if dtype == "float32" else 2)
    assert rows(*args, "--optimize", dtype)[1] == [fast | {"reused": True}]
    assert main(["evaluate", *map(str, args), "--optimize", dtype]) == 0
    assert capsys.readouterr().out.startswith(f"{DIGITS} optimized in {dtype} on digits")


def test_results_of_what_was_read_otherwise_are_not_reused(tmp_path, digits, rows):
    """The same file, but another model of those in it, another config or another preprocessing."""
    other = vit.create_model(DIGITS).state_dict()
    torch.save({"model": other, "model_ema": digits.state_dict()}, tmp_path / "model.pth")
    file = tmp_path / "results.jsonl"
    args = ("digits", "--model", tmp_path / "model.pth", "--set", "num_heads=3", "--limit", "9", "--results", file)

    def reused():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # which of the models was read
            return rows(*args)[1][0]["reused"]

    assert not reused() and reused()
    row = json.loads(file.read_text())
    assert row["part"] == "model_ema." and row["config"]["num_heads"] == 3
    for change in ({"part": "model."}, {"config": row["config"] | {"num_heads": 6}}, {"mean": [0.4] * 3}):
        file.write_text(json.dumps(row | change) + "\n")
        assert not reused() and reused(), change
    file.write_text(json.dumps({name: row[name] for name in row if name not in ("part", "config", "mean")}) + "\n")
    assert not reused()  # an earlier version's row, which does not say what was read


def test_an_interruption_keeps_what_is_finished(tmp_path, labelled, monkeypatch, rows):
    def interrupted(model, transform, *others):
        if transform.size == (32, 32):
            raise KeyboardInterrupt
        return count(model, transform, *others)

    monkeypatch.setattr(evaluate, "count", interrupted)
    file = tmp_path / "results.jsonl"
    code, found, _ = rows(labelled, "--model", DIGITS, "--img-size", "24,32", "--results", file)
    assert code == 130 and [row["size"] for row in found] == ["24x24"] and len(file.read_text().splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{gone}"], "gone' is not a folder: expected one"),
        ([""], "'' is not a folder"),
        (["{flat}"], "holds 3 images and no sub-folders: expected one sub-folder per class"),
        (["{hollow}"], "hollow/0 holds no images"),
        (["{other}"], "1 of 1 classes of the data match no class of the model: 'cow'; expected the model's categories"),
        (["digits", "--model", "{headless}"], "has no classifier"),
        (["digits", "--model", "{imagenet}"], "the digits have 10 classes and the model has 1000"),
        (["digits", "--img-size", "32,30"], "nearest size that works is 32 x 32"),
        (["digits", "--img-size", "32,,48"], "expected 384, 224x448 .height x width. or native, got ''"),
        (["digits", "--img-size", "native", "--mode", "crop"], "neither crops nor squashes"),
        (["digits", "--crop-pct", "1.5", "--mode", "crop"], "crop_pct must lie in"),
        (["digits", "--crop-pct", "0.9", "--mode", "squash"], "has no use in mode 'squash'"),
        (["digits", "--img-size", "32", "--max-tokens", "63"], "32x32 makes 64 patches, more than 63"),
        (["digits", "--limit", "0"], "expected a whole number above 0, got '0'"),
        (["digits", "--class-map", "{gone}"], "No such file"),
        (["digits", "--plot", "accuracy.xyz"], "--plot must be a .png, .svg or .pdf"),
        (["digits", "--plot", "{gone}/a.png"], "the folder .*gone does not exist"),
        (["digits", "--results", "{gone}/r.jsonl"], "No such file"),
        (["digits", "--results", "{flat}/1.png"], "line 1 of .* is not a result"),
        ([], "the following arguments are required: DATA"),
    ],
)
def test_bad_input_gets_one_line_and_exit_code_2(arguments, message, tmp_path, imagenet, capsys):
    for name in ("flat", "hollow/0", "other/cow"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("flat/1.png", "flat/2.JPEG", "flat/3.png", "other/cow/1.png"):
        digit_images()[0][0].save(tmp_path / name)
    vit.save_checkpoint(vit.create_model(DIGITS, depth=1, num_classes=0), tmp_path / "headless.safetensors")
    names = {name: tmp_path / name for name in ("gone", "flat", "hollow", "other")}
    names |= {"headless": tmp_path / "headless.safetensors", "imagenet": imagenet[1]}
    if "--model" not in arguments:
        arguments = [*arguments, "--model", DIGITS]
    try:
        code = main(["evaluate", *(argument.format(**names) for argument in arguments)])
    except SystemExit as stop:  # argparse's own
        code = stop.code
    out, err = capsys.readouterr()
    assert code == 2 and out == ""
    assert re.search(message, err) and len(err.splitlines()) == 1, err
