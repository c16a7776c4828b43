"""The model by itself: shapes, set_attention, intermediates, and what PyTorch's tools make of it."""

import copy
import pickle
import weakref

import pytest
import torch
from helpers import (
    FLOAT32,
    MINI,
    difference,
    images,
    pixels,
    randomize,
    refused_in_one_line,
)
from torch.func import functional_call, vmap

import vit
from vit.config import ViTConfig
from vit.position import resample_position_embedding

TINY = ViTConfig(img_size=32, patch_size=4, embed_dim=64, depth=2, num_heads=2, num_classes=7, init_values=0.5)


@pytest.fixture
def tiny() -> vit.ViT:
    return randomize(vit.ViT(TINY)).eval()


def test_parameter_names_are_those_of_the_design(tiny):
    names = set(tiny.state_dict())
    assert {
        "class_token", "position_embedding", "patch_embed.proj.weight", "blocks.1.attention.qkv.weight",
        "blocks.1.attention.proj.bias", "blocks.1.mlp.fc1.weight", "blocks.1.scale1", "norm.weight", "head.weight",
    } <= names  # fmt: skip


@torch.no_grad()
def test_shapes_of_every_stage(tiny):
    x = images(3, 3, 20, 44)
    tokens = tiny.forward_features(x)
    assert tokens.shape == (3, 1 + 5 * 11, 64)
    assert tiny.forward_head(tokens).shape == tiny(x).shape == (3, 7)
    assert tiny.forward_head(tokens, pre_logits=True).shape == (3, 64)
    assert torch.equal(tiny.forward_head(tokens), tiny(x))


@torch.no_grad()
def test_equal_token_counts_are_not_equal_grids(tiny):
    """4x16 patches are as many as 8x8: as many tokens in another grid must get other positions."""
    x = images(1, 3, 32, 32)
    strip = images(1, 3, 16, 64)
    assert tiny.embed(x).shape == tiny.embed(strip).shape
    added = tiny.embed(torch.zeros(1, 3, 16, 64)) - tiny.embed(torch.zeros(1, 3, 32, 32))
    assert added[:, 1:].abs().max() > 0.1
    assert torch.equal(added[:, :1], torch.zeros(1, 1, 64))


def test_training_at_another_size_trains_the_stored_grid(tiny):
    before = tiny.position_embedding.detach().clone()
    tiny(images(1, 3, 48, 24)).square().sum().backward()
    assert tiny.position_embedding.grad.abs().amax(dim=2).min() > 0  # every row of the 8x8 grid, and the class token's
    assert torch.equal(tiny.position_embedding, before)


def test_reset_classifier(tiny):
    tiny.categories = list("abcdefg")
    tiny.to(torch.bfloat16).reset_classifier(3)
    assert tiny.config.num_classes == 3 and tiny.categories is None
    assert tiny(images(1, 3, 32, 32).bfloat16()).shape == (1, 3)
    tiny.reset_classifier(0)
    assert tiny(images(1, 3, 32, 32).bfloat16()).shape == (1, 64)


def test_attention_is_replaced_in_one_line(tiny):
    x = images(2, 3, 32, 24)
    expected = tiny(x)
    calls = []

    def uniform(q, k, v, *, bias=None):
        calls.append(q.shape)
        return v.mean(dim=2, keepdim=True).expand_as(v)

    tiny.set_attention(uniform, blocks=[-1])
    assert difference(tiny(x), expected) > 1e-3
    assert calls == [(2, 2, 49, 32)]
    tiny.set_attention(uniform)
    tiny(x)
    assert len(calls) == 3
    tiny.set_attention("reference")
    assert difference(tiny(x), expected) <= FLOAT32
    assert len(calls) == 3


def test_gradient_checkpointing_changes_no_number(tiny):
    again = vit.ViT(TINY.override(grad_checkpointing=True, drop_path_rate=0.5)).train()
    plain = vit.ViT(TINY.override(drop_path_rate=0.5)).train()
    again.load_state_dict(tiny.state_dict())
    plain.load_state_dict(tiny.state_dict())
    calls = {"again": 0, "plain": 0}
    for name, model in (("again", again), ("plain", plain)):
        model.blocks[0].mlp.fc1.register_forward_hook(lambda *_, name=name: calls.update({name: calls[name] + 1}))
        torch.manual_seed(5)
        model(images(4, 3, 24, 32)).square().sum().backward()
    assert calls == {"again": 2, "plain": 1}  # the block did run once more in the backward pass
    for a, b in zip(again.parameters(), plain.parameters()):
        assert torch.equal(a.grad, b.grad)


def test_copies_pickles_and_functional_calls(tiny):
    tiny.set_attention("reference", blocks=[0])
    tiny.categories = list("abcdefg")
    x = images(2, 3, 24, 40)
    expected = tiny(x)
    for other in (copy.deepcopy(tiny), pickle.loads(pickle.dumps(tiny))):
        assert torch.equal(other(x), expected)
        assert other.config == tiny.config and other.categories == tiny.categories
        assert other.attends[0].fn is vit.attention.reference
        other.class_token.data.add_(1)
    assert torch.equal(tiny(x), expected)
    moved = {name: p + 0.1 for name, p in tiny.named_parameters()}
    assert difference(functional_call(tiny, moved, (x,)), expected) > 1e-3
    assert torch.equal(tiny(x), expected)


def test_vmap_over_an_ensemble(tiny):
    """Two models at once, at a size that resamples positions: no state survives from one to the other."""
    members = [randomize(vit.ViT(TINY), seed).eval() for seed in (1, 2)]
    x = images(2, 3, 24, 40)
    stacked = {name: torch.stack([dict(m.named_parameters())[name] for m in members]) for name in tiny.state_dict()}
    together = vmap(lambda parameters: functional_call(tiny, parameters, (x,)))(stacked)
    for row, member in zip(together, members):
        assert difference(row, member(x)) <= FLOAT32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_casting(tiny, dtype):
    x = images(2, 3, 24, 40)
    expected = tiny(x)
    half = copy.deepcopy(tiny).to(dtype)
    assert half(x.to(dtype)).dtype == dtype
    assert difference(half(x.to(dtype)).float(), expected) < 0.05
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert difference(tiny(x).float(), expected) < 0.05


def test_autocast_leaves_positions_in_float32():
    embedding = images(1, 1, 64, 16)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = resample_position_embedding(embedding, (8, 8), (5, 11))
    assert torch.equal(inside, resample_position_embedding(embedding, (8, 8), (5, 11)))


def test_the_default_dtype_changes_no_position():
    embedding = images(1, 1, 196, 16)[0]
    expected = resample_position_embedding(embedding, (14, 14), (9, 5))
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(resample_position_embedding(embedding, (14, 14), (9, 5)), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_shapes_on_the_meta_device():
    with torch.device("meta"):
        model = vit.ViT(TINY)
    assert model(torch.empty(2, 3, 40, 24, device="meta")).shape == (2, 7)


def test_blocks_are_any_iterable_of_numbers(tiny):
    tiny.set_attention("reference", blocks=(i for i in [-1]))
    assert [attend.name for attend in tiny.attends] == ["sdpa", "reference"]
    for blocks, message in ((0, "must be a list"), (["0"], "must be a whole number"), ([True], "whole number")):
        with pytest.raises(ValueError, match=message):
            tiny.set_attention("reference", blocks=blocks)


@pytest.fixture
def small() -> vit.ViT:
    return randomize(vit.ViT(MINI)).eval()


@torch.no_grad()
def test_224_384_224_is_the_identity_to_the_bit():
    model = randomize(vit.ViT(MINI.override(img_size=224, patch_size=16))).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x = images(1, 3, 224, 224)
    tokens = model.forward_features(x)
    model(images(1, 3, 384, 384)), model(images(1, 3, 112, 448))
    assert torch.equal(model.forward_features(x), tokens)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_step_at_384_trains_the_stored_grid():
    model = randomize(vit.ViT(MINI.override(img_size=224, patch_size=16, depth=1)))
    x = images(1, 3, 224, 224)
    before, stored = model(x).detach(), model.position_embedding.detach().clone()
    optimizer = torch.optim.SGD([model.position_embedding], lr=0.1)
    model(images(1, 3, 384, 384)).square().sum().backward()
    optimizer.step()
    assert model.position_embedding.shape == (1, 1 + 14 * 14, 48)
    assert (model.position_embedding - stored).abs().amax(dim=2).min() > 0  # every row
    assert difference(model(x).detach(), before) > 100 * FLOAT32


@torch.no_grad()
def test_loading_keeps_the_stored_grid(small, tmp_path):
    vit.save_checkpoint(small, tmp_path / "m.safetensors")
    again = vit.load_pretrained(tmp_path / "m.safetensors")
    assert again.config.img_size == (56, 56) and torch.equal(again.position_embedding, small.position_embedding)
    assert torch.equal(again(pixels((24, 17))), small(pixels((24, 17))))
    larger = vit.load_pretrained(tmp_path / "m.safetensors", patch_size=6)
    assert larger.config.grid == (14, 14) and torch.equal(larger.position_embedding, small.position_embedding)
    with pytest.raises(ValueError, match="position_embedding has 197 rows, which does not fit img_size 96x96"):
        vit.load_pretrained(tmp_path / "m.safetensors", img_size=96)
    with pytest.raises(RuntimeError, match="size mismatch for position_embedding"):
        vit.ViT(MINI.override(img_size=96)).load_state_dict(small.state_dict())


# Maps after some blocks


# Maps after some blocks

DEEP = MINI.override(depth=4)


@torch.no_grad()
def test_the_last_normed_intermediate_is_the_features():
    model = randomize(vit.ViT(DEEP.override(reg_tokens=3, class_position=False, dist_token=True))).eval()
    x = pixels((9, 5), count=2)
    ((patches, prefix),) = model.forward_intermediates(x, [-1], norm=True, return_prefix_tokens=True)
    assert torch.equal(torch.cat([prefix, patches.flatten(2).transpose(1, 2)], dim=1), model.forward_features(x))


@torch.no_grad()
def test_intermediates_come_in_the_order_asked():
    model = randomize(vit.ViT(DEEP)).eval()
    x = pixels((5, 9))
    each = model.forward_intermediates(x)
    assert len({float(one.sum()) for one in each}) == 4
    for asked in ([2, 0], [-1, 1, -1, -4], (3,), range(3), [1, 1, -3]):
        found = model.forward_intermediates(x, asked)
        assert len(found) == len(asked)
        assert all(torch.equal(one, each[i]) for one, i in zip(found, asked))


class MustNotRun(Exception):
    pass


def forbid(model: vit.ViT, *numbers: int) -> None:
    def refuse(*_: object) -> None:
        raise MustNotRun

    for i in numbers:
        model.blocks[i].register_forward_pre_hook(refuse)


@torch.no_grad()
def test_no_block_beyond_the_last_asked_runs():
    model = randomize(vit.ViT(DEEP)).eval()
    x = pixels((5, 9))
    forbid(model, 2, 3)
    model.forward_intermediates(x, [1, 0, -3])
    model.forward_intermediates_packed(list(x), [1, 0, -3])
    vit.attention_maps(model, x, [-2, 0])  # needs block 1's result, and of block 2 only what goes in
    for run in (model.forward_intermediates, lambda x, blocks: model.forward_intermediates_packed(list(x), blocks)):
        with pytest.raises(MustNotRun):
            run(x, [2])
    with pytest.raises(MustNotRun):
        vit.attention_maps(model, x, [-1])


# One loop over the blocks


@torch.no_grad()
def test_encode_keeps_what_is_asked_for_and_stops():
    model = randomize(vit.ViT(DEEP)).eval()
    x = model.embed(pixels((5, 9)))
    order = [[] for _ in range(3)]
    expected = [x]
    for block in model.blocks:
        expected.append(block(expected[-1]))
    forbid(model, 3)
    for i, block in enumerate(model.blocks):
        block.register_forward_hook(lambda *_, i=i: order[-1].append(f"block {i}"))

    def keep(i):
        return lambda tokens: (order[-1].append(f"keep {i}"), tokens.clone())[1]

    last, kept = model.encode(x, keep={2: keep(2), -1: keep(-1), 0: keep(0)})  # in any order
    assert order.pop() == ["keep -1", "block 0", "keep 0", "block 1", "block 2", "keep 2"]
    assert set(kept) == {-1, 0, 2} and all(torch.equal(kept[i], expected[i + 1]) for i in kept)
    assert torch.equal(last, expected[3])
    last, kept = model.encode(x, keep={-1: keep(-1)})  # no block at all
    assert order.pop() == ["keep -1"] and list(kept) == [-1] and last is x
    model.encode(x, keep={1: lambda tokens: None})
    with pytest.raises(MustNotRun):
        model.encode(x)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("norm", [True, False])
@torch.no_grad()
def test_normed_intermediates_leave_the_others_to_be_freed(norm, packed):
    """Only one map per block is kept, so tokens before the norm live no longer than the next block runs."""
    model = randomize(vit.ViT(DEEP)).eval()
    seen, alive = [], []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda *_: alive.append(sum(ref() is not None for ref in seen)))
        block.register_forward_hook(lambda block, given, out: seen.append(weakref.ref(out)))
    x = pixels((5, 9))
    model.forward_intermediates_packed(list(x), norm=norm) if packed else model.forward_intermediates(x, norm=norm)
    assert alive == ([0, 1, 1, 1] if norm else [0, 1, 2, 3])


# Nonsense

NONSENSE = {
    "no blocks": (lambda m: m.forward_intermediates(pixels((2, 2)), []), r"blocks must be .* not \[\]"),
    "a number": (lambda m: m.forward_intermediates(pixels((2, 2)), 1), "blocks must be a list .* not 1"),
    "a text": (lambda m: m.forward_intermediates(pixels((2, 2)), "all"), "blocks must be a list .* not 'all'"),
    "a tensor": (lambda m: m.forward_intermediates(pixels((2, 2)), torch.tensor(1)), r"blocks must .* not tensor\(1\)"),
    "block 2": (lambda m: m.forward_intermediates(pixels((2, 2)), [0, 2]), "block 2 is out of range: there are 2"),
    "block -3": (lambda m: m.forward_intermediates(pixels((2, 2)), [-3]), "block -3 is out of range: there are 2"),
    "block 1.0": (lambda m: m.forward_intermediates(pixels((2, 2)), [1.0]), "number of a block .* not 1.0"),
    "block True": (lambda m: m.forward_intermediates(pixels((2, 2)), [True]), "number of a block .* not True"),
}


@pytest.mark.parametrize("case", NONSENSE)
def test_nonsense_is_refused_in_one_line(small, case):
    refused_in_one_line(lambda: NONSENSE[case][0](small), NONSENSE[case][1])


def test_embed_accepts_what_forward_accepts(tiny):
    """Never fewer patches in silence: it checks images, and completes ragged sides."""
    with pytest.raises(ValueError, match="the nearest size that works is 32 x 32"):
        tiny.embed(images(1, 3, 33, 31))
    assert tiny.embed(images(1, 3, 33, 31), "crop").shape == (1, 1 + 8 * 7, 64)
    assert torch.equal(tiny.embed(images(1, 3, 32, 40)), tiny.tokens(images(1, 3, 32, 40)))
