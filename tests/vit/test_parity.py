"""Our model against timm's, with the same weights through the key map: logits, tokens, gradients."""

from itertools import permutations

import pytest
import torch
from helpers import FLOAT32, GRADIENT, MINI, difference, images, ours_from, pixels, randomize, timm_twin
from peers import build_peer

import vit
from vit.config import ViTConfig
from vit.position import RULES
from vit.presets import NAMED_MODELS
from vit.weights.keymap import sort_keys

SMALL = NAMED_MODELS["vit_small_patch16_224"].config
SHALLOW = SMALL.override(depth=3, num_classes=17)
RELATIVES = {
    "layer scale": SHALLOW.override(init_values=0.1),
    "registers": SHALLOW.override(reg_tokens=4, class_position=False),
    "no class position": SHALLOW.override(class_position=False),
    "average pooling": SHALLOW.override(global_pool="avg"),
    "registers, average pooling": SHALLOW.override(reg_tokens=2, class_position=False, global_pool="avg"),
    "tanh": SHALLOW.override(gelu="tanh"),
    "one channel": SHALLOW.override(in_chans=1),
    "five channels": SHALLOW.override(in_chans=5),
    "no head": SHALLOW.override(num_classes=0),
    "rectangle stored": SHALLOW.override(img_size=(112, 448)),
    "one patch stored": SHALLOW.override(img_size=16),
    "other widths": SHALLOW.override(embed_dim=96, num_heads=3, mlp_ratio=2.5, patch_size=8, img_size=40),
    "everything": ViTConfig(
        img_size=(56, 98), patch_size=14, in_chans=2, num_classes=5, global_pool="avg", embed_dim=72, depth=2,
        num_heads=4, mlp_ratio=3.0, init_values=0.3, reg_tokens=3, class_position=False, gelu="tanh",
    ),
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("name", sorted(NAMED_MODELS))
def test_every_named_config_equals_timm(name):
    config = NAMED_MODELS[name].config
    twin = timm_twin(config)
    model = ours_from(twin, config)
    x = images(2, 3, *config.img_size)
    assert difference(model.forward_features(x), twin.forward_features(x)) <= FLOAT32
    assert difference(model(x), twin(x)) <= FLOAT32


@torch.no_grad()
@pytest.mark.parametrize("size", [(224, 224), (384, 384), (256, 160), (112, 448), (448, 112), (16, 16), (208, 16)])
def test_the_224_model_equals_timm_at_other_sizes(size):
    twin = timm_twin(SMALL)
    model = ours_from(twin, SMALL)
    x = images(1, 3, *size)
    assert difference(model.forward_features(x), twin.forward_features(x)) <= FLOAT32
    assert difference(model(x), twin(x)) <= FLOAT32


@torch.no_grad()
@pytest.mark.parametrize("name", RELATIVES)
def test_relatives_equal_timm(name):
    config = RELATIVES[name]
    twin = timm_twin(config)
    model = ours_from(twin, config)
    p = config.patch_size
    for size in (config.img_size, (3 * p, 5 * p), (7 * p, 2 * p)):
        x = images(2, config.in_chans, *size)
        assert difference(model.forward_features(x), twin.forward_features(x)) <= FLOAT32
        assert difference(model(x), twin(x)) <= FLOAT32
        tokens = twin.forward_features(x)
        features = twin.forward_head(tokens, pre_logits=True)
        assert difference(model.forward_head(tokens, pre_logits=True), features) <= FLOAT32


@pytest.mark.parametrize("attention", ["sdpa", "reference"])
@pytest.mark.parametrize("name", ["layer scale", "registers", "everything"])
@pytest.mark.parametrize("native", [True, False])
def test_gradients_equal_timm(name, attention, native):
    config = RELATIVES[name]
    twin = timm_twin(config)
    model = ours_from(twin, config)
    model.set_attention(attention)
    size = config.img_size if native else (5 * config.patch_size, 3 * config.patch_size)
    grads = []
    for net in (model, twin):
        x = images(2, config.in_chans, *size).requires_grad_()
        net(x).square().sum().backward()
        grads.append({name: parameter.grad for name, parameter in net.named_parameters()} | {"images": x.grad})
    ours, theirs = grads
    groups = sort_keys(vit.weights.LAYOUTS["timm"], (n for n in theirs if n != "images"), prefixed=False).groups
    names = {key: ours for ours, (_, (key,)) in groups.items()}
    assert set(names.values()) == set(ours) - {"images"}
    assert difference(ours["images"], theirs["images"]) <= GRADIENT
    for their_name, our_name in names.items():
        assert difference(ours[our_name], theirs[their_name]) <= GRADIENT, our_name


def test_drop_path_draws_what_timm_draws():
    config = RELATIVES["layer scale"].override(drop_path_rate=0.5)
    twin = timm_twin(config).train()
    model = ours_from(twin, config).train()
    x = images(8, 3, 32, 48)
    outputs = []
    for net in (model, twin):
        torch.manual_seed(3)
        outputs.append(net(x))
    assert difference(*outputs) <= FLOAT32
    model.eval()
    assert difference(model(x), outputs[1]) > 1e-2  # the seed above did drop something


@torch.no_grad()
@pytest.mark.parametrize(
    "wrong",
    [
        lambda sd: sd.update({"pos_embed": sd["pos_embed"].flip(1)}),
        lambda sd: sd.update({"cls_token": torch.zeros_like(sd["cls_token"])}),
        lambda sd: sd.update({"blocks.1.attn.qkv.weight": torch.cat(sd["blocks.1.attn.qkv.weight"].chunk(3)[::-1])}),
        lambda sd: sd.update({"blocks.2.attn.proj.weight": sd["blocks.2.attn.proj.weight"].T}),
        lambda sd: sd.update({"blocks.0.norm1.bias": sd["blocks.0.norm2.bias"]}),
    ],
    ids=["positions flipped", "no class token", "v k q", "square weight transposed", "norms swapped"],
)
def test_the_parity_test_can_fail(wrong):
    twin = timm_twin(SHALLOW)
    x = images(2, 3, 64, 96)
    expected = twin(x)
    assert difference(ours_from(twin, SHALLOW)(x), expected) <= FLOAT32
    state_dict = twin.state_dict()
    wrong(state_dict)
    converted = vit.weights.convert(state_dict, "timm")
    model = vit.ViT(SHALLOW).eval()
    model.load_state_dict(converted.state_dict)
    assert difference(model(x), expected) > 100 * FLOAT32


@torch.no_grad()
def test_another_rule_for_positions_would_be_noticed(monkeypatch):
    """Through the whole model: bicubic without antialiasing, which is transformers' rule."""

    def plain_bicubic(old, new, device):
        return torch.nn.functional.interpolate(torch.eye(old)[None, None], size=(new, old), mode="bicubic")[0, 0]

    twin = timm_twin(SHALLOW)
    model = ours_from(twin, SHALLOW)
    x = images(1, 3, 256, 160)
    assert difference(model(x), twin(x)) <= FLOAT32
    monkeypatch.setitem(RULES, "timm", plain_bicubic)
    assert difference(model(x), twin(x)) > 100 * FLOAT32


@torch.no_grad()
def test_gelu_eps_and_heads_matter():
    twin = timm_twin(SHALLOW)
    x = images(2, 3, 64, 96)
    expected = twin(x)
    for other in ({"gelu": "tanh"}, {"eps": 1e-3}, {"num_heads": 12}):
        assert difference(ours_from(twin, SHALLOW.override(**other))(x), expected) > FLOAT32, other


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_no_worse_than_timm(dtype):
    twin = timm_twin(SMALL)
    model = ours_from(twin, SMALL)
    x = images(2, 3, 160, 256)
    expected = twin(x)
    ours, theirs = ((net.to(dtype)(x.to(dtype)).float() - expected).square().mean().sqrt() for net in (model, twin))
    assert 0 < ours <= 1.5 * theirs


def test_the_readmes_table():
    from parity_table import rows

    found = list(rows(sizes=((112, 448),), batch=1))
    dtypes = ("float32", "bfloat16", "float16")
    assert {row[1:3] for row in found} == {(dtype, name) for dtype in dtypes for name in ("sdpa", "reference")}
    for size, dtype, attention, ours, peer, bar in found:
        assert peer > 0 and ours <= bar, (size, dtype, attention, ours, peer)


PRIMES = (7, 11, 13, 17, 19, 23)


GRIDS = [
    (14, 14), *((n, n) for n in PRIMES), *permutations(PRIMES, 2),
    *((1, n) for n in (1, 2, 7, 13, 14, 23, 64)), *((n, 1) for n in (2, 7, 13, 14, 23, 64)),
    (2, 2), (3, 2), (5, 9), (16, 10), (14, 9), (9, 14), (7, 28), (28, 7), (24, 24), (28, 28), (8, 40), (37, 3), (3, 37),
]  # fmt: skip


LAYER_SCALE = MINI.override(init_values=0.5)


# The layout that a library reads, our config, and the rule of that library's model.
PEERS = {
    "timm": ("timm", MINI, "timm"),
    "timm, a rectangle stored": ("timm", MINI.override(img_size=(28, 68), class_position=False), "timm"),
    "ViTForImageClassification": ("transformers", MINI, "transformers"),
    "ViTModel": ("transformers", MINI.override(num_classes=0), "transformers"),
    "Dinov2Model": ("transformers_dinov2", LAYER_SCALE.override(num_classes=0), "transformers"),
    "Dinov2ForImageClassification": (
        "transformers_dinov2", LAYER_SCALE.override(global_pool="token_avg"), "transformers"
    ),
    "Dinov2WithRegistersModel": (
        "transformers_dinov2_registers", LAYER_SCALE.override(num_classes=0, reg_tokens=3), "timm"
    ),
}  # fmt: skip


def outputs(model: vit.ViT, x: torch.Tensor) -> torch.Tensor:
    """What `build_peer` gives: logits, or tokens where there is no head."""
    return model(x) if model.config.num_classes else model.forward_features(x)


@torch.no_grad()
@pytest.mark.parametrize("peer", PEERS)
def test_every_grid_equals_other_libraries(peer):
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


# Maps after some blocks


DEEP = MINI.override(depth=4)


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
