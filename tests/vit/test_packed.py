"""Packed images: several sizes in one pass, each as if it were alone."""

import re

import pytest
import torch
from helpers import FLOAT32, GRADIENT, difference, images, randomize
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import vit
from vit.config import ViTConfig

TINY = ViTConfig(img_size=(20, 28), patch_size=4, embed_dim=24, depth=2, num_heads=2, mlp_ratio=2.0, num_classes=5)
RELATIVES = {
    "plain": TINY,
    "registers": TINY.override(reg_tokens=3),
    "distillation token": TINY.override(dist_token=True),
    "two heads": TINY.override(dist_token=True, global_pool="dist", reg_tokens=1),
    "no class position": TINY.override(class_position=False, reg_tokens=2),
    "average pooling": TINY.override(global_pool="avg", reg_tokens=2),
    "norm after pooling": TINY.override(global_pool="avg", fc_norm=True),
    "token and average": TINY.override(global_pool="token_avg", init_values=0.5, reg_tokens=1),
    "layer scale": TINY.override(init_values=0.5),
    "no head": TINY.override(num_classes=0),
    "another rule": TINY.override(position_rule="dinov2"),
}
GRIDS = [(5, 7), (1, 1), (3, 2), (1, 9), (6, 6), (7, 5), (2, 2)]


def image_by_image(fn, q, k, v, lengths):
    """Attention within each packed image, by a function that takes one image."""
    parts = zip(*(x.split(lengths, dim=2) for x in (q, k, v)))
    return torch.cat([fn(*part) for part in parts], dim=2)


def listed(grids: list[tuple[int, int]], seed: int = 1) -> list[Tensor]:
    return [images(1, 3, 4 * h, 4 * w, seed=seed + i)[0] for i, (h, w) in enumerate(grids)]


def make(config: ViTConfig) -> vit.ViT:
    """Attention far from uniform, so that attending to another image would be noticed."""
    model = randomize(vit.ViT(config)).eval()
    with torch.no_grad():
        for block in model.blocks:
            block.attention.qkv.weight.mul_(4)
    return model


@pytest.fixture
def tiny() -> vit.ViT:
    return make(TINY)


def alone(model: vit.ViT, x: list[Tensor]) -> list[Tensor]:
    return [model(one[None])[0] for one in x]


def gradients(model: vit.ViT, x: list[Tensor], outputs: list[Tensor]) -> dict[str, Tensor]:
    """Of a weighted sum of the outputs, by every parameter and every image."""
    generator = torch.Generator().manual_seed(0)
    upstream = [0.5 + torch.rand(one.shape, generator=generator) for one in outputs]  # sums must not cancel out
    inputs = dict(model.named_parameters()) | {f"image {i}": one for i, one in enumerate(x)}
    loss = sum((one * weights).sum() for one, weights in zip(outputs, upstream))
    found = torch.autograd.grad(loss, list(inputs.values()), allow_unused=True)
    return {name: gradient for name, gradient in zip(inputs, found) if gradient is not None}


def compare(model: vit.ViT, x: list[Tensor], packed: list[Tensor], single: list[Tensor]) -> None:
    assert len(packed) == len(single)
    for one, other in zip(packed, single):
        assert difference(one.detach(), other.detach()) <= FLOAT32
    ours, theirs = gradients(model, x, packed), gradients(model, x, single)
    assert ours.keys() == theirs.keys() and len(ours) > 20
    for name, gradient in theirs.items():
        assert difference(ours[name], gradient) <= GRADIENT, name


MODELS = {name: make(config) for name, config in RELATIVES.items()}
often = settings(
    max_examples=20, deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
sides = st.integers(1, 9)
lists = st.lists(st.tuples(sides, sides), min_size=1, max_size=8)
budgets = st.one_of(st.integers(1, 200), st.just(2048))


@pytest.mark.parametrize("name", RELATIVES)
@often
@given(grids=lists, budget=budgets)
def test_packed_equals_one_by_one(name, grids, budget):
    model = MODELS[name]
    x = [one.requires_grad_() for one in listed(grids)]
    compare(model, x, list(model.forward_packed(x, budget=budget)), alone(model, x))
    single = [model.forward_features(one[None])[0] for one in x]
    compare(model, x, model.forward_features_packed(x, budget=budget), single)


@pytest.mark.parametrize("name", ["registers", "norm after pooling", "two heads"])
@pytest.mark.parametrize("norm", [False, True])
@often
@given(grids=lists, budget=budgets, blocks=st.lists(st.integers(-2, 1), min_size=1, max_size=3))
def test_packed_intermediates_equal_one_by_one(name, norm, grids, budget, blocks):
    model = MODELS[name]
    x = [one.requires_grad_() for one in listed(grids)]
    found = model.forward_intermediates_packed(x, blocks, norm, return_prefix_tokens=True, budget=budget)
    single = [model.forward_intermediates(one[None], blocks, norm, return_prefix_tokens=True) for one in x]
    assert len(found) == len(blocks) and all(len(of_block) == len(x) for of_block in found)
    flat = [tensor for of_block in found for pair in of_block for tensor in pair]
    compare_to = [tensor[0] for i in range(len(blocks)) for pairs in single for tensor in pairs[i]]
    for one, other in zip(flat, compare_to, strict=True):
        assert difference(one.detach(), other.detach()) <= FLOAT32
    ours, theirs = gradients(model, x, flat), gradients(model, x, compare_to)
    for key, gradient in theirs.items():
        assert difference(ours[key], gradient) <= GRADIENT, key
    maps = model.forward_intermediates_packed(x, blocks, norm, budget=budget)
    for of_block, pairs in zip(maps, found, strict=True):
        for one, (patches, _), grid in zip(of_block, pairs, grids, strict=True):
            assert one.shape == (24, *grid) and torch.equal(one, patches)


@torch.no_grad()
def test_images_do_not_attend_to_each_other(tiny):
    x = listed(GRIDS)
    expected = tiny.forward_features_packed(x)
    for i in range(len(x)):
        changed = [one if j == i else one + 5 for j, one in enumerate(x)]
        found = tiny.forward_features_packed(changed)
        assert difference(found[i], expected[i]) <= FLOAT32
        assert all(difference(found[j], expected[j]) > 1e-3 for j in range(len(x)) if j != i)


@torch.no_grad()
def test_wrong_lengths_would_be_noticed(tiny):
    x = listed(GRIDS)
    expected = torch.stack(alone(tiny, x))

    def one_too_far(q, k, v, *, bias=None, lengths=None):
        wrong = [lengths[0] + 1, *lengths[1:-1], lengths[-1] - 1]
        return image_by_image(vit.attention.sdpa, q, k, v, wrong)

    def all_as_one(q, k, v, *, bias=None, lengths=None):
        return vit.attention.sdpa(q, k, v)

    assert difference(tiny.forward_packed(x), expected) <= FLOAT32
    for wrong in (one_too_far, all_as_one):
        tiny.set_attention(wrong)
        assert difference(tiny.forward_packed(x), expected) > 100 * FLOAT32


# Attention functions


def watch(calls: list, fn=vit.attention.sdpa, lengthy: bool = True):
    """An attention function that notes the lengths that it is called with or, without lengths, the shapes."""

    def with_lengths(q, k, v, *, bias=None, lengths=None):
        calls.append((q.shape[0], q.shape[2], list(lengths)))
        return image_by_image(fn, q, k, v, lengths)

    def without(q, k, v, *, bias=None):
        assert q.shape == k.shape == v.shape
        calls.append(tuple(q.shape))
        return fn(q, k, v)

    return with_lengths if lengthy else without


TOKENS = [36, 2, 7, 10, 37, 36, 5]  # of GRIDS, with the class token


@torch.no_grad()
def test_a_function_with_lengths_is_called_once_per_block_and_part(tiny):
    calls = []
    x = listed(GRIDS)
    expected = torch.stack(alone(tiny, x))
    tiny.set_attention(watch(calls))
    assert difference(tiny.forward_packed(x), expected) <= FLOAT32
    assert calls == [(1, sum(TOKENS), TOKENS)] * 2
    calls.clear()
    assert difference(tiny.forward_packed(x, budget=80), expected) <= FLOAT32
    parts = [[36, 2, 7, 10], [37, 36, 5]]
    assert calls == [(1, sum(part), part) for part in parts for _ in range(2)]


@torch.no_grad()
def test_the_result_of_a_function_with_lengths_is_used(tiny):
    def even(q, k, v, *, bias=None, lengths=None):
        return v.mean(dim=2, keepdim=True).expand_as(v)  # over all images

    x = listed(GRIDS)
    expected = torch.stack(alone(tiny, x))
    tiny.set_attention(even, blocks=[1])
    together = tiny.forward_packed(x)
    assert difference(together, expected) > 1e-2
    assert difference(together, torch.stack(alone(tiny, x))) > 1e-3  # this function does attend to other images
    assert difference(tiny.forward_packed(x, budget=1), torch.stack(alone(tiny, x))) <= FLOAT32


@torch.no_grad()
def test_a_function_without_lengths_sees_one_image_at_a_time(tiny):
    calls = []
    x = listed(GRIDS)
    expected = torch.stack(alone(tiny, x))
    tiny.set_attention(watch(calls, lengthy=False))
    assert difference(tiny.forward_packed(x), expected) <= FLOAT32
    assert calls == [(1, 2, tokens, 12) for _ in range(2) for tokens in TOKENS]


@torch.no_grad()
def test_blocks_may_differ_in_their_function(tiny):
    long, short = [], []
    x = listed(GRIDS)
    expected = torch.stack(alone(tiny, x))
    tiny.set_attention(watch(short, lengthy=False), blocks=[0])
    tiny.set_attention(watch(long), blocks=[-1])
    assert difference(tiny.forward_packed(x), expected) <= FLOAT32
    assert long == [(1, sum(TOKENS), TOKENS)] and [shape[2] for shape in short] == TOKENS
    tiny.set_attention("reference", blocks=[1])
    assert difference(tiny.forward_packed(x), expected) <= FLOAT32
    assert len(long) == 1 and len(short) == 2 * len(TOKENS)


@torch.no_grad()
def test_a_batch_of_one_size_has_no_lengths(tiny):
    def picky(q, k, v, *, bias=None, lengths=None):
        assert lengths is None
        return vit.attention.sdpa(q, k, v)

    x = images(2, 3, 20, 28)
    expected = tiny(x)
    tiny.set_attention(picky)
    assert torch.equal(tiny(x), expected)
    with pytest.raises(AssertionError):
        tiny.forward_packed(list(x))


@pytest.mark.parametrize("wrong", [lambda v: v[:, :, 1:], lambda v: v.double(), lambda v: None])
@pytest.mark.parametrize("lengthy", [True, False])
def test_what_a_function_returns_is_checked(tiny, wrong, lengthy):
    def fn(q, k, v, *, bias=None):
        return wrong(v)

    def with_lengths(q, k, v, *, bias=None, lengths=None):
        return wrong(v)

    tiny.set_attention(with_lengths if lengthy else fn)
    with pytest.raises(ValueError, match="block 0: attention .* returned .*, expected torch.float32"):
        tiny.forward_packed(listed(GRIDS))


@torch.no_grad()
@pytest.mark.parametrize(
    ("budget", "parts"),
    [
        (1, [[36], [2], [7], [10], [37], [36], [5]]),
        (36, [[36], [2, 7, 10], [37], [36], [5]]),
        (37, [[36], [2, 7, 10], [37], [36], [5]]),
        (38, [[36, 2], [7, 10], [37], [36], [5]]),
        (45, [[36, 2, 7], [10], [37], [36, 5]]),
        (132, [[36, 2, 7, 10, 37, 36], [5]]),
        (133, [TOKENS]),
        (10**6, [TOKENS]),
    ],
)
def test_parts_keep_to_the_budget_and_the_order(tiny, budget, parts):
    calls = []
    tiny.set_attention(watch(calls), blocks=[0])
    for run in (tiny.forward_packed, tiny.forward_features_packed):
        calls.clear()
        run(listed(GRIDS), budget=budget)
        assert [lengths for _, _, lengths in calls] == parts
    calls.clear()
    tiny.forward_intermediates_packed(listed(GRIDS), [0], budget=budget)
    assert [lengths for _, _, lengths in calls] == parts


# Training


def test_drop_path_drops_whole_images():
    config = TINY.override(drop_path_rate=0.5, num_classes=0)
    model = make(config).train()
    x = listed([(3, 2), (1, 9), (6, 6), (1, 1)] * 12)
    branches = []
    for block in model.blocks:
        for part in (block.residual_attention, block.residual_mlp):
            part.register_forward_hook(
                lambda part, given, out: branches.append((part.drop_path_rate, given[0], out, given[2].lengths))
            )
    torch.manual_seed(3)
    model.forward_features_packed(x)
    assert [rate for rate, *_ in branches] == [0.0, 0.0, 0.5, 0.5]
    fates = []
    for rate, branch, out, lengths in branches:
        assert lengths == [7, 10, 37, 2] * 12
        kept = []
        for one, other in zip(branch[0].split(lengths), out[0].split(lengths)):
            dropped = not other.any()
            assert dropped or difference(other, one / (1 - rate)) <= FLOAT32
            kept.append(not dropped)
        fates.append(kept)
    assert all(fates[0]) and all(fates[1])
    for kept in fates[2:]:
        assert 12 <= sum(kept) <= 36  # of 48, half on average
    assert fates[2] != fates[3]
    model.eval()
    branches.clear()
    model.forward_features_packed(x)
    assert all(torch.equal(branch, out) for _, branch, out, _ in branches)


def test_drop_path_draws_for_equal_images_what_a_batch_draws():
    model = make(TINY.override(drop_path_rate=0.5, init_values=0.5)).train()
    x = images(12, 3, 12, 20)
    outputs = []
    for run in (lambda: model(x), lambda: model.forward_packed(list(x)), lambda: model.forward_packed(list(x))):
        torch.manual_seed(5)
        outputs.append(run())
        outputs[0], outputs[-1] = outputs[0].detach(), outputs[-1].detach()
    assert difference(outputs[1], outputs[0]) <= FLOAT32 and torch.equal(outputs[1], outputs[2])
    assert difference(model.eval()(x).detach(), outputs[0]) > 1e-2


@pytest.mark.parametrize("budget", [40, 2048])
def test_gradient_checkpointing_changes_no_gradient(budget):
    config = TINY.override(drop_path_rate=0.3, reg_tokens=1)
    found = []
    for on in (False, True):
        model = randomize(vit.ViT(config.override(grad_checkpointing=on))).train()
        calls = []
        model.set_attention(watch(calls))
        x = [one.requires_grad_() for one in listed(GRIDS)]
        torch.manual_seed(2)
        model.forward_packed(x, budget=budget).square().sum().backward()
        found.append(({name: p.grad for name, p in model.named_parameters()}, [one.grad for one in x], len(calls)))
    (plain, plain_images, once), (again, again_images, twice) = found
    assert twice == 2 * once
    assert all(torch.equal(again[name], gradient) for name, gradient in plain.items())
    assert all(torch.equal(one, other) for one, other in zip(again_images, plain_images))
    assert all(one.abs().max() > 0 for one in plain_images)


# Other inputs


@torch.no_grad()
def test_half_precision(tiny):
    x = listed(GRIDS)
    expected = tiny.forward_packed(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert difference(tiny.forward_packed(x).float(), expected) < 0.1
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        found = tiny.to(dtype).forward_packed([one.to(dtype) for one in x])
        assert found.dtype == dtype and difference(found.float(), expected) < 0.1


@torch.no_grad()
def test_one_image_tuples_and_views(tiny):
    x = listed(GRIDS)
    expected = torch.stack(alone(tiny, x))
    assert difference(tiny.forward_packed(x[:1]), expected[:1]) <= FLOAT32
    assert difference(tiny.forward_packed(tuple(x)), expected) <= FLOAT32
    views = [one.permute(1, 2, 0).contiguous().permute(2, 0, 1) for one in x]
    assert not views[0].is_contiguous() and difference(tiny.forward_packed(views), expected) <= FLOAT32


# Refusals

ONE = images(1, 3, 20, 28)[0]
REFUSED = {
    "empty": (lambda: [], "at least one .* got an empty list"),
    "a batch": (lambda: images(2, 3, 20, 28), "expected a list of .* images, not Tensor"),
    "nothing": (lambda: None, "expected a list of .* images, not NoneType"),
    "a generator": (lambda: (one for one in [ONE]), "expected a list of .* images, not generator"),
    "a batch in it": (lambda: [ONE, images(1, 3, 20, 28)], r"image 1 of the list: .* got \[1, 3, 20, 28\]"),
    "a plane in it": (lambda: [ONE[0]], r"image 0 of the list: .* got \[20, 28\]"),
    "a list in it": (lambda: [ONE, ONE, ONE.tolist()], "image 2 of the list: .* got list"),
    "two dtypes": (lambda: [ONE, ONE, ONE.double()], "dtype: image 0 has torch.float32, image 2 torch.float64"),
    "two devices": (lambda: [ONE, ONE.to("meta")], "device: image 0 has cpu, image 1 meta"),
    "four channels": (lambda: [ONE, images(1, 4, 20, 28)[0]], "image 1 of the list: .* got 4 in place of 3 channels"),
    "integers": (lambda: [ONE.byte()], "image 0 of the list: .* got torch.uint8"),
    "another dtype": (lambda: [ONE.double()], "image 0 of the list: .* got torch.float64: use"),
    "ragged": (lambda: [ONE, ONE, ONE[:, :17]], "image 2 of the list: .* got 17 x 28, .* 16 x 28"),
    "no pixels": (lambda: [ONE, ONE[:, :0]], "image 1 of the list: .* got no pixels"),
    "a strip": (lambda: [images(1, 3, 1, 10000)[0]], "image 0 of the list: .* got 1 x 10000"),
}


@pytest.mark.parametrize("run", ["forward_packed", "forward_features_packed", "forward_intermediates_packed"])
@pytest.mark.parametrize("case", REFUSED)
def test_bad_lists_are_refused_in_one_line(tiny, case, run):
    make_list, message = REFUSED[case]
    with pytest.raises(ValueError) as error:
        getattr(tiny, run)(make_list())
    assert re.search(message, str(error.value)), str(error.value)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


@pytest.mark.parametrize("budget", [0, -5, 1.5, True, None, "all"])
def test_bad_budgets_are_refused(tiny, budget):
    for run in (tiny.forward_packed, tiny.forward_features_packed, tiny.forward_intermediates_packed):
        with pytest.raises(ValueError, match=f"budget must be a whole number of at least 1, not {budget!r}"):
            run([ONE], budget=budget)


def test_bad_blocks_and_policies_are_refused(tiny):
    for blocks, message in (([2], "block 2 is out of range"), ([], "at least one number"), (0, "must be a list")):
        with pytest.raises(ValueError, match=message):
            tiny.forward_intermediates_packed([ONE], blocks)
    with pytest.raises(ValueError, match="image 0 of the list: unknown policy for ragged sides 'padd'. .* 'pad'"):
        tiny.forward_packed([ONE], ragged="padd")
    with pytest.raises(ValueError, match="image 1 of the list: ragged='crop' needs sides of at least 4 .* got 3 x 28"):
        tiny.forward_packed([ONE, ONE[:, :3]], ragged="crop")


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.*were cropped")
@pytest.mark.parametrize("policy", ["resize", "crop", "pad"])
def test_ragged_images_are_completed_one_by_one(tiny, policy):
    x = [images(1, 3, *size)[0] for size in ((20, 28), (17, 30), (4, 5), (9, 33))]
    single = [tiny(one[None], ragged=policy)[0] for one in x]
    assert difference(tiny.forward_packed(x, ragged=policy), torch.stack(single)) <= FLOAT32
    for one, other in zip(tiny.forward_features_packed(x, ragged=policy), x, strict=True):
        assert difference(one, tiny.forward_features(other[None], ragged=policy)[0]) <= FLOAT32
    for one, other in zip(tiny.forward_intermediates_packed(x, [-1], ragged=policy)[0], x, strict=True):
        assert difference(one, tiny.forward_intermediates(other[None], [-1], ragged=policy)[0][0]) <= FLOAT32


def test_another_pooling_is_that_of_forward():
    """Whatever `pool` a subclass has: the head sees all tokens of an image, packed or alone."""

    class Largest(vit.ViT):
        def pool(self, tokens):
            return tokens[:, 1:].amax(dim=1)

    model = randomize(Largest(TINY)).eval()
    x = listed([(3, 2), (1, 9), (6, 6)])
    assert difference(model.forward_packed(x), torch.cat([model(one[None]) for one in x])) <= FLOAT32
