"""What the README shows, run."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from vit.cli import main, make_parser
from vit.kernels.cpu.model import missing

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.S | re.M)
PYTHON = [text for language, text in BLOCKS if language == "python"]
SHELL = [text for language, text in BLOCKS if language == "sh"]


def test_python_blocks_run(default_hub, tmp_path):
    """All of them, one after the other, as somebody who follows the page; the call that is to fail does."""
    Image.new("RGB", (320, 240), "orange").save(tmp_path / "photo.jpg")
    refused = "model(torch.randn(1, 3, 230, 224))"
    text = "\n".join(PYTHON)
    assert refused in text
    run_it = f"try: {refused}\nexcept ValueError as error: refusal = str(error)\n"
    text = re.sub(re.escape(refused) + r".*\n", run_it, text)
    saved = 'vit.save_checkpoint(model, "for-timm", layout="timm")'  # what the shell command before it does
    if missing("int8"):
        text = text.replace('optimize(model, "int8", images)', "optimize(model)")
    if not torch.cuda.is_available():  # Triton's interpreter, which takes a minute for a whole image
        text = text.replace('(model.cuda(), "bfloat16")', '(model, "float16")')
        text = text.replace("fast(images.cuda())", "fast(images[:1, :, :16, :16])")
    text = text.replace("timm.create_model", f"import timm\n{saved}\ntimm.create_model")
    command = ["features", "photo.jpg", "-o", "features.safetensors", "--model", "vit_digits_patch4_32"]
    text = f"import vit.cli\nassert vit.cli.main({command}) == 0\n{text}\nprint(refusal)"
    (tmp_path / "readme.py").write_text(text)
    env = os.environ | {"HF_ENDPOINT": default_hub.endpoint, "HF_HUB_CACHE": str(tmp_path / "cache"),
                        "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}  # fmt: skip
    done = subprocess.run([sys.executable, "readme.py"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    quoted = re.search(r"# ValueError: (.*)\n\s*# (.*)\n", PYTHON[1])
    assert done.stdout.splitlines()[-1] == " ".join(quoted.groups())


@pytest.mark.parametrize("line", [line for block in SHELL for line in block.splitlines() if line.startswith("vit ")])
def test_commands_are_commands(line):
    arguments = shlex.split(line, comments=True)[1:]
    try:
        make_parser().parse_args(arguments)
    except SystemExit as stop:
        if "--device cuda" not in line:  # which only some machines have
            pytest.fail(f"vit refuses what the README shows: {line} (exit code {stop.code})")


def test_the_two_commands_are_those_of_ci():
    ci = (ROOT / ".ci" / "run").read_text()
    first, second = (re.sub(r" +#.*", "", line) for line in SHELL[0].splitlines())
    assert first == "pip install -e . && vit demo" and second == 'pip install -e ".[test]" && pytest -n auto'
    for part in ("-e . && vit demo", '-e ".[test]" && pytest -n auto'):
        assert part in ci


def test_the_demo_prints_what_the_readme_shows(tmp_path, capsys):
    assert main(["demo", "-o", str(tmp_path / "demo.png")]) == 0
    printed = capsys.readouterr().out

    def steady(text):  # without times, rounding errors and the path
        text = re.sub(r"(%) +[\d.]+ ", r"\1 TIME ", text)
        return [re.sub(r"\d\.\de[-+]\d+", "ERROR", line) for line in text.splitlines() if not line.startswith("where")]

    (shown,) = [text for language, text in BLOCKS if not language]
    assert steady(shown) == steady(printed)


def test_files_that_the_readme_names_exist():
    for name in re.findall(r"`((?:vit|weights|kernels|tests|examples)/[\w/.]*)`", README):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"\]\((examples/[\w/.]*)\)", README):
        assert (ROOT / name).exists(), name
