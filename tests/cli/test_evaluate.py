"""`vit evaluate`: the figures against direct computations, the classes' order, and what is refused."""

import json
import re
import shutil
import sys

import pytest
import timm
import torch
from helpers import randomize
from PIL import Image
from torchvision.datasets import ImageFolder

import vit
from vit.cli import datasets, evaluate, main
from vit.cli.datasets import draw_samples, find_samples, match_classes
from vit.cli.evaluate import measure, wilson
from vit.image import create_transform
from vit.resources import digit_images, imagenet_categories, imagenet_synsets

DIGITS = "vit_digits_patch4_32"


@pytest.fixture(scope="module")
def digits():
    return vit.load_pretrained(DIGITS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Forty digits, one sub-folder each and one below it, at several shapes; a text file beside them."""
    folder = tmp_path_factory.mktemp("data")
    images, truth = digit_images()
    for i in range(40):
        below = folder / str(truth[i].item()) / ("below" if i % 7 == 0 else "")
        below.mkdir(parents=True, exist_ok=True)
        images[i].resize((24 + i % 3 * 9, 24 + i % 4 * 7)).save(below / f"{i:02}.png")
    (folder / "notes.txt").write_text("no image")
    return folder


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    """A model with ImageNet's classes and a random head, whose outputs differ from digit to digit; and its file."""
    model = vit.load_pretrained(DIGITS)
    model.reset_classifier(1000)
    randomize(model.head)
    model.categories = imagenet_categories()
    return model, vit.save_checkpoint(model, tmp_path_factory.mktemp("imagenet") / "m.safetensors")


def rows(capsys, *args):
    """The command's exit code, its JSON rows, and its lines on stderr."""
    code = main(["evaluate", *map(str, args), "--json"])
    out, err = capsys.readouterr()
    return code, [json.loads(line) for line in out.splitlines()], err.splitlines()


def place(folder, images, names):
    """Write images into the sub-folders of those names."""
    for i, (image, name) in enumerate(zip(images, names)):
        (folder / name).mkdir(parents=True, exist_ok=True)
        image.save(folder / name / f"{i:03}.png")


# The figures.


def test_the_digits_have_the_readmes_accuracies(capsys):
    """README.md's table, to the image."""
    expected = {"24x24": 356, "32x32": 357, "32x48": 358, "48x32": 358, "48x48": 359, "64x64": 357}
    assert main(["evaluate", "digits", "--model", DIGITS, "--img-size", "24,32,32x48,48x32,48,64"]) == 0
    out = capsys.readouterr().out
    right = {size: int(count) for size, count in re.findall(r"^(\d+x\d+) .*\((\d+) of 360\)$", out, re.M)}
    assert right == expected
    assert "98.89%" in out and "matched by the model's categories" in out


def test_the_figures_equal_a_direct_computation(folder, digits, capsys):
    """timm's own evaluation transform, images in torchvision's order, one at a time, and their largest logits."""
    args = (folder, "--model", DIGITS, "--img-size", "24,32x48", "--crop-pct", "0.8", "-b", "7")
    code, found, _ = rows(capsys, *args)
    assert code == 0 and [row["size"] for row in found] == ["24x24", "32x48"]
    settings = digits.preprocessing
    for row, size in zip(found, ((24, 24), (32, 48))):
        transform = timm.data.create_transform(
            (3, *size), crop_pct=0.8, interpolation=settings.interpolation, mean=settings.mean, std=settings.std
        )
        right = right5 = 0
        for path, label in ImageFolder(folder).samples:
            with torch.no_grad():
                logits = digits(transform(Image.open(path).convert("RGB"))[None])[0]
            right += int(logits.argmax()) == label
            right5 += int((logits > logits[label]).sum()) < 5
        assert (row["right"], row["right5"], row["images"]) == (right, right5, 40)
        assert 0 < right < right5 < 41  # neither is trivial
        assert row["top1"] == right / 40 and row["top5"] == right5 / 40
        assert row["tokens"] == 1 + size[0] * size[1] // 16 and row["ms_per_image"] > 0
        assert (row["mode"], row["crop_pct"]) == ("crop", 0.8)


def test_native_sizes(folder, digits, capsys):
    code, (row,), _ = rows(capsys, folder, "--model", DIGITS, "--img-size", "native", "-b", "9")
    transform = create_transform(digits, mode="native")
    right = tokens = 0
    for path, label in ImageFolder(folder).samples:
        with torch.no_grad():
            image = transform(vit.load_image(path))[None]
            right += int(digits(image).argmax()) == label
            tokens += digits.forward_features(image).shape[1]
    assert code == 0 and row["right"] == right > 0 and row["tokens"] == tokens / 40 and row["size"] == "native"


def test_modes(folder, capsys):
    """The folder's default is the model's own, the digits' is "squash"; "native" takes neither."""
    for data, own in ((folder, "crop"), ("digits", "squash")):
        for option, mode in (([], own), (["--mode", "squash"], "squash"), (["--mode", "crop"], "crop")):
            args = (data, "--model", DIGITS, "--img-size", "16,native", *option, "--limit", "1")
            assert [row["mode"] for row in rows(capsys, *args)[1]] == [mode, "native"]
    _, (row,), _ = rows(capsys, "digits", "--model", DIGITS, "--crop-pct", "0.9", "--limit", "1")
    assert (row["mode"], row["crop_pct"]) == ("crop", 0.9)


def test_the_interval():
    """Against the values of Newcombe (1998), table I, method 3, and its ends."""
    for right, total, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (1, 29, 0.0061, 0.1718)):
        assert wilson(right, total) == pytest.approx((low, high), abs=6e-5)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=6e-5)
    assert wilson(20, 20) == pytest.approx((0.8389, 1.0), abs=6e-5)
    for total in range(1, 400):  # whatever the rounding
        assert wilson(0, total)[0] == 0.0 and wilson(total, total)[1] == 1.0


def test_the_limit_draws_from_all_classes(folder, capsys):
    samples = find_samples(str(folder))
    drawn = draw_samples(samples, 20, 0)
    assert len(set(drawn)) == 20 and set(drawn) <= set(samples) and drawn == draw_samples(samples, 20, 0)
    assert drawn != draw_samples(samples, 20, 1) and drawn != samples[:20]
    assert len({name for _, name in drawn}) > 5
    assert draw_samples(samples, 41, 0) == draw_samples(samples, None, 0) == samples
    _, (row,), _ = rows(capsys, folder, "--model", DIGITS, "--limit", "20")
    assert row["images"] == 20


def test_logits_that_are_not_numbers_have_no_accuracy():
    model = vit.create_model(DIGITS, depth=1).eval()
    torch.nn.init.constant_(model.head.bias, float("nan"))
    with pytest.raises(ValueError, match="NaN"):
        measure(model, create_transform(model), digit_images()[0][:2], torch.tensor([0, 1]), 2, set())


# The classes.


def test_images_and_order_are_image_folders(folder):
    samples = find_samples(str(folder))
    theirs = ImageFolder(folder)
    assert {(str(path), theirs.class_to_idx[name]) for path, name in samples} == set(theirs.samples)
    assert len(samples) == len(theirs.samples)


def test_sorted_order_is_image_folders(tmp_path, digits, capsys):
    """Names that sort otherwise by number, by case and as people do; placed so that all must be right."""
    names = ["c10", "c2", "C3", "b", "a", "é", "z z", "1st", "_", "c1"]
    images, truth = digit_images()
    order = sorted(names)
    place(tmp_path, images[:100], [order[label] for label in truth[:100]])
    theirs = ImageFolder(tmp_path).class_to_idx
    found, rule = match_classes(sorted(theirs), digits.categories, 10)
    assert found == theirs and "sorted order" in rule
    code, (row,), _ = rows(capsys, tmp_path, "--model", DIGITS, "--mode", "squash")
    assert code == 0 and row["top1"] > 0.95 and row["classes"] == rule


def test_rules():
    synsets, categories = imagenet_synsets(), imagenet_categories()
    found, rule = match_classes([synsets[5], synsets[700]], categories, 1000)
    assert found == {synsets[5]: 5, synsets[700]: 700} and "synsets" in rule
    found, rule = match_classes([categories[3], categories[999]], categories, 1000)
    assert found == {categories[3]: 3, categories[999]: 999} and "categories" in rule
    found, rule = match_classes(["cat", "ant"], ["dog", "cat", "ant"], 3)
    assert found == {"cat": 1, "ant": 2} and "categories" in rule
    found, rule = match_classes(["0", "0017", "3"], None, 18)
    assert found == {"0": 0, "0017": 17, "3": 3} and "whole numbers" in rule
    found, rule = match_classes(["10", "9"], ["9", "10", *map(str, range(9))], 11)  # categories come first
    assert found == {"10": 1, "9": 0} and "categories" in rule


@pytest.mark.parametrize(
    ("names", "categories", "message"),
    [
        (["n01440764", "tench"], imagenet_categories(), "1 of 2 .*: 'tench'; expected ImageNet's synsets"),
        (["n01440764", "n00000000"], imagenet_categories(), "'n00000000'; expected ImageNet's synsets"),
        (["n01440764"], [f"c{i}" for i in range(1000)], "1 of 1 .*'n01440764'; expected the model's categories"),
        (["crane", "hen"], imagenet_categories(), "1 of 2 .*: 'crane'; expected the model's categories"),  # two cranes
        (["cat", "cow"], ["cat", "dog"], "1 of 2 .*'cow'; expected the model's categories"),
        (["1", "2", "3"], None, "1 of 3 .*'3'; expected whole numbers from 0 to 2"),  # not by their sorted order
        (["a", "b", "c", "d"], None, r"4 of 4 .*: 'a', 'b', 'c' \.\.\.; expected .* exactly 1000 sub-folders"),
    ],
)
def test_refused_classes(names, categories, message):
    count = len(categories) if categories else 3 if "1" in names else 1000
    with pytest.raises(ValueError, match=message) as error:
        match_classes(sorted(names), categories, count)
    assert "\n" not in str(error.value)


def test_a_subset_of_imagenet(tmp_path, imagenet, capsys):
    """Images in the folder of the class that the model predicts are all right; in its second choice's, none."""
    model, file = imagenet
    transform = create_transform(model)
    images = digit_images()[0][:12]
    with torch.no_grad():
        best = model(torch.stack([transform(image) for image in images])).argsort(dim=1, descending=True)
    assert len(best[:, 0].unique()) > 3
    for choice, top1, top5 in ((0, 1.0, 1.0), (1, 0.0, 1.0), (4, 0.0, 1.0), (5, 0.0, 0.0)):
        folder = tmp_path / str(choice)
        place(folder, images, [imagenet_synsets()[output] for output in best[:, choice]])
        code, (row,), _ = rows(capsys, folder, "--model", file)
        assert code == 0 and (row["top1"], row["top5"]) == (top1, top5) and "synsets" in row["classes"]


def test_class_maps(tmp_path, digits, capsys):
    """Class names of one's own, by line and by number; the lines' order is the outputs', whatever the sorted order."""
    images, truth = digit_images()
    words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    place(tmp_path / "data", images[:60], [words[label] for label in truth[:60]])
    (tmp_path / "lines.txt").write_text("\n".join(words) + "\n")
    pairs = [f"{word}\t{i}" for i, word in enumerate(words)]
    (tmp_path / "pairs.txt").write_text("\n".join(pairs[::-1]) + "\n\n")
    options = ("--model", DIGITS, "--mode", "squash")
    for name in ("lines.txt", "pairs.txt"):
        code, (row,), _ = rows(capsys, tmp_path / "data", *options, "--class-map", tmp_path / name)
        assert code == 0 and row["top1"] > 0.95 and name in row["classes"]
    _, (row,), _ = rows(capsys, tmp_path / "data", *options)
    assert row["top1"] < 0.5  # the sorted order of the words is another


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("a\nb", "1 of 3 .*'c'; expected a line of .* for each"),
        ("a\nb\nc\na", "1 of 3 .*'a'; expected a line"),
        ("a 0\nb 1\nc 10", "gives 'c' output 10, and the model's are 0 to 9"),
        ("".join(f"z{i}\n" for i in range(9)) + "a\nb\nc", "gives 'b' output 10"),
        ("a\n\nb\nc", "line 2 of .* is empty, expected the name of a class"),
        ("# classes\na\nb\nc", "line 1 of .* is a comment"),
        ("a 0\na 1\nb 2\nc 3", "1 of 3 .*'a'; expected a line"),
    ],
)
def test_refused_class_maps(lines, message, tmp_path):
    (tmp_path / "map.txt").write_text(lines)
    with pytest.raises(ValueError, match=message):
        datasets.apply_class_map(["a", "b", "c"], tmp_path / "map.txt", 10)


def test_class_names_may_end_in_numbers(tmp_path):
    (tmp_path / "map.txt").write_text("boeing 737\nairbus 3\n")
    assert datasets.apply_class_map(["airbus 3"], tmp_path / "map.txt", 10) == {"airbus 3": 1}


# What cannot be read, what is kept, what is refused.


def test_unreadable_images_are_reported_once_and_left_out(tmp_path, capsys):
    images, truth = digit_images()
    place(tmp_path, images[:30], [str(label.item()) for label in truth[:30]])
    _, clean, _ = rows(capsys, tmp_path, "--model", DIGITS, "--img-size", "32,48", "--mode", "squash")
    (tmp_path / "0" / "000.png").write_bytes(b"")  # before all others, so that labels would shift
    (tmp_path / "3" / "cut.png").write_bytes((tmp_path / "3" / "002.png").read_bytes()[:60])
    code, found, errors = rows(capsys, tmp_path, "--model", DIGITS, "--img-size", "32,48", "--mode", "squash", "-b", 4)
    assert code == 1 and len(errors) == 3
    assert "000.png" in errors[0] and "cut.png" in errors[1] and errors[2] == "vit evaluate: 2 of 32 could not be used"
    for before, row in zip(clean, found):
        assert (row["images"], row["unreadable"], row["right"]) == (30, 2, before["right"])
    for path in tmp_path.rglob("*.png"):
        path.write_bytes(b"")
    code, found, errors = rows(capsys, tmp_path, "--model", DIGITS)
    assert code == 2 and found == [] and errors[-1] == "vit evaluate: none of the 32 images can be used"


def test_results_are_kept_and_taken_up(tmp_path, folder, capsys, monkeypatch):
    file = tmp_path / "results.jsonl"
    args = (folder, "--model", DIGITS, "--results", file)
    _, first, _ = rows(capsys, *args, "--img-size", "24,32")
    assert [json.loads(text) | {"reused": False} for text in file.read_text().splitlines()] == first
    measured = []
    monkeypatch.setattr(evaluate, "measure", lambda *args: measured.append(args[1].size) or measure(*args))
    _, again, _ = rows(capsys, *args, "--img-size", "32,40,24")
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
        rows(capsys, *args, "--img-size", "24", *other)
        assert measured == [(24, 24)], other
    (moved := tmp_path / "moved").symlink_to(folder)  # the same images elsewhere
    assert rows(capsys, moved, *args[1:], "--img-size", "24")[1][0]["reused"]
    shutil.copytree(folder, copy := tmp_path / "copy")
    (renamed := copy / "3" / "02.png").rename(copy / "3" / "02b.png")
    assert not rows(capsys, copy, *args[1:], "--img-size", "24")[1][0]["reused"]
    renamed.write_bytes((copy / "3" / "02b.png").read_bytes() + b" ")
    (copy / "3" / "02b.png").unlink()
    assert not rows(capsys, copy, *args[1:], "--img-size", "24")[1][0]["reused"]


def test_optimized(optimized_dtype, tmp_path, capsys, monkeypatch):
    dtype = optimized_dtype
    file = tmp_path / "results.jsonl"
    args = ("digits", "--model", DIGITS, "--limit", "200", "--results", file)
    _, (plain,), _ = rows(capsys, *args)
    measured = []
    monkeypatch.setattr(evaluate, "measure", lambda *args: measured.append(args[0].optimized) or measure(*args))
    code, (fast,), _ = rows(capsys, *args, "--optimize", dtype)
    assert code == 0 and measured == [dtype] and not fast["reused"]  # the other's figures are not its own
    assert (plain["optimize"], fast["optimize"]) == (None, dtype)
    assert abs(fast["right"] - plain["right"]) <= (0 if dtype == "float32" else 2)
    assert rows(capsys, *args, "--optimize", dtype)[1] == [fast | {"reused": True}]
    assert main(["evaluate", *map(str, args), "--optimize", dtype]) == 0
    assert capsys.readouterr().out.startswith(f"{DIGITS} optimized in {dtype} on digits")

    before = {name: value for name, value in plain.items() if name not in ("optimize", "reused")}
    file.write_text(json.dumps(before) + "\n")  # as it was written before there was --optimize
    assert rows(capsys, *args)[1][0]["reused"] and not rows(capsys, *args, "--optimize", dtype)[1][0]["reused"]


def test_an_interruption_keeps_what_is_finished(tmp_path, folder, capsys, monkeypatch):
    def interrupted(model, transform, *others):
        if transform.size == (32, 32):
            raise KeyboardInterrupt
        return measure(model, transform, *others)

    monkeypatch.setattr(evaluate, "measure", interrupted)
    file = tmp_path / "results.jsonl"
    code, found, _ = rows(capsys, folder, "--model", DIGITS, "--img-size", "24,32", "--results", file)
    assert code == 130 and [row["size"] for row in found] == ["24x24"] and len(file.read_text().splitlines()) == 1


def test_the_plot(tmp_path, folder, capsys):
    pytest.importorskip("matplotlib")
    file = tmp_path / "accuracy.png"
    code, found, _ = rows(capsys, folder, "--model", DIGITS, "--img-size", "24,16x32,32x16,native", "--plot", file)
    assert code == 0 and len(found) == 4
    picture = Image.open(file)
    assert picture.width > 500 and len(picture.convert("RGB").getcolors(1 << 20)) > 20


def test_a_plot_without_matplotlib_is_refused_before_anything_is_computed(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr(evaluate, "find_samples", lambda data: pytest.fail("it went on"))
    code, found, (error,) = rows(capsys, "digits", "--model", DIGITS, "--plot", "accuracy.png")
    assert code == 2 and found == [] and "pip install 'vit-small[viz]'" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{gone}"], "there is no folder .*gone"),
        ([""], "there is no folder ''"),
        (["{flat}"], "holds 3 images and no sub-folders: expected one sub-folder per class"),
        (["{hollow}"], "hollow/0 holds no images"),
        (["{other}"], "1 of 1 classes of the data match none of the model: 'cow'; expected the model's categories"),
        (["digits", "--model", "{headless}"], "has no classifier"),
        (["digits", "--model", "{imagenet}"], "the digits have 10 classes and the model 1000"),
        (["digits", "--img-size", "32,30"], "nearest size that works is 32 x 32"),
        (["digits", "--img-size", "32,,48"], "expected 384, 224x448 .height x width. or native, got ''"),
        (["digits", "--img-size", "native", "--mode", "crop"], "cuts and squashes nothing"),
        (["digits", "--crop-pct", "1.5", "--mode", "crop"], "crop_pct must lie in"),
        (["digits", "--crop-pct", "0.9", "--mode", "squash"], "has no use in mode 'squash'"),
        (["digits", "--img-size", "32", "--max-tokens", "63"], "32x32 makes 64 patches, more than 63"),
        (["digits", "--limit", "0"], "expected a whole number above 0, got '0'"),
        (["digits", "--class-map", "{gone}"], "No such file"),
        (["digits", "--plot", "accuracy.xyz"], "--plot must be a .png, .svg or .pdf"),
        (["digits", "--plot", "{gone}/a.png"], "there is no folder .*gone"),
        (["digits", "--results", "{gone}/r.jsonl"], "No such file"),
        (["digits", "--results", "{flat}/1.png"], "line 1 of .* is no result"),
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
