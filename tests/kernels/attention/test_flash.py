"""The `triton` attention, our FlashAttention-2, forward and backward, against `reference` in float64.

Where there is no CUDA it runs in Triton's interpreter, a tile at a time in numpy: the same kernels and numbers, without
a compiler. What only a GPU can show is skipped there, apart from whether the kernels compile for one.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import FLOAT32, GRADIENT, difference, images, randomize
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

import vit
from vit.attention import reference, sdpa
from vit.kernels.attention import flash
from vit.kernels.attention.flash import refusal, triton

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"  # read when the first call imports the kernels

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
needs_cuda = pytest.mark.skipif(not CUDA, reason="there is no CUDA device")
interpreter_only = pytest.mark.skipif(CUDA, reason="the kernels are compiled here, not interpreted")
# numpy warns of what a GPU does silently: tokens beyond T divide 0 by 0, and those results are not stored
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")

B, A = 2, 3
BATT, ATT, TT, KEYS = "B A T T", "1 A T T", "T T", "B 1 1 T"


def inputs(T: int, d: int, bias: str | None = None, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> tuple:
    """qkv [B, T, 3, A, d] as a ViT's Linear makes it, a bias in these letters, and the output's gradient [B, T, A * d].

    The bias has -inf for some pairs, and for two thirds of the keys, whole tiles of them, in its last row.
    """
    qkv, dout = scale * images(B, T, 3, A, d), images(B, T, A * d, seed=2)
    added = None
    if bias is not None:
        added = images(*({"B": B, "A": A, "T": T, "1": 1}[letter] for letter in bias.split()), seed=3)
        added.view(-1, T)[-1, : 2 * T // 3] = -torch.inf
        added.view(-1, T)[:, T // 2] = -torch.inf if T > 2 else 0
    return tuple(x if x is None else x.to(DEVICE, dtype) for x in (qkv, added, dout))


def run(fn, qkv, bias, dout, dtype=None) -> list[torch.Tensor]:
    """The output [B, T, A * d] of an attention function, and the gradients of qkv and of the bias if there is one."""
    qkv, bias, dout = (x if x is None else x.detach().to(dtype or x.dtype) for x in (qkv, bias, dout))
    leaves = [x.requires_grad_() for x in (qkv, bias) if x is not None]
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each [B, A, T, d], strided
    out = fn(q, k, v, bias=bias).transpose(1, 2).flatten(2)  # [B, T, A * d]
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def errors(results, expected) -> list[float]:
    return [difference(ours, theirs) for ours, theirs in zip(results, expected, strict=True)]


def rms(ours: torch.Tensor, exact: torch.Tensor) -> float:
    return (ours.double() - exact).square().mean().sqrt().item()


def check(results, expected) -> None:
    """Within the tolerances for float32."""
    out, *gradients = errors(results, expected)
    assert out <= FLOAT32 and max(gradients) <= GRADIENT, (out, gradients)


class Operators(TorchDispatchMode):
    """The names of our operators that run within it."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "vit":
            self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def launched(monkeypatch):
    """The names of the kernels that are launched, in order."""
    kernels, names = flash.kernels(), []

    def counted(name, kernel):
        class Counted:
            def __getitem__(self, grid):
                names.append(name)
                return kernel[grid]

        return Counted()

    for name in ("forward", "delta", "key_value", "query", "bias"):
        monkeypatch.setattr(kernels, f"{name}_kernel", counted(name, getattr(kernels, f"{name}_kernel")))
    return names


# Equal numbers


CASES = [
    (1, 32, None), (1, 128, None), (2, 64, BATT),
    (17, 32, KEYS), (17, 48, BATT), (17, 64, TT), (17, 80, None), (17, 96, ATT), (17, 100, None), (50, 128, BATT),
    (50, 128, None), (197, 64, None), (197, 32, BATT), (100, 48, ATT), (100, 64, TT),
    pytest.param(197, 64, KEYS, marks=pytest.mark.matrix),
]  # fmt: skip


@needs_triton
@pytest.mark.parametrize(("T", "d", "bias"), CASES)
def test_it_equals_reference(T, d, bias, launched):
    given = inputs(T, d, bias)
    check(run(triton, *given), run(reference, *given, torch.float64))
    assert launched == ["forward", "delta", "key_value", "query"] + ["bias"] * (bias is not None)


@needs_triton
@pytest.mark.parametrize("bias", ["T", "1 T", "A T T", "A T 1", "B 1 T T", "1 1 T T", "B A T 1"])
def test_every_way_to_broadcast_a_bias(bias):
    """A gradient that is zero, as of a bias that shifts whole rows of scores, is compared with the size of dout."""
    qkv, _, dout = inputs(17, 32)
    added = images(*({"B": B, "A": A, "T": 17, "1": 1}[letter] for letter in bias.split()), seed=3).to(DEVICE)
    ours, theirs = run(triton, qkv, added, dout), run(reference, qkv, added, dout, torch.float64)
    check(ours[:2], theirs[:2])
    assert ours[2].shape == added.shape
    largest = max(theirs[2].abs().max().item(), 0.1 * dout.abs().max().item())
    assert (ours[2].double() - theirs[2]).abs().max().item() <= GRADIENT * largest


def check_half(T: int, d: int, bias: str | None, dtype: torch.dtype, scale: float = 1.0) -> None:
    """Errors of the output and gradients are at most 1.5 times PyTorch's own in the same dtype.

    The bias is a constant: for one that needs a gradient PyTorch may compute in float32.
    """
    qkv, added, dout = inputs(T, d, bias, dtype, scale)

    def results(fn, dtype=dtype):
        constant = added if added is None else added.to(dtype)
        return run(lambda q, k, v, *, bias: fn(q, k, v, bias=constant), qkv, None, dout, dtype)

    ours, theirs, exact = results(triton), results(sdpa), results(reference, torch.float64)
    for what, a, b, c in zip(("out", "gradient"), ours, theirs, exact, strict=True):
        assert rms(a, c) <= 1.5 * rms(b, c), (what, rms(a, c), rms(b, c))


@needs_triton
@pytest.mark.parametrize(
    ("T", "d", "bias", "scale"),
    [(17, 48, None, 3), (50, 128, ATT, 1), (197, 64, None, 1), (197, 32, None, 3), (197, 64, KEYS, 3)],
)
def test_float16_errs_no_more_than_pytorch_does(T, d, bias, scale):
    check_half(T, d, bias, torch.float16, scale)


@needs_triton
def test_float16_gives_a_bias_its_gradient():
    given = inputs(50, 32, TT, torch.float16)
    ours, exact = run(triton, *given), run(reference, *given, torch.float64)
    assert ours[2].dtype == torch.float16
    assert rms(ours[2], exact[2]) <= 1e-3 * rms(exact[2], torch.zeros_like(exact[2]))


@needs_triton
def test_any_strides():
    T, d = 17, 48
    q, k, v = (images(B, A, T, d, seed=seed).to(DEVICE) for seed in range(3))
    bias = images(B, A, T, T, seed=3).to(DEVICE)
    every_second = torch.zeros(B, A, T, 2 * d, device=DEVICE)[..., ::2].copy_(k)  # [B, A, T, d]
    sideways = v.transpose(0, 3).contiguous().transpose(0, 3)  # [B, A, T, d]
    shared = q[:1, :1].expand(B, A, T, d)  # [B, A, T, d], strides 0
    turned = bias.mT.contiguous().mT  # [B, A, T, T]
    given, results = (shared, every_second, sideways, turned), []
    for fn, dtype in ((triton, torch.float32), (reference, torch.float64)):
        leaves = [x.detach().to(dtype).requires_grad_() for x in given]
        assert fn is reference or [x.stride() for x in leaves] == [x.stride() for x in given]
        out = fn(*leaves[:3], bias=leaves[3])
        results.append([out.detach(), *torch.autograd.grad(out.sum(), leaves)])  # the sum's gradient has strides 0
    check(*results)


@needs_triton
def test_merging_the_heads_copies_nothing():
    q, k, v = inputs(17, 48)[0].permute(2, 0, 3, 1, 4)
    out = triton(q, k, v)
    merged = out.transpose(1, 2).reshape(B, 17, A * 48)
    assert merged.data_ptr() == out.data_ptr() and merged.is_contiguous()


@needs_triton
def test_equal_inputs_give_equal_gradients_to_the_bit():
    given = inputs(50, 32, TT)
    assert all(torch.equal(one, other) for one, other in zip(run(triton, *given), run(triton, *given), strict=True))


@needs_triton
def test_a_query_without_keys_is_nan_as_in_reference():
    qkv, bias, dout = inputs(17, 32, BATT)
    bias[1, 2, 5] = -torch.inf
    for ours, theirs in zip(run(triton, qkv, bias, dout), run(reference, qkv, bias, dout, torch.float64), strict=True):
        assert ours.isnan().any() and torch.equal(ours.isnan(), theirs.isnan())
        assert difference(ours.nan_to_num(0), theirs.nan_to_num(0)) <= GRADIENT


@needs_triton
@pytest.mark.parametrize("shape", [(0, A, 5, 32), (B, A, 0, 32)])
def test_nothing_gives_nothing(shape):
    q, bias = torch.zeros(shape, device=DEVICE, requires_grad=True), torch.ones(1, 1, device=DEVICE, requires_grad=True)
    out = triton(q, q, q, bias=bias)
    out.sum().backward()
    assert out.shape == q.grad.shape == shape and bias.grad.item() == 0


# A test must be able to fail


MISTAKES = {  # name: what to break in the kernels, and which of out, dqkv and dbias must then be wrong
    "sums of values do not shrink": ("shrink[:, None] * total", "total", [0]),
    "sums of weights do not shrink": ("shrink * ell", "ell", [0]),
    "a tile of -inf is not looked for": ('tl.where(new_m == float("-inf"), 0.0, new_m)', "new_m", [0]),
    "keys beyond T weigh": ('float("-inf"))\n\n\n# Forward', "s)\n\n\n# Forward", [0]),
    "the bias is not in powers of two": ("added.to(tl.float32) * LOG2_E", "added.to(tl.float32)", [0, 1, 2]),
    "no delta for queries": ("(dp - delta_row[:, None])", "dp", [1, 2]),
    "no delta for keys": ("(dp_t - delta_row[None, :])", "dp_t", [1]),
    "the bias is not turned": ("whole(full.mT, q)", "whole(full, q)", [1]),
    "a shared bias gets one image's gradient": ("range(plane, B, planes)", "range(plane, plane + 1)", [2]),
    "a shared bias gets one head's gradient": ("range(head, A, heads)", "range(head, head + 1)", [2]),
    "keys are not scaled": ("dk_tile * (scale / LOG2_E)", "dk_tile", [1]),
    "queries are not scaled": ("dq_tile * (scale / LOG2_E)", "dq_tile", [1]),
}


@pytest.fixture
def edited(tmp_path, monkeypatch):
    """Replace a text in the file of `triton`'s kernels; one program adds up all that share a bias."""

    def edit(old: str, new: str) -> None:
        source = Path(flash.kernels().__file__).read_text()
        assert source.count(old) == 1
        path = tmp_path / "edited_kernels.py"
        path.write_text(source.replace(old, new).replace("PROGRAMS = 512", "PROGRAMS = 1"))
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        monkeypatch.setattr(flash, "kernels", lambda: module)

    return edit


@needs_triton
def test_one_program_adds_up_all_that_share_a_bias(edited):
    edited("PROGRAMS = 512", "PROGRAMS = 1")
    given = inputs(100, 32, TT)
    check(run(triton, *given), run(reference, *given, torch.float64))


@needs_triton
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_the_kernels_is_seen(mistake, edited):
    """Negative control: the comparison above, with one line of the kernels broken."""
    right, wrong, results = MISTAKES[mistake]
    edited(right, wrong)
    given = inputs(100, 32, TT)
    found = errors(run(triton, *given), run(reference, *given, torch.float64))
    assert not any(found[i] <= 100 * GRADIENT for i in results), found  # NaN is a mistake too


# What runs


@needs_triton
def test_a_bias_without_gradient_costs_nothing(launched):
    qkv, constant, dout = inputs(17, 32, BATT)
    with Operators() as seen:
        run(lambda q, k, v, *, bias: triton(q, k, v, bias=constant), qkv, None, dout)
    assert seen.names == ["flash_attention", "flash_attention_backward"]
    assert launched == ["forward", "delta", "key_value", "query"]


def small_model() -> vit.ViT:
    config = {"img_size": 24, "patch_size": 4, "embed_dim": 64, "num_heads": 2, "depth": 2, "num_classes": 5}
    return randomize(vit.ViT(vit.ViTConfig(**config))).to(DEVICE)


def logits_and_gradients(net, batch) -> list[torch.Tensor]:
    net.zero_grad()
    logits = net(batch)
    logits.square().sum().backward()
    return [logits.detach(), *(p.grad.clone() for p in net.parameters() if p.grad.abs().max() > 1e-6)]


@needs_triton
def test_a_model_takes_it(launched):
    net, batch = small_model(), images(2, 3, 16, 28).to(DEVICE)
    expected = logits_and_gradients(net, batch)
    net.set_attention(triton)
    check(logits_and_gradients(net, batch), expected)
    assert launched == ["forward"] * 2 + ["delta", "key_value", "query"] * 2  # once in each block


@needs_triton
@pytest.mark.parametrize(("backend", "bias"), [
    ("aot_eager", None), ("aot_eager", ATT), pytest.param("inductor", TT, marks=pytest.mark.matrix),
])  # fmt: skip
def test_compiled_it_is_one_graph_with_the_same_numbers(backend, bias, launched):
    given = inputs(20, 48, bias)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(
        lambda q, k, v, *, bias: triton(2 * q, k, v, bias=bias).sin(), fullgraph=True, backend=counter
    )
    ours = run(compiled, *given)
    check(ours, run(lambda q, k, v, *, bias: reference(2 * q, k, v, bias=bias).sin(), *given, torch.float64))
    assert counter.frame_count == 1
    assert launched == ["forward", "delta", "key_value", "query"] + ["bias"] * (bias is not None)


@needs_triton
def test_compiled_once_for_many_lengths():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda q, k, v, *, bias: triton(q, k, v), fullgraph=True, dynamic=True, backend=counter)
    for T in (5, 9, 17):
        given = inputs(T, 32)
        check(run(compiled, *given), run(reference, *given, torch.float64))
    assert counter.frame_count == 1


@needs_triton
def test_pytorch_finds_the_operators_well_formed():
    qkv, bias, _ = inputs(5, 32, TT)
    q, k, v = (x.detach().requires_grad_() for x in qkv.permute(2, 0, 3, 1, 4))
    torch.library.opcheck(flash.flash_attention, (q, k, v, bias.requires_grad_()))


@needs_triton
def test_there_is_no_forward_mode_derivative():
    q, k, v = torch.randn(3, 1, 1, 5, 32)
    with pytest.raises(ValueError, match="attention 'triton' has no forward-mode derivative"):
        torch.func.jvp(lambda q: triton(q, k, v), (q,), (q,))


@needs_triton
def test_there_is_no_second_derivative():
    q, k, v = (x.detach().requires_grad_() for x in inputs(5, 32)[0].permute(2, 0, 3, 1, 4))
    (gradient,) = torch.autograd.grad(triton(q, k, v).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="backward through vit.flash_attention_backward"):
        gradient.sum().backward()


# Refusals


def zeros(*shape: int, dtype: torch.dtype = torch.float32, device: str = DEVICE) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


q = (2, 3, 5, 32)
REFUSALS = {
    "three dimensions": ([zeros(3, 5, 32)] * 3, None, r"of one shape \[B, A, T, d\], not \[3, 5, 32\]"),
    "other lengths": ([zeros(*q), zeros(2, 3, 6, 32), zeros(2, 3, 6, 32)], None, r"one shape .*\[2, 3, 6, 32\]"),
    "double": ([zeros(*q, dtype=torch.float64)] * 3, None, "takes torch.float32, .*, not torch.float64"),
    "mixed dtypes": ([zeros(*q), zeros(*q), zeros(*q, dtype=torch.float16)], None, "of one dtype, not .*float16"),
    "mixed devices": ([zeros(*q), zeros(*q, device="meta"), zeros(*q)], None, "on one device, not .*meta"),
    "narrow heads": ([zeros(2, 3, 5, 31)] * 3, None, "heads 32 to 128 wide, not 31"),
    "wide heads": ([zeros(2, 3, 5, 129)] * 3, None, "heads 32 to 128 wide, not 129"),
    "another bias": ([zeros(*q)] * 3, zeros(2, 3, 5, 4), r"\[2, 3, 5, 4\] does not broadcast to .*\[2, 3, 5, 5\]"),
    "five dimensions": ([zeros(*q)] * 3, zeros(1, 2, 3, 5, 5), r"\[1, 2, 3, 5, 5\] does not broadcast"),
    "a bias in float16": ([zeros(*q)] * 3, zeros(5, 5, dtype=torch.float16), "bias is torch.float16"),
    "a bias elsewhere": ([zeros(*q)] * 3, zeros(5, 5, device="meta"), "bias is .* on meta"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_it_cannot_do_is_refused(case):
    qkv, bias, reason = REFUSALS[case]
    with pytest.raises(ValueError, match=f"^attention 'triton' .*{reason}") as error:
        triton(*qkv, bias=bias)
    assert str(error.value) == f"attention 'triton' {refusal(*qkv, bias)}" and "\n" not in str(error.value)


@needs_triton
def test_what_it_can_do_is_not_refused():
    assert refusal(*[zeros(*q)] * 3, zeros(5, 5)) is None
    assert refusal(*[zeros(1, 1, 1, 32, dtype=torch.float16)] * 3) is None
    assert refusal(*[zeros(1, 1, 1, 128)] * 3) is None


def test_without_triton_it_says_so(monkeypatch):
    monkeypatch.setattr(flash, "installed", lambda: False)
    with pytest.raises(ValueError, match="^attention 'triton' needs triton, which is not installed$"):
        triton(*[zeros(*q)] * 3)


@pytest.mark.parametrize(
    ("interpreted", "device", "dtype", "reason"),
    [
        (False, "cpu", torch.float32, "runs on CUDA; on a CPU only in Triton's interpreter, TRITON_INTERPRET=1 set"),
        (True, "mps", torch.float32, "runs on CUDA"),
        (True, "cpu", torch.bfloat16, "does not run in torch.bfloat16 in Triton's interpreter"),
        (True, "cuda", torch.bfloat16, "does not run in torch.bfloat16 in Triton's interpreter"),
        (False, "cuda", torch.bfloat16, "needs a GPU of compute capability 8.0, as Triton does, not 7.5"),
        (True, "cpu", torch.float16, None),
    ],
)
def test_machines_that_cannot_run_it(interpreted, device, dtype, reason, monkeypatch):
    monkeypatch.setattr(flash, "installed", lambda: True)
    monkeypatch.setattr(flash, "kernels", lambda: SimpleNamespace(INTERPRETED=interpreted))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    found = flash.wrong_machine(SimpleNamespace(device=torch.device(device), dtype=dtype))
    assert found is None if reason is None else found.startswith(reason)


@needs_triton
@interpreter_only
def test_bfloat16_is_refused_in_the_interpreter_also_when_compiled():
    given = [zeros(*q, dtype=torch.bfloat16)] * 3
    with pytest.raises(ValueError, match="^attention 'triton' does not run in torch.bfloat16"):
        triton(*given)
    torch._dynamo.reset()
    with pytest.raises(ValueError, match="^attention 'triton' does not run in torch.bfloat16"):
        torch.compile(lambda *x: triton(*x), backend="aot_eager", fullgraph=True)(*given)


def in_a_process_of_its_own(code: str, **environment: str) -> str:
    environment = {**{name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}, **environment}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@needs_triton
@interpreter_only
def test_a_cpu_without_the_interpreter_is_refused_and_importing_needs_no_triton():
    code = "import sys, torch; from vit.kernels.attention.flash import refusal; print('triton' in sys.modules)"
    code += "; print(refusal(*[torch.zeros(1, 1, 5, 32)] * 3))"
    first, second = in_a_process_of_its_own(code).splitlines()
    assert first == "False" and second.startswith("runs on CUDA; on a CPU only in Triton's interpreter")


# GPUs


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from vit.kernels.attention import flash_kernels as kernels

def compiled(name, backward, bias, architecture, d=64):
    "The machine code of a kernel for bfloat16 and T = 197, with strides as a ViT has them."
    kernel, layout = getattr(kernels, name), kernels.launch(d, kernels.torch.bfloat16, backward=backward, bias=bias)
    known = {"d": d, "E": kernels.padded(d), "R": layout.R, "C": layout.C}
    known |= {} if bias else {"bias": None, "bias_t": None}
    types, constants = {}, {}
    for i, argument in enumerate(kernel.arg_names):
        if argument in known:
            types[argument], constants[i,] = "constexpr", known[argument]
        elif argument.endswith("strides"):
            types[argument] = ("i32", "i32", "i32", "constexpr")
            constants[i, 3] = 1
        elif argument in ("A", "B", "T", "planes", "heads"):
            types[argument] = "i32"
        else:
            types[argument] = {"scale": "fp32", "lse": "*fp32", "delta": "*fp32"}.get(argument, "*bf16")
    options = {"num_warps": layout.warps, "num_stages": layout.stages}
    return triton.compile(ASTSource(kernel, types, constants), GPUTarget("cuda", architecture, 32), options)

for architecture, name, *how in [
    (80, "forward_kernel", False, False), (90, "forward_kernel", False, True), (90, "delta_kernel", True, False),
    (80, "key_value_kernel", True, False), (90, "query_kernel", True, False), (90, "bias_kernel", True, True),
]:
    code = compiled(name, *how, architecture)
    print(name, code.metadata.shared, len(code.asm["cubin"]) > 0, "mma" in code.asm["ptx"])
"""


@pytest.mark.matrix
@needs_triton
@interpreter_only
def test_the_kernels_compile_for_gpus(tmp_path):
    """To machine code for Ampere and Hopper, with tensor cores, and within a consumer GPU's shared memory."""
    lines = in_a_process_of_its_own(COMPILE, TRITON_CACHE_DIR=str(tmp_path)).splitlines()
    assert len(lines) == 6
    for name, shared, code, tensor_cores in map(str.split, lines):
        assert int(shared) <= 99 * 1024 and code == "True", name
        assert tensor_cores == str(name != "delta_kernel"), name


@needs_triton
@needs_cuda
@pytest.mark.parametrize("bias", [None, ATT, KEYS])
@pytest.mark.parametrize("d", [32, 48, 64, 128])
@pytest.mark.parametrize("T", [197, 577, 1025])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_on_a_gpu(dtype, T, d, bias):
    given = inputs(T, d, bias, dtype)
    exact, ours = run(reference, *given, torch.float64), run(triton, *given)
    if dtype == torch.float32:
        return check(ours, exact)
    check_half(T, d, bias, dtype)
    if bias:
        assert rms(ours[2], exact[2]) <= 1.5 * rms(run(reference, *given)[2], exact[2])


@needs_triton
@needs_cuda
def test_on_a_gpu_float32_is_not_tf32():
    given = inputs(577, 64)
    torch.set_float32_matmul_precision("high")
    try:
        ours = run(triton, *given)
    finally:
        torch.set_float32_matmul_precision("highest")
    check(ours, run(reference, *given, torch.float64))


@needs_triton
@needs_cuda
def test_on_a_gpu_more_than_two_to_the_31_numbers():
    """The last image of a batch whose qkv has more numbers than 32 bits can count."""
    T, d, heads = 197, 64, 6
    count = 2**31 // (T * 3 * heads * d) + 2
    if torch.cuda.mem_get_info()[0] < 3 * count * T * 3 * heads * d:
        pytest.skip("the GPU has too little memory free")
    qkv = torch.zeros(count, T, 3, heads, d, device=DEVICE, dtype=torch.float16)
    qkv[-1] = images(T, 3, heads, d).to(qkv)
    expected = triton(*qkv[-1:].permute(2, 0, 3, 1, 4))
    assert torch.equal(triton(*qkv.permute(2, 0, 3, 1, 4))[-1:], expected)


@needs_triton
@needs_cuda
def test_on_a_gpu_autocast_hands_over_one_dtype():
    net, batch = small_model().eval(), images(2, 3, 24, 24).to(DEVICE)
    exact = net.double()(batch.double())
    net = net.float()
    with torch.autocast("cuda", torch.bfloat16):
        plain = net(batch)
        net.set_attention(triton)
        ours = net(batch)
    assert rms(ours, exact) <= 1.5 * rms(plain, exact)
