"""What it costs that attention can be replaced, and `flex` beside `sdpa`: python tests/benchmarks/attention.py

`sdpa` through `set_attention` against the same model with the call written into its attention, ViT-S/16, batch 1, 224
px; then `flex` with a score_mod that changes nothing against `sdpa`, on q, k and v of such a model at larger sizes. One
thread, a minute on a quiet core.
"""

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from harness import environment, interleave, print_rows, summarize, write_json
from helpers import difference, images, randomize

import vit
from vit.attention import sdpa
from vit.kernels.attention.flex import flex
from vit.model import Attention

LENGTHS = (577, 785, 1025)


class WrittenOut(Attention):
    """Attention without the seam."""

    def forward(self, x: Tensor, packing: object = None) -> Tensor:
        """See `Attention`."""
        B, T, D = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.num_heads, D // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).reshape(B, T, D))


def without_seam(model: vit.ViT) -> vit.ViT:
    """The same model, its attention written out."""
    plain = vit.ViT(model.config).eval()
    plain.load_state_dict(model.state_dict())
    for block in plain.blocks:
        block.attention.__class__ = WrittenOut
    return plain


@torch.inference_mode()
def main() -> None:
    """Race, print the tables, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results = {"environment": environment(), "rows": {}}

    model = randomize(vit.create_model("vit_small_patch16_224")).eval()
    plain, x = without_seam(model), images(1, 3, 224, 224)
    assert difference(model(x), plain(x)) == 0
    calls = {
        "written out": lambda: plain(x),
        "through the seam": lambda: model(x),
        "written out, again": lambda: plain(x),
    }
    rows = summarize(interleave(calls, args.rounds, "seam"), "written out")
    print_rows(f"batch 1, 224 x 224, {args.threads} thread(s)", rows, "written out")
    results["rows"]["seam"] = rows

    def unchanged(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score

    for T in LENGTHS:
        q, k, v = images(1, T, 3, 6, 64).permute(2, 0, 3, 1, 4)
        calls = {"sdpa": lambda q=q, k=k, v=v: sdpa(q, k, v),
                 "flex": lambda q=q, k=k, v=v: flex(q, k, v, score_mod=unchanged),
                 "sdpa, again": lambda q=q, k=k, v=v: sdpa(q, k, v)}  # fmt: skip
        assert difference(calls["flex"](), calls["sdpa"]()) <= 1e-5
        rows = summarize(interleave(calls, args.rounds, f"T = {T}"), "sdpa")
        print_rows(f"attention alone, T = {T}, 6 heads of 64", rows, "sdpa")
        results["rows"][f"flex {T}"] = rows
    write_json(args.json, results)


if __name__ == "__main__":
    main()
