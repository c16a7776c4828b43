"""Eager float32 forward passes of ViT-S/16, ours against timm's, with the same weights.

    python tests/benchmarks/forward.py

One thread, three to four minutes on a quiet core. `ours, again` is the same model once more: how far its ratio lies
from that of `ours` is the noise of the run.
"""

import argparse
import sys
from pathlib import Path

import timm
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from harness import environment, interleave, print_rows, summarize, write_json
from helpers import difference, images, ours_from, timm_twin

from vit.presets import NAMED_MODELS


@torch.inference_mode()
def main() -> None:
    """Race at batch 1 and 8, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--img-size", type=int, default=224)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    config = NAMED_MODELS["vit_small_patch16_224"].config
    twin = timm_twin(config)
    model = ours_from(twin, config)
    results = {"environment": environment() | {"timm": timm.__version__}, "forward": []}
    print(results["environment"])
    for batch in args.batch:
        x = images(batch, 3, args.img_size, args.img_size)
        assert difference(model(x), twin(x)) <= 1e-5
        calls = {"timm": lambda x=x: twin(x), "ours": lambda x=x: model(x), "ours, again": lambda x=x: model(x)}
        rows = summarize(interleave(calls, max(4, args.rounds // batch), f"batch {batch}"), "timm")
        print_rows(f"batch {batch}, {args.img_size} x {args.img_size}, {args.threads} thread(s)", rows, "timm")
        results["forward"].append({"batch": batch, "img_size": args.img_size, "rows": rows})
    write_json(args.json, results)


if __name__ == "__main__":
    main()
