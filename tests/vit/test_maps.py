"""Attention maps: the weights that are used, of the blocks, heads and rows asked for."""

import warnings

import pytest
import torch
from helpers import FLOAT32, MINI, difference, images, pixels, randomize, refused_in_one_line
from torch.utils._python_dispatch import TorchDispatchMode

import vit
from vit.config import ViTConfig

TINY = ViTConfig(img_size=32, patch_size=4, embed_dim=64, depth=2, num_heads=2, num_classes=7, init_values=0.5)


@pytest.fixture
def tiny() -> vit.ViT:
    return randomize(vit.ViT(TINY)).eval()


@pytest.fixture
def small() -> vit.ViT:
    return randomize(vit.ViT(MINI)).eval()


@torch.no_grad()
def watched(model: vit.ViT, x: torch.Tensor) -> list[torch.Tensor]:
    """Each block's weights [B, A, T, T], from the queries and keys that its attention function is called with."""
    seen = []

    def spy(q, k, v, *, bias=None):
        seen.append(torch.einsum("batd,basd->bats", q.float(), k.float()).div(q.shape[-1] ** 0.5).softmax(dim=-1))
        return vit.attention.sdpa(q, k, v)

    before = [attend.name for attend in model.attends]
    model.set_attention(spy)
    model.forward_features(x)
    for i, name in enumerate(before):
        model.set_attention(name, blocks=[i])
    return seen


@pytest.fixture
def looking() -> vit.ViT:
    model = vit.ViT(MINI.override(depth=3, reg_tokens=2))
    randomize(model)
    with torch.no_grad():
        for block in model.blocks:
            block.attention.qkv.weight.mul_(3)  # else the weights are nearly uniform
    return model.eval()


@pytest.mark.parametrize("attention", ["sdpa", "reference"])
@pytest.mark.parametrize("grid", [(14, 14), (9, 5), (1, 13), (1, 1), (11, 17)])
def test_attention_maps_equal_the_weights_that_are_used(looking, attention, grid):
    x = pixels(grid, count=2)
    looking.set_attention(attention)
    expected = watched(looking, x)
    maps = vit.attention_maps(looking, x, blocks=[2, 0, -2], queries="all")
    T = 3 + grid[0] * grid[1]
    for found, i in zip(maps, (2, 0, 1), strict=True):
        assert found.shape == (2, 3, T, T) and found.dtype == torch.float32 and not found.requires_grad
        assert difference(found, expected[i]) <= FLOAT32
        assert (found.sum(dim=-1) - 1).abs().max() <= FLOAT32 and found.min() >= 0
    if T > 4:
        assert difference(maps[0], expected[0]) > 0.01  # another block's
        assert maps[0].max() > 3 / T  # not uniform


@torch.no_grad()
def test_maps_of_any_blocks_in_any_order(looking):
    x = pixels((5, 7), count=2)
    every = vit.attention_maps(looking, x, blocks=[0, 1, 2], queries="all")
    assert all(difference(found, one) <= FLOAT32 for found, one in zip(every, watched(looking, x)))
    for asked in ([0], [0, -1], [-1, 0, 0], [-3], [2, 1]):
        found = vit.attention_maps(looking, x, blocks=asked, queries="all")
        assert len(found) == len(asked)
        assert all(torch.equal(one, every[i]) for one, i in zip(found, asked))
    assert min(difference(every[i], every[j]) for i, j in ((0, 1), (0, 2), (1, 2))) > 0.01
    looking.blocks[0].register_forward_pre_hook(lambda *_: pytest.fail("block 0 ran"))
    vit.attention_maps(looking, x, blocks=[0])  # reads the tokens before it


def test_heads_and_rows_are_those_asked(looking):
    x = pixels((5, 7), count=2)
    full = watched(looking, x)[-1]  # [2, 3, 38, 38]
    for heads in (None, [0], [2, 0], [-1, -1, 1], (1,)):
        for queries in ("class", "all", [0], [3, -1, 17, 3], range(3, 38), [1, 2]):
            rows = {"class": [0], "all": range(38)}[queries] if isinstance(queries, str) else queries
            (found,) = vit.attention_maps(looking, x, heads=heads, queries=queries)
            expected = full[:, list(range(3) if heads is None else heads)][:, :, list(rows)]
            assert difference(found, expected) <= FLOAT32, (heads, queries)
    (mistaken,) = vit.attention_maps(looking, x, heads=[0, 2])
    assert difference(mistaken, full[:, [2, 0], :1]) > 0.01


def test_maps_of_another_function_are_said_to_be_softmax(looking):
    x = pixels((5, 7))
    expected = watched(looking, x)

    def even(q, k, v, *, bias=None):
        return v.mean(dim=2, keepdim=True).expand_as(v)

    looking.set_attention(even, blocks=[1])
    with pytest.warns(UserWarning, match="attends by another function"):
        maps = vit.attention_maps(looking, x, blocks=[0, 1, 2], queries="all")
    assert difference(maps[0], expected[0]) <= FLOAT32 and difference(maps[1], expected[1]) <= FLOAT32
    assert difference(maps[2], expected[2]) > 1e-3  # it comes after what `even` did
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vit.attention_maps(looking, x, blocks=[0, 2])


@pytest.mark.parametrize(("dtype", "bar"), [(torch.float16, 5e-3), (torch.bfloat16, 5e-2), (torch.float64, 1e-5)])
def test_maps_of_half_models(looking, dtype, bar):
    x = pixels((5, 7), count=2)
    expected = watched(looking, x)
    maps = vit.attention_maps(looking.to(dtype), x.to(dtype), blocks=[0, 1, 2], queries="all")
    for found, one in zip(maps, expected):
        assert found.dtype == torch.float32
        assert (found - one).abs().max() <= bar
        assert (found.sum(dim=-1) - 1).abs().max() <= FLOAT32


def test_maps_are_float32_under_autocast(looking):
    x = pixels((5, 7), count=2)
    expected = watched(looking, x)
    with torch.autocast("cpu", torch.bfloat16):
        maps = vit.attention_maps(looking, x, blocks=[0, 1, 2], queries="all")
    for found, one in zip(maps, expected):
        assert found.dtype == torch.float32
        assert (found - one).abs().max() <= 5e-2
        assert (found.sum(dim=-1) - 1).abs().max() <= FLOAT32


class Largest(TorchDispatchMode):
    """The largest tensor that any operation makes, in numbers."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


@pytest.mark.parametrize(
    ("blocks", "heads", "queries"),
    [([0], None, "class"), ([2], [1], [0, 5, 9]), ([0, 2], None, "all"), ([-1], [0], "all"), ([2], None, "class")],
)
def test_maps_take_little_memory_beyond_the_result(looking, blocks, heads, queries):
    x = pixels((40, 23))
    T, D = 3 + 40 * 23, 48
    with Largest() as taken:
        maps = vit.attention_maps(looking, x, blocks, heads, queries)
    through = 3 * D * T if blocks == [0] else 4 * D * T  # queries, keys and values; the MLP's hidden layer
    assert taken.numel <= max(maps[0].numel(), through) < 3 * T * T + 1
    looking.set_attention("reference")
    with Largest() as taken:
        looking.forward_features(x)
    assert taken.numel == 3 * T * T  # what fused attention is spared is seen where it is not spared


@torch.no_grad()
def test_attention_maps(tiny):
    seen = {}

    def spy(q, k, v, *, bias=None):
        weights = torch.softmax(q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5, dim=-1)
        seen[len(seen)] = weights
        return weights @ v

    x = images(2, 3, 12, 40)
    maps = vit.attention_maps(tiny, x, blocks=[-1, 0], queries="all")
    rows = vit.attention_maps(tiny, x, blocks=[1])
    tiny.set_attention(spy)
    tiny(x)
    assert difference(maps[0], seen[1]) <= FLOAT32
    assert difference(maps[1], seen[0]) <= FLOAT32
    assert difference(rows[0], maps[0][:, :, :1]) <= FLOAT32
    assert difference(maps[0].sum(dim=-1), torch.ones(2, 2, 31)) <= FLOAT32
    assert not tiny.blocks[0].attention.qkv._forward_hooks
    with pytest.raises(ValueError, match="block 2 is out of range"):
        vit.attention_maps(tiny, x, blocks=[2])
    with pytest.raises(ValueError, match="queries must be 'class', 'all' or a list of token numbers, not 'cls'"):
        vit.attention_maps(tiny, x, queries="cls")


NONSENSE = {
    "maps' policy": (lambda m: vit.attention_maps(m, pixels((2, 2)), ragged="padd"), "'padd'. Did you mean 'pad'"),
    "maps' block": (lambda m: vit.attention_maps(m, pixels((2, 2)), [9]), "block 9 is out of range: there are 2"),
    "maps' number": (lambda m: vit.attention_maps(m, pixels((2, 2)), 1), "blocks must be a list .* not 1"),
    "maps' none": (lambda m: vit.attention_maps(m, pixels((2, 2)), []), r"blocks must be a list .* not \[\]"),
    "head 3": (lambda m: vit.attention_maps(m, pixels((2, 2)), heads=[3]), "head 3 is out of range: there are 3"),
    "head -4": (lambda m: vit.attention_maps(m, pixels((2, 2)), heads=[-4]), "head -4 is out of range: there are 3"),
    "a head": (lambda m: vit.attention_maps(m, pixels((2, 2)), heads=0), "heads must be a list .* not 0"),
    "no heads": (lambda m: vit.attention_maps(m, pixels((2, 2)), heads=[]), r"heads must be a list .* not \[\]"),
    "query 5": (lambda m: vit.attention_maps(m, pixels((2, 2)), queries=[5]), "token 5 is out of range: there are 5"),
    "query -6": (
        lambda m: vit.attention_maps(m, pixels((2, 2)), queries=[-6]),
        "token -6 is out of range: there are 5",
    ),
    "a query": (lambda m: vit.attention_maps(m, pixels((2, 2)), queries=3), "queries must be .* not 3"),
    "no queries": (lambda m: vit.attention_maps(m, pixels((2, 2)), queries=[]), r"queries must be .* not \[\]"),
    "query 'cls'": (lambda m: vit.attention_maps(m, pixels((2, 2)), queries="cls"), "queries must be .* not 'cls'"),
    "maps' strip": (lambda m: vit.attention_maps(m, images(1, 3, 1, 10000)), "got 1 x 10000, the nearest size"),
}


@pytest.mark.parametrize("case", NONSENSE)
def test_nonsense_is_refused_in_one_line(small, case):
    refused_in_one_line(lambda: NONSENSE[case][0](small), NONSENSE[case][1])
