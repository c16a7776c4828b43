"""Sharper attention for more tokens: scores times log T / log T_trained (arXiv:2202.12172, arXiv:2501.19399).

    python examples/log_n_temperature.py -o log_n_temperature.png

Takes 40 seconds on two cores and trains nothing. Does it help a model beyond its trained sizes (16 to 48 pixels)? Not
here. It is meant for attention that is diluted over more tokens, but a larger picture of the same digit has more tokens
of each kind, and a token still attends to the same share of them: exp(entropy) / T, the mean over blocks, heads and
tokens. The factor narrows that share, and accuracy falls. For every second held-out digit it draws and prints

    16x16: 100.00% right, loss 0.109, attends to 61%; with the factor 99.44% right, loss 0.120, attends to 73%
    24x24: 99.44% right, loss 0.099, attends to 59%; with the factor 99.44% right, loss 0.097, attends to 64%
    32x32: 100.00% right, loss 0.098, attends to 62%; with the factor 100.00% right, loss 0.098, attends to 62%
    48x48: 100.00% right, loss 0.101, attends to 62%; with the factor 100.00% right, loss 0.101, attends to 57%
    64x64: 99.44% right, loss 0.126, attends to 64%; with the factor 99.44% right, loss 0.125, attends to 54%
    96x96: 94.44% right, loss 0.251, attends to 65%; with the factor 93.89% right, loss 0.261, attends to 52%
    128x128: 88.89% right, loss 0.430, attends to 65%; with the factor 84.44% right, loss 0.538, attends to 49%
"""

import argparse
import math

import torch
from matplotlib import pyplot as plt
from torch import Tensor
from torch.nn import functional as F

import vit
from vit.resources import digit_images

SIZES = (16, 24, 32, 48, 64, 96, 128)


def log_n(q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None = None, trained: int) -> Tensor:
    """`sdpa` with scores that grow with log T, the number of tokens, and are unchanged at T = `trained`."""
    return vit.attention.sdpa(q * (math.log(q.shape[2]) / math.log(trained)), k, v, bias=bias)


@torch.inference_mode()
def measure(model: vit.ViT, images: Tensor, labels: Tensor, trained: int) -> tuple[float, float, float]:
    """Accuracy, loss, and the share of the tokens that a token attends to (on the first four images)."""
    model.set_attention(log_n, trained=trained)
    logits = torch.cat([model(batch) for batch in images.split(20)])  # [B, 10]
    names = [f"blocks.{i}.attention.{part}" for i in range(len(model.blocks)) for part in "qk"]
    kept, shares = [*vit.record(model, images[:4], names).values()], []
    for q, k in zip(kept[::2], kept[1::2]):
        one_hot = torch.eye(q.shape[2]).expand(*q.shape[:2], -1, -1)  # [B, A, T, T]: attention of it is its weights
        entropy = torch.special.entr(log_n(q, k, one_hot, trained=trained)).sum(dim=-1)  # [B, A, T]
        shares.append(entropy.exp().mean().item() / q.shape[2])
    accuracy = (logits.argmax(dim=1) == labels).double().mean().item()
    return accuracy, F.cross_entropy(logits, labels).item(), sum(shares) / len(shares)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", default="log_n_temperature.png")
    output = parser.parse_args().output
    torch.set_num_threads(2)
    model, (digits, labels) = vit.load_pretrained("vit_digits_patch4_32"), (part[::2] for part in digit_images())
    p, (h, w) = model.config.patch_size, model.config.grid
    curves = []
    for side in SIZES:
        images = torch.stack([*map(vit.create_transform(model, (side, side), mode="squash"), digits)])
        T = 1 + (side // p) ** 2  # "trained" at the same number, the factor is 1
        curves.append([measure(model, images, labels, trained) for trained in (T, 1 + h * w)])
        texts = ["{:.2%} right, loss {:.3f}, attends to {:.0%}".format(*figures) for figures in curves[-1]]
        print(f"{side}x{side}: {texts[0]}; with the factor {texts[1]}", flush=True)
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for axis, part, title in zip(axes, (0, 2), ("accuracy", "share of the tokens that one attends to")):
        for i, name in enumerate(("as trained", "scores times log T / log 65")):
            axis.plot(SIZES, [row[i][part] for row in curves], "o-", label=name)
        axis.axvspan(16, 48, color="0.9", label="training sizes")
        axis.set(title=title, xlabel="side in pixels", xticks=SIZES)
    axes[0].legend()
    figure.savefig(output, dpi=110)
