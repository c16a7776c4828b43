"""The research examples compute what they say: the central function of each, on small random models."""

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from helpers import FLOAT32, difference, images, randomize

import vit

EXAMPLES = Path(__file__).parents[2] / "examples"
TINY = vit.ViTConfig(img_size=(24, 40), patch_size=4, embed_dim=64, depth=3, num_heads=4, num_classes=7)


@pytest.fixture
def tiny() -> vit.ViT:
    return randomize(vit.ViT(TINY)).eval().requires_grad_(False)


@pytest.fixture
def head_ablation(load) -> ModuleType:
    return load("head_ablation")


def shake_values(model: vit.ViT, block: int, head: int) -> None:
    """Change the values of one head and nothing else."""
    d = TINY.embed_dim // TINY.num_heads
    start = 2 * TINY.embed_dim + head * d
    model.blocks[block].attention.qkv.weight[start : start + d] += images(d, TINY.embed_dim, seed=7)


def test_ablating_no_head_changes_nothing(tiny, head_ablation):
    x = images(3, 3, 24, 40)
    means = head_ablation.mean_heads(tiny, x)
    assert [mean.shape for mean in means] == [(1, 4, 61, 16)] * 3
    assert torch.equal(head_ablation.without(tiny, x, [], means), tiny(x))


def test_an_ablated_head_carries_nothing_of_the_image(tiny, head_ablation):
    x, means = images(3, 3, 24, 40), head_ablation.mean_heads(tiny, images(5, 3, 24, 40, seed=2))
    out = [(2, 3), (1, 2), (1, 0)]
    before = head_ablation.without(tiny, x, out, means)
    assert difference(before, tiny(x)) > 0.01
    for block, head in out:
        shake_values(tiny, block, head)
    assert torch.equal(head_ablation.without(tiny, x, out, means), before)
    assert difference(tiny(x), before) > 0.01
    shake_values(tiny, 1, 1)  # a head that is not ablated
    assert difference(head_ablation.without(tiny, x, out, means), before) > 0.01


def test_an_ablated_head_gives_its_mean(tiny, head_ablation):
    """The mean over a single image is the image's own output."""
    x, out = images(1, 3, 24, 40), [(0, 1), (2, 0)]
    assert torch.equal(head_ablation.without(tiny, x, out, head_ablation.mean_heads(tiny, x)), tiny(x))
    two = torch.cat([x, images(1, 3, 24, 40, seed=2)])
    found = vit.record(tiny, two, "blocks.0.attention.heads")["blocks.0.attention.heads"]
    assert difference(head_ablation.mean_heads(tiny, two)[0], (found[:1] + found[1:]) / 2) <= FLOAT32


def test_merging_none_is_the_model(load, tiny):
    x = images(2, 3, 32, 56)
    expected = tiny(x)
    logits, sizes, places = load("token_merging").merging(tiny, x, 0)
    assert torch.equal(logits, expected)
    assert (sizes == 1).all() and torch.equal(places, torch.arange(113).expand(2, -1))


@pytest.mark.parametrize("r", [1, 8, 100])
def test_no_token_is_lost(load, tiny, r):
    """Each token is in one remaining token, whose size counts them; the class token stays alone."""
    x = images(2, 3, 32, 56)  # 113 tokens
    _, sizes, places = load("token_merging").merging(tiny, x, r)
    left = 113
    for _ in range(3):
        left -= min(r, (left - 1) // 2)
    assert sizes.shape == (2, left, 1)
    assert torch.equal(sizes[:, :, 0], torch.nn.functional.one_hot(places, left).sum(dim=1).float())
    assert (places[:, 0] == 0).all() and (sizes[:, 0] == 1).all()


def test_the_most_alike_are_matched(load):
    """Six tokens: 4 points as 1 does, 2 almost as 5; the class token, number 0, points exactly as 3."""
    angles = torch.tensor([[2.0, 0.0, 1.0, 2.0, 0.0, 1.1]])
    k = torch.stack([angles.cos(), angles.sin()], dim=2) * torch.arange(1, 7)[:, None]
    match = load("token_merging").match
    assert match(k, 0).tolist() == [[0, 1, 2, 3, 4, 5]]
    assert match(k, 1).tolist() == [[0, 1, 2, 3, 1, 4]]
    assert match(k, 2).tolist() == [[0, 1, 3, 2, 1, 3]]


def test_size_weighs_like_the_tokens_themselves(load, tiny):
    """Five kinds of patches, no positions: only equal tokens are merged, and if weighed they leave the logits alone."""
    merging = load("token_merging").merging
    tiny.position_embedding[:, 1:] = 0
    kinds = images(5, 3, 4, 4)
    chosen = torch.randint(5, (2, 8, 14), generator=torch.Generator().manual_seed(0))
    x = kinds[chosen].permute(0, 3, 1, 4, 2, 5).reshape(2, 3, 32, 56)
    expected = tiny(x)
    logits, sizes, places = merging(tiny, x, 20)
    of_each = [chosen[0].flatten()[places[0, 1:] == token].unique() for token in range(1, sizes.shape[1])]
    assert all(len(kind) == 1 for kind in of_each) and sizes.shape[1] == 113 - 60  # only equals were merged
    assert difference(logits, expected) <= FLOAT32
    assert difference(merging(tiny, x, 20, weigh=False)[0], expected) > 0.01


def test_numpy_is_pytorch(load, tiny):
    x = images(2, 3, 24, 40)
    weights = {name: tensor.numpy() for name, tensor in tiny.state_dict().items()}
    logits, attention = load("numpy_forward").forward(weights, TINY, x.numpy())
    assert logits.dtype == np.float32 and difference(torch.from_numpy(logits), tiny(x)) <= FLOAT32
    theirs = vit.record(tiny, x, "blocks.2.attention.weights")["blocks.2.attention.weights"]
    assert difference(torch.from_numpy(attention), theirs) <= FLOAT32
    for name in weights:  # every one matters
        other = {**weights, name: weights[name] * 1.5}
        if name.endswith("qkv.bias"):  # but not the keys': the softmax does not see them
            other[name][64:128] = weights[name][64:128]
        changed, _ = load("numpy_forward").forward(other, TINY, x.numpy())
        assert difference(torch.from_numpy(changed), tiny(x)) > 10 * FLOAT32, name


def test_numpy_is_pytorch_in_double_precision(load, tiny):
    x = images(2, 3, 24, 40).double()
    weights = {name: tensor.numpy() for name, tensor in tiny.double().state_dict().items()}
    logits, _ = load("numpy_forward").forward(weights, TINY, x.numpy())
    assert difference(torch.from_numpy(logits), tiny(x)) <= 1e-13
