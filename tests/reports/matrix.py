"""Every attention backend against `reference` in float64: the table of kernels/README.md.

    python tests/reports/matrix.py [--lengths 1 17] [--backends flash triton] [--no-compiled]

backend x dtype x T x with and without bias x forward and backward x compiled or not; about an hour on two cores, most
of it compiling. Without a GPU, `triton` runs in its interpreter.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before its kernels are first used

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from vit.attention import reference
from vit.kernels.attention.backends import REFUSALS
from vit.registry import get_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LENGTHS = (1, 17, 197, 257, 785, 1025)
FORWARD, BACKWARD = 1e-5, 2e-5  # float32: of the largest value
HALF = 1.5  # bfloat16 and float16: times the error of the peer's error in that dtype, both root mean squares

# The events that the profiler must have seen, and those that it must not have, for a backend to have run.
_FLASH = "aten::_scaled_dot_product_flash_attention_for_cpu" if DEVICE == "cpu" else "aten::_flash_attention_forward"
_FUSED = ("_scaled_dot_product_flash", "_scaled_dot_product_efficient", "_scaled_dot_product_cudnn", "vit::")
SEEN = {
    "reference": "aten::softmax", "bmm": "aten::softmax", "flash": _FLASH,
    "math": "aten::_scaled_dot_product_attention_math",
    "efficient": "aten::_scaled_dot_product_efficient_attention", "cudnn": "aten::_scaled_dot_product_cudnn_attention",
    "sdpa": "aten::scaled_dot_product_attention", "flex": "Torch-Compiled Region", "triton": "vit::flash_attention",
    "varlen": "aten::_flash_attention_forward",
}  # fmt: skip
_KINDS = (  # the columns of the table: with a bias, backward
    ("forward", False, False),
    ("forward, bias", True, False),
    ("backward", False, True),
    ("backward, bias", True, True),
)
# Backends without fused operators; compiled, their own events are missing, too.
_PLAIN = ("reference", "bmm", "math", "flex")


@dataclass(frozen=True)
class Cell:
    """One case of the matrix."""

    backend: str
    dtype: torch.dtype
    T: int
    bias: bool
    backward: bool
    compiled: bool


@dataclass(frozen=True)
class Found:
    """The result of a case: its error and the bar, or why it was refused."""

    error: float = 0.0
    bar: float = 0.0
    refused: str = ""


def cells(backends: list[str], lengths: list[int]) -> Iterator[Cell]:
    """All cases."""
    flags = (False, True)
    for backend in backends:
        for dtype in DTYPES:
            for compiled in flags:
                for bias in flags:
                    for T in lengths:
                        for backward in flags:
                            yield Cell(backend, dtype, T, bias, backward, compiled)


def inputs(cell: Cell) -> list[Tensor]:
    """q, k and v [2, 3, T, 64], views of one tensor as in a model, then the bias [2, 3, T, T] if there is one."""
    generator = torch.Generator().manual_seed(cell.T)
    qkv = torch.randn(2, cell.T, 3, 3, 64, generator=generator).to(DEVICE, cell.dtype)
    given = list(qkv.permute(2, 0, 3, 1, 4).unbind(0))
    if cell.bias:
        given.append(torch.randn(2, 3, cell.T, cell.T, generator=generator).to(DEVICE, cell.dtype))
    return given


def outcome(fn: Callable[..., Tensor], given: list[Tensor], backward: bool) -> list[Tensor]:
    """The result and, with `backward`, the gradients of all inputs."""
    leaves = [x.detach().requires_grad_(backward) for x in given]
    with torch.set_grad_enabled(backward):
        out = fn(*leaves[:3], bias=leaves[3] if len(leaves) > 3 else None)
    if not backward:
        return [out]
    weights = torch.linspace(-1, 1, out.numel(), device=out.device).view(out.shape)
    out.backward(weights.to(out.dtype))
    return [out.detach(), *(x.grad for x in leaves)]  # type: ignore[misc]


def run(cell: Cell) -> Found:
    """Run one case. AssertionError if another kernel ran than the one that was asked for."""
    fn, given = get_attention(cell.backend), inputs(cell)
    leaves = [x.detach().requires_grad_(cell.backward) for x in given]
    with torch.set_grad_enabled(cell.backward):
        refused = REFUSALS[cell.backend](*leaves)
    if refused:
        try:
            outcome(fn, given, cell.backward)
        except ValueError as error:
            assert refused in str(error), error
            return Found(refused=refused)
        raise AssertionError(f"{cell} was to be refused: {refused}")
    called = torch.compile(fn, fullgraph=True, dynamic=False) if cell.compiled else fn
    if cell.compiled:
        torch.compiler.reset()
    with warnings.catch_warnings(), profile(activities=[ProfilerActivity.CPU]) as seen:
        warnings.simplefilter("ignore")
        ours = outcome(called, given, cell.backward)
    check_kernel(cell, {event.key for event in seen.key_averages()})
    exact = outcome(reference, [x.double() for x in given], cell.backward)
    if cell.dtype == torch.float32:
        pairs = list(zip(ours, exact))
        relative = [largest(a, b, exact) for a, b in pairs]
        bars = [FORWARD] + [BACKWARD] * (len(relative) - 1)
    else:
        peer = outcome(unfused if cell.backend in ("reference", "bmm") else fused, given, cell.backward)
        relative = [rms(a - b) for a, b in zip(ours, exact)]
        bars = [HALF * max(rms(a - b), 1e-4 * rms(b), 1e-6) for a, b in zip(peer, exact)]
    worst = max(range(len(bars)), key=lambda i: relative[i] / bars[i])
    return Found(relative[worst], bars[worst])


def fused(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """PyTorch's own call, which half precision is compared with."""
    return scaled_dot_product_attention(q, k, v, attn_mask=bias)


def unfused(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """The formula as timm writes it without fused attention: the peer of backends that round as often."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    return (scores if bias is None else scores + bias).softmax(dim=-1) @ v


def largest(a: Tensor, b: Tensor, all_of_them: list[Tensor]) -> float:
    """max|a - b| over max|b|; a gradient that is zero (of q and k if T is 1) is compared with the others' size."""
    scale = max(b.abs().max().item(), 0.1 * max(x.abs().max().item() for x in all_of_them))
    return (a.double() - b).abs().max().item() / scale


def rms(x: Tensor) -> float:
    """Root mean square."""
    return x.double().square().mean().sqrt().item()


def check_kernel(cell: Cell, events: set[str]) -> None:
    """AssertionError unless that backend ran."""
    wanted, plain = SEEN[cell.backend], cell.backend in _PLAIN
    if cell.compiled and (plain or cell.backend == "sdpa"):
        wanted = "Torch-Compiled Region"
    assert any(event.startswith(wanted) for event in events), (cell, wanted, sorted(events))
    others = [event for event in events if any(part in event for part in _FUSED)]
    if plain:
        assert not others, (cell, others)
    if cell.backend == "flex":
        assert not [event for event in events if "softmax" in event], (cell, sorted(events))


def table(results: dict[Cell, Found]) -> str:
    """A row for each backend and dtype; the worst case over all T as a share of its bar, eager and compiled."""
    reasons: list[str] = []
    lines = ["| backend | dtype | " + " | ".join(f"{kind}" for kind, *_ in _KINDS) + " |", "|" + "---|" * 6]
    for backend, dtype in dict.fromkeys((cell.backend, cell.dtype) for cell in results):
        texts = []
        for _, bias, backward in _KINDS:
            here = {
                c: f
                for c, f in results.items()
                if (c.backend, c.dtype, c.bias, c.backward) == (backend, dtype, bias, backward)
            }
            texts.append(
                " / ".join(
                    _entry([f for c, f in here.items() if c.compiled == compiled], reasons)
                    for compiled in (False, True)
                )
            )
        lines.append(f"| `{backend}` | {str(dtype).removeprefix('torch.')} | " + " | ".join(texts) + " |")
    return "\n".join([*lines, "", *(f"({i}) refused: {reason}  " for i, reason in enumerate(reasons, 1))])


def _entry(found: list[Found], reasons: list[str]) -> str:
    ran = [one for one in found if not one.refused]
    if not found:
        return "-"
    if not ran:
        reason = found[0].refused
        if reason not in reasons:
            reasons.append(reason)
        return f"({reasons.index(reason) + 1})"
    worst = max(one.error / one.bar for one in ran)
    return f"{worst:.2f}" + ("" if worst <= 1 else " FAILS")


def main() -> None:
    """Run the cases that are asked for, print the table; exit code 1 if a case misses its bar."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backends", nargs="+", choices=list(REFUSALS), default=list(REFUSALS))
    parser.add_argument("--lengths", nargs="+", type=int, default=list(LENGTHS))
    parser.add_argument("--no-compiled", action="store_true", help="leave out the compiled half")
    args = parser.parse_args()
    chosen = [cell for cell in cells(args.backends, args.lengths) if not (cell.compiled and args.no_compiled)]
    results = {cell: run(cell) for cell in tqdm(chosen, unit="cell", disable=None)}
    print(table(results))
    failed = [(cell, found) for cell, found in results.items() if found.error > found.bar]
    for cell, found in failed:
        print(f"FAILS: {cell}: {found.error:.1e}, expected at most {found.bar:.1e}")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
