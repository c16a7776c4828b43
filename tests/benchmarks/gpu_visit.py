"""All that this project wants of an NVIDIA GPU, in one visit of nine minutes: is it right, and how fast is it.

On any machine, beforehand:

    pip install --no-deps --target build/visit .
    python tests/benchmarks/gpu_visit.py OUT --rehearse

Then take the tree there, with build/visit, and run

    PYTHONPATH=build/visit python tests/benchmarks/gpu_visit.py OUT
    PYTHONPATH=build/visit python tests/benchmarks/gpu_visit.py OUT --stages flash tune     # what failed, once more

Each stage is a process of its own with its own limit, so that one that fails, hangs or crashes ends no other. OUT gets
visit.jsonl, a line for each result as soon as there is one; visit.log, what the stages print; the race's tables; and
tuned.json, which then ships as kernels/gpu/tuned.json. It needs torch, triton, numpy, safetensors, huggingface-hub,
Pillow and tqdm. Where timm, pytest or compute-sanitizer is missing, a line says so, and what needs it is left out.

`--rehearse` runs every stage in Triton's interpreter on a CPU, in float16 and at tiny sizes. They fit the same limits,
but one that is slow, on a machine that does other work, is ended only after three times as long.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import itertools
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
ROOT = HERE.parents[2]
CACHE = Path(tempfile.gettempdir()) / "vit_visit"  # where the tuner keeps its choices between stages
LOSS = 1.5  # times the error of PyTorch in half precision, at most
# What a rehearsal runs in another way, or not at all.
UNCOVERED = [
    "compiling for the GPU, the copy engine, shared memory, races between threads: the interpreter has none of them",
    "bfloat16: the interpreter computes float16",
    "CUDA graphs, streams, the allocator: there are none on a CPU, and `ours` without graphs is raced twice",
    "every time and ratio, and so which layout the tuner takes: its choices go to OUT and are worth nothing",
    "the tuner's choice between our attention and PyTorch's, which only a GPU makes",
    "torch.compile and its modes: it is switched off, so that timm's compiled rivals run eagerly",
    "PyTorch's own flash attention on a GPU: its place takes the one for CPUs",
    "compute-sanitizer, which watches only a GPU: the kernels it would watch run without it",
    "the tests that need a GPU, which skip themselves",
]


@dataclass(frozen=True)
class Sizes:
    """What is computed: as a visit takes it, and as a rehearsal does."""

    width: int
    depth: int
    size: int  # of images
    batches: tuple[int, ...]
    rows: tuple[int, int]  # of matrices, in many tiles and in few
    tokens: tuple[int, ...]  # in attention
    load: int  # tokens in all, where attention is timed
    exact: int  # tokens in all, where it is compared
    calls: int  # of a model with other images; the third records a graph
    rounds: int
    workers: int


REAL = Sizes(384, 12, 224, (1, 8, 64, 256), (4999, 197), (197, 577, 1025, 4097), 2**18, 8194, 5, 20, 12)
TINY = Sizes(96, 2, 32, (1, 2), (70, 17), (5, 37), 64, 74, 1, 1, 2)
sizes = TINY if os.environ.get("TRITON_INTERPRET") == "1" else REAL


# What a stage does, in its own process. Imports are inside, so that one that is missing fails one stage.


def environment(out: Path) -> None:
    """Versions, the GPU, and its two limits: copies and products."""
    import numpy
    import torch
    import triton
    from gpu import copy_rate, half, name_of

    from vit.cli import timing

    device = where()
    timing.PEAK_SIDE["cpu"] = 256
    found = timing.environment(device) | {"triton": triton.__version__, "numpy": numpy.__version__}
    found |= {name: bool(importlib.util.find_spec(name)) for name in ("timm", "pytest", "xdist", "torchvision")}
    found["compute-sanitizer"] = sanitizer_path() or "missing"
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"multiprocessors": properties.multi_processor_count, "GiB": properties.total_memory / 2**30}
        found["capability"] = torch.cuda.get_device_capability(device)
        query = "driver_version,clocks.sm,clocks.mem,power.limit"
        command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv"]
        found["nvidia-smi"] = subprocess.run(command, capture_output=True, text=True).stdout
    note(out, **found)
    note(out, **{"copy TB/s": copy_rate(device) / 1e12})
    note(out, **{"matmul TFLOP/s": timing.peak_flops(name_of(half(device)), 1, device) / 1e12})


def kernels(out: Path) -> None:
    """Every layout of every kernel against float64, in several processes, each of which compiles its share."""
    command = [sys.executable, str(HERE), str(out), "--run", "kernels"]
    parts = [subprocess.Popen([*command, "--part", str(i)]) for i in range(sizes.workers)]
    codes = [part.wait() for part in parts]
    for i, code in enumerate(codes):
        if code < 0:  # a compiler that crashes takes its process with it
            note(out, part=i, failed=f"ended by signal {-code}", ok=False)
    if any(codes):
        sys.exit(1)


def some_kernels(out: Path, part: int) -> None:
    """One process's share of `kernels`."""
    import torch

    torch.manual_seed(part)
    cases = layouts()
    for what, tile, run, twin, args in cases[part :: sizes.workers]:
        with attempt(out, what=what, tile=tile):
            exact = in_double(twin, args)
            poison(exact)
            close(out, run(*args, tile=tile), exact, twin(*args), what=what, tile=tile)


def layouts() -> list[tuple]:
    """What, layout, kernel, twin and arguments: the products of a block, its MLP and the patches, in every layout."""
    import torch

    from vit.kernels.gpu import fused, plain, tiles

    D, H, device, dtype = sizes.width, 4 * sizes.width, where(), half_dtype()
    many, few = sizes.rows

    def tensor(*shape: int, to: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(*shape, device=device).to(to)

    def folded(N: int, K: int) -> list[torch.Tensor]:
        parts = fused.fold_norm(
            0.06 * tensor(N, K, to=torch.float32), tensor(N, to=torch.float32), 1 + 0.2 * tensor(K, to=torch.float32),
            tensor(K, to=torch.float32), dtype,
        )  # fmt: skip
        return [parts["weight"], parts["bias"], parts["sums"]]

    def patched(fn: Callable, images: Any, weight: Any, bias: Any, positions: Any, **more: Any) -> torch.Tensor:
        count = len(images) * (images.shape[2] // 16) * (images.shape[3] // 16) // len(images)
        x = torch.full((len(images), 1 + count, D), torch.nan, dtype=weight.dtype, device=device)
        fn(images, weight, bias, positions, x, 1, **more)
        return x[:, 1:]

    found: list[tuple] = []
    for (kernel, is_few), table in tiles.TILES.items():
        M = few if is_few else many
        for tile in table:
            x, wide = 1 + tensor(M, D), tensor(M, H)
            (w1, b1, s1), (w2, b2, _) = folded(H, D), folded(D, H)
            if kernel == "linear":
                for what, args in [
                    ("qkv", (x, *folded(3 * D, D), 1e-6)), ("fc1", (x, w1, b1, s1, 1e-6, "erf")),
                    ("proj", (x, *folded(D, D)[:2], None, 0.0, "", tensor(M, D))),
                    ("fc2", (wide, w2, b2, None, 0.0, "", x)),
                ]:  # fmt: skip
                    found.append((what, tile, fused.linear, plain.linear, args))
            elif kernel == "mlp":
                found.append(("mlp", tile, fused.mlp, plain.mlp, (x, w1, b1, s1, w2, b2, 1e-6, "erf")))
            else:
                side = sizes.size
                B = max(1, M * 256 // side**2)
                weight, positions = 0.06 * tensor(D, 3, 16, 16), tensor((side // 16) ** 2, D, to=torch.float32)
                pixels = torch.randint(256, (B, 3, side, side), dtype=torch.uint8, device=device)
                for images in (pixels, tensor(B, 3, side, side)):
                    args = images, weight, tensor(D, to=torch.float32), positions
                    run, twin = partial(patched, fused.patches), partial(patched, plain.patches)
                    found.append((f"patches of {images.dtype}", tile, run, twin, args))
    return found


def model(out: Path) -> None:
    """The whole model against float32, with and without graphs, of floats and of bytes; layouts are not measured."""
    import torch
    from helpers import randomize

    import vit
    from vit.kernels.gpu import tuning

    tuning.measure = lambda calls, timed: ({list(calls)[-1 if "sdpa" in calls else 1]: 0.0}, False)  # the first layout
    tuning.remembered = dict
    torch.backends.cudnn.allow_tf32 = False
    device, dtype = where(), half_dtype()
    slow = randomize(small(vit)).eval().to(device)
    mean, std = (torch.tensor(x, device=device)[:, None, None] for x in
                 (slow.preprocessing.mean, slow.preprocessing.std))  # fmt: skip
    rough = randomize(small(vit)).eval().to(device, dtype)
    for mode in ("latency", "throughput"):
        fast = vit.kernels.optimize(slow, str(dtype).removeprefix("torch."), mode=mode)
        for batch in sorted({*sizes.batches[:2], sizes.batches[-1]}):
            for kind in ("floats", "bytes"):
                with attempt(out, what=f"{mode}, batch {batch}, {kind}"), torch.inference_mode():
                    for _ in range(sizes.calls):
                        pixels = torch.randint(256, (batch, 3, sizes.size, sizes.size), device=device).byte()
                        x = (pixels / 255 - mean) / std
                        given = pixels if kind == "bytes" else x.to(dtype)
                        exact = torch.cat([slow(some) for some in x.split(64)])
                        ours, theirs = fast(given), rough(x.to(dtype))
                    close(out, ours, exact.double(), theirs, what=f"{mode}, batch {batch}, {kind}")
        if graphs := fast._graphs:
            note(out, what="graphs", recorded=len(graphs.kept), ok=device.type != "cuda" or len(graphs.kept) == 6)


def flash(out: Path) -> None:
    """Our attention against PyTorch's flash, forward and backward: the error, then the time."""
    import torch

    from vit.kernels import attention  # noqa: F401 - whose operators are registered by it
    from vit.registry import get_attention

    ours, theirs = get_attention("triton"), get_attention("flash")
    for T in sizes.tokens:
        with attempt(out, what=f"T {T}, error"):
            q, k, v, dout = heads(max(1, sizes.exact // T), T)
            exact = with_gradients(get_attention("reference"), *(x.double() for x in (q, k, v, dout)))
            pairs = zip(with_gradients(ours, q, k, v, dout), with_gradients(theirs, q, k, v, dout), exact)
            for name, (a, b, right) in zip(("out", "dq", "dk", "dv"), pairs):
                close(out, a, right, b, what=f"T {T}, {name}")
    for T in sizes.tokens:
        with attempt(out, what=f"T {T}, time"):
            q, k, v, dout = heads(max(1, sizes.load // T), T)
            runs = {}
            for name, fn in (("ours", ours), ("theirs", theirs)):
                with torch.no_grad():
                    forward = times(partial(fn, q, k, v))
                parts = [x.detach().requires_grad_() for x in (q, k, v)]
                result = fn(*parts)
                backward = times(partial(torch.autograd.grad, result, parts, dout, retain_graph=True))
                runs[name] = forward, backward
            (a, c), (b, d) = runs["ours"], runs["theirs"]
            flop = 4 * q.numel() * T
            note(out, what=f"T {T}", **{"forward ms": a, "their forward ms": b, "backward ms": c,
                 "their backward ms": d, "forward TFLOP/s": flop / a / 1e9, "forward ratio": a / b,
                 "backward ratio": c / d, "bars met": [a / b <= 1.1, c / d <= 1.5]})  # fmt: skip


def tune(out: Path) -> None:
    """The tuner over the shapes of ViT-S; after each batch its choices so far are written as they ship."""
    import torch

    import vit
    from vit.kernels.gpu import tuning

    device, dtype = where(), half_dtype()
    about = "a rehearsal, nothing"
    if device.type == "cuda":
        import triton

        about = f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}, triton {triton.__version__}"
    else:
        tuning.MEASURED.add("cpu")
        tuning.name_of = lambda device: "rehearsal"
        tuning.milliseconds = lambda run, device: times(run)
    tuning.SHIPPED = CACHE / "nothing.json"  # everything is measured
    tuning.SHIPPED.write_text('{"choices": {}}')
    tuning.path().unlink(missing_ok=True)
    decide, measure, keys = tuning.decide, tuning.measure, []

    def named(key: str, calls: dict, device: Any) -> Any:
        keys.append(key)  # the MLP's two products are measured while it is
        try:
            return decide(key, calls, device)
        finally:
            keys.pop()

    def noted(calls: dict, timed: Callable) -> tuple[dict, bool]:
        start = time.perf_counter()
        found, lasts = measure(calls, timed)
        spent = round(time.perf_counter() - start, 2)
        note(out, key=keys[-1], milliseconds={str(choice): ms for choice, ms in found.items()}, seconds=spent)
        return found, lasts

    tuning.decide, tuning.measure = named, noted
    fast = vit.kernels.optimize(small(vit).eval().to(device), str(dtype).removeprefix("torch."), mode="throughput")
    for batch in sizes.batches:
        shape = batch, 3, sizes.size, sizes.size
        with attempt(out, what=f"batch {batch}"), torch.inference_mode():
            fast(torch.randn(shape, device=device).to(dtype))
            fast(torch.randint(256, shape, device=device).byte())
            fast(torch.randn(shape, device=device))
        choices = {"measured": about, "choices": tuning.read()}
        (out / "tuned.json").write_text(json.dumps(choices, indent=1, sort_keys=True) + "\n")
    note(out, what="choices", **{key: str(choice) for key, choice in tuning.read().items()})


OURS = "ours, optimized"
BARS = {"ratio": "times as fast as timm's best", "of matmul": "of the rate of a large product"}
FIRST = ["timm", OURS, "ours, optimized, no graphs", "timm, reduce-overhead"]


def race(out: Path, name: str, size: int, batches: tuple[int, ...], contestants: list[str]) -> None:
    """`gpu.py` for some of its contestants; its rows end in `name`.json."""
    file = out / f"{name}.json"
    command = [sys.executable, str(HERE.with_name("gpu.py")), "--json", str(file), "--only", *contestants]
    variables = dict(os.environ)
    if sizes is TINY:
        size, batches = 32, (1,)
        command += ["--device", "cpu", "--rounds", "1", "--tiny"]
        variables["TORCHDYNAMO_DISABLE"] = "1"
    command += ["--img-size", str(size), "--batch", *map(str, batches)]
    file.unlink(missing_ok=True)
    code = subprocess.run(command, env=variables).returncode
    rows = json.loads(file.read_text())["rows"] if file.exists() else []
    for row in rows:
        needed = row["name"].startswith("ours")
        note(out, **row, ok=not ("failed" in row and needed))
    if code or not rows or any("failed" in row and row["name"].startswith("ours") for row in rows):
        sys.exit(1)


def sanitizer(out: Path) -> None:
    """Two kernels, of which each read and write is checked."""
    path = sanitizer_path()
    command = [sys.executable, str(HERE), str(out), "--run", "watched"]
    if path is None or where().type != "cuda":
        note(out, skipped="compute-sanitizer is missing" if path is None else "there is no GPU to watch")
        sys.exit(subprocess.run(command).returncode)
    names = [option for name in ("linear_kernel", "mlp_kernel") for option in ("--kernel-name", f"kns={name}")]
    options = ["--tool", "memcheck", "--error-exitcode", "9", "--report-api-errors", "no", *names]
    variables = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # so that each tensor has bounds of its own
    done = subprocess.run([path, *options, *command], env=variables, capture_output=True, text=True)
    print(done.stdout, done.stderr)
    last = [line for line in done.stdout.splitlines() if line.startswith("=========")][-1:]
    note(out, what="memcheck", code=done.returncode, says=last, ok=done.returncode == 0)
    sys.exit(done.returncode)


def watched(out: Path) -> None:
    """What `sanitizer` watches: a product and the MLP, each in one layout."""
    import torch

    for what, (tile, run, args) in {what: (tile, run, args) for what, tile, run, _, args in layouts()}.items():
        if what in ("qkv", "mlp"):
            assert run(*args, tile=tile).isfinite().all()
            print("ran", what, tile)
    if where().type == "cuda":
        torch.cuda.synchronize()


def tests(out: Path) -> None:
    """pytest on the kernels' tests."""
    missing = [name for name in ("pytest", "timm") if not importlib.util.find_spec(name)]
    if missing:
        note(out, skipped=f"{' and '.join(missing)} missing")
        return
    files = ["tests/kernels/gpu", "tests/kernels/attention/test_flash.py"]
    if sizes is TINY:
        files = ["tests/kernels/gpu/test_tuning.py"]
    several = ["-n", "8"] if sizes is REAL and importlib.util.find_spec("xdist") else []
    command = [sys.executable, "-P", "-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider", *several, *files]
    if sys.version_info < (3, 11):  # where the current folder cannot be kept off the path
        command.remove("-P")
    running = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert running.stdout is not None
    line = ""
    for line in running.stdout:  # as it comes: there may be no time for a summary
        print(line, end="")
        if line.startswith(("FAILED", "ERROR")) or "] FAILED " in line:
            note(out, failed=line.strip()[:300], ok=False)
    note(out, says=line.strip(), ok=running.wait() == 0)


def step(out: Path) -> None:
    """A training step under autocast: forward, backward and AdamW, ours and timm's, in turns."""
    import torch

    import vit

    device, dtype = where(), half_dtype()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    batch = sizes.batches[-1]
    makers: dict[str, Callable[[], Any]] = {"ours": lambda: small(vit), "ours, triton": lambda: small(vit)}
    if importlib.util.find_spec("timm") is None:
        note(out, skipped="timm is missing: ours alone")
    else:
        from helpers import timm_twin

        makers["timm"] = lambda: timm_twin(small(vit).config)
    x = torch.randn(batch, 3, sizes.size, sizes.size, device=device)
    labels = torch.arange(batch, device=device) % 10
    calls: dict[str, Callable[[], object]] = {}
    for name, make in makers.items():
        with attempt(out, what=name):
            one = make().to(device).train()
            if name == "ours, triton":
                one.set_attention("triton")
            optimizer = torch.optim.AdamW(one.parameters(), lr=1e-5, fused=device.type == "cuda")

            def call(one: Any = one, optimizer: Any = optimizer) -> object:
                optimizer.zero_grad()
                with torch.autocast(device.type, dtype):
                    loss = torch.nn.functional.cross_entropy(one(x).float(), labels)
                loss.backward()
                optimizer.step()
                return loss

            for _ in range(3):
                loss = call()
            calls[name] = call
            note(out, what=name, loss=loss.item(), ok=bool(loss.isfinite()))
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(max(2, sizes.rounds // 4)):
        for name in [*calls, *reversed(calls)]:
            found[name].append(times(calls[name], 1))
    medians = {name: statistics.median(values) for name, values in found.items()}
    rates = {name: {"ms": ms, "images/s": 1e3 * batch / ms} for name, ms in medians.items()}
    best = min((ms for name, ms in medians.items() if name.startswith("ours")), default=0)
    note(out, batch=batch, **rates, **({"times timm": medians["timm"] / best} if "timm" in medians else {}))


def sweep(out: Path) -> None:
    """Other layouts of our attention, forward and backward, at two lengths: what to take if a bar is missed."""
    import torch

    from vit.kernels.attention import flash_kernels as kernels
    from vit.registry import get_attention

    Launch, ours = kernels.Launch, get_attention("triton")
    forwards = [(128, 64, 8, 3), (64, 64, 4, 3), (64, 32, 4, 3), (128, 32, 4, 4), (128, 64, 4, 3)]
    backwards = [(64, 64, 4, 2), (64, 64, 4, 3), (32, 64, 4, 3), (64, 64, 8, 2), (64, 128, 8, 2)]
    for T in (sizes.tokens[0], sizes.tokens[-1]):
        q, k, v, dout = heads(max(1, sizes.load // T), T)
        for forward, backward in zip(forwards, backwards):
            with attempt(out, what=f"T {T}", forward=forward, backward=backward):
                kernels.LAUNCHES[64, 2] = (Launch(*forward), Launch(*backward), kernels.LAUNCHES[64, 2][2])
                with torch.no_grad():
                    a = times(partial(ours, q, k, v))
                parts = [x.detach().requires_grad_() for x in (q, k, v)]
                b = times(partial(torch.autograd.grad, ours(*parts), parts, dout, retain_graph=True))
                note(out, what=f"T {T}", forward=forward, backward=backward, ms=[a, b])


# What stages share


def where() -> Any:
    """The GPU; in a rehearsal the CPU."""
    import torch

    return torch.device("cpu") if sizes is TINY else torch.device("cuda", 0)


def half_dtype() -> Any:
    """bfloat16; in a rehearsal float16."""
    import torch

    return torch.float16 if sizes is TINY else torch.bfloat16


def small(vit: Any) -> Any:
    """A ViT-S, or in a rehearsal a smaller one, on the CPU."""
    more = {} if sizes is REAL else {"embed_dim": sizes.width, "depth": sizes.depth, "num_heads": 3}
    return vit.create_model("vit_small_patch16_224", img_size=sizes.size, **more)


def heads(B: int, T: int) -> list[Any]:
    """q, k and v [B, A, T, 64], views of one tensor as in a model, and the gradient of the result."""
    import torch

    A = 6 if sizes is REAL else 1
    qkv = torch.randn(B, T, 3, A, 64, device=where()).to(half_dtype())
    return [*qkv.permute(2, 0, 3, 1, 4), torch.randn(B, T, A, 64, device=where()).to(half_dtype()).transpose(1, 2)]


def with_gradients(fn: Callable, q: Any, k: Any, v: Any, dout: Any) -> tuple:
    """The result, and the gradients of q, k and v."""
    import torch

    parts = [x.detach().requires_grad_() for x in (q, k, v)]
    result = fn(*parts)
    return result.detach(), *torch.autograd.grad(result, parts, dout)


def times(call: Callable[[], object], count: int | None = None) -> float:
    """The median time of a call in milliseconds; calls are queued, so that Python's time does not show."""
    import torch

    count = count or sizes.rounds
    if where().type != "cuda":
        start = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - start)
    if count > 1:
        for _ in range(3):
            call()
    torch.cuda.synchronize()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(events))


def in_double(fn: Callable, args: tuple) -> Any:
    """fn in float64."""
    import torch

    wide = []
    for x in args:
        if isinstance(x, torch.Tensor):
            x = x.double() / 256 if x.dtype == torch.uint8 else x.double()
        wide.append(x)
    return fn(*wide)


def poison(like: Any) -> None:
    """Fill the memory that the next tensor of this shape may get, so that nothing unwritten looks right."""
    import torch

    torch.full_like(like, torch.nan, dtype=half_dtype())


def close(out: Path, ours: Any, exact: Any, theirs: Any, **about: Any) -> None:
    """Note our error and theirs, root mean squares of the difference from `exact`, relative to it."""
    error, other = (((x.double() - exact).norm() / exact.norm()).item() for x in (ours, theirs))
    note(out, **about, error=error, theirs=other, ok=error <= LOSS * other)


class attempt:
    """A part of a stage. What it raises is noted and counts as a failure of the stage, which goes on."""

    failures = 0

    def __init__(self, out: Path, **about: Any) -> None:
        self.out, self.about = out, about

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> bool:
        if not isinstance(error, Exception):
            return False
        note(self.out, **self.about, failed=f"{type(error).__name__}: {str(error)[:500]}", ok=False)
        return True


def note(out: Path, ok: bool = True, **row: Any) -> None:
    """Write a result at once, to the log too. A result that is not ok fails the stage, which goes on."""
    attempt.failures += not ok
    line = json.dumps({"stage": os.environ.get("VISIT_STAGE"), "ok": bool(ok), **row}, default=str)
    print(line, flush=True)
    with open(out / "visit.jsonl", "a") as file:
        file.write(line + "\n")


def sanitizer_path() -> str | None:
    """Where compute-sanitizer is."""
    return shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")


# The visit


def large(out: Path) -> None:
    """Images of 1024 px, batch 8."""
    race(out, "large", 1024, (8,), FIRST)


def usual(out: Path) -> None:
    """Images of 224 px, batch 256 and 1."""
    race(out, "race", 224, (256, 1), FIRST)


def autotuned(out: Path) -> None:
    """The same beside timm's slowest to compile."""
    race(out, "autotuned", 224, (256, 1), ["timm", OURS, "timm, max-autotune"])


# In the order of their worth, with the seconds that each may take: less than nine minutes together.
STAGES: dict[str, tuple[int, Callable[[Path], None]]] = {
    "environment": (20, environment),
    "kernels": (60, kernels),
    "model": (30, model),
    "flash": (35, flash),
    "tune": (70, tune),
    "race": (90, usual),
    "autotuned": (80, autotuned),
    "large": (45, large),
    "sanitizer": (25, sanitizer),
    "tests": (40, tests),
    "step": (20, step),
    "sweep": (20, sweep),
}


def run(name: str, out: Path, rehearse: bool) -> tuple[str, float]:
    """How a stage ended, and after how many seconds."""
    variables = os.environ | {"VISIT_STAGE": name, "XDG_CACHE_HOME": str(CACHE), "PYTHONUNBUFFERED": "1"}
    if rehearse:
        variables |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    start = time.perf_counter()
    with open(out / "visit.log", "a") as log:
        log.write(f"\n==== {name}\n")
        log.flush()
        command = [sys.executable, str(HERE), str(out), "--run", name]
        process = subprocess.Popen(command, env=variables, stdout=log, stderr=log, start_new_session=True)
        try:
            code = process.wait(STAGES[name][0] * (3 if rehearse else 1))
            ended = "passed" if code == 0 else f"failed ({f'signal {-code}' if code < 0 else f'code {code}'})"
        except subprocess.TimeoutExpired:
            ended = "out of time"
        finally:
            with_its_children(process)
    return ended, time.perf_counter() - start


def with_its_children(process: subprocess.Popen) -> None:
    """End a stage and what it started, if anything is left of them."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def results(out: Path) -> list[dict]:
    """All results in OUT."""
    file, rows = out / "visit.jsonl", []
    for line in file.read_text().splitlines() if file.exists() else []:
        with contextlib.suppress(ValueError):  # half a line, of a stage that was ended
            rows.append(json.loads(line))
    return rows


def report(rows: list[dict], ended: dict[str, tuple[str, float]], rehearse: bool) -> None:
    """How each stage ended, what went wrong, and the figures that have bars."""
    for name, (how, seconds) in ended.items():
        mine = [row for row in rows if row["stage"] == name]
        print(f"{name:12} {how:20} {seconds:6.1f} s of {STAGES[name][0]}, {len(mine)} results")
        failed = [row for row in mine if not row["ok"]]
        for row in failed[:5]:
            print("    ", json.dumps(row)[:300])
        if len(failed) > 5:
            print(f"     and {len(failed) - 5} more, in visit.jsonl")
        for row in mine:
            if "skipped" in row:
                print("    ", row["skipped"])
    if not rehearse:
        for row in rows:
            if row["stage"] in ("environment", "flash", "race", "autotuned", "large", "step"):
                print(json.dumps({key: value for key, value in row.items() if key != "ok"})[:400])
        print("\n".join(bars(rows)))


def bars(rows: list[dict]) -> list[str]:
    """Each bar of the race, and what was reached: against the best of timm's, in every run that raced it."""
    found = []
    for size, batch, column, bar in [
        (224, 256, "ratio", 2.0), (224, 256, "of matmul", 0.45), (224, 1, "ratio", 1.5), (1024, 8, "ratio", 1.3),
    ]:  # fmt: skip
        mine = [row for row in rows if (row.get("size"), row.get("batch"), row.get("name")) == (size, batch, OURS)]
        values = [row[column] for row in mine if column in row]
        reached = "not measured" if not values else f"{min(values):.2f}, {'met' if min(values) >= bar else 'missed'}"
        found.append(f"{size} px, batch {batch}: {BARS[column]}, at least {bar}: {reached}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="a folder for the results")
    names = ", ".join(STAGES)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES), metavar="STAGE", help=names)
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, at tiny sizes")
    parser.add_argument("--run", choices=[*STAGES, "watched"], help=argparse.SUPPRESS)  # this process is that stage
    parser.add_argument("--part", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    out = args.out.resolve()
    if args.run:
        sys.path[:0] = [str(HERE.parent), str(ROOT / "tests" / "support")]
        if args.part is not None:
            some_kernels(out, args.part)
        else:
            {"watched": watched, **{name: fn for name, (_, fn) in STAGES.items()}}[args.run](out)
        sys.exit(attempt.failures > 0)
    out.mkdir(parents=True, exist_ok=True)
    (CACHE / "vit").mkdir(parents=True, exist_ok=True)
    before = len(results(out))  # of an earlier visit
    ended: dict[str, tuple[str, float]] = {}
    for name in args.stages:
        ended[name] = run(name, out, args.rehearse)
        print(f"{name}: {ended[name][0]}, {ended[name][1]:.1f} s", flush=True)
    print()
    report(results(out)[before:], ended, args.rehearse)
    if args.rehearse:
        print("\nA rehearsal cannot cover:")
        for line in UNCOVERED:
            print(f"  - {line}")
    sys.exit(any(how != "passed" for how, _ in ended.values()))


if __name__ == "__main__":
    main()
