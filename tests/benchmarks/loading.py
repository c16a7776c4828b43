"""What it costs to import the package and to load the 88 MB checkpoint.

    python tests/benchmarks/loading.py

Each figure is the median over fresh processes. Loading includes the check for finite values and the sha256.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from harness import environment, write_json

import vit

IMPORT = """
import time, torch, json
start = time.perf_counter()
import vit
print(json.dumps({"import vit, after import torch (s)": time.perf_counter() - start}))
"""

LOAD = """
import sys, time, json, os, torch, vit
def memory(key):  # of this process, in bytes
    return next(1024 * int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key))
file, small = sys.argv[1:]
vit.load_pretrained(small)  # imports, and what the libraries set up once
size, base = os.path.getsize(file), memory("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # forget the peak of the imports
start = time.perf_counter()
model = vit.load_pretrained(file)
print(json.dumps({"load (s)": time.perf_counter() - start, "file (MB)": size / 1e6,
                  "peak memory over the base / file": (memory("VmHWM") - base) / size}))
"""


def main() -> None:
    """Measure in fresh processes, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    figures: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        file = vit.save_checkpoint(vit.create_model("vit_small_patch16_224"), Path(folder) / "small", layout="timm")
        tiny = vit.save_checkpoint(vit.create_model("vit_digits_patch4_32"), Path(folder) / "digits")
        for _ in range(args.runs):
            for code, arguments in ((IMPORT, ()), (LOAD, (str(file), str(tiny)))):
                command = [sys.executable, "-c", code, *arguments]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                for name, value in json.loads(done.stdout).items():
                    figures.setdefault(name, []).append(value)
    print(environment() | {"torch": torch.__version__})
    for name, values in figures.items():
        print(f"  {name:40} {statistics.median(values):8.3f}   ({min(values):.3f} - {max(values):.3f})")
    write_json(args.json, {"environment": environment(), "figures": figures})


if __name__ == "__main__":
    main()
