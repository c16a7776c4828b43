"""Large images, ours against timm's with the same weights: time, peak memory, and what resampling positions costs.

    python tests/benchmarks/resolution.py

Eager float32, one image, about eight minutes on two cores. Memory is what PyTorch allocates over model and input.
"""

import argparse
import sys
from pathlib import Path

import timm
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from harness import environment, interleave, print_rows, summarize, write_json
from helpers import difference, images, ours_from, timm_twin

from vit.cli.timing import peak_memory
from vit.position import resample_position_embedding
from vit.presets import NAMED_MODELS

CONFIG = NAMED_MODELS["vit_small_patch16_224"].config


@torch.inference_mode()
def main() -> None:
    """Race at each size, print tables, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sides", type=int, nargs="+", default=[1024, 2048])
    parser.add_argument("--rounds", type=int, nargs="+", default=[8, 2], help="for each side")
    parser.add_argument("--resampled", type=int, nargs="*", default=[112, 160, 384, 512, 1024])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    twin = timm_twin(CONFIG)
    model = ours_from(twin, CONFIG)
    results = {"environment": environment() | {"timm": timm.__version__}, "forward": [], "resampling": []}
    print(results["environment"])
    for side, rounds in zip(args.sides, args.rounds):
        x = images(1, 3, side, side)
        assert difference(model(x), twin(x)) <= 1e-5
        calls = {"timm": lambda x=x: twin(x), "ours": lambda x=x: model(x), "ours, again": lambda x=x: model(x)}
        rows = summarize(interleave(calls, rounds, f"{side} px"), "timm")
        print_rows(f"{side} x {side}, batch 1, {args.threads} thread(s)", rows, "timm")
        memory = {name: peak_memory(calls[name], torch.device("cpu")) for name in ("timm", "ours")}
        print(f"  peak memory over model and input: timm {memory['timm']:.1f} MiB, ours {memory['ours']:.1f} MiB")
        results["forward"].append({"img_size": side, "rows": rows, "memory": memory})

    print("\nresampling the position embedding, share of a forward pass")
    positions = model.position_embedding[:, 1:]
    for side in args.resampled:
        x, grid = images(1, 3, side, side), (side // 16, side // 16)
        calls = {"forward": lambda x=x: model(x),
                 "resampling": lambda g=grid: resample_position_embedding(positions, CONFIG.grid, g)}  # fmt: skip
        seconds = interleave(calls, 5 if side > 512 else 25)
        rows = summarize(seconds, "forward")
        share = rows[1]["ms"] / rows[0]["ms"]
        print(f"  {side:5} px   {rows[1]['ms']:7.3f} of {rows[0]['ms']:9.2f} ms   {share:.2%}")
        results["resampling"].append({"img_size": side, "ms": rows[1]["ms"], "share": share})
    write_json(args.json, results)


if __name__ == "__main__":
    main()
