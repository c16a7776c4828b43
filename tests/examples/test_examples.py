"""The examples run, print what they promise, and wrote what ships with the package."""

import math
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import FLOAT32, difference, images, randomize
from PIL import Image
from torch import Tensor

import vit
from vit.attention import sdpa
from vit.resources import DATA, digit_images

EXAMPLES = Path(__file__).parents[2] / "examples"
RESEARCH = [
    "head_ablation",
    "log_n_temperature",
    "numpy_forward",
    "relative_bias",
    "rotary",
    "token_merging",
    "windowed",
]
NUMBER = re.compile(r"(?<![\w.])[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?(?!\w|\.\d)")  # 32x32 and float32 are words
TINY = vit.ViTConfig(img_size=(24, 40), patch_size=4, embed_dim=64, depth=3, num_heads=4, num_classes=7, reg_tokens=2)


def run(script: str, *args: object, folder: Path | None = None) -> str:
    command = [sys.executable, str(EXAMPLES / script), *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.examples
def test_training_on_digits(tmp_path):
    """One epoch of the eighty: it saves a model, and it holds out the images that ship with the package."""
    folders = ("--output", tmp_path / "model", "--heldout", tmp_path / "heldout")
    out = run("train_digits.py", "--epochs", 1, "--threads", 1, *folders)
    assert re.fullmatch(r"held-out accuracy at 32x32: [\d.]+% \(\d+ of 360\)", out.splitlines()[-1])
    model = vit.load_pretrained(tmp_path / "model")
    assert model.config == vit.load_pretrained("vit_digits_patch4_32").config
    assert model.categories == list("0123456789")
    for name in ("heldout.png", "heldout.txt"):
        new, shipped = tmp_path / "heldout" / name, DATA / "digits" / name
        if name.endswith("png"):
            assert np.array_equal(np.asarray(Image.open(new)), np.asarray(Image.open(shipped)))
        else:
            assert new.read_text() == shipped.read_text()


def test_the_shipped_model_is_right_on_heldout_digits():
    model = vit.load_pretrained("vit_digits_patch4_32")
    digits, truth = digit_images()
    assert len(digits) == len(truth) == 360
    for size, least in (((32, 32), 0.98), ((24, 24), 0.97), ((48, 48), 0.97), ((32, 48), 0.97)):
        transform = vit.create_transform(model, size, mode="squash")
        with torch.inference_mode():
            guesses = model(torch.stack([transform(image) for image in digits])).argmax(dim=1)
        assert (guesses == truth).float().mean() >= least, size
    assert (guesses == truth.roll(1)).float().mean() < 0.3  # shifted labels are mostly wrong


def test_timm_reads_the_shipped_model():
    """timm's own loader reads our trained weights: the file is a timm checkpoint."""
    import timm

    twin = timm.create_model(
        f"local-dir:{DATA / 'vit_digits_patch4_32'}", pretrained=True, dynamic_img_size=True
    ).eval()
    model = vit.load_pretrained("vit_digits_patch4_32")
    with torch.no_grad():
        for size in ((32, 32), (48, 24), (64, 64)):
            x = images(2, 3, *size)
            assert difference(model(x), twin(x)) <= 2 * FLOAT32


def test_patches(tmp_path):
    out = run("patches.py", "-o", tmp_path / "patches.png")
    assert str(tmp_path / "patches.png") in out
    new, shown = Image.open(tmp_path / "patches.png"), Image.open(EXAMPLES / "pictures" / "patches.png")
    assert np.array_equal(np.asarray(new), np.asarray(shown))


def promised(script: str) -> list[str]:
    """What an example's docstring says that it prints: the indented block after a line that ends in "prints"."""
    docstring = (EXAMPLES / script).read_text(encoding="utf-8").split('"""')[1]
    block = re.search(r"\bprints(?:, [^\n]+,)?:?\n\n((?: {4}.*\n)+)", docstring)
    assert block, f"{script} does not say what it prints"
    return block[1].splitlines()


def words(line: str) -> list[str]:
    """A line without its numbers."""
    return NUMBER.sub("#", line).split()


def strays(line: str, printed: str) -> list[str]:
    """The numbers of a printed line that are not what was promised.

    Percentages are held to 1.5 points, counts of images ("357 of 360") to 5 images, all else to 25 %, or a unit in the
    last decimal; times are not.
    """
    found = []
    for one, other in zip(NUMBER.finditer(line), NUMBER.finditer(printed)):
        behind, (want, got) = line[one.end() :], (float(one[0]), float(other[0]))
        if re.match(r" ?(ms|s|seconds)\b", behind):
            continue
        if re.match(r" ?%", behind):
            tolerance = 1.5
        elif re.match(r" of \d", behind):
            tolerance = 5
        else:
            decimals = re.search(r"\.(\d+)$", one[0])
            tolerance = max(0.25 * abs(want), 10 ** -len(decimals[1]) if decimals else 0)
        if not abs(got - want) <= tolerance * (1 + 1e-9):
            found.append(f"{other[0]} for {one[0]}")
    return found


@pytest.mark.parametrize(
    ("line", "printed", "wrong"),
    [
        ("windows of 2x2: 98.89% (356 of 360), 9.7 ms", "windows of 2x2:  97.50% (351 of 360), 97 ms", 0),
        ("windows of 2x2: 98.89% (356 of 360)", "windows of 2x2: 97.22% (350 of 360)", 2),
        ("loss 0.109, moved by -0.001 and 1e-05", "loss 0.136, moved by -0.002 and 1.2e-05", 0),
        ("loss 0.109, moved by -0.001 and 1e-05", "loss 0.137, moved by -0.003 and 2e-05", 3),
        ("loss 0.109", "loss nan", None),
        ("loss 0.109 at 32x32", "loss 0.109 at 32x48", None),
        ("rotary 98.61 %", "rotary", None),
    ],
)
def test_what_counts_as_promised(line, printed, wrong):
    assert (words(line) == words(printed)) == (wrong is not None)
    assert wrong is None or len(strays(line, printed)) == wrong


@pytest.mark.examples
@pytest.mark.parametrize("name", RESEARCH)
def test_research(name, tmp_path):
    """It runs from any folder, and prints and draws what its docstring says."""
    assert len((EXAMPLES / f"{name}.py").read_text(encoding="utf-8").splitlines()) <= 80
    lines = run(f"{name}.py", "-o", tmp_path / "picture.png", folder=tmp_path).splitlines()
    for line in promised(f"{name}.py"):
        while lines and words(lines[0]) != words(line):
            lines.pop(0)
        assert lines, f"{name}.py does not print, or not in this order: {line}"
        assert not strays(line, lines.pop(0)), line
    assert [path.name for path in tmp_path.iterdir()] == ["picture.png"]
    (shipped,) = EXAMPLES.glob(f"pictures/{name}.*")
    assert shipped.stat().st_size < 150_000
    for picture in (tmp_path / "picture.png", shipped):
        assert len(np.unique(np.asarray(Image.open(picture).convert("L")))) > 16, picture


@pytest.mark.parametrize("name", RESEARCH)
def test_research_says_what_to_expect(name):
    docstring = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8").split('"""')[1]
    assert docstring.splitlines()[2] == f"    python examples/{name}.py -o {name}.png"
    assert re.search(r"^Takes .*(second|minute)", docstring, re.MULTILINE)
    assert any(NUMBER.search(line) for line in promised(f"{name}.py"))


def qkv(T: int, seed: int = 0) -> Tensor:
    """q, k and v, each [2, 4, T, 16], with scores that differ much."""
    return 2 * torch.randn(3, 2, 4, T, 16, generator=torch.Generator().manual_seed(seed))


def weights(attend, T: int, seed: int = 0) -> Tensor:
    """[2, 4, T, T], the attention weights: the output for one-hot values."""
    q, k, _ = qkv(T, seed)
    return attend(q, k, torch.eye(T).expand(2, 4, T, T))


def runs_in_a_model(attention, **options) -> None:
    """It runs for any grid, gives the same for packed images, and changes the output."""
    model = randomize(vit.ViT(TINY)).eval().requires_grad_(False)
    pixels = [images(1, 3, *size)[0] for size in ((24, 40), (12, 28), (4, 4))]
    plain = model(pixels[0][None])
    model.set_attention(attention, **options)
    for name, parameter in model.named_parameters():
        if name.endswith("table"):
            parameter.requires_grad_(False).normal_(generator=torch.Generator().manual_seed(2))
    each = torch.cat([model(one[None]) for one in pixels])
    assert difference(model.forward_packed(pixels), each) <= FLOAT32
    assert difference(each[:1], plain) > 1e-3


def test_windows(load):
    """Windows lie as in Swin; patches attend within their window and to the prefix; one large window is `sdpa`."""
    example = load("windowed")
    assert example.windows((4, 6), 4, block=0).unique(return_inverse=True)[1].tolist() == [[0] * 4 + [1] * 2] * 4
    shifted = [[0, 0, 1, 1, 1, 1, 2]] * 2 + [[3, 3, 4, 4, 4, 4, 5]] * 3  # 5x7, moved by 2: none is divisible
    assert example.windows((5, 7), 4, block=3).unique(return_inverse=True)[1].tolist() == shifted
    for block in (0, 1):
        number = example.windows((5, 7), 4, block).flatten()
        found = weights(partial(example.windowed, grid=(5, 7), prefix=3, block=block, window=4), 38)
        assert torch.equal(found[:, :, 3:, 3:] > 0, (number[:, None] == number).expand(2, 4, 35, 35))
        assert (found[:, :, :3] > 0).all() and (found[:, :, :, :3] > 0).all()
        kept = weights(sdpa, 38).where(found > 0, 0)
        assert difference(found, kept / kept.sum(dim=-1, keepdim=True)) <= FLOAT32
        alone = example.windowed(*qkv(38), grid=(5, 7), prefix=3, block=block, window=7)
        assert difference(alone, sdpa(*qkv(38))) <= FLOAT32  # a bias of zeros may take another kernel than none
    bias = torch.randn(38, 38)
    whole = example.windowed(*qkv(38), bias=bias, grid=(5, 7), prefix=3, block=1, window=9)
    assert difference(whole, sdpa(*qkv(38), bias=bias)) <= FLOAT32
    runs_in_a_model(example.windowed, window=2)


def test_relative_bias(load):
    """A table of zeros is `sdpa`; a bias depends on the offset alone, has directions, and leaves out the prefix."""
    example = load("relative_bias")
    attend = example.RelativeBias(TINY, 0).requires_grad_(False)  # of a grid of 6x10
    assert attend.table.shape == (4, 11, 19)
    assert difference(attend(*qkv(63), grid=(6, 10), prefix=3), sdpa(*qkv(63))) <= FLOAT32
    attend.table.normal_(generator=torch.Generator().manual_seed(2))
    bias = torch.zeros(4, 63, 63)
    for i, j in ((i, j) for i in range(60) for j in range(60)):
        bias[:, 3 + i, 3 + j] = attend.table[:, j // 10 - i // 10 + 5, j % 10 - i % 10 + 9]
    assert difference(attend(*qkv(63), grid=(6, 10), prefix=3), sdpa(*qkv(63), bias=bias)) <= FLOAT32
    more = torch.randn(63, 63)
    assert difference(attend(*qkv(63), bias=more, grid=(6, 10), prefix=3), sdpa(*qkv(63), bias=bias + more)) <= FLOAT32
    # On another grid, a table that rises with the offset does so still, and no offset is the middle.
    attend.table.copy_(torch.arange(-9.0, 10).expand(4, 11, 19))
    for grid in ((3, 7), (8, 20)):
        T = 3 + math.prod(grid)
        log = (weights(partial(attend, grid=grid, prefix=3), T).log() - weights(sdpa, T).log())[0, 0, 3, 3:].view(grid)
        rises = log[0] - log[0, 0]
        assert (rises.diff() > 0).all() and difference(log, log[:1].expand(grid)) <= 1e-3
        assert difference(rises[1:-2], torch.arange(1, grid[1] - 2) * 19 / (2 * grid[1] - 1)) <= 1e-3
    runs_in_a_model(example.RelativeBias)


def test_rotary(load):
    """Scores depend on differences of rows and of columns only; the prefix is not rotated."""
    example = load("rotary")
    q, k = torch.randn(2, 1, 1, 1, 16, generator=torch.Generator().manual_seed(3)).expand(2, 1, 1, 38, 16)
    turned_q, turned_k = (example.rotate(x, (5, 7), prefix=3, span=None)[0, 0] for x in (q, k))  # the same everywhere
    scores = (turned_q @ turned_k.T)[3:, 3:].view(5, 7, 5, 7)
    assert difference(scores[1:, 2:, 1:, 2:], scores[:-1, :-2, :-1, :-2]) <= FLOAT32
    assert difference(scores[0, 0], scores[0, 0, :1].expand(5, 7)) > 0.1  # rows count,
    assert difference(scores[0, 0], scores[0, 0, :, :1].expand(5, 7)) > 0.1  # and columns,
    assert difference(scores[0, 0, :5, :5], scores[0, 0, :5, :5].T) > 0.1  # each for itself,
    assert difference(scores[2, 3], scores[2, 3].flip(0, 1)) > 0.1  # and directions
    assert torch.equal(turned_q[:3], q[0, 0, :3])
    assert difference(turned_q.norm(dim=1), q[0, 0].norm(dim=1)) <= FLOAT32
    plain = sdpa(*qkv(38))
    assert difference(example.rotary(*qkv(38), grid=(5, 7), prefix=3, span=0), plain) <= FLOAT32
    assert difference(example.rotary(*qkv(38), grid=(5, 7), prefix=3, span=8), plain) > 1e-2
    rows = example.rotate(torch.ones(1, 1, 8, 16), (8, 1), prefix=0, span=8)  # of the trained grid they are 1 apart
    assert difference(example.rotate(torch.ones(1, 1, 24, 16), (24, 1), prefix=0, span=8)[:, :, 1::3], rows) <= FLOAT32
    runs_in_a_model(example.rotary, span=8)


def test_log_n(load):
    """At the trained number of tokens it is `sdpa`; otherwise scores, but not biases, grow with the logarithm."""
    example = load("log_n_temperature")
    assert torch.equal(example.log_n(*qkv(64), trained=64), sdpa(*qkv(64)))
    (q, k, v), bias = qkv(64), torch.randn(64, 64)
    expected = (1.5 * q @ k.mT / 4 + bias).softmax(dim=-1) @ v  # log 64 is 1.5 times log 16
    assert difference(example.log_n(q, k, v, bias=bias, trained=16), expected) <= FLOAT32
    runs_in_a_model(example.log_n, trained=20)
