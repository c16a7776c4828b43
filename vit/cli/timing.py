"""How long a model takes, where the time goes, and what this machine could do."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from vit.config import ViTConfig

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # some builds of PyTorch's profiler log each start and stop

PEAK_SIDE = {"cpu": 4096, "cuda": 8192}  # sides of the square matrices whose product measures a machine's peak
LONGEST = 10.0  # seconds that these products may take


@dataclass(frozen=True)
class Case:
    """One combination to time."""

    size: tuple[int, int]
    batch: int
    optimize: str | None  # the dtype that the model was optimized to; None for the model as it is
    dtype: str  # the dtype that it computes in
    attention: str
    threads: int


def flops(config: ViTConfig, size: tuple[int, int], read: int | None = None) -> int:
    """Floating point operations in one image's matrix products; a multiplication and an addition count as two.

    Args:
        read: for how many tokens the last block computes more than keys and values; None for all.
    """
    D, N = config.embed_dim, (size[0] // config.patch_size) * (size[1] // config.patch_size)
    T = N + config.num_prefix_tokens
    patches = 2 * N * config.in_chans * config.patch_size**2 * D
    heads = (
        2 * D * config.num_classes * (2 if config.global_pool in ("token_avg", "dist") else 1)
    )  # [2D, classes], or two heads

    def block(n: int) -> int:
        attention = 2 * 2 * n * T * D  # q k^T and the weights times v
        return 2 * T * D * 3 * D + attention + 2 * n * D * (D + 2 * config.mlp_dim)  # qkv; proj, fc1 and fc2

    return patches + (config.depth - 1) * block(T) + block(T if read is None else read) + heads


def synchronize(device: torch.device) -> None:
    """Wait until a device has finished its work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def seconds(call: Callable[[], object], threads: int, device: torch.device) -> float:
    """How long one call takes with a number of threads."""
    torch.set_num_threads(threads)
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def race(
    calls: Mapping[Case, Callable[[], object]],
    rounds: int,
    device: torch.device,
    progress: Callable[[Iterable], Iterable],
) -> dict[Case, list[float]]:
    """Time all cases `rounds` times in turn, every other round backwards, so that other load hits all alike.

    Each case is called once before that, unmeasured.
    """
    times: dict[Case, list[float]] = {case: [] for case in calls}
    order = [case for i in range(rounds + 1) for case in (list(calls) if i % 2 else reversed(list(calls)))]
    for i, case in enumerate(progress(order)):
        taken = seconds(calls[case], case.threads, device)
        if i >= len(calls):
            times[case].append(taken)
    return times


def spread(values: list[float]) -> tuple[float, float, float]:
    """The lower quartile, the median and the upper quartile."""
    if len(values) < 2:
        return (values[0],) * 3
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high


def peak_flops(kind: str, threads: int, device: torch.device) -> float:
    """Operations per second of a large matrix product: the best of four runs, after one that warms up.

    The matrices' side is `PEAK_SIDE`, or less if the products would take over `LONGEST` seconds, as in half precision
    on a processor that has no instructions for it.

    Args:
        kind: "float32", "bfloat16" or "float16"; or "int8", multiplied as in optimized models.
    """
    side = PEAK_SIDE.get(device.type, 4096)
    small = side // 8
    once = min(seconds(product(kind, small, device), threads, device) for _ in range(2))
    while side > small and 5 * once * (side / small) ** 3 > LONGEST:
        side //= 2
    multiply = product(kind, side, device)
    return 2 * side**3 / min([seconds(multiply, threads, device) for _ in range(5)][1:])


def product(kind: str, side: int, device: torch.device) -> Callable[[], Tensor]:
    """A call that multiplies two square matrices of random numbers as a linear layer does."""
    if kind == "int8":
        from vit.kernels.cpu.int8 import square_product

        return square_product(side)
    a, b = (torch.randn(side, side, device=device).to(getattr(torch, kind)) for _ in range(2))
    return lambda: F.linear(a, b)


def peak_memory(call: Callable[[], object], device: torch.device) -> float:
    """The most MiB that PyTorch holds during a call, beyond what it held before: the model and its images."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = profiler.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    return max(accumulate(size for _, size in changes), default=0) / 2**20


# Kinds of operations -> parts of their names in PyTorch; the first match counts.
KINDS = {
    "attention": ("attention", "softmax", "bmm"),
    "matrix products": ("addmm", "::mm", "linear", "matmul", "conv", "mkldnn"),
    "LayerNorm": ("layer_norm",),
    "GELU": ("gelu",),
    "copies": ("copy", "cat", "clone", "contiguous", "::to"),
    "sums": ("::add", "::mul"),
}


def profile_kinds(call: Callable[[], object], device: torch.device) -> dict[str, float]:
    """The share of a call's time spent in each kind of operation, by PyTorch's profiler; the largest first."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    call()
    with profile(activities=activities) as profiler:
        for _ in range(3):
            call()
        synchronize(device)
    times: dict[str, float] = {}
    for event in profiler.key_averages():
        spent = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
        kind = next((kind for kind, parts in KINDS.items() if any(part in event.key for part in parts)), "other")
        times[kind] = times.get(kind, 0.0) + spent
    total = sum(times.values())
    return {kind: spent / total for kind, spent in sorted(times.items(), key=lambda item: -item[1])}


def environment(device: torch.device) -> dict[str, Any]:
    """What a measurement depends on: processor, versions."""
    info = Path("/proc/cpuinfo")
    lines: Iterable[str] = info.read_text().splitlines() if info.exists() else []
    names = [text.split(":")[1].strip() for text in lines if text.startswith("model name")]
    processor = names[0] if names else platform.processor() or platform.machine()
    if device.type == "cuda":
        processor = torch.cuda.get_device_name(device)
    return {
        "processor": processor, "cores": os.cpu_count(), "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__, "python": platform.python_version(),
    }  # fmt: skip


def images(case: Case, config: ViTConfig, device: torch.device, dtype: torch.dtype) -> Tensor:
    """[B, C, H, W] of noise; in bytes, [B, H, W, C]."""
    generator = torch.Generator().manual_seed(0)
    if dtype == torch.uint8:
        return torch.randint(256, (case.batch, *case.size, config.in_chans), generator=generator, dtype=dtype)
    return torch.randn(case.batch, config.in_chans, *case.size, generator=generator).to(device, dtype)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an error says so; PyTorch has a class of its own for this on GPUs only."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
