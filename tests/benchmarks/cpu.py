"""ViT-S/16 on a CPU, ours against timm's on everybody's runtime, in float32 and in int8.

    pip install onnxruntime openvino nncf torchao
    python tests/benchmarks/cpu.py

All have timm's random weights. Each contestant is a process of its own, since runtimes would share an allocator and
threads otherwise; they take turns, and the table has ratios of medians. A runtime that is not installed, or that fails,
has its reason in the table. ResNet-50 and EfficientNet-B0 run beside them: what one would have deployed otherwise.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))

Call = Callable[[Tensor], Tensor]
REFERENCE = "timm"
CALIBRATION = 32  # images


def timm_model(size: int, name: str = "vit_small_patch16_224") -> nn.Module:
    """With random weights, the same in every process."""
    import timm

    torch.manual_seed(0)
    return timm.create_model(name, **({"img_size": size} if name.startswith("vit") else {})).eval()


def our_model(size: int) -> nn.Module:
    """timm's model in ours."""
    from helpers import ours_from

    import vit

    config = vit.create_model("vit_small_patch16_224", img_size=size).config
    return ours_from(timm_model(size), config)


def noise(batch: int, size: int, seed: int = 1) -> Tensor:
    """[B, 3, size, size]."""
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))


def eager(size: int, name: str = "vit_small_patch16_224") -> Call:
    return timm_model(size, name)


def compiled(size: int) -> Call:
    import torch._inductor.config as inductor

    inductor.freezing = True
    return torch.compile(timm_model(size), mode="max-autotune-no-cudagraphs", dynamic=False)


def quantize_dynamic(size: int) -> Call:
    return torch.ao.quantization.quantize_dynamic(timm_model(size), {nn.Linear}, torch.qint8)


def torchao(size: int) -> Call:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    model = timm_model(size)
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return torch.compile(model, mode="max-autotune-no-cudagraphs", dynamic=False)


def ours(size: int) -> Call:
    return our_model(size)


def ours_float32(size: int, mode: str = "latency") -> Call:
    import vit

    return vit.kernels.optimize(our_model(size), "float32", mode=mode)


def ours_int8(size: int, mode: str = "latency") -> Call:
    import vit

    return vit.kernels.optimize(our_model(size), "int8", noise(CALIBRATION, size, seed=2), mode)


def to_onnx(model: nn.Module, size: int, folder: str) -> str:
    """The file that a model is exported to, for any batch."""
    file = f"{folder}/model.onnx"
    batch = {0: torch.export.Dim("batch", min=1, max=1024)}
    torch.onnx.export(
        model,
        (noise(2, size).to(next(model.parameters()).dtype),),
        file,
        dynamo=True,
        dynamic_shapes=(batch,),
        verbose=False,
        external_data=False,
    )
    return file


def onnxruntime(size: int, quantize: str | None = None) -> Call:
    import onnxruntime as ort
    from onnxruntime import quantization

    with tempfile.TemporaryDirectory() as folder:
        file = to_onnx(timm_model(size), size, folder)
        if quantize is not None:
            quantization.quant_pre_process(file, f"{folder}/prepared.onnx", skip_symbolic_shape=True)
            source, file = f"{folder}/prepared.onnx", f"{folder}/int8.onnx"
        if quantize == "dynamic":
            quantization.quantize_dynamic(source, file, per_channel=True)
        if quantize == "static":
            name = ort.InferenceSession(source).get_inputs()[0].name

            class Reader(quantization.CalibrationDataReader):
                def __init__(self) -> None:
                    self.left = [{name: noise(1, size, seed).numpy()} for seed in range(CALIBRATION)]

                def get_next(self) -> dict | None:
                    return self.left.pop() if self.left else None

            quantization.quantize_static(source, file, Reader(), per_channel=True)
        options = ort.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = ort.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])


def openvino(size: int, quantize: bool = False, name: str = "vit_small_patch16_224") -> Call:
    import openvino as ov

    model = ov.convert_model(timm_model(size, name), example_input=noise(1, size), input=[-1, 3, size, size])
    if quantize:
        import nncf

        images = nncf.Dataset([noise(1, size, seed).numpy() for seed in range(CALIBRATION)])
        model = nncf.quantize(
            model, images, model_type=nncf.ModelType.TRANSFORMER, subset_size=CALIBRATION,
            preset=nncf.QuantizationPreset.MIXED,
        )  # fmt: skip
    config = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
    }  # fmt: skip
    request = ov.Core().compile_model(model, "CPU", config).create_infer_request()
    return lambda x: torch.from_numpy(request.infer([x.numpy()])[0])


CONTESTANTS: dict[str, Callable[[int], Call]] = {
    "timm": eager,
    "timm, compiled": compiled,
    "onnxruntime": onnxruntime,
    "openvino": openvino,
    "ours": ours,
    "ours, float32": ours_float32,
    "ours, float32, throughput": lambda size: ours_float32(size, "throughput"),
    "onnxruntime, dynamic int8": lambda size: onnxruntime(size, "dynamic"),
    "onnxruntime, static int8": lambda size: onnxruntime(size, "static"),
    "torch, dynamic int8": quantize_dynamic,
    "torchao int8, compiled": torchao,
    "openvino int8 (nncf)": lambda size: openvino(size, quantize=True),
    "ours, int8": ours_int8,
    "ours, int8, throughput": lambda size: ours_int8(size, "throughput"),
    "ResNet-50": lambda size: eager(size, "resnet50"),
    "ResNet-50, openvino": lambda size: openvino(size, name="resnet50"),
    "EfficientNet-B0": lambda size: eager(size, "efficientnet_b0"),
    "EfficientNet-B0, openvino": lambda size: openvino(size, name="efficientnet_b0"),
}


class Worker:
    """A contestant in a process of its own."""

    def __init__(self, name: str, size: int, threads: int) -> None:
        command = [sys.executable, __file__, "--worker", name, "--img-size", str(size), "--threads", str(threads)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self.built = self.answer()["built"]  # seconds

    def answer(self) -> dict:
        """What it says next; RuntimeError where that is a failure."""
        for line in self.process.stdout:
            if line.startswith("{"):  # runtimes print, too
                found = json.loads(line)
                if "error" in found:
                    raise RuntimeError(found["error"])
                return found
        raise RuntimeError(f"ended with {self.process.wait()}")

    def run(self, batch: int, calls: int) -> dict:
        """Seconds of one call, and of each of so many after it, and the first image's logits."""
        print(json.dumps([batch, calls]), file=self.process.stdin, flush=True)
        return self.answer()

    def end(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()


@torch.inference_mode()
def work(name: str, size: int, threads: int) -> None:
    """The other side of a `Worker`."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(threads)
    try:
        start = time.perf_counter()
        call = CONTESTANTS[name](size)
        print(json.dumps({"built": time.perf_counter() - start}), flush=True)
        for line in sys.stdin:
            batch, calls = json.loads(line)
            x, seconds = noise(batch, size), []
            start = time.perf_counter()
            logits = call(x)
            first = time.perf_counter() - start
            for _ in range(calls):
                start = time.perf_counter()
                call(x)
                seconds.append(time.perf_counter() - start)
            print(json.dumps({"first": first, "seconds": seconds, "logits": logits[0].tolist()}), flush=True)
    except Exception as error:
        line = (str(error).splitlines() or [""])[0]
        print(json.dumps({"error": f"{type(error).__name__}: {line[:120]}"}), flush=True)


def race(names: list[str], batches: list[int], size: int, threads: int, seconds: float) -> list[dict]:
    """A row for each contestant and batch."""
    rows = []
    workers: dict[str, Worker] = {}
    failed: dict[str, str] = {}
    for name in tqdm(names, f"building, {size} px, {threads} threads", leave=False, disable=None):
        try:
            workers[name] = Worker(name, size, threads)
        except RuntimeError as error:
            failed[name] = str(error)

    def ask(name: str, batch: int, calls: int) -> dict | None:
        """Its answer; None where it failed, and is out of the race."""
        try:
            return workers[name].run(batch, calls)
        except (RuntimeError, OSError) as error:
            worker = workers.pop(name)
            why = f"ended with {worker.process.wait()}" if isinstance(error, OSError) else error
            failed[name] = f"batch {batch}: {why}"
            worker.end()
            return None

    for batch in batches if REFERENCE in workers else ():
        first = {name: (workers[name].built, ask(name, batch, 1)) for name in list(workers)}
        if REFERENCE not in workers:
            break
        found: dict[str, list[float]] = {name: [] for name in workers}
        once = first[REFERENCE][1]["seconds"][0]
        rounds = max(5, round(seconds / (3 * once)))
        for i in tqdm(range(rounds), f"batch {batch}", leave=False, disable=None):
            for name in list(workers) if i % 2 else list(reversed(workers)):
                if answer := ask(name, batch, 2):
                    found[name] += answer["seconds"]
        if REFERENCE not in workers:
            break
        logits = {name: first[name][1]["logits"] for name in workers}
        for name in workers:
            entry = row(name, batch, size, threads, found[name], found[REFERENCE], logits)
            rows.append(entry | {"ready": first[name][0] + first[name][1]["first"]})
    for worker in workers.values():
        worker.end()
    if REFERENCE in failed:
        print(f"{REFERENCE} failed, with which all others are compared: {failed[REFERENCE]}", file=sys.stderr)
    return rows + [{"name": name, "size": size, "threads": threads, "failed": why} for name, why in failed.items()]


def row(name: str, batch: int, size: int, threads: int, seconds: list[float], base: list[float], logits: dict) -> dict:
    """What is told of a contestant: times per image, how often it is as fast as timm, how alike its logits are."""
    low, median, high = (1e3 * value / batch for value in statistics.quantiles(seconds, n=4))
    one, other = torch.tensor(logits[name]), torch.tensor(logits[REFERENCE])
    alike = len(one) == len(other) and not name.startswith(("ResNet", "EfficientNet"))
    return {
        "name": name, "batch": batch, "size": size, "threads": threads, "ms": median, "low": low, "high": high,
        "ratio": statistics.median(base) * 1e3 / batch / median, "calls": len(seconds),
        "difference": ((one - other).norm() / other.norm()).item() if alike else None,
    }  # fmt: skip


def show(rows: list[dict]) -> None:
    """A table for each size, number of threads and batch."""
    for size, threads, batch in dict.fromkeys((r["size"], r["threads"], r["batch"]) for r in rows if "ms" in r):
        print(f"\n{size} px, {threads} thread(s), batch {batch}")
        print("| | ms per image | quartiles | times as fast as timm | error of the logits | s until its first answer |")
        print("|---|---|---|---|---|---|")
        for r in rows:
            if "ms" in r and (r["size"], r["threads"], r["batch"]) == (size, threads, batch):
                error = "" if r["difference"] is None else f"{r['difference']:.1e}"
                ends = f"{r['low']:.1f}-{r['high']:.1f}"
                print(f"| {r['name']} | {r['ms']:.1f} | {ends} | {r['ratio']:.2f} | {error} | {r['ready']:.0f} |")
    for r in rows:
        if "failed" in r:
            print(f"{r['name']}, {r['size']} px, {r['threads']} thread(s): failed: {r['failed']}", flush=True)


def main() -> None:
    """Race, print tables, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS), metavar="NAME")
    parser.add_argument("--img-size", type=int, nargs="+", default=[224, 384])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seconds", type=float, default=10, help="for each contestant and case; default: %(default)s")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.worker:
        return work(args.worker, args.img_size[0], args.threads[0])
    from harness import environment, write_json

    names = list(dict.fromkeys([REFERENCE, *args.only]))
    where = environment() | {"versions": versions()}
    print(where)
    rows = []
    for size in args.img_size:
        for threads in args.threads:
            found = race(names, args.batch, size, threads, args.seconds)
            show(found)
            rows += found
            write_json(args.json, {"environment": where, "rows": rows})  # so far, should it be interrupted
    return None


def versions() -> dict[str, str]:
    """Of the runtimes that are installed."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("timm", "onnxruntime", "openvino", "nncf", "torchao"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


if __name__ == "__main__":
    main()
