"""The model by itself: sizes, refusals, and what PyTorch's tools make of it."""

import copy
import pickle
import warnings

import pytest
import torch
from helpers import FLOAT32, difference, images, randomize
from torch.func import functional_call, vmap
from torch.torch_version import TorchVersion

import vit
from vit.config import ViTConfig
from vit.position import resample_position_embedding
from vit.presets import NAMED_MODELS

TINY = ViTConfig(img_size=32, patch_size=4, embed_dim=64, depth=2, num_heads=2, num_classes=7, init_values=0.5)


@pytest.fixture
def tiny() -> vit.ViT:
    return randomize(vit.ViT(TINY)).eval()


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("vit_small_patch16_224", 22_050_664),
        ("vit_small_patch16_384", 22_196_584),
        ("vit_small_patch32_224", 22_878_952),
        ("vit_small_patch14_dinov2", 22_056_192),
        ("vit_tiny_patch16_224", 5_717_416),
        ("vit_base_patch16_224", 86_567_656),
    ],
)
def test_parameter_counts(name, parameters):
    with torch.device("meta"):
        model = vit.create_model(name)
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_the_small_model_has_152_tensors():
    with torch.device("meta"):
        assert len(vit.create_model("vit_small_patch16_224").state_dict()) == 152


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
    """4x16 patches are as many as 8x8: the same tokens, laid out otherwise, must get other positions."""
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


BAD_IMAGES = {
    "3 dimensions": (lambda: images(3, 32, 32), r"\[B, 3, H, W\].*got 3 dimensions: \[3, 32, 32\]"),
    "5 dimensions": (lambda: images(1, 1, 3, 32, 32), "got 5 dimensions"),
    "channels last": (lambda: images(2, 32, 32, 3), r"got 32 channels: \[2, 32, 32, 3\]"),
    "one channel": (lambda: images(2, 1, 32, 32), "got 1 channels"),
    "integers": (lambda: torch.zeros(1, 3, 32, 32, dtype=torch.uint8), "got torch.uint8: scale and normalise"),
    "empty batch": (lambda: images(0, 3, 32, 32), r"empty batch: \[0, 3, 32, 32\]"),
    "ragged height": (lambda: images(1, 3, 30, 32), "got 30 x 32, the nearest size that works is 32 x 32"),
    "ragged width": (lambda: images(1, 3, 32, 33), "got 32 x 33, the nearest size that works is 32 x 32"),
    "no height": (lambda: images(1, 3, 0, 32), r"got no pixels: \[1, 3, 0, 32\]"),
    "no width": (lambda: images(1, 3, 32, 0), "got no pixels"),
    "below a patch": (lambda: images(1, 3, 1, 3), "got 1 x 3, the nearest size that works is 4 x 4"),
    "another dtype": (lambda: images(1, 3, 32, 32).double(), "torch.float32; got torch.float64: cast"),
}


@pytest.mark.parametrize("case", BAD_IMAGES)
def test_bad_images_are_refused(tiny, case):
    make, message = BAD_IMAGES[case]
    with pytest.raises(ValueError, match=message):
        tiny(make())


BAD_CONFIGS = {
    "embed_dim 65 is not a multiple of num_heads 2": {"embed_dim": 65},
    "img_size 30x32 is not a multiple of patch_size 4": {"img_size": (30, 32)},
    "depth must be a whole number of at least 1, not 0": {"depth": 0},
    "num_classes must be a whole number of at least 0, not -1": {"num_classes": -1},
    "num_heads must be a whole number of at least 1, not 2.0": {"num_heads": 2.0},
    "embed_dim must be a whole number of at least 1, not True": {"embed_dim": True},
    "is not a whole number": {"mlp_ratio": 1.23},
    "eps must be above 0.0, not 0": {"eps": 0},
    "eps must be a finite number, not nan": {"eps": float("nan")},
    "unknown global_pool 'mean'": {"global_pool": "mean"},
    "unknown gelu 'tan'. Did you mean 'tanh'": {"gelu": "tan"},
    "unknown position_rule 'tim'. Did you mean 'timm'": {"position_rule": "tim"},
    r"drop_path_rate must lie in \[0, 1\), not 1.0": {"drop_path_rate": 1.0},
    "class_position must be True or False, not 1": {"class_position": 1},
    "img_size must be a whole number above 0 or a pair": {"img_size": (32, 32, 3)},
    "unknown config field 'num_class'. Did you mean 'num_classes'": {"num_class": 3},
}


@pytest.mark.parametrize("message", BAD_CONFIGS)
def test_contradictory_configs_are_refused(message):
    with pytest.raises(ValueError, match=message):
        TINY.override(**BAD_CONFIGS[message])


def test_names():
    assert "vit_small_patch16_224" in vit.list_models()
    assert "vit_small_patch16_224.augreg_in21k_ft_in1k" in vit.list_models(pretrained=True)
    with pytest.raises(ValueError, match="unknown model 'vit_smal_patch16_224'. Did you mean 'vit_small_patch16_224'"):
        vit.create_model("vit_smal_patch16_224")


def test_create_model_overrides():
    model = vit.create_model("vit_small_patch16_224", num_classes=10, in_chans=1, img_size=(64, 96), depth=1)
    assert model.training and model.provenance is None and model.categories is None
    assert model.preprocessing.size == (64, 96) and model.preprocessing.mean == (0.5,)
    assert model(images(1, 1, 64, 96)).shape == (1, 10)


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


def test_attention_refusals(tiny):
    with pytest.raises(ValueError, match="unknown attention 'sdpaa'. Did you mean 'sdpa'"):
        tiny.set_attention("sdpaa")
    with pytest.raises(ValueError, match="block 2 is out of range"):
        tiny.set_attention("reference", blocks=[0, 2])
    assert all(attend.fn is vit.attention.sdpa for attend in tiny.attends)  # nothing half-done
    with pytest.raises(ValueError, match=r"must be callable as fn\(q, k, v, \*, bias=None\)"):
        tiny.set_attention(lambda q, k: q)
    with pytest.raises(ValueError, match="is registered already"):
        vit.register_attention("sdpa", lambda q, k, v, *, bias=None: v)
    tiny.set_attention(lambda q, k, v, *, bias=None: v.transpose(1, 2))
    shapes = r"block 0: .* returned .* \[1, 65, 2, 32\] on cpu, expected .* \[1, 2, 65, 32\]"
    with pytest.raises(ValueError, match=shapes):
        tiny(images(1, 3, 32, 32))


def test_attention_bias_agrees_with_the_reference():
    q, k, v = (images(2, 3, 19, 8, seed=s).double() for s in (1, 2, 3))
    for shape in ((2, 3, 19, 19), (1, 3, 19, 19), (19, 19), (2, 1, 1, 19)):
        bias = torch.randn(*shape, dtype=torch.float64)
        expected = vit.attention.reference(q, k, v, bias=bias)
        assert difference(vit.attention.sdpa(q, k, v, bias=bias), expected) < 1e-12
        assert difference(vit.attention.reference(q, k, v), expected) > 1e-2


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


def test_compiles_as_one_graph_and_trains():
    tiny = randomize(vit.ViT(TINY.override(depth=1))).eval()
    compiled = torch.compile(tiny, fullgraph=True)
    sizes = [(32, 32), (24, 40), (48, 12), (20, 20)]  # native, then changing
    if torch.__version__ < TorchVersion("2.15"):  # which breaks there for nn.Conv2d alone, too
        sizes.remove((20, 20))
    for size in sizes:
        x = images(2, 3, *size)
        tiny.zero_grad()
        expected = tiny(x)
        expected.square().sum().backward()
        grads = [p.grad.clone() for p in tiny.parameters()]
        tiny.zero_grad()
        actual = compiled(x)
        assert difference(actual, expected) <= FLOAT32
        actual.square().sum().backward()
        for p, grad in zip(tiny.parameters(), grads):
            assert difference(p.grad, grad) <= 2 * FLOAT32


@pytest.mark.parametrize("strict", [True, False])
@torch.no_grad()
def test_exports_with_dynamic_batch_height_and_width(tiny, strict):
    B, h, w = (torch.export.Dim(name, min=2, max=64) for name in "Bhw")
    exported = torch.export.export(
        tiny, (images(2, 3, 32, 32),), dynamic_shapes={"images": {0: B, 2: 4 * h, 3: 4 * w}}, strict=strict
    ).module()
    for size in ((2, 3, 32, 32), (5, 3, 24, 40), (3, 3, 64, 8)):
        x = images(*size)
        assert difference(exported(x), tiny(x)) <= FLOAT32


def test_preprocessing_refuses_nonsense():
    for message, values in {
        "std must be above 0": {"std": (0.5, 0.0, 0.5)},
        "mean has 1 channels and std 3": {"mean": (0.5,)},
        "unknown interpolation 'bicubik'. Did you mean 'bicubic'": {"interpolation": "bicubik"},
        r"crop_pct must lie in \(0, 1\], not 1.5": {"crop_pct": 1.5},
        "each value of mean must be a finite number, not nan": {"mean": (float("nan"), 0.5, 0.5)},
    }.items():
        with pytest.raises(ValueError, match=message):
            vit.Preprocessing(**values)


def test_named_models_agree_with_their_preprocessing():
    for name, named in NAMED_MODELS.items():
        assert named.preprocessing.size == named.config.img_size, name


def test_the_default_dtype_changes_no_position():
    embedding = images(1, 1, 196, 16)[0]
    expected = resample_position_embedding(embedding, (14, 14), (9, 5))
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(resample_position_embedding(embedding, (14, 14), (9, 5)), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_shapes_can_be_asked_for_on_the_meta_device():
    with torch.device("meta"):
        model = vit.ViT(TINY)
    assert model(torch.empty(2, 3, 40, 24, device="meta")).shape == (2, 7)


def test_blocks_may_be_any_numbers(tiny):
    tiny.set_attention("reference", blocks=(i for i in [-1]))
    assert [attend.name for attend in tiny.attends] == ["sdpa", "reference"]
    for blocks, message in ((0, "must be a list"), (["0"], "must be a whole number"), ([True], "whole number")):
        with pytest.raises(ValueError, match=message):
            tiny.set_attention("reference", blocks=blocks)


def test_other_things_than_functions_are_refused(tiny):
    for wrong, message in (
        (torch.nn.Linear(2, 2), "is a module: pass its class or a factory"),
        ([], r"must be a registered name or a function, not \[\]"),
        (None, "must be a registered name or a function, not None"),
    ):
        with pytest.raises(ValueError, match=message):
            tiny.set_attention(wrong)
    with pytest.raises(ValueError, match="must be a string, not 5"):
        vit.register_attention(5, vit.attention.sdpa)
    with pytest.raises(ValueError, match="got list, not a tensor"):
        tiny([images(3, 32, 32)])


def test_registering_changes_no_other_model():
    try:
        vit.register_attention("sdpa", lambda q, k, v, *, bias=None: v, overwrite=True)
        assert vit.ViT(TINY).attends[0].fn is vit.attention.sdpa
    finally:
        vit.register_attention("sdpa", vit.attention.sdpa, exact=True, overwrite=True)


def test_an_attention_function_of_another_kind_is_said_where_it_would_be_lost(tmp_path):
    model = vit.create_model("vit_digits_patch4_32", depth=2).eval()
    model.set_attention(lambda q, k, v, *, bias=None: v, blocks=[0])
    with pytest.warns(UserWarning, match="attends by another function"):
        vit.attention_maps(model, torch.zeros(1, 3, 32, 32), blocks=[0])
    with pytest.warns(UserWarning, match="blocks 0: .*has no name .*: set it again"):
        vit.save_checkpoint(model, tmp_path / "m.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vit.attention_maps(model, torch.zeros(1, 3, 32, 32), blocks=[1])
        model.set_attention("reference")
        vit.save_checkpoint(model, tmp_path / "m.safetensors")


@pytest.mark.parametrize("wrong", [None, (1, 2), "double"])
def test_attention_that_returns_something_else(wrong):
    model = vit.create_model("vit_digits_patch4_32", depth=1).eval()
    model.set_attention(lambda q, k, v, *, bias=None: v.double() if wrong == "double" else wrong)
    with pytest.raises(ValueError, match="block 0: attention '<lambda>' returned .*, expected torch.float32"):
        model(torch.zeros(1, 3, 32, 32))
