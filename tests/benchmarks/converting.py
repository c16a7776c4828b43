"""How long conversions and foreign layouts take: python tests/benchmarks/converting.py

The cases run in turn, each in fresh processes, so that neither caches nor changes in the machine's load favour one.
Converting is compared with reading a file and writing it again, both to a new file; loading a foreign layout with
loading our own. The foreign files are as their own libraries write them. Takes about five minutes.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

import vit

ROUNDS = 9
LAYOUTS = ("vit", "timm", "transformers", "torchvision")
START = """
import resource, sys, threading, time, warnings
import torch, vit
from pathlib import Path
from safetensors.torch import load_file, save_file
from vit.weights.load import find, load, load_pretrained
from vit.weights.verify import convert_file
from vit.weights.save import write
warnings.simplefilter("ignore")  # about settings that a layout cannot hold
source, target, tiny = sys.argv[1:]
Path(source).read_bytes()  # into the system's cache
convert_file(tiny, target + "-tiny", "transformers")  # so that torch loads what it loads at the first use
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
READ_WRITE = "save_file({k: v.clone() for k, v in load_file(source).items()}, target + '/copy')"
CONVERT = """
    loaded = load(find(source))
    write(loaded.ours, loaded.attributes, Path(target) / "converted.safetensors", %r, lambda: loaded.provenance)
"""
PROVE = 'convert_file(source, target + "/proved", "transformers")'


def measure(job: str, source: Path, tiny: Path, watched: bool = False) -> float:
    """Seconds, or with `watched` the peak memory above that before the job, as a multiple of the file's size."""
    code = START % (job, "watcher.start()" if watched else "")
    with tempfile.TemporaryDirectory(dir=tiny.parent) as target:
        done = subprocess.run(
            [sys.executable, "-c", code, str(source), target, str(tiny)], capture_output=True, text=True, check=True,
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
    seconds, peak = done.stdout.split()
    return float(peak if watched else seconds)


def main() -> None:
    """Print the table, and the same as JSON."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    warnings.simplefilter("ignore")  # as above
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = vit.create_model("vit_small_patch16_224").eval()
        files = {layout: vit.save_checkpoint(model, folder / layout, layout=layout) for layout in LAYOUTS}
        for layout in LAYOUTS[1:]:
            save_file(load_file(files[layout]), files[layout], {"format": "pt"})  # without the hash in our headers
        files["augreg npz"] = vit.save_checkpoint(model, folder / "a.npz", layout="augreg")
        tiny = vit.save_checkpoint(vit.create_model("vit_digits_patch4_32"), folder / "tiny.safetensors")
        jobs = {
            "read and write": (READ_WRITE, files["timm"]),
            "timm to transformers": (CONVERT % "transformers", files["timm"]),
            "the same with the proof (vit convert)": (PROVE, files["timm"]),
            **{f"load {layout}": ("load_pretrained(source)", file) for layout, file in files.items()},
        }
        times: dict[str, list[float]] = {job: [] for job in jobs}
        for _ in tqdm(range(ROUNDS), "rounds", leave=False, disable=None):
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
