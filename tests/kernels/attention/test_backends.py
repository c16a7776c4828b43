"""The backends: a part of the matrix, refusals, and what `available` and `explain` say.

`python tests/reports/matrix.py` runs all of it; `pytest -m matrix` runs what compiles for long.
"""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import FLOAT32, difference, images, randomize
from matrix import BACKWARD, DEVICE, DTYPES, FORWARD, Cell, Found, cells, check_kernel, run, table

import vit
from vit.attention import reference
from vit.kernels.attention.backends import REFUSALS
from vit.kernels.attention.flex import flex
from vit.registry import get_attention

TINY = vit.ViTConfig(img_size=32, patch_size=4, embed_dim=64, depth=3, num_heads=2, num_classes=7)
BACKENDS = [name for name in REFUSALS if name != "flex"]  # flex compiles each case for seven seconds
CPU_ONLY = pytest.mark.skipif(DEVICE != "cpu", reason="says what a machine without CUDA says")


def check(cell: Cell) -> None:
    found = run(cell)
    assert found.refused or found.error <= found.bar, (cell, found)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_matrix(backend, dtype):
    for cell in cells([backend], [1, 17, 197]):
        if cell.dtype == dtype and not cell.compiled and (cell.T < 100 or backend != "triton" or DEVICE == "cuda"):
            check(cell)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_matrix_compiled(backend, dtype):
    check(Cell(backend, dtype, 17, bias=True, backward=backend not in ("flash",), compiled=True))


def test_the_matrix_can_fail(monkeypatch):
    """A backend with a small error, one that did not run, and one that should have refused."""
    cell = Cell("math", torch.float32, 17, bias=True, backward=True, compiled=False)
    wrong = lambda q, k, v, *, bias=None: get_attention("math")(q, k, v * (1 + 1e-4), bias=bias)  # noqa: E731
    monkeypatch.setattr("matrix.get_attention", lambda name: wrong)
    found = run(cell)
    assert found.error > found.bar == FORWARD
    monkeypatch.setattr("matrix.get_attention", lambda name: reference)
    with pytest.raises(AssertionError, match="_scaled_dot_product_attention_math"):
        run(cell)
    with pytest.raises(AssertionError):
        check_kernel(cell, {"aten::_scaled_dot_product_attention_math", "aten::_scaled_dot_product_flash_attention"})
    monkeypatch.setitem(REFUSALS, "math", lambda *given: "is tired")
    with pytest.raises(AssertionError, match="was to be refused: is tired"):
        run(cell)


def test_the_table_says_what_was_found():
    def rows(error, refused=""):
        return {cell: Found(error, BACKWARD, refused) for cell in cells(["math"], [1]) if cell.dtype == torch.float32}

    assert "| `math` | float32 | 0.50 / 0.50 | 0.50 / 0.50 |" in table(rows(1e-5))
    assert "2.00 FAILS" in table(rows(4e-5))
    text = table(rows(0.0, "has no battery"))
    assert "| (1) / (1) |" in text and "(1) refused: has no battery" in text


@pytest.mark.parametrize("backend", ["math", "flash"])
def test_a_model_runs_on_each(backend):
    model = randomize(vit.ViT(TINY)).eval()
    x = images(2, 3, 24, 40)
    expected = model(x)
    model.set_attention(backend)
    assert difference(model(x), expected) <= FLOAT32
    model.forward_packed([images(3, 8, 12), images(3, 16, 4)])


@CPU_ONLY
@pytest.mark.parametrize(
    ("backend", "message"),
    [
        ("efficient", "attention 'efficient' runs on cuda, not on cpu"),
        ("cudnn", "attention 'cudnn' runs on cuda, not on cpu"),
        ("varlen", "attention 'varlen' runs on cuda, not on cpu"),
        ("flex", "attention 'flex' has no backward pass on a cpu"),
    ],
)
def test_what_a_cpu_cannot_do_is_refused_with_the_block(backend, message):
    model = randomize(vit.ViT(TINY)).eval()
    model.set_attention(backend, [2])
    with pytest.raises(ValueError, match=f"block 2: {message}"):
        model(images(1, 3, 32, 32))


def test_bias_and_dtypes_are_refused():
    q = torch.randn(1, 2, 5, 32, device=DEVICE)
    for name in ("reference", "sdpa", "math", "flash", "flex"):
        with pytest.raises(ValueError, match=r"bias \[2, 5\] does not broadcast to \[B, A, T, T\] = \[1, 2, 5, 5\]"):
            get_attention(name)(q, q, q, bias=q[0, :, :, 0])
    with pytest.raises(ValueError, match="'flex' runs in float32, bfloat16 or float16, not in torch.float64"):
        flex(q.double(), q.double(), q.double())
    if DEVICE == "cpu":
        table = torch.zeros(5, requires_grad=True)
        with pytest.raises(ValueError, match="'flex' has no backward pass on a cpu"):
            flex(q, q, q, score_mod=lambda score, b, h, i, j: score + table[j])
        with pytest.raises(ValueError, match="'flash' has no gradient of bias on a cpu"):
            get_attention("flash")(q, q, q, bias=torch.zeros(5, 5, requires_grad=True))


# What the machine has, and what would run


@CPU_ONLY
def test_available():
    found = vit.kernels.available()
    assert list(found) == list(REFUSALS) and set(found) <= set(vit.attention_names())
    assert [name for name, reason in found.items() if reason is None] == [
        "reference", "sdpa", "bmm", "math", "flash", "flex", "triton",
    ]  # fmt: skip
    assert found["cudnn"] == "runs on cuda, not on cpu"
    assert set(vit.kernels.available("cuda").values()) == {"there is no device 'cuda' here"}


@CPU_ONLY
def test_explain(capsys):
    model = vit.ViT(TINY).eval()
    model.set_attention("flex", [1])
    model.set_attention(lambda q, k, v, *, bias=None: v, [2])
    vit.kernels.explain(model, images(2, 3, 24, 40))
    lines = capsys.readouterr().out.splitlines()
    assert lines[:4] == [
        "q, k and v: [2, 2, 61, 32] torch.float32 on cpu, with gradients",
        "block 0: 'sdpa': PyTorch takes FLASH_ATTENTION",
        "block 1: 'flex': refused: has no backward pass on a cpu: call the model under torch.no_grad()",
        "block 2: '<lambda>': runs as it is: no backend of vit.kernels",
    ]
    assert "  math       would run" in lines and "  cudnn      runs on cuda, not on cpu" in lines
    model.requires_grad_(False).head.requires_grad_(True)
    vit.kernels.explain(model, images(2, 3, 24, 40))
    assert "without gradients" in capsys.readouterr().out
    model.set_attention("math")
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        vit.kernels.explain(model, images(2, 3, 24, 40))
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [
        "q, k and v: [2, 2, 61, 32] torch.bfloat16 on cpu, without gradients", "blocks 0 to 2: 'math': runs",
    ]  # fmt: skip
    scale = torch.ones(1, requires_grad=True)
    model.requires_grad_(False).set_attention("flex", score_mod=lambda score, b, h, i, j: score * scale[0])
    vit.kernels.explain(model, images(2, 3, 24, 40))
    assert "'flex', score_mod=" in (out := capsys.readouterr().out) and "refused: has no backward pass" in out
    with pytest.raises(ValueError, match="got 30 x 32"):
        vit.kernels.explain(model, images(1, 3, 30, 32))


def test_explain_tells_of_biases_and_of_what_took_a_name_over(capsys):
    model = randomize(vit.create_model("vit_digits_patch4_32", reg_tokens=1)).eval()
    x = images(1, 3, 32, 32)

    def told():
        vit.kernels.explain(model, x)
        return capsys.readouterr().out

    for bias in (torch.zeros(66), torch.zeros(1, 66, 66)):
        model.set_attention("sdpa", bias=bias)
        model(x)
        assert "PyTorch takes FLASH_ATTENTION" in told()
    model.set_attention("flash", bias=torch.zeros(66))
    model.set_attention("flash", [1], bias=torch.zeros(66, requires_grad=True))
    assert "block 1: 'flash'" in told() and "refused: has no gradient of bias" in told()
    model.set_attention("flex", score_mod=5)
    assert "refused: takes a hashable function as score_mod, not 5" in told()
    model.requires_grad_(False)
    model.register_tokens.requires_grad_(True)
    model.set_attention("flex")
    assert "refused: has no backward pass" in told()
    own, flash = lambda q, k, v, *, bias=None: v, get_attention("flash")
    vit.register_attention("flash", own, overwrite=True)
    try:
        model.set_attention("flash")
        assert "runs as it is: no backend" in told()
    finally:
        vit.register_attention("flash", flash, exact=True, overwrite=True)


def test_threads_that_insist_on_kernels_disturb_no_others():
    flags = torch.backends.cuda
    before = flags.flash_sdp_enabled(), flags.math_sdp_enabled(), flags.mem_efficient_sdp_enabled()
    q, bias = images(1, 1, 5, 32), torch.zeros(5, 5, requires_grad=True)

    def attend(i: int) -> None:
        for _ in range(300):  # only math can give sdpa's bias a gradient
            out = get_attention(("math", "flash", "sdpa")[i % 3])(q, q, q, bias=bias if i % 3 == 2 else None)
            assert not torch.isnan(out).any()

    with ThreadPoolExecutor(6) as threads:
        list(threads.map(attend, range(6)))
    assert (flags.flash_sdp_enabled(), flags.math_sdp_enabled(), flags.mem_efficient_sdp_enabled()) == before


@pytest.mark.parametrize(
    ("name", "change", "text"),
    [
        ("flex", lambda x: x[:, :, :0], r"takes no empty tensors, not q \[1, 1, 5, 32\] and k \[1, 1, 0, 32\]"),
        ("flash", lambda x: x[:, :, :0], r"takes no empty tensors, not q \[1, 1, 5, 32\] and k \[1, 1, 0, 32\]"),
        ("flash", lambda x: x.mT.contiguous().mT, "takes q, k and v whose last stride is 1"),
    ],
)
def test_what_would_end_the_process_or_be_read_wrongly(name, change, text):
    q = images(1, 1, 5, 32)
    with torch.no_grad(), pytest.raises(ValueError, match=text):
        get_attention(name)(q, change(q), change(q))
