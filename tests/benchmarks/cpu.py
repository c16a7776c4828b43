"""ViT-S/16 on a CPU, ours against timm's in several runtimes, in float32 and in int8.

    pip install onnxruntime openvino nncf torchao
    python tests/benchmarks/cpu.py --json cpu.json

It takes hours and can be interrupted: called again with the same file, it continues after the last case in that file
(what failed is not tried again).

All have timm's random weights. Each contestant is a process of its own, since runtimes would otherwise share an
allocator and threads; they take turns, and the table has ratios of medians. A runtime that is not installed, or that
fails, has its reason in the table. ResNet-50 and EfficientNet-B0 run beside them for comparison.
"""

import argparse
import hashlib
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

Call = Callable[[Tensor], Tensor]
REFERENCE = "timm"
CALIBRATION = 32  # images
LONG = 1.0  # seconds
SLOW = 5  # times timm's time


def timm_model(size: int, name: str = "vit_small_patch16_224") -> nn.Module:
    """With random weights, the same in every process."""
    import timm

    torch.manual_seed(0)
    return timm.create_model(name, **({"img_size": size} if name.startswith("vit") else {})).eval()


def our_model(size: int) -> nn.Module:
    """Our model with the weights of timm's."""
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


def ours_float32(size: int) -> Call:
    import vit

    return vit.kernels.optimize(our_model(size), "float32")


def ours_int8(size: int) -> Call:
    import vit

    return vit.kernels.optimize(our_model(size), "int8", noise(CALIBRATION, size, seed=2))


def to_onnx(model: nn.Module, size: int, folder: str) -> str:
    """Export a model to an ONNX file, for any batch; the path of the file."""
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
    "onnxruntime, dynamic int8": lambda size: onnxruntime(size, "dynamic"),
    "onnxruntime, static int8": lambda size: onnxruntime(size, "static"),
    "torch, dynamic int8": quantize_dynamic,
    "torchao int8, compiled": torchao,
    "openvino int8 (nncf)": lambda size: openvino(size, quantize=True),
    "ours, int8": ours_int8,
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
        try:
            self.built = self.answer()["built"]  # seconds
        except BaseException:
            self.end()
            raise

    def answer(self) -> dict:
        """Its next answer; RuntimeError if that is a failure."""
        for line in self.process.stdout:
            if line.startswith("{"):  # runtimes print other lines
                found = json.loads(line)
                if "error" in found:
                    raise RuntimeError(found["error"])
                return found
        raise RuntimeError(f"ended with {self.process.wait()}")

    def run(self, batch: int, calls: int) -> dict:
        """The seconds of one call and of each of `calls` further ones, and the first image's logits."""
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
        print(json.dumps({"error": f"{type(error).__name__}: {line[:200]}"}), flush=True)


def race(names: list[str], batches: list[int], size: int, threads: int, seconds: float) -> Iterator[list[dict]]:
    """For each batch size a row for each contestant: its times, or why it has none."""
    workers: dict[str, Worker] = {}
    failed: dict[str, str] = {}
    try:
        title = f"building, {size} px, {threads} threads"
        for name in tqdm(names if batches else (), title, leave=False, disable=None):
            try:
                workers[name] = Worker(name, size, threads)
            except RuntimeError as error:
                failed[name] = str(error)
            check_reference(failed)
        for batch in batches:
            found = measure(workers, failed, batch, seconds)
            case = {"batch": batch, "size": size, "threads": threads}
            yield [{"name": name} | case | outcome(name, batch, found, failed) for name in names]
    finally:
        for worker in workers.values():
            worker.end()


def measure(workers: dict[str, Worker], failed: dict[str, str], batch: int, seconds: float) -> dict[str, dict]:
    """The answers of all contestants, which take turns. Those that fail or are slow move from `workers` to `failed`."""

    def ask(name: str, calls: int) -> dict | None:
        try:
            return workers[name].run(batch, calls)
        except (RuntimeError, OSError) as error:
            leave(name, f"ended with {workers[name].process.wait()}" if isinstance(error, OSError) else str(error))
            check_reference(failed)
            return None

    def leave(name: str, why: str) -> None:
        workers.pop(name).end()
        failed[name] = f"batch {batch}: {why}"

    found: dict[str, dict] = {}
    for name in tqdm(list(workers), f"batch {batch}, first calls", leave=False, disable=None):
        if answer := ask(name, 1):
            once = answer["seconds"][0]
            found[name] = answer | {"seconds": [], "built": workers[name].built, "once": once}
            if once > SLOW * found[REFERENCE]["once"]:
                leave(name, f"{1e3 * once / batch:.0f} ms per image, more than {SLOW} times timm's time: left out")
    once = found[REFERENCE]["once"]
    rounds = max(3, round(seconds / (once * (3 if once < LONG else 1))))
    for i in tqdm(range(rounds), f"batch {batch}", leave=False, disable=None):
        for name in list(workers) if i % 2 else list(reversed(workers)):
            # Two calls after one that refills the caches, which makes no difference to a long call.
            if answer := ask(name, 2 if found[name]["once"] < LONG else 0):
                found[name]["seconds"] += answer["seconds"] or [answer["first"]]
    return found


def check_reference(failed: dict[str, str]) -> None:
    """Exit if the reference failed, since there is nothing to compare with."""
    if REFERENCE in failed:
        sys.exit(f"{REFERENCE} failed, to which all others are compared: {failed[REFERENCE]}")


def outcome(name: str, batch: int, found: dict[str, dict], failed: dict[str, str]) -> dict:
    """A contestant's row: times per image, how many times as fast as timm it is, the error of its logits."""
    if name in failed:
        return {"failed": failed[name]}
    own, base = found[name], found[REFERENCE]
    low, median, high = (1e3 * value / batch for value in statistics.quantiles(own["seconds"], n=4))
    one, other = torch.tensor(own["logits"]), torch.tensor(base["logits"])
    alike = len(one) == len(other) and not name.startswith(("ResNet", "EfficientNet"))
    return {
        "ms": median, "low": low, "high": high, "calls": len(own["seconds"]),
        "ratio": statistics.median(base["seconds"]) * 1e3 / batch / median,
        "difference": ((one - other).norm() / other.norm()).item() if alike else None,
        "ready": own["built"] + own["first"],
    }  # fmt: skip


def show(rows: list[dict]) -> None:
    """The table of one case."""
    print(f"\n{rows[0]['size']} px, {rows[0]['threads']} thread(s), batch {rows[0]['batch']}")
    print(
        "| | ms per image | quartiles, of calls | times as fast as timm | error of the logits"
        " | s until its first answer |"
    )
    print("|---|---|---|---|---|---|")
    for r in rows:
        if "failed" in r:
            print(f"| {r['name']} | {r['failed']} | | | | |")
            continue
        error = "" if r["difference"] is None else f"{r['difference']:.1e}"
        ends = f"{r['low']:.1f}-{r['high']:.1f}, {r['calls']}"
        print(f"| {r['name']} | {r['ms']:.1f} | {ends} | {r['ratio']:.2f} | {error} | {r['ready']:.0f} |")
    sys.stdout.flush()


def kept(path: Path | None, where: dict, names: list[str]) -> dict[tuple, list[dict]]:
    """The rows that an earlier run wrote to the file, by size, threads and batch; they are not measured again."""
    if path is None or not path.exists():
        return {}
    try:
        content = json.loads(path.read_text())
        same = content["environment"] == where and {r["name"] for r in content["rows"]} == set(names)
    except (ValueError, KeyError, TypeError):
        same = False
    if not same:
        sys.exit(f"{path} was not written by this code, on this machine, with these options: write to another file")
    done: dict[tuple, list[dict]] = {}
    for r in content["rows"]:
        done.setdefault((r["size"], r["threads"], r["batch"]), []).append(r)
    return done


def main() -> None:
    """Race, print tables, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS), metavar="NAME")
    parser.add_argument("--img-size", type=int, nargs="+", default=[224, 384])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seconds", type=float, default=10, help="for each contestant and case; default: %(default)s")
    parser.add_argument("--json", type=Path, help="written after each case; cases in it are not measured again")
    args = parser.parse_args()
    if args.worker:
        return work(args.worker, args.img_size[0], args.threads[0])
    from harness import environment, write_json

    names = list(dict.fromkeys([REFERENCE, *args.only]))
    where = environment() | {"versions": versions(), "code": code(), "seconds": args.seconds}
    print(where)
    done = kept(args.json, where, names)
    for size, threads in itertools.product(args.img_size, args.threads):
        left = [batch for batch in args.batch if (size, threads, batch) not in done]
        for batch in args.batch:
            if batch not in left:
                show(done[size, threads, batch])
        for batch, rows in zip(left, race(names, left, size, threads, args.seconds), strict=True):
            done[size, threads, batch] = rows
            show(rows)
            write_json(args.json, {"environment": where, "rows": list(itertools.chain(*done.values()))})
    return None


def code() -> str:
    """A hash of this package's sources."""
    import vit

    roots = [Path(package.__file__).parent for package in (vit, vit.kernels, vit.weights)]
    files = sorted({file for root in roots for file in root.rglob("*.py")})
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


def versions() -> dict[str, str]:
    """The versions of the runtimes."""
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
