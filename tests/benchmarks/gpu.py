"""ViT-S/16 on an NVIDIA GPU, ours against timm's, eager and compiled, in one process and in turns.

    python tests/benchmarks/gpu.py --img-size 224 --batch 256 1 --json 224.json
    python tests/benchmarks/gpu.py --img-size 1024 --batch 8 --json 1024.json

These two are the cases with targets; without options it takes every size and batch, each of which compiles for minutes.
All contestants have timm's random weights and compute in bfloat16, under autocast, or, in ONNX Runtime, in float16. The
table has images per second, TFLOP/s and their share of the GPU's rate in a product of two 8192 x 8192 matrices of
random numbers, the share of the speed that its memory allows for one kernel per fused operation, the memory taken
(graphs included; contestants that share a pool of graphs look smaller than they are), and each contestant's error: the
root mean square of the logits' difference from timm's in float32, relative to them. A contestant with more than 1.5
times the error of timm in half precision is disqualified. All are credited with the whole model's operations, though
ours leaves out those whose results the head does not read. A contestant that is not installed or fails has its reason
in the table. Where timm is missing, ours as it is takes timm's place as the reference, and there are no ratios.
`--device cpu` in Triton's interpreter (TRITON_INTERPRET=1) shows only that all of it runs.
"""

from __future__ import annotations

import argparse
import gc
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch._dynamo
from torch import Tensor, nn
from tqdm import tqdm

import vit
from vit.cli import timing

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from cpu import to_onnx
from harness import write_json

# All compiled models share the code of one forward, for which Dynamo compiles eight graphs and runs the rest eagerly.
torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 1000
torch._dynamo.config.fail_on_recompile_limit_hit = True

Call = Callable[[Tensor], Tensor]
ROUNDS = 20  # each contestant is timed twice in a round
PEER = "timm"  # the names of timm's contestants begin with it
LOSS = 1.5  # times the error of timm in half precision, at most
SHAPE: dict[str, int] = {}  # of the model, if it is not a ViT-S
TINY = {"depth": 1, "embed_dim": 96, "num_heads": 3}


def half(device: torch.device) -> torch.dtype:
    """The dtype of the race: bfloat16, or float16 in Triton's interpreter, which cannot compute bfloat16."""
    return torch.bfloat16 if device.type == "cuda" else torch.float16


def name_of(dtype: torch.dtype) -> str:
    """The name that `optimize` takes."""
    return str(dtype).removeprefix("torch.")


def timm_model(size: int) -> nn.Module:
    """timm's, on the CPU, with random weights, the same at each call."""
    import timm

    torch.manual_seed(0)
    return timm.create_model("vit_small_patch16_224", img_size=size, **SHAPE).eval()


def our_model(size: int) -> nn.Module:
    """Ours with timm's weights, on the CPU; where there is no timm, with random ones, the same at each call."""
    torch.manual_seed(0)
    if not find_spec("timm"):
        return vit.ViT(config_of(size)).eval()
    from helpers import ours_from

    return ours_from(timm_model(size), config_of(size))


def config_of(size: int) -> vit.ViTConfig:
    """Ours."""
    return vit.create_model("vit_small_patch16_224", img_size=size, **SHAPE).config


def eager(size: int, device: torch.device, layout: torch.memory_format = torch.contiguous_format) -> Call:
    """timm in half precision throughout."""
    return timm_model(size).to(device, half(device), memory_format=layout)


def autocast(size: int, device: torch.device) -> Call:
    """timm in float32, with products under autocast."""
    return cast(timm_model(size).to(device), device)


def cast(model: Call, device: torch.device) -> Call:
    """A model under autocast."""

    def call(x: Tensor) -> Tensor:
        with torch.autocast(device.type, half(device)):
            return model(x)

    return call


def compiled(model: nn.Module, mode: str) -> Call:
    """A model compiled by torch.compile."""
    return torch.compile(model, mode=mode, dynamic=False)


def torchvision(size: int, device: torch.device) -> Call:
    """torchvision's class at S size, with weights of its own."""
    from torchvision.models import VisionTransformer

    return VisionTransformer(size, 16, 12, 6, 384, 1536).eval().to(device, half(device))


def onnxruntime(size: int, device: torch.device) -> Call:
    """timm in float16, by ONNX Runtime; images and logits stay on the GPU."""
    import onnxruntime as ort

    provider = {"cuda": "CUDAExecutionProvider", "cpu": "CPUExecutionProvider"}[device.type]
    if provider not in ort.get_available_providers():
        raise RuntimeError(f"onnxruntime {ort.__version__} has no {provider}: onnxruntime-gpu has one")
    with tempfile.TemporaryDirectory() as folder:
        session = ort.InferenceSession(to_onnx(timm_model(size).half(), size, folder), providers=[provider])
    name = session.get_inputs()[0].name

    def call(x: Tensor) -> Tensor:
        binding, logits = session.io_binding(), torch.empty(len(x), 1000, dtype=torch.float16, device=device)
        binding.bind_input(name, device.type, device.index or 0, np.float16, list(x.shape), x.data_ptr())
        output = session.get_outputs()[0].name
        binding.bind_output(output, device.type, device.index or 0, np.float16, list(logits.shape), logits.data_ptr())
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()  # ONNX Runtime has its own stream
        session.run_with_iobinding(binding)
        return logits

    return call


def ours(size: int, device: torch.device) -> Call:
    return our_model(size).to(device, half(device))


def optimized(size: int, device: torch.device, mode: str) -> Call:
    return vit.kernels.optimize(our_model(size).to(device), name_of(half(device)), mode=mode)


CONTESTANTS: dict[str, Callable[[int, torch.device], Call]] = {
    "timm": eager,
    "timm, channels last": lambda size, device: eager(size, device, torch.channels_last),
    "timm, autocast": autocast,
    "timm, max-autotune": lambda size, device: compiled(timm_model(size).to(device, half(device)), "max-autotune"),
    "timm, max-autotune, no graphs": lambda size, device: compiled(
        timm_model(size).to(device, half(device)), "max-autotune-no-cudagraphs"
    ),
    "timm, reduce-overhead": lambda size, device: compiled(
        timm_model(size).to(device, half(device)), "reduce-overhead"
    ),
    "timm, autocast, max-autotune": lambda size, device: cast(
        compiled(timm_model(size).to(device), "max-autotune"), device
    ),
    "torchvision": torchvision,
    "onnxruntime, float16": onnxruntime,
    "ours": ours,
    "ours, optimized": lambda size, device: optimized(size, device, "latency"),
    "ours, optimized, no graphs": lambda size, device: optimized(size, device, "throughput"),
}


class Inputs(dict[str, Tensor]):
    """The same images in the form that each contestant takes, made once."""

    def __init__(self, x: Tensor) -> None:
        super().__init__({"": x})

    def __missing__(self, kind: str) -> Tensor:
        x = self[""]
        channels_last = kind == "channels last"
        self[kind] = x.to(memory_format=torch.channels_last) if channels_last else x.to(KINDS[kind])
        return self[kind]

    def of(self, name: str) -> Tensor:
        """The images for a contestant."""
        return self[next((kind for kind in KINDS if kind in name), "")]


KINDS = {"autocast": torch.float32, "channels last": None, "float16": torch.float16}


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """One call, by the GPU's own clock."""
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def copy_rate(device: torch.device) -> float:
    """Bytes per second in a large copy, reads and writes counted."""
    source = torch.empty(2**30 if device.type == "cuda" else 2**24, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / statistics.median(seconds(lambda: target.copy_(source), device) for _ in range(10))


WEIGHTS = 2 * 22_050_664  # bytes of a model, in half precision


def least_bytes(config: vit.ViTConfig, size: int) -> int:
    """The bytes that must go through memory for one image if each fused operation is one kernel, in half precision.

    Pixels and tokens; in each block x and qkv; qkv and heads; heads and x twice; x twice. Weights come on top, once for
    a batch.
    """
    h = size // config.patch_size
    T, D = config.num_prefix_tokens + h * h, config.embed_dim
    return 2 * (config.in_chans * size * size + T * D + config.depth * T * D * (1 + 3 + 3 + 1 + 1 + 2 + 2))


def build(names: list[str], size: int, device: torch.device) -> tuple[dict[str, Call], dict[str, str]]:
    """The contestants, and why others cannot run."""
    calls, failed = {}, {}
    for name in tqdm(names, f"building, {size} px", leave=False, disable=None):
        try:
            calls[name] = CONTESTANTS[name](size, device)
        except Exception as error:  # of whatever kind that library raises
            failed[name] = reason(error)
    return calls, failed


def reason(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"


def race(calls: dict[str, Call], batch: int, size: int, device: torch.device, rounds: int, limits: dict) -> list[dict]:
    """A row for each contestant that runs."""
    inputs = Inputs(
        torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1)).to(device, half(device))
    )
    reference = timm_model if find_spec("timm") else our_model
    exact = reference(size).to(device)(inputs[""][:8].float()).double()
    rough = PEER if PEER in calls else "ours"
    rows: dict[str, dict] = {}
    for name in tqdm(calls, f"warming up, {size} px, batch {batch}", leave=False, disable=None):
        row = rows[name] = {"name": name, "size": size, "batch": batch}
        try:
            x, before = inputs.of(name), reserved(device)
            for _ in range(4):  # compile, measure layouts, record graphs
                logits = calls[name](x)[:8].double()
            row["memory MiB"] = memory(lambda name=name, x=x: calls[name](x), before, device)
            if name != "torchvision":  # which has other weights
                row["error"] = ((logits - exact).norm() / exact.norm()).item()
                check(row["error"], rows[rough].get("error", math.nan))
        except Exception as error:
            row["failed"] = reason(error)
    times: dict[str, list[float]] = {name: [] for name, row in rows.items() if "failed" not in row}
    for _ in tqdm(range(rounds), f"{size} px, batch {batch}", leave=False, disable=None):
        for name in [*times, *reversed(times)]:
            try:
                times[name].append(seconds(lambda name=name: calls[name](inputs.of(name)), device))
            except Exception as error:
                rows[name]["failed"] = reason(error)
        times = {name: found for name, found in times.items() if "failed" not in rows[name]}
    config = config_of(size)
    best = min((statistics.median(found) for name, found in times.items() if name.startswith(PEER)), default=math.nan)
    for name, found in times.items():
        rows[name] |= speeds(found, batch, best, config, size, limits)
    return list(rows.values())


def check(error: float, theirs: float) -> None:
    """ArithmeticError for a contestant whose answer is wrong; `theirs` is the error of timm in half precision."""
    if not error <= LOSS * theirs:
        raise ArithmeticError(f"error {error:.1e}, more than {LOSS} times PyTorch's in half precision, {theirs:.1e}")


def reserved(device: torch.device) -> int:
    """Bytes that PyTorch holds on a GPU after freeing what it can."""
    if device.type != "cuda":
        return 0
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved(device)


def memory(call: Callable[[], object], before: int, device: torch.device) -> float:
    """MiB that a call needs beyond what was held before the first one, graphs included."""
    if device.type != "cuda":
        return timing.peak_memory(call, device)
    reserved(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_reserved(device) - before) / 2**20


def speeds(times: list[float], batch: int, best: float, config: vit.ViTConfig, size: int, limits: dict) -> dict:
    """A contestant's row, from its times."""
    low, median, high = statistics.quantiles(times, n=4)
    rate = timing.flops(config, (size, size)) * batch / median
    return {
        "ms": 1e3 * median, "low": 1e3 * low, "high": 1e3 * high, "images/s": batch / median, "TFLOP/s": rate / 1e12,
        "of matmul": rate / limits["matmul FLOP/s"],
        "of memory": (least_bytes(config, size) * batch + WEIGHTS) / limits["copy bytes/s"] / median,
        "ratio": best / median,
    }  # fmt: skip


def show(rows: list[dict]) -> None:
    """A table for each size and batch."""
    for size, batch in dict.fromkeys((row["size"], row["batch"]) for row in rows if "batch" in row):
        print(f"\n{size} px, batch {batch}")
        print("| | images/s | ms | quartiles | times timm's best | TFLOP/s | of matmul | of memory | MiB | error |")
        print("|---|---|---|---|---|---|---|---|---|---|")
        for row in rows:
            if (row["size"], row.get("batch")) != (size, batch):
                continue
            if "failed" in row:
                print(f"| {row['name']} | did not run: {row['failed']} |")
                continue
            error = f"{row['error']:.1e}" if "error" in row else ""
            print(
                f"| {row['name']} | {row['images/s']:.0f} | {row['ms']:.3f} | {row['low']:.3f}-{row['high']:.3f} |"
                f" {row['ratio']:.2f} | {row['TFLOP/s']:.0f} | {row['of matmul']:.0%} |"
                f" {row['of memory']:.0%} | {row['memory MiB']:.0f} | {error} |"
            )
    for row in rows:
        if "batch" not in row:
            print(f"{row['name']}, {row['size']} px: cannot be built: {row['failed']}")


@torch.inference_mode()
def main() -> None:
    """Race, print tables, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS), metavar="NAME")
    parser.add_argument("--img-size", type=int, nargs="+", default=[224, 384, 1024])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 64, 256, 1024])
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="each times all twice; default: %(default)s")
    parser.add_argument("--tiny", action="store_true", help="a model of one narrow block, for a trial")
    parser.add_argument("--device", type=torch.device, default="cuda")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    SHAPE.update(TINY if args.tiny else {})
    if args.device.type == "cuda" and not torch.cuda.is_available():
        parser.error("there is no NVIDIA GPU here")
    torch.backends.cudnn.allow_tf32 = False  # in the convolution of the reference
    timing.PEAK_SIDE["cpu"] = 256  # no figure means anything there
    limits = {
        "matmul FLOP/s": timing.peak_flops(name_of(half(args.device)), torch.get_num_threads(), args.device),
        "copy bytes/s": copy_rate(args.device),
    }
    where = timing.environment(args.device) | limits | versions()
    print(where)
    rows: list[dict] = []
    names = list(dict.fromkeys([*((PEER,) if find_spec("timm") else ("ours",)), *args.only]))
    for size in args.img_size:
        calls, failed = build(names, size, args.device)
        rows += [{"name": name, "size": size, "failed": why} for name, why in failed.items()]
        for batch in args.batch:
            rows += race(calls, batch, size, args.device, args.rounds, limits)
            write_json(args.json, {"environment": where, "rows": rows})  # after each case, in case it is interrupted
    show(rows)


def versions() -> dict[str, str]:
    """The versions of the libraries and of the GPU's driver."""
    import subprocess
    from importlib.metadata import version

    found = {name: version(name) for name in ("timm", "triton", "torchvision") if find_spec(name)}
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        found["driver"] = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        found["driver"] = "unknown"
    return found


if __name__ == "__main__":
    main()
