"""The command line as a whole: exit codes, one line per error, warnings, pipes and terminals."""

import os
import re
import shlex
import struct
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch

import vit
from vit.cli import main, make_parser, one_line_warnings

DIGITS = "vit_digits_patch4_32"


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
def test_bad_input_gets_one_line_and_exit_code_2(arguments, message, digit_files, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    names = {
        "empty": tmp_path / "empty",
        "image": next(digit_files.glob("*.png")),
        "headless": tmp_path / "m.safetensors",
    }
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


def test_without_a_network_the_error_says_what_to_do(digit_files, tmp_path, run):
    start = time.perf_counter()
    result = run("predict", next(digit_files.glob("*.png")), HF_HUB_CACHE=str(tmp_path), HF_HUB_OFFLINE="0",
                 HF_ENDPOINT="http://127.0.0.1:9")  # fmt: skip
    assert result.returncode == 2 and time.perf_counter() - start < 30
    assert len(result.stderr.splitlines()) == 1
    for part in ("timm/vit_small_patch16_224.augreg_in21k_ft_in1k", "pass a local file or folder", "`vit demo`"):
        assert part in result.stderr


def test_the_help_opens_with_commands_that_parse(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    lines = capsys.readouterr().out.splitlines()
    last = lines.index("")
    assert stop.value.code == 0 and last >= 4 and lines[last + 1].startswith("usage: vit")
    for line in lines[:last]:
        command, _ = re.split(r"   +", line)
        program, *arguments = shlex.split(command)
        assert program == "vit" and make_parser().parse_args(arguments).run


def test_a_warning_is_one_line_in_the_name_of_the_command(digit_files, tmp_path, run):
    model = vit.load_pretrained(DIGITS)
    state = {f"backbone.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save(state | {"decoder.weight": torch.ones(2)}, tmp_path / "detector.pt")
    image, heads = next(digit_files.glob("*.png")), f"--set=num_heads={model.config.num_heads}"
    result = run("predict", image, "--model", tmp_path / "detector.pt", "--prefix", "backbone.", heads)
    assert "vit predict: warning: left behind: decoder (1)" in result.stderr.splitlines(), result.stderr
    assert ".py" not in result.stderr


def test_other_kinds_of_warnings_are_unchanged():
    before, place = warnings.formatwarning, ("a.py", 3)
    with one_line_warnings("predict"):
        assert (
            warnings.formatwarning("two\nlines", UserWarning, *place, line=None) == "vit predict: warning: two lines\n"
        )
        assert warnings.formatwarning("old", FutureWarning, *place) == before("old", FutureWarning, *place)
    assert warnings.formatwarning is before


@pytest.mark.parametrize(
    ("output", "code", "message"),
    [
        ("| head -n 1", 0, ""),
        ("| true", 0, ""),
        (">&-", 0, ""),
        ("> /dev/full", 2, "vit predict: [Errno 28] No space left on device\n"),
    ],
)
@pytest.mark.parametrize("command", ["vit", "RANK=0 python -m vit"])
def test_where_output_cannot_be_written(command, output, code, message, digit_files):
    """With Python's buffer, which `print` fills and the end of the command empties."""
    script = f"set -o pipefail; {command} predict {digit_files} --model {DIGITS} {output}"
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"
    result = subprocess.run(["bash", "-c", script], env=env, capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stderr) == (code, message)


def test_a_terminal_gets_a_progress_bar(digit_files, run):
    fcntl, pty, termios = (pytest.importorskip(name) for name in ("fcntl", "pty", "termios"))
    main_end, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    command = [Path(sys.executable).with_name("vit"), "predict", digit_files, "--model", DIGITS]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=terminal, timeout=120)
    drawn = os.read(main_end, 1 << 20).decode()
    os.close(terminal)
    assert done.returncode == 0 and "/12 [" in drawn and "image/s" in drawn
    assert b"/12" not in done.stdout
