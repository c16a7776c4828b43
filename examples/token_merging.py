"""Fewer tokens block by block, without training: ToMe (arXiv:2210.09461) merges similar tokens.

    python examples/token_merging.py -o token_merging.png

Takes half a minute on one core. The held-out digits are resized to 64x64 pixels, 257 tokens, and lose r tokens in every
block. A token merged from n counts as n in attention if log n is added to its scores, through the `bias` of `sdpa`; the
figures in brackets leave that out. Times are per image; the picture shows the merged tokens at r = 32. It prints

    r = 0: 99.17% right, logits off by 0.0% (99.17% right, logits off by 0.0%), 257 tokens left, 9.7 ms, x 1.00
    r = 16: 99.17% right, logits off by 0.4% (98.89% right, logits off by 4.5%), 161 tokens left, 8.0 ms, x 0.82
    r = 32: 99.17% right, logits off by 2.6% (98.61% right, logits off by 11.2%), 65 tokens left, 6.0 ms, x 0.62
    r = 48: 98.61% right, logits off by 8.2% (98.61% right, logits off by 13.9%), 17 tokens left, 4.5 ms, x 0.46
"""

import argparse
from time import process_time

import torch
from matplotlib import pyplot as plt

import vit


def match(k: torch.Tensor, r: int) -> torch.Tensor:
    """Keys [B, T, d] -> [B, T], each token's index after merging the r even tokens that are most like an odd one."""
    k = k / k.norm(dim=-1, keepdim=True)
    scores = k[:, ::2] @ k[:, 1::2].mT  # [B, even, odd], cosines
    scores[:, 0] = -torch.inf  # the class token is never merged
    best, mate = scores.max(dim=-1)  # each [B, even]
    gone = best.argsort(dim=-1, descending=True)[:, :r]  # [B, r]
    number = torch.ones(k.shape[:2], dtype=torch.int64).scatter(1, 2 * gone, 0).cumsum(dim=1) - 1  # [B, T]
    return number.scatter(1, 2 * gone, number.gather(1, 2 * mate.gather(1, gone) + 1))


def merging(model: vit.ViT, images: torch.Tensor, r: int, weigh: bool = True) -> tuple[torch.Tensor, ...]:
    """Logits; how many tokens each remaining one holds [B, T', 1]; the final index of each token [B, T]."""
    x = keys = model.embed(images)  # [B, T, D]
    sizes, places = torch.ones_like(x[:, :, :1]), torch.arange(x.shape[1]).expand(x.shape[:2])

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, bias: torch.Tensor | None = None) -> torch.Tensor:
        nonlocal keys
        keys = k.mean(dim=1)  # [B, T, d]
        return vit.attention.sdpa(q, k, v, bias=sizes.log().mT[:, None] if weigh and r else None)  # [B, A, T, d]

    model.set_attention(attend)
    for block in model.blocks:
        x = x + block.residual_attention(block.attention(block.norm1(x)), block.scale1)  # [B, T, D]
        if less := min(r, (x.shape[1] - 1) // 2):
            to, n = match(keys, less), x.shape[1] - less  # [B, T] in range(n)
            rows = (to + n * torch.arange(len(x))[:, None]).flatten()  # [B*T]
            x = torch.cat([x * sizes, sizes], dim=2).flatten(0, 1)  # [B*T, D + 1]
            x = x.new_zeros(len(to) * n, x.shape[1]).index_add(0, rows, x).unflatten(0, (-1, n))  # [B, T - r, D + 1]
            x, sizes, places = x[:, :, :-1] / x[:, :, -1:], x[:, :, -1:], to.gather(1, places)
        x = x + block.residual_mlp(block.mlp(block.norm2(x)), block.scale2)
    return model.forward_head(model.norm(x)), sizes, places


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", default="token_merging.png")
    output = parser.parse_args().output
    torch.set_num_threads(1)
    model = vit.load_pretrained("vit_digits_patch4_32").requires_grad_(False)
    digits, labels = vit.resources.digit_images()
    images = torch.stack([*map(vit.create_transform(model, (64, 64), mode="squash"), digits)])  # [360, 3, 64, 64]
    runs: dict[tuple[int, bool], list] = {(r, weigh): [] for r in (0, 16, 32, 48) for weigh in (True, False)}
    for batch, setting in [(batch, setting) for batch in images.split(20) for setting in runs]:
        runs[setting].append((process_time(), *merging(model, batch, *setting), process_time()))
    logits = {setting: torch.cat([part[1] for part in parts]) for setting, parts in runs.items()}  # [360, 10]
    for r in (0, 16, 32, 48):
        both = [logits[r, weigh] for weigh in (True, False)]
        right = [f"{(x.argmax(dim=1) == labels).double().mean():.2%} right" for x in both]
        moved = [f"logits off by {(x - logits[0, True]).norm() / logits[0, True].norm():.1%}" for x in both]
        ms = torch.tensor([[part[4] - part[0] for part in runs[number, True]] for number in (r, 0)]) * 50
        cost = f"{runs[r, True][0][2].shape[1]} tokens left, {ms[0].median():.1f} ms, x {(ms[0] / ms[1]).median():.2f}"
        print(f"r = {r}: {right[0]}, {moved[0]} ({right[1]}, {moved[1]}), {cost}")
    figure, axes = plt.subplots(2, 6, figsize=(9, 3.1), subplot_kw={"xticks": [], "yticks": []}, layout="tight")
    for i, picture in enumerate([*images[:6, 0], *(runs[32, True][0][3][:6, 1:] * 7 % 20).unflatten(1, (16, 16))]):
        axes.flat[i].imshow(picture, cmap=("gray", "tab20")[i // 6])
    figure.savefig(output, dpi=110)
