"""`vit features`: what is on disk is what the model computes, however often the run was interrupted."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import FLOAT32, difference, operations
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import vit
from vit.cli import main
from vit.cli.features import extract, lower
from vit.resources import digit_images

DIGITS = "vit_digits_patch4_32"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Eleven digits as PNG files of different sizes, and one file that is not an image."""
    folder = tmp_path_factory.mktemp("digits")
    for i, image in enumerate(digit_images()[0][:11]):
        image.resize((16 + 5 * i, 40 - 2 * i)).save(folder / f"{i:02}.png")
    (folder / "05b.png").write_bytes(b"no image")
    return folder


def features(folder: Path, output: Path, *options: object) -> int:
    return main(["features", str(folder), "-o", str(output), "--model", DIGITS, "-b", "4", *map(str, options)])


def metadata(file: Path) -> dict:
    with safe_open(file, "pt") as opened:
        return opened.metadata()


def expected(path: str, kind: str, **sizing) -> torch.Tensor:
    model = vit.load_pretrained(DIGITS)
    with torch.inference_mode():
        x = vit.create_transform(model, **sizing)(vit.load_image(path))[None]
        tokens = model.forward_features(x)
        if kind == "dense":
            h, w = x.shape[2] // 4, x.shape[3] // 4
            return tokens[0, 1:].T.reshape(-1, h, w)
        return tokens[0, 0] if kind == "class" else model.forward_head(tokens, pre_logits=True)[0]


@pytest.mark.parametrize("kind", ["class", "pooled", "dense"])
@pytest.mark.parametrize(
    ("options", "sizing"),
    [([], {}), (["--img-size", "native"], {"mode": "native"}),
     (["--img-size", 24, "--mode", "native"], {"size": 24, "mode": "native"}),
     (["--crop-pct", 0.6], {"crop_pct": 0.6})],
)  # fmt: skip
def test_equals_the_library(tmp_path, folder, capsys, kind, options, sizing):
    assert features(folder, tmp_path / "a.safetensors", "--kind", kind, *options) == 1  # one file is not an image
    out, err = capsys.readouterr()
    assert "11 images in 1 file" in out and "1 of 12 images could not be used" in err and "05b.png" in err
    tensors, about = load_file(tmp_path / "a.safetensors"), metadata(tmp_path / "a.safetensors")
    paths = json.loads(about["paths"])
    assert [Path(path).name for path in paths] == [f"{i:02}.png" for i in range(11)]
    assert list(json.loads(about["skipped"])) == [str(folder / "05b.png")] and about["kind"] == kind
    rows = tensors if kind == "dense" else dict(zip(paths, tensors["features"], strict=True))
    assert rows.keys() == set(paths)
    for path in paths:
        assert difference(rows[path], expected(path, kind, **sizing)) <= FLOAT32


def test_average_pooling_is_what_the_head_reads(tmp_path, folder):
    model = vit.load_pretrained(DIGITS)
    model.config = model.config.override(global_pool="avg")
    vit.save_checkpoint(model, tmp_path / "avg.safetensors")
    for kind in ("class", "pooled"):
        features(
            folder / "00.png", tmp_path / f"{kind}.safetensors", "--kind", kind, "--model", tmp_path / "avg.safetensors"
        )
    one, other = (load_file(tmp_path / f"{kind}.safetensors")["features"] for kind in ("class", "pooled"))
    assert difference(one, other) > 0.1


def test_float16(tmp_path, folder, capsys):
    features(folder, tmp_path / "a.safetensors", "--save-dtype", "float16")
    features(folder, tmp_path / "b.safetensors")
    half, full = (load_file(tmp_path / f"{name}.safetensors")["features"] for name in "ab")
    assert half.dtype == torch.float16 and torch.equal(half, full.half())
    model = vit.load_pretrained(DIGITS)
    with torch.no_grad():
        model.norm.weight.mul_(1e6)
    vit.save_checkpoint(model, tmp_path / "large.safetensors")
    large = ["--model", tmp_path / "large.safetensors", "--save-dtype", "float16"]
    assert features(folder, tmp_path / "c.safetensors", *large) == 2
    assert "float16 cannot hold" in capsys.readouterr().err and not (tmp_path / "c.safetensors").exists()


@pytest.mark.parametrize("kind", ["pooled", "dense"])
def test_several_files(tmp_path, folder, kind):
    features(folder, tmp_path / "one.safetensors", "--kind", kind)
    features(folder, tmp_path / "some.safetensors", "--kind", kind, "--shard", 5)
    names = [f"some-{i:05}-of-00003.safetensors" for i in (1, 2, 3)]
    index = json.loads((tmp_path / "some.safetensors.index.json").read_text())["shards"]
    assert [shard["file"] for shard in index] == names
    assert [path for shard in index for path in shard["paths"]] == json.loads(
        metadata(tmp_path / "one.safetensors")["paths"]
    )
    whole, parts = load_file(tmp_path / "one.safetensors"), [load_file(tmp_path / name) for name in names]
    if kind == "dense":
        together = {path: values for part in parts for path, values in part.items()}
        assert together.keys() == whole.keys()
        assert all(difference(together[path], whole[path]) <= FLOAT32 for path in whole)
    else:
        assert difference(torch.cat([part["features"] for part in parts]), whole["features"]) <= FLOAT32


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


@pytest.mark.parametrize("call", range(9))
def test_an_interrupted_run_resumes(tmp_path, folder, call, monkeypatch, capsys):
    """Interrupted at each renaming and each batch: the result is the same bytes as without interruption."""
    (tmp_path / "whole").mkdir()
    (tmp_path / "cut").mkdir()
    features(folder, tmp_path / "whole" / "a.safetensors", "--shard", 3)
    calls = 0

    def cut(function):
        def counted(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == call + 1:
                raise KeyboardInterrupt
            return function(*args, **kwargs)

        return counted

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", cut(os.replace))
        patch.setattr(vit.ViT, "forward_features", cut(vit.ViT.forward_features))
        assert features(folder, tmp_path / "cut" / "a.safetensors", "--shard", 3) == 130
    assert contents(tmp_path / "cut") != contents(tmp_path / "whole")
    computed = []
    forward = vit.ViT.forward_features
    monkeypatch.setattr(vit.ViT, "forward_features", lambda *args: computed.append(1) or forward(*args))
    done = len(list((tmp_path / "cut").glob("*.safetensors")))
    assert features(folder, tmp_path / "cut" / "a.safetensors", "--shard", 3) == 1
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    assert len(computed) == 4 - done  # nothing twice
    assert f", {done} of them from an earlier run" in capsys.readouterr().out or not done


def test_a_killed_run_resumes(tmp_path, folder):
    output = tmp_path / "a.safetensors"
    arguments = ["features", str(folder), "-o", str(output), "--model", DIGITS, "-b", "4", "--shard", "1"]
    command = [sys.executable, "-c", f"from vit.cli import main; main({arguments})"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while len(list(tmp_path.glob("a-*"))) < 3 and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert features(folder, output, "--shard", 1) == 1
    shards = json.loads((tmp_path / "a.safetensors.index.json").read_text())["shards"]
    assert [Path(path).name for shard in shards for path in shard["paths"]] == [f"{i:02}.png" for i in range(11)]


def test_another_run_is_not_mixed_in(tmp_path, folder, capsys):
    output = tmp_path / "a.safetensors"
    features(folder, output)
    before = output.read_bytes()
    for options, message in (
        (["--kind", "class"], "its kind is pooled, not class"),
        (["--img-size", "48"], "its transform is Transform"),
        (["--save-dtype", "float16"], "its dtype is float32, not float16"),
    ):
        assert features(folder, output, *options) == 2
        assert message in capsys.readouterr().err and output.read_bytes() == before
    assert features(folder / "00.png", output) == 2
    assert "exists and holds other images" in capsys.readouterr().err
    output.write_bytes(b"something else")
    assert features(folder, output) == 2
    assert "is not a safetensors file" in capsys.readouterr().err and output.read_bytes() == b"something else"


def test_optimized(tmp_path, folder, capsys, optimized_dtype, kernels):
    dtype = optimized_dtype
    plain, fast = tmp_path / "plain.safetensors", tmp_path / "fast.safetensors"
    assert kernels[dtype] not in operations(lambda: features(folder, plain))
    assert kernels[dtype] in operations(lambda: features(folder, fast, "--optimize", dtype))
    ours, theirs = (load_file(file)["features"] for file in (fast, plain))
    assert difference(ours, theirs) <= (FLOAT32 if dtype == "float32" else 0.1)
    assert metadata(fast)["optimize"] == dtype
    capsys.readouterr()
    for file, options, message in (
        (plain, ["--optimize", dtype], f"its optimize is None, not {dtype}"),
        (fast, [], f"its optimize is {dtype}, not None"),
    ):
        before = file.read_bytes()
        assert features(folder, file, *options) == 2
        assert message in capsys.readouterr().err and file.read_bytes() == before


def test_files_from_before_optimize_existed_are_reused(tmp_path, folder, capsys):
    output = tmp_path / "a.safetensors"
    features(folder, output)
    about = metadata(output)
    del about["optimize"]
    save_file(load_file(output), output, about)
    assert features(folder, output) == 1 and "from an earlier run" in capsys.readouterr().out
    assert features(folder, output, "--optimize", "float32") == 2


@pytest.mark.parametrize(
    ("output", "options", "message"),
    [
        ("a.npz", [], "must be a .safetensors file"),
        ("a.safetensors", ["--pca"], "must be a .png"),
        ("a.png", ["--pca", "--kind", "dense"], "--kind, --save-dtype and --shard cannot go with it"),
        ("a.safetensors", ["--img-size", "native", "--mode", "crop"], "--mode crop cannot go with it"),
        ("a.safetensors", ["--shard", "0"], "expected a whole number above 0"),
    ],
)
def test_bad_input(tmp_path, folder, capsys, output, options, message):
    try:
        code = features(folder, tmp_path / output, *options)
    except SystemExit as stop:
        code = stop.code
    err = capsys.readouterr().err
    assert code == 2 and message in err and len(err.splitlines()) == 1 and not list(tmp_path.iterdir())


def test_images_that_were_named_twice_count_once(tmp_path, folder):
    assert main(["features", str(folder / "00.png"), str(folder / "0[01].png"), "-o", str(tmp_path / "a.safetensors"),
                 "--model", DIGITS]) == 0  # fmt: skip
    assert len(json.loads(metadata(tmp_path / "a.safetensors")["paths"])) == 2


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", ["class", "pooled", "dense"])
def test_rows_keep_nothing_else_in_memory(kind, packed):
    batch = [(Path(str(i)), torch.randn(3, 32, 32)) for i in range(4)]
    found = extract(vit.load_pretrained(DIGITS), batch, kind, packed)
    rows = [lower(row, torch.float32, path) for path, row in found]
    assert len(rows) == 4 and all(row.untyped_storage().nbytes() == row.nbytes for row in rows)


def test_two_models_of_one_file_are_not_mixed(tmp_path, folder, capsys):
    one = load_file(Path(vit.__file__).parent / "data" / DIGITS / "model.safetensors")
    both = {f"{name}.{key}": value * scale for name, scale in (("a", 1), ("b", 2)) for key, value in one.items()}
    save_file(both, tmp_path / "both.safetensors")
    model = ["--model", tmp_path / "both.safetensors", "--set", "num_heads=3", "--prefix"]
    with pytest.warns(UserWarning, match="left behind"):
        assert features(folder / "00.png", tmp_path / "f.safetensors", *model, "a.") == 0
        assert features(folder / "00.png", tmp_path / "f.safetensors", *model, "b.") == 2
    assert "its prefix is a., not b." in capsys.readouterr().err


def test_files_of_others_stay(tmp_path, folder, capsys):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {}}')
    assert features(folder, tmp_path / "model.safetensors", "--shard", 5) == 2
    assert "is not an index of features" in capsys.readouterr().err and index.read_text() == '{"weight_map": {}}'
    assert len(list(tmp_path.iterdir())) == 1


def test_other_numbers_of_files_are_not_mixed(tmp_path, folder, capsys):
    output = tmp_path / "a.safetensors"
    assert features(folder, output, "--shard", 5) == 1
    before = contents(tmp_path)
    for options in (["--shard", 3], []):
        assert features(folder, output, *options) == 2
        assert "a-00001-of-00003.safetensors exists and belongs to another list" in capsys.readouterr().err
    assert contents(tmp_path) == before
    assert features(folder, tmp_path / "b.safetensors") == 1
    assert features(folder, tmp_path / "b.safetensors", "--shard", 5) == 2


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere names are text")
def test_a_name_that_is_not_utf8(tmp_path, folder, capsys):
    image = os.fsencode(tmp_path) + b"/\xff.png"
    with open(image, "wb") as file:
        file.write((folder / "00.png").read_bytes())
    assert features(os.fsdecode(image), tmp_path / "a.safetensors", "--kind", "dense") == 2
    assert "cannot name a tensor" in capsys.readouterr().err and not (tmp_path / "a.safetensors").exists()
    assert features(os.fsdecode(image), tmp_path / "a.safetensors") == 0
    assert json.loads(metadata(tmp_path / "a.safetensors")["paths"]) == [os.fsdecode(image)]


def test_no_image_can_be_read(tmp_path, folder):
    assert features(folder / "05b.png", tmp_path / "a.safetensors") == 1
    assert load_file(tmp_path / "a.safetensors")["features"].shape == (0, 96)


def test_a_killed_run_leaves_nothing(tmp_path, folder, monkeypatch):
    with monkeypatch.context() as patch:  # SIGKILL leaves no time to tidy up
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        patch.setattr(Path, "unlink", lambda *_, **__: None)
        assert features(folder, tmp_path / "a.safetensors") == 130
    assert len(list(tmp_path.glob(".a.safetensors.*"))) == 1
    features(folder, tmp_path / "a.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_an_image_that_changed_is_noticed(tmp_path, folder, capsys):
    out, mine = tmp_path / "f.safetensors", tmp_path / "images"
    shutil.copytree(folder, mine)
    (mine / "05b.png").unlink()
    assert features(mine, out) == 0
    capsys.readouterr()
    one = mine / "02.png"
    one.write_bytes((mine / "03.png").read_bytes())
    assert features(mine, out) == 2
    assert f"{one} has changed since" in capsys.readouterr().err


def test_skipped_images_are_reported_again(tmp_path, folder, capsys):
    out = tmp_path / "f.safetensors"
    assert features(folder, out) == 1
    capsys.readouterr()
    assert features(folder, out) == 1
    assert "05b.png" in (err := capsys.readouterr().err) and "(in an earlier run)" in err
