"""Print the README's parity table: our difference from timm and timm's from itself, per size, dtype and attention.

    python tests/reports/parity_table.py

The same random, non-trivial weights in both; about a minute on two cores. float32 rows: max|ours - timm| divided by
max|timm|, of logits and tokens; for scale, timm's fused attention against its unfused one. Half-precision rows: root
mean square of the difference from timm's float32 logits, divided by theirs, for our model and for timm's.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from helpers import FLOAT32, difference, images, ours_from, timm_twin

from vit.presets import NAMED_MODELS

SIZES = ((224, 224), (384, 384), (256, 160), (112, 448))


def rms(values: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference, over that of `expected`."""
    return ((values.float() - expected).square().mean() / expected.square().mean()).sqrt().item()


def fuse(twin: nn.Module, fused: bool) -> None:
    """Switch timm's attention between the fused kernel and softmax written out."""
    for block in twin.blocks:
        block.attn.fused_attn = fused


@torch.no_grad()
def rows(sizes: tuple = SIZES, batch: int = 2) -> Iterator[tuple[str, str, str, float, float, float]]:
    """(size, dtype, attention, our error, the peer's own, the bar) for each row, as soon as it is known."""
    config = NAMED_MODELS["vit_small_patch16_224"].config
    twin = timm_twin(config)
    model = ours_from(twin, config)
    for height, width in sizes:
        size = f"{height} x {width}"
        x = images(batch, 3, height, width)
        tokens, logits = twin.forward_features(x), twin(x)
        fuse(twin, False)
        peer = max(difference(twin.forward_features(x), tokens), difference(twin(x), logits))
        fuse(twin, True)
        for attention in ("sdpa", "reference"):
            model.set_attention(attention)
            ours = max(difference(model.forward_features(x), tokens), difference(model(x), logits))
            yield size, "float32", attention, ours, peer, FLOAT32
        for dtype in (torch.bfloat16, torch.float16):
            half_twin, half = timm_twin(config).to(dtype), ours_from(timm_twin(config), config).to(dtype)
            peer = rms(half_twin(x.to(dtype)), logits)
            for attention in ("sdpa", "reference"):
                half.set_attention(attention)
                name = str(dtype).removeprefix("torch.")
                yield size, name, attention, rms(half(x.to(dtype)), logits), peer, 1.5 * peer


def main() -> None:
    """The table, in Markdown."""
    print("| size | dtype | attention | our difference | timm against itself | allowed |")
    print("|---|---|---|---|---|---|")
    for size, dtype, attention, ours, peer, bar in rows():
        print(f"| {size} | {dtype} | {attention} | {ours:.1e} | {peer:.1e} | {bar:.1e} |", flush=True)


if __name__ == "__main__":
    main()
