"""Images of many sizes: packed, one by one, and all padded to the largest.

    python tests/benchmarks/packed.py

64 images of 64 different sizes in each mix, ViT-S/16, eager float32, about ten minutes on two cores. Padding
changes the answers; it is here for its cost.
"""

import argparse
import random
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from harness import environment, interleave, print_rows, summarize, write_json
from helpers import difference, images, randomize

import vit
from vit.packed import BUDGET

PATCH = 16
MIXES = {"96 to 512 px": (6, 32), "16 to 128 px": (1, 8)}  # patches a side


def mix(low: int, high: int, count: int) -> list[torch.Tensor]:
    """Images of different sizes, `low` to `high` patches a side; some sizes repeat if there are too few."""
    sizes = [(h, w) for h in range(low, high + 1) for w in range(low, high + 1)]
    generator = random.Random(0)
    chosen = generator.sample(sizes, min(count, len(sizes)))
    chosen += generator.choices(sizes, k=count - len(chosen))
    return [images(3, h * PATCH, w * PATCH, seed=i) for i, (h, w) in enumerate(chosen)]


def pad(batch: list[torch.Tensor]) -> torch.Tensor:
    """[B, 3, H, W], all padded to the largest."""
    H, W = (max(image.shape[i] for image in batch) for i in (1, 2))
    return torch.stack([F.pad(image, (0, W - image.shape[2], 0, H - image.shape[1])) for image in batch])


@torch.inference_mode()
def main() -> None:
    """Race on each mix, print tables, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--budgets", type=int, nargs="*", default=[512, 1024, 4096], help="besides the default")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    model = randomize(vit.create_model("vit_small_patch16_224")).eval()
    results = {"environment": environment(), "mixes": []}
    print(results["environment"])
    for title, (low, high) in MIXES.items():
        batch = mix(low, high, args.count)
        padded = pad(batch)
        one_by_one = torch.cat([model(image[None]) for image in batch])
        assert difference(model.forward_packed(batch), one_by_one) <= 1e-5
        calls = {
            "one by one": lambda b=batch: [model(image[None]) for image in b],
            "packed": lambda b=batch: model.forward_packed(b),
            "packed, again": lambda b=batch: model.forward_packed(b),
            **{f"packed, budget {n}": lambda b=batch, n=n: model.forward_packed(b, budget=n) for n in args.budgets},
            "padded, batches of 8": lambda b=padded: [model(part) for part in b.split(8)],
        }
        rows = summarize(interleave(calls, args.rounds, title), "one by one")
        print_rows(
            f"{args.count} images of {title}, default budget {BUDGET}, {args.threads} threads", rows, "one by one"
        )
        tokens = sum(image[0].numel() for image in batch) // PATCH**2
        wasted = 1 - tokens * PATCH**2 / padded[:, 0].numel()
        print(f"  {tokens} patches, none of them wasted when packed; padded, {wasted:.0%} of all are padding")
        results["mixes"].append({"mix": title, "patches": tokens, "padding": wasted, "rows": rows})
    write_json(args.json, results)


if __name__ == "__main__":
    main()
