"""Any resolution: every grid against other people's models, ragged sides, intermediate maps, attention maps."""

import re
import warnings
from itertools import permutations

import pytest
import torch
import torch.nn.functional as F
from helpers import FLOAT32, GRADIENT, difference, images, ours_from, randomize, timm_twin
from peers import build_peer
from torch.utils._python_dispatch import TorchDispatchMode

import vit
from vit.config import ViTConfig
from vit.inputs import complete_patches
from vit.weights.keymap import sort_keys

SMALL = ViTConfig(img_size=56, patch_size=4, embed_dim=48, depth=2, num_heads=3, num_classes=5)  # 14 x 14, as at 224
PRIMES = (7, 11, 13, 17, 19, 23)
GRIDS = [
    (14, 14), *((n, n) for n in PRIMES), *permutations(PRIMES, 2),
    *((1, n) for n in (1, 2, 7, 13, 14, 23, 64)), *((n, 1) for n in (2, 7, 13, 14, 23, 64)),
    (2, 2), (3, 2), (5, 9), (16, 10), (14, 9), (9, 14), (7, 28), (28, 7), (24, 24), (28, 28), (8, 40), (37, 3), (3, 37),
]  # fmt: skip
LAYER_SCALE = SMALL.override(init_values=0.5)

# The layout that a library reads, our config, and the rule of that library's model.
PEERS = {
    "timm": ("timm", SMALL, "timm"),
    "timm, a rectangle stored": ("timm", SMALL.override(img_size=(28, 68), class_position=False), "timm"),
    "ViTForImageClassification": ("transformers", SMALL, "transformers"),
    "ViTModel": ("transformers", SMALL.override(num_classes=0), "transformers"),
    "Dinov2Model": ("transformers_dinov2", LAYER_SCALE.override(num_classes=0), "transformers"),
    "Dinov2ForImageClassification": (
        "transformers_dinov2", LAYER_SCALE.override(global_pool="token_avg"), "transformers"
    ),
    "Dinov2WithRegistersModel": (
        "transformers_dinov2_registers", LAYER_SCALE.override(num_classes=0, reg_tokens=3), "timm"
    ),
}  # fmt: skip


def pixels(grid: tuple[int, int], count: int = 1, p: int = 4, seed: int = 1) -> torch.Tensor:
    return images(count, 3, grid[0] * p, grid[1] * p, seed=seed)


@pytest.fixture
def small() -> vit.ViT:
    return randomize(vit.ViT(SMALL)).eval()


def outputs(model: vit.ViT, x: torch.Tensor) -> torch.Tensor:
    """What `build_peer` gives: logits, or tokens where there is no head."""
    return model(x) if model.config.num_classes else model.forward_features(x)


@torch.no_grad()
@pytest.mark.parametrize("peer", PEERS)
def test_every_grid_equals_other_peoples_models(peer):
    layout, config, rule = PEERS[peer]
    other = {"timm": "transformers", "transformers": "timm"}[rule]
    model = randomize(vit.ViT(config.override(position_rule=rule))).eval()
    wrong = vit.ViT(config.override(position_rule=other)).eval()
    wrong.load_state_dict(model.state_dict())
    theirs = build_peer(layout, vit.weights.convert(model.state_dict(), "vit", layout, model.config).state_dict, config)
    assert len(set(GRIDS)) == len(GRIDS) >= 60
    right, misses = {}, {}
    for grid in GRIDS:
        x = pixels(grid)
        expected = theirs(x)
        right[grid] = difference(outputs(model, x), expected)
        misses[grid] = difference(outputs(wrong, x), expected)
    worst = max(right, key=right.__getitem__)
    assert right[worst] <= FLOAT32, f"{worst}: {right[worst]:.1e}"
    seen = sum(miss > 100 * FLOAT32 for miss in misses.values())
    assert seen >= 0.8 * len(GRIDS), f"another rule passes at {len(GRIDS) - seen} sizes"


@torch.no_grad()
def test_224_384_224_is_the_identity_to_the_bit():
    model = randomize(vit.ViT(SMALL.override(img_size=224, patch_size=16))).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x = images(1, 3, 224, 224)
    tokens = model.forward_features(x)
    model(images(1, 3, 384, 384)), model(images(1, 3, 112, 448))
    assert torch.equal(model.forward_features(x), tokens)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_step_at_384_trains_the_stored_grid():
    model = randomize(vit.ViT(SMALL.override(img_size=224, patch_size=16, depth=1)))
    x = images(1, 3, 224, 224)
    before, stored = model(x).detach(), model.position_embedding.detach().clone()
    optimizer = torch.optim.SGD([model.position_embedding], lr=0.1)
    model(images(1, 3, 384, 384)).square().sum().backward()
    optimizer.step()
    assert model.position_embedding.shape == (1, 1 + 14 * 14, 48)
    assert (model.position_embedding - stored).abs().amax(dim=2).min() > 0  # every row
    assert difference(model(x).detach(), before) > 100 * FLOAT32


@torch.no_grad()
def test_loading_keeps_the_stored_grid_whatever_size_is_wanted(small, tmp_path):
    vit.save_checkpoint(small, tmp_path / "m.safetensors")
    again = vit.load_pretrained(tmp_path / "m.safetensors")
    assert again.config.img_size == (56, 56) and torch.equal(again.position_embedding, small.position_embedding)
    assert torch.equal(again(pixels((24, 17))), small(pixels((24, 17))))
    larger = vit.load_pretrained(tmp_path / "m.safetensors", patch_size=6)
    assert larger.config.grid == (14, 14) and torch.equal(larger.position_embedding, small.position_embedding)
    with pytest.raises(ValueError, match="position_embedding has 197 rows, which does not fit img_size 96x96"):
        vit.load_pretrained(tmp_path / "m.safetensors", img_size=96)
    with pytest.raises(RuntimeError, match="size mismatch for position_embedding"):
        vit.ViT(SMALL.override(img_size=96)).load_state_dict(small.state_dict())


TWENTY = [
    (14, 14), (24, 24), (7, 28), (28, 7), (13, 17), (19, 23), (3, 2), (14, 9), (9, 14), (16, 10), (11, 11), (5, 40),
    (2, 2), (31, 8), (2, 13), (64, 2), (23, 7), (6, 6), (14, 15), (40, 5),
]  # fmt: skip
SINGLE = [(1, 13), (13, 1), (1, 1), (1, 14), (14, 1)]  # PyTorch makes graphs of their own for sides of one


@torch.no_grad()
@pytest.mark.parametrize("dynamic", [None, pytest.param(True, marks=pytest.mark.matrix)])
def test_compiles_within_pytorchs_limit_for_twenty_grids(dynamic):
    model = randomize(vit.ViT(SMALL.override(depth=1, embed_dim=24))).eval()
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    assert len(set(TWENTY)) == 20
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True), torch.inference_mode():
        for grid in TWENTY + SINGLE:
            x = pixels(grid, count=2)
            assert difference(compiled(x), model(x)) <= FLOAT32, grid


@torch.no_grad()
def test_one_exported_graph_serves_twenty_grids():
    model = randomize(vit.ViT(SMALL.override(depth=1))).eval()
    h, w = (torch.export.Dim(name, min=2, max=64) for name in "hw")
    example = pixels((10, 12))
    exported = torch.export.export(model, (example,), dynamic_shapes={"images": {2: 4 * h, 3: 4 * w}}).module()
    for grid in TWENTY:
        x = pixels(grid)
        assert difference(exported(x), model(x)) <= FLOAT32, grid


# Sides that are no multiples of the patch


def cropped(x: torch.Tensor, p: int) -> torch.Tensor:
    return x[:, :, : x.shape[2] // p * p, : x.shape[3] // p * p]


def padded(x: torch.Tensor, p: int) -> torch.Tensor:
    whole = x.new_zeros(*x.shape[:2], *((side + p - 1) // p * p for side in x.shape[2:]))
    whole[:, :, : x.shape[2], : x.shape[3]] = x
    return whole


def resized(x: torch.Tensor, p: int) -> torch.Tensor:
    sides = [max(p, (2 * side + p) // (2 * p) * p) for side in x.shape[2:]]
    return F.interpolate(x, size=sides, mode="bicubic", antialias=True)


BY_HAND = {"crop": cropped, "pad": padded, "resize": resized}
RAGGED = [(30, 33), (57, 56), (56, 59), (5, 50), (55, 9), (41, 62)]


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.*were cropped")
@pytest.mark.parametrize("policy", BY_HAND)
@pytest.mark.parametrize("size", RAGGED)
def test_ragged_sides_are_completed_as_by_hand(small, policy, size):
    x = images(2, 3, *size)
    whole = BY_HAND[policy](x, 4)
    assert whole.shape[2] % 4 == whole.shape[3] % 4 == 0 and whole.shape != x.shape
    assert torch.equal(complete_patches(x, 4, policy), whole)
    assert torch.equal(small(x, ragged=policy), small(whole))
    assert torch.equal(small.forward_features(x, ragged=policy), small.forward_features(whole))
    for one, other in zip(small.forward_intermediates(x, ragged=policy), small.forward_intermediates(whole)):
        assert torch.equal(one, other)
    assert difference(small.forward_packed(list(x), ragged=policy), small(whole)) <= FLOAT32
    for one, other in zip(
        vit.attention_maps(small, x, ragged=policy, queries="all"), vit.attention_maps(small, whole, queries="all")
    ):
        assert torch.equal(one, other)
    for another in BY_HAND.keys() - {policy}:
        completed = BY_HAND[another](x, 4)
        assert completed.shape != whole.shape or difference(small(completed), small(whole)) > 100 * FLOAT32


@torch.no_grad()
def test_pad_equals_timms_dynamic_img_pad():
    twin = timm_twin(SMALL)
    model = ours_from(twin, SMALL)
    twin.patch_embed.dynamic_img_pad = True
    for size in (*RAGGED, (1, 1), (1, 97), (56, 56), (64, 20)):
        x = images(2, 3, *size)
        assert difference(model.forward_features(x, ragged="pad"), twin.forward_features(x)) <= FLOAT32, size
        assert difference(model(x, ragged="pad"), twin(x)) <= FLOAT32, size
    at_the_left = F.pad(images(2, 3, 30, 33), (3, 0, 0, 2))
    assert difference(model(at_the_left), twin(images(2, 3, 30, 33))) > 100 * FLOAT32


def test_crop_says_how_much_and_the_others_say_nothing(small):
    with pytest.warns(UserWarning, match="^2 rows of 30 and 1 columns of 33 were cropped$"):
        small(images(1, 3, 30, 33), ragged="crop")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for policy in ("pad", "resize"):
            small(images(1, 3, 30, 33), ragged=policy)
        small(images(1, 3, 32, 32), ragged="crop")


@pytest.mark.parametrize("policy", ["error", "resize", "crop", "pad"])
def test_whole_sides_come_back_as_they_are(policy):
    x = images(1, 3, 32, 44)
    assert complete_patches(x, 4, policy) is x


@pytest.mark.filterwarnings("ignore:.*were cropped")
@pytest.mark.parametrize("policy", BY_HAND)
def test_gradients_reach_ragged_images(small, policy):
    gradients = []
    for forward in (lambda x: small(x, ragged=policy), lambda x: small(BY_HAND[policy](x, 4))):
        x = images(2, 3, 30, 33).requires_grad_()
        forward(x).square().sum().backward()
        gradients.append(x.grad)
    assert difference(*gradients) <= GRADIENT
    reached = gradients[0].abs().amax(dim=(0, 1)) > 0
    assert reached.all() if policy != "crop" else (reached[:28, :32].all() and reached.sum() == 28 * 32)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.*were cropped")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("policy", BY_HAND)
def test_ragged_sides_in_other_dtypes(small, policy, dtype):
    x = images(1, 3, 30, 33)
    expected = small(x, ragged=policy)
    actual = small.to(dtype)(x.to(dtype), ragged=policy)
    assert actual.dtype == dtype
    assert difference(actual.float(), expected) < (FLOAT32 if dtype == torch.float64 else 0.05)


# Maps after some blocks

DEEP = SMALL.override(depth=4)
MAPPED = {
    "plain": DEEP,
    "registers": DEEP.override(reg_tokens=3, class_position=False),
    "norm after pooling": DEEP.override(global_pool="avg", fc_norm=True),
    "layer scale": DEEP.override(init_values=0.5),
}


@torch.no_grad()
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("name", MAPPED)
def test_intermediates_equal_timm(name, norm):
    config = MAPPED[name]
    twin = timm_twin(config)
    model = ours_from(twin, config)
    for grid in ((14, 14), (9, 5), (1, 13), (17, 23)):
        x = pixels(grid, count=2)
        for asked in (None, [0, 2]):
            theirs = twin.forward_intermediates(x, asked, norm=norm, intermediates_only=True, return_prefix_tokens=True)
            ours = model.forward_intermediates(x, asked, norm=norm, return_prefix_tokens=True)
            assert len(ours) == len(theirs) == (2 if asked else config.depth)
            for our_pair, their_pair in zip(ours, theirs):
                for one, other in zip(our_pair, their_pair, strict=True):
                    assert difference(one, other) <= FLOAT32
            for one, (other, _) in zip(model.forward_intermediates(x, asked, norm=norm), ours, strict=True):
                assert torch.equal(one, other)
    if name != "norm after pooling":
        (one,), (other,) = (model.forward_intermediates(x, [-1], norm=either) for either in (norm, not norm))
        assert difference(one, other) > 100 * FLOAT32


@torch.no_grad()
def test_the_last_normed_intermediate_is_the_features():
    model = randomize(vit.ViT(MAPPED["registers"].override(dist_token=True))).eval()
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


@pytest.mark.parametrize("norm", [False, True])
def test_gradients_of_intermediates_equal_timm(norm):
    config = MAPPED["registers"].override(num_classes=0)
    twin = timm_twin(config)
    model = ours_from(twin, config)
    gradients = []
    for net in (model, twin):
        x = pixels((9, 5), count=2).requires_grad_()
        options = {} if net is model else {"intermediates_only": True}
        pairs = net.forward_intermediates(x, [1, 3], norm=norm, return_prefix_tokens=True, **options)
        flat = [tensor for pair in pairs for tensor in pair]
        sum((one * images(*one.shape, 1, seed=i)[..., 0]).sum() for i, one in enumerate(flat)).backward()
        gradients.append({name: p.grad for name, p in net.named_parameters() if p.grad is not None} | {"": x.grad})
    ours, theirs = gradients
    assert difference(ours.pop(""), theirs.pop("")) <= GRADIENT
    groups = sort_keys(vit.weights.LAYOUTS["timm"], dict(twin.named_parameters()), prefixed=False).groups
    names = {key: name for name, (_, (key,)) in groups.items()}
    assert {names[key] for key in theirs} == set(ours)
    assert ("norm.weight" in ours) == norm
    for key, gradient in theirs.items():
        assert difference(ours[names[key]], gradient) <= GRADIENT, key


# Who looks at whom


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
    model = vit.ViT(SMALL.override(depth=3, reg_tokens=2))
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


# Nonsense

NONSENSE = {
    "no height": (lambda m: m(images(1, 3, 0, 56)), r"got no pixels: \[1, 3, 0, 56\]"),
    "no width": (lambda m: m(images(1, 3, 56, 0), ragged="pad"), r"got no pixels: \[1, 3, 56, 0\]"),
    "no pixels": (lambda m: m.forward_intermediates(images(1, 3, 0, 0)), r"got no pixels: \[1, 3, 0, 0\]"),
    "one row": (lambda m: m(images(1, 3, 1, 56)), "got 1 x 56, the nearest size that works is 4 x 56"),
    "one pixel": (lambda m: m(images(1, 3, 1, 1)), "got 1 x 1, the nearest size that works is 4 x 4"),
    "a strip": (lambda m: m(images(1, 3, 1, 10000)), "got 1 x 10000, the nearest size that works is 4 x 10000"),
    "a column": (lambda m: m(images(1, 3, 9999, 2)), "got 9999 x 2, the nearest size that works is 10000 x 4"),
    "says how": (lambda m: m(images(1, 3, 30, 57)), "32 x 56 .or pass ragged='resize', 'crop' or 'pad'"),
    "crop below a patch": (lambda m: m(images(1, 3, 3, 56), "crop"), "'crop' .* at least 4 .* 4; got 3 x 56"),
    "crop a strip": (lambda m: m(images(1, 3, 1, 10000), "crop"), "'crop' .* at least 4 .*; got 1 x 10000"),
    "resize below half": (lambda m: m(images(1, 3, 56, 1), "resize"), "'resize' .* at least 2 .* 4; got 56 x 1"),
    "resize a strip": (lambda m: m(images(1, 3, 1, 10000), "resize"), "'resize' .* at least 2 .*; got 1 x 10000"),
    "policy": (lambda m: m(pixels((2, 2)), ragged="rezise"), "sides 'rezise'. Did you mean 'resize'"),
    "another policy": (lambda m: m(images(1, 3, 30, 30), ragged=None), "sides None. Known: error, resize, crop, pad"),
    "a flag": (lambda m: m.forward_features(pixels((2, 2)), ragged=True), "ragged sides True. Known: error"),
    "maps' policy": (lambda m: vit.attention_maps(m, pixels((2, 2)), ragged="padd"), "'padd'. Did you mean 'pad'"),
    "no blocks": (lambda m: m.forward_intermediates(pixels((2, 2)), []), r"blocks must be .* not \[\]"),
    "a number": (lambda m: m.forward_intermediates(pixels((2, 2)), 1), "blocks must be a list .* not 1"),
    "a text": (lambda m: m.forward_intermediates(pixels((2, 2)), "all"), "blocks must be a list .* not 'all'"),
    "a tensor": (lambda m: m.forward_intermediates(pixels((2, 2)), torch.tensor(1)), r"blocks must .* not tensor\(1\)"),
    "block 2": (lambda m: m.forward_intermediates(pixels((2, 2)), [0, 2]), "block 2 is out of range: there are 2"),
    "block -3": (lambda m: m.forward_intermediates(pixels((2, 2)), [-3]), "block -3 is out of range: there are 2"),
    "block 1.0": (lambda m: m.forward_intermediates(pixels((2, 2)), [1.0]), "number of a block .* not 1.0"),
    "block True": (lambda m: m.forward_intermediates(pixels((2, 2)), [True]), "number of a block .* not True"),
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
    call, message = NONSENSE[case]
    with pytest.raises(ValueError) as error:
        call(small)
    assert re.search(message, str(error.value)), str(error.value)
    assert "\n" not in str(error.value)


@torch.no_grad()
def test_the_thinnest_images_that_are_right_are_taken(small):
    for size in ((4, 4), (4, 9992), (1, 10000)):
        assert small(images(1, 3, *size), ragged="pad").isfinite().all()
    for size in ((2, 2), (2, 57)):
        assert small(images(1, 3, *size), ragged="resize").isfinite().all()
