"""How long conversions and foreign layouts take: python tests/benchmarks/converting.py

Each case runs in fresh processes, in turn, so that neither caches nor the machine's moods favour one. Converting is
held against reading a file and writing it again; loading a foreign layout against loading our own.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import vit

ROUNDS = 9
START = """
import resource, sys, threading, time
import torch, vit
from pathlib import Path
from safetensors.torch import load_file, save_file
from vit.weights.load import find, load, load_pretrained
from vit.weights.proof import convert_file
from vit.weights.save import write
source, target, tiny = sys.argv[1:]
Path(source).read_bytes()  # into the system's cache
convert_file(tiny, target + "-tiny", "transformers")  # what torch loads of itself at the first use
def memory():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
def job():
    %s
before = peak = memory()
done = threading.Event()
def watch():
    global peak
    while not done.wait(0.001):
        peak = max(peak, memory())
watcher = threading.Thread(target=watch)
%s
start = time.perf_counter()
job()
print(time.perf_counter() - start)
done.set()
print((peak - before) / Path(source).stat().st_size)
"""
READ_WRITE = "save_file({k: v.clone() for k, v in load_file(source).items()}, target)"
CONVERT = """
    loaded = load(find(source))
    write(loaded.ours, loaded.attributes, Path(target) / "model.safetensors", %r, lambda: loaded.provenance)
"""


def measure(job: str, source: Path, target: Path, tiny: Path, watched: bool = False) -> float:
    """Seconds, or with `watched` the peak of memory over what was there before, in sizes of the file."""
    code = START % (job, "watcher.start()" if watched else "")
    done = subprocess.run(
        [sys.executable, "-c", code, str(source), str(target), str(tiny)], capture_output=True, text=True, check=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    seconds, peak = done.stdout.split()
    return float(peak if watched else seconds)


def main() -> None:
    """Print the table, and the same as JSON."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = vit.create_model("vit_small_patch16_224").eval()
        files = {
            layout: vit.save_checkpoint(model, folder / layout, layout=layout)
            for layout in ("timm", "vit", "transformers", "torchvision", "augreg")
        }
        files["augreg npz"] = vit.save_checkpoint(model, folder / "a.npz", layout="augreg")
        tiny = vit.save_checkpoint(vit.create_model("vit_digits_patch4_32"), folder / "tiny.safetensors")
        out = folder / "out"
        jobs = {
            "read and write": (READ_WRITE, files["timm"], folder / "copy.safetensors"),
            "timm to transformers": (CONVERT % "transformers", files["timm"], out),
            "the same with the proof (vit convert)": (
                'convert_file(source, target, "transformers")', files["timm"], folder / "proved"),
            **{f"load {layout}": ("load_pretrained(source)", file, out) for layout, file in files.items()},
        }  # fmt: skip
        times: dict[str, list[float]] = {job: [] for job in jobs}
        for _ in range(ROUNDS):
            for job, case in jobs.items():
                times[job].append(measure(*case, tiny))
        medians = {job: statistics.median(values) for job, values in times.items()}
        peak = statistics.median(measure(*jobs["timm to transformers"], tiny, watched=True) for _ in range(3))
        rows = {job: seconds / medians["load vit" if job.startswith("load") else "read and write"]
                for job, seconds in medians.items()}  # fmt: skip
    print("| | median, ms | ratio |\n|---|---|---|")
    for job, ratio in rows.items():
        print(f"| {job} | {1000 * medians[job]:.0f} | {ratio:.2f} |")
    print(f"\npeak memory of timm to transformers, over what was there before: {peak:.2f} times the file")
    print(json.dumps({"seconds": medians, "ratios": rows, "peak": peak, "torch": torch.__version__}))


if __name__ == "__main__":
    main()
