"""The command line as people use it: subprocesses, their output and their exit codes."""

import json
import os
import re
import shutil
import struct
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import randomize
from PIL import Image

import vit
from vit.cli import main, one_line_warnings, options
from vit.cli.attention import draw
from vit.cli.predict import batches, decode
from vit.image import ImageError, create_transform, load_image
from vit.resources import digit_images, imagenet_synsets

DIGITS = "vit_digits_patch4_32"


def run(*args: object, **env: str) -> subprocess.CompletedProcess:
    """The installed command, `vit`, without a terminal and without a network."""
    command = Path(sys.executable).with_name("vit")
    return subprocess.run(
        [str(command), *map(str, args)],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **env},
    )


@pytest.fixture
def call(capsys):
    """As `run`, in this process, which need not start."""

    def call(*args: object) -> subprocess.CompletedProcess:
        capsys.readouterr()
        code = main([str(arg) for arg in args])
        return subprocess.CompletedProcess(args, code, *capsys.readouterr())

    return call


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Twelve digits as PNG files, one of them in a folder below, beside a text file."""
    folder = tmp_path_factory.mktemp("digits")
    (folder / "below").mkdir()
    images, truth = digit_images()
    for i in range(12):
        place = folder / "below" if i == 11 else folder
        images[i].save(place / f"{i:02}_is_{truth[i]}.png")
    (folder / "notes.txt").write_text("no image")
    return folder


@pytest.fixture(scope="module")
def imagenet_file(tmp_path_factory):
    """A shallow ViT-S/16 with random weights and ImageNet's classes, in timm's layout."""
    folder = tmp_path_factory.mktemp("imagenet")
    model = randomize(vit.create_model("vit_small_patch16_224", depth=1))
    return vit.save_checkpoint(model, folder / "model", layout="timm")


def test_predict_a_folder(folder):
    result = run("predict", folder, "--model", DIGITS, "-k", "2", "--mode", "squash")
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    blocks = re.findall(r"_is_(\d)\.png\n +([\d.]+)%  (\d)\n +([\d.]+)%  (\d)\n", result.stdout)
    assert len(blocks) == 12
    assert sum(truth == guess for truth, _, guess, _, _ in blocks) >= 11
    assert all(float(first) >= float(second) for _, first, _, second, _ in blocks)


def test_predict_equals_the_library(folder, call):
    result = call(
        "predict", folder / "*.png", "--model", DIGITS, "--json", "-b", "5", "--img-size", "40x48", "-k", "10"
    )
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [line["path"] for line in lines] == sorted(str(path) for path in folder.glob("*.png"))
    model = vit.load_pretrained(DIGITS)
    transform = create_transform(model, (40, 48))
    for line in lines:
        with torch.no_grad():
            expected = model(transform(load_image(line["path"]))[None]).softmax(dim=-1)[0]
        assert len(line["predictions"]) == 10
        for answer in line["predictions"]:
            assert answer["label"] == str(answer["class"])
            assert abs(answer["probability"] - expected[answer["class"]].item()) < 1e-5


def test_predict_names_imagenets_classes(folder, imagenet_file, call):
    result = call("predict", next(folder.glob("*.png")), "--model", imagenet_file, "--json", "--img-size", "64")
    (line,) = result.stdout.splitlines()
    for answer in json.loads(line)["predictions"]:
        assert answer["synset"] == imagenet_synsets()[answer["class"]]
        assert isinstance(answer["label"], str)
    table = call("predict", next(folder.glob("*.png")), "--model", imagenet_file, "--img-size", "64").stdout
    assert re.search(r"%  n\d{8}  \w", table)


def test_predict_native_sizes(tmp_path, folder, call):
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


def test_predict_optimized(folder, tmp_path, optimized_dtype, capsys):
    """The same answers, and from a file that was optimized before."""
    dtype = optimized_dtype
    command = ["predict", str(folder), "--json", "-k", "10", "--model"]
    vit.kernels.save(vit.kernels.optimize(vit.load_pretrained(DIGITS), dtype), tmp_path / "fast.safetensors")
    found = []
    for arguments in ([DIGITS], [DIGITS, "--optimize", dtype], [str(tmp_path / "fast.safetensors")]):
        assert main([*command, *arguments]) == 0
        lines = capsys.readouterr().out.splitlines()
        found.append([json.loads(line)["predictions"] for line in lines])
    plain, fast, saved = found
    assert fast == saved and fast != plain
    for ours, theirs in zip(fast, plain, strict=True):
        assert ours[0]["label"] == theirs[0]["label"]
        assert abs(ours[0]["probability"] - theirs[0]["probability"]) < (1e-5 if dtype == "float32" else 0.1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--optimize", "float32", "--device", "cuda"],
            "optimized in float32 runs on cpu, so --device cuda",
        ),
        (["--optimize", "int8", "--dtype", "bfloat16"], "takes images in float32, so --dtype bfloat16 cannot go"),
        (["--optimize", "int4"], "'int4'"),
        (["--model", "{fast}", "--optimize", "float32"], "is optimized already, so --optimize cannot go with it"),
        (["--model", "{fast}", "--dtype", "float16"], "takes images in float32, so --dtype float16 cannot go"),
        (["--model", "{fast}", "--device", "cuda"], "optimized in float32 runs on cpu, so --device cuda"),
        (["--model", "{fast}", "--set", "eps=1e-5"], "--layout, --prefix, --sha256 and --set are for checkpoints"),
    ],
)
@pytest.mark.parametrize("command", ["predict {image}", "features {image} -o {out}", "evaluate digits", "bench"])
def test_what_cannot_go_with_optimize(command, arguments, message, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(options, "device", torch.device)  # whether this machine has it or not
    names = {"fast": tmp_path / "fast.safetensors", "out": tmp_path / "out.safetensors"}
    names["image"] = next(folder.glob("*.png"))
    vit.kernels.save(vit.kernels.optimize(vit.load_pretrained(DIGITS)), names["fast"])
    if "--model" not in arguments:
        arguments = [*arguments, "--model", DIGITS]
    try:
        code = main([argument.format(**names) for argument in (*command.split(), *arguments)])
    except SystemExit as stop:  # argparse's own
        code = stop.code
    out, err = capsys.readouterr()
    assert code == 2 and out == "" and message in err and len(err.splitlines()) == 1, err
    assert not names["out"].exists()


def test_predict_reports_and_skips_what_it_cannot_read(tmp_path, folder):
    for path in sorted(folder.glob("*.png"))[:3]:
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
    assert len(errors) == 5 and errors[-1] == "vit predict: 4 of 7 could not be used"
    for name in ("empty.png", "cut.png", "float.tiff", "gone.png"):
        assert sum(name in line for line in errors) == 1
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["predict", "{empty}"], "holds no images"),
        (["predict", "{empty}/*.jpg"], "no file matches"),
        (["predict", "{image}", "--model", "gone.safetensors"], "gone.safetensors does not exist"),
        (["predict", "{image}", "--model", "{empty}"], "holds none of model.safetensors"),
        (["predict", "{image}", "--model", "vit_smal_patch16_224"], "Did you mean 'vit_small_patch16_224"),
        (["predict", "{image}", "--model", DIGITS, "--img-size", "30"], "nearest size that works is 32 x 32"),
        (["predict", "{image}", "--img-size", "0"], "expected 384, 224x448 .height x width. or native, got '0'"),
        (["predict", "{image}", "--img-size", "3x"], "224x448 .height x width. or native, got '3x'"),
        (["predict", "{image}", "--batch-size", "-1"], "expected a whole number above 0, got '-1'"),
        (["predict", "{image}", "--device", "abacus"], "'abacus' cannot be used here"),
        (["predict", "{image}", "--dtype", "int8"], "invalid choice: 'int8'"),
        (["predict", "{image}", "--model", "{headless}"], "has no classifier"),
        (["predict"], "the following arguments are required: IMAGE"),
        (["inspect", "{image}"], r"must end in one of .safetensors, .index.json, .npz, .pth"),
        (["convert", DIGITS, "{empty}/x.safetensors", "--to", "tim"], "Did you mean 'timm'"),
        (["convert", DIGITS, "{empty}/x.pth", "--to", "vit"], "must end in .safetensors"),
        (["convert", DIGITS, "{image}", "--to", "vit"], "must end in .safetensors or be a folder"),
        (["convert", DIGITS, "{empty}/x.safetensors", "--to", "timm"], "x.safetensors must be a folder"),
        (["predict", ""], "expected the name of an image"),
        (["predict", "{image}", "--device", "meta"], "'meta' cannot be used here"),
        (["inspect", ""], "expected the name of a model"),
        (["demo", "-o", "{empty}/x.xyz"], "must be a .png"),
        (["attention", "{image}", "--model", DIGITS, "-o", "{empty}/x.txt"], "must be a .png"),
        (["attention", "{image}", "--model", DIGITS, "--block", "6", "-o", "{empty}/a.png"], "block 6 is out of range"),
        (["attention", "gone.png", "--model", DIGITS, "-o", "{empty}/a.png"], "cannot use image 'gone.png'"),
        (["attention", "{image}", "--model", DIGITS, "--max-tokens", "3", "-o", "{empty}/a.png"], "makes 4 patches at"),
        (["predictt"], "invalid choice: 'predictt'"),
    ],
)
def test_bad_input_gets_one_line_and_exit_code_2(arguments, message, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    names = {"empty": tmp_path / "empty", "image": next(folder.glob("*.png")), "headless": tmp_path / "m.safetensors"}
    names["empty"].mkdir()
    vit.save_checkpoint(vit.create_model(DIGITS, depth=1, num_classes=0), names["headless"])
    try:
        code = main([argument.format(**names) for argument in arguments])
    except SystemExit as stop:  # argparse's own
        code = stop.code
    out, err = capsys.readouterr()
    assert code == 2 and out == ""
    assert re.search(message, err) and len(err.splitlines()) == 1, err
    assert list(names["empty"].iterdir()) == []


def test_without_a_network_the_default_model_says_how_to_go_on(folder, tmp_path):
    start = time.perf_counter()
    result = run("predict", next(folder.glob("*.png")), HF_HUB_CACHE=str(tmp_path), HF_HUB_OFFLINE="0",
                 HF_ENDPOINT="http://127.0.0.1:9")  # fmt: skip
    assert result.returncode == 2 and time.perf_counter() - start < 30
    assert len(result.stderr.splitlines()) == 1
    for part in ("timm/vit_small_patch16_224.augreg_in21k_ft_in1k", "pass a local file or folder", "`vit demo`"):
        assert part in result.stderr


def test_a_warning_is_one_line_in_the_name_of_the_command(folder, tmp_path):
    model = vit.load_pretrained(DIGITS)
    state = {f"backbone.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save(state | {"decoder.weight": torch.ones(2)}, tmp_path / "detector.pt")
    image, heads = next(folder.glob("*.png")), f"--set=num_heads={model.config.num_heads}"
    result = run("predict", image, "--model", tmp_path / "detector.pt", "--prefix", "backbone.", heads)
    assert "vit predict: warning: left behind: decoder (1)" in result.stderr.splitlines(), result.stderr
    assert ".py" not in result.stderr


def test_warnings_of_other_kinds_stay_as_they_are():
    before, place = warnings.formatwarning, ("a.py", 3)
    with one_line_warnings("predict"):
        assert (
            warnings.formatwarning("two\nlines", UserWarning, *place, line=None) == "vit predict: warning: two lines\n"
        )
        assert warnings.formatwarning("old", FutureWarning, *place) == before("old", FutureWarning, *place)
    assert warnings.formatwarning is before


def test_inspect(tmp_path, imagenet_file, call):
    shown = call("inspect", imagenet_file).stdout
    for part in ("blocks.0.attn.qkv.weight", "1152x384", "layout", "timm", "num_heads = 6", "crop_pct = 0.9", "sha256"):
        assert part in shown
    facts = json.loads(call("inspect", imagenet_file, "--json").stdout)
    assert facts["layout"] == "timm" and facts["config"]["depth"] == {"value": 1, "from": "config.json"}
    assert facts["parameters"] == sum(p.numel() for p in vit.load_pretrained(imagenet_file).parameters())


def test_inspect_shows_a_checkpoint_that_cannot_be_loaded(tmp_path, call):
    from safetensors.torch import save_file

    save_file({"conv1.weight": torch.ones(3, 4)}, tmp_path / "m.safetensors")
    result = call("inspect", tmp_path / "m.safetensors")
    assert result.returncode == 2
    assert "conv1.weight" in result.stdout and "3x4" in result.stdout
    assert (
        "cannot be loaded" in result.stderr
        and "unknown layout" in result.stderr
        and len(result.stderr.splitlines()) == 1
    )


def test_convert_there_and_back(tmp_path, call):
    assert run("convert", DIGITS, tmp_path / "ours.safetensors", "--to", "vit").returncode == 0
    result = call("convert", tmp_path / "ours.safetensors", tmp_path / "theirs", "--to", "timm")
    assert (
        result.returncode == 0 and "vit -> timm" in result.stdout and "every tensor equal bit for bit" in result.stdout
    )
    original = vit.load_pretrained(DIGITS)
    back = vit.load_pretrained(tmp_path / "theirs")
    assert all(torch.equal(a, b) for a, b in zip(original.parameters(), back.parameters()))
    assert back.config == original.config and back.categories == original.categories

    before = (tmp_path / "ours.safetensors").read_bytes()
    refused = call("convert", DIGITS, tmp_path / "ours.safetensors", "--to", "vit")
    assert refused.returncode == 2 and "--force replaces" in refused.stderr
    assert (tmp_path / "ours.safetensors").read_bytes() == before
    assert call("convert", DIGITS, tmp_path / "ours.safetensors", "--to", "vit", "--force").returncode == 0


def test_demo(tmp_path):
    start = time.perf_counter()
    result = run("demo", "-o", tmp_path / "new" / "demo.png", HF_ENDPOINT="http://127.0.0.1:9")
    elapsed = time.perf_counter() - start
    assert result.returncode == 0, result.stderr
    assert elapsed < 60  # 15 s on a quiet machine
    rows = re.findall(r"^(\d+x\d+) +\d+x\d+ +([\d.]+)%", result.stdout, re.M)
    accuracy = {size: float(value) for size, value in rows}
    assert set(accuracy) == {"32x32", "48x48", "32x48"}
    assert accuracy["32x32"] >= 98 and min(accuracy.values()) >= 97
    assert float(re.search(r"^sdpa +([\d.e-]+)$", result.stdout, re.M).group(1)) <= 1e-5
    picture = Image.open(tmp_path / "new" / "demo.png")
    assert picture.width > 800 and len(picture.getcolors(1 << 20)) > 100
    assert str(tmp_path / "new" / "demo.png") in result.stdout


def test_the_reader_may_stop_reading(folder):
    command = f"{Path(sys.executable).with_name('vit')} predict {folder} --model {DIGITS} | head -n 1"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120)
    assert "Traceback" not in result.stderr and "Broken" not in result.stderr


def test_a_terminal_gets_a_progress_bar(folder):
    fcntl, pty, termios = (pytest.importorskip(name) for name in ("fcntl", "pty", "termios"))
    main_end, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    command = [Path(sys.executable).with_name("vit"), "predict", folder, "--model", DIGITS]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=terminal, timeout=120)
    drawn = os.read(main_end, 1 << 20).decode()
    os.close(terminal)
    assert done.returncode == 0 and "/12 [" in drawn and "image/s" in drawn
    assert b"/12" not in done.stdout


def test_batches_keep_order():
    model = vit.load_pretrained(DIGITS)
    crop, native = create_transform(model), create_transform(model, mode="native")
    items = [(Path(str(i)), ImageError("x") if i % 3 else torch.zeros(3, 8, 8)) for i in range(7)]
    groups = [[int(str(path)) for path, _ in batch] for batch in batches(items, 3, crop)]
    assert groups == [[0, 1, 2], [3, 4, 5], [6]]
    assert list(batches([], 3, crop)) == []
    large = [(Path(str(i)), torch.zeros(3, 128, side)) for i, side in enumerate((128, 64, 64, 128, 64, 128))]
    groups = [[int(str(path)) for path, _ in batch] for batch in batches(large, 4, native)]  # 1024 tokens, or 512
    assert groups == [[0, 1, 2], [3, 4], [5]]  # 2048 at a time
    assert len(list(batches(large, 4, crop))) == 2


def test_decoding_stays_a_bounded_way_ahead(folder):
    """Thousands of files stream: what is decoded and not yet used is bounded."""
    decoded = []
    path = next(folder.glob("*.png"))
    transform = create_transform(vit.load_pretrained(DIGITS))
    stream = decode([path] * 1000, lambda image: (decoded.append(1), transform(image))[1])
    first = next(stream)
    time.sleep(0.2)
    assert first[1].shape == (3, 32, 32) and 1 <= len(decoded) <= 8 * 8 + 9
    stream.close()
    assert len(decoded) < 200


@pytest.mark.parametrize("options", [[], ["--img-size", "48x24", "--block", "0"], ["--img-size", "64"]])
def test_attention_draws_the_photograph_and_each_head(tmp_path, options, capsys):
    photo = Image.effect_noise((61, 33), 80)
    photo.save(tmp_path / "a.png")
    output = tmp_path / "below" / "out.png"
    assert main(["attention", str(tmp_path / "a.png"), "--model", DIGITS, "-o", str(output), *options]) == 0
    picture = Image.open(output)
    model = vit.load_pretrained(DIGITS)
    size = {0: {"mode": "native"}, 4: {"size": (48, 24)}, 2: {"size": 64}}[len(options)]
    H, W = create_transform(model, **size)(photo).shape[1:]
    assert f"{H // 4} x {W // 4} patches, block {-1 if len(options) < 4 else 0}, 3 heads" in capsys.readouterr().out
    scale = 420 / max(H, W)
    width, height = round(W * scale), round(H * scale)  # each picture's, 8 pixels apart: 5 of them, 4 in a row
    assert picture.size == (4 * width + 24, 2 * height + 8)
    lefts = (0, width + 8, 2 * width + 16)
    photo_shown, mean, head = (np.asarray(picture.crop((x, 0, x + width, height))) for x in lefts)
    assert np.array_equal(photo_shown[..., 0], photo_shown[..., 1])  # grey
    assert not np.array_equal(mean[..., 0], mean[..., 1]) and not np.array_equal(mean, head)  # heat


def test_attention_is_drawn_where_it_falls(tmp_path):
    """A model that looks at one patch only: the heat lies there, in each head and on average."""
    weights = np.full((2, 4, 6), 1e-6)
    weights[:, 1, 4] = 1
    sheet = np.asarray(draw(Image.new("RGB", (60, 40)), weights)).astype(int)
    height, width = (sheet.shape[0]), (sheet.shape[1] - 3 * 8) // 4
    for left in (width + 8, 2 * (width + 8), 3 * (width + 8)):
        heat = sheet[:, left : left + width, 0] - sheet[:, left : left + width, 2]
        y, x = np.unravel_index(heat.argmax(), heat.shape)
        assert height / 4 < y < height / 2 and width * 4 / 6 < x < width * 5 / 6
