"""Optimized models: the same answers, by other kernels, and nothing that they cannot do done wrongly."""

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import FLOAT32, difference, images, operations, randomize
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache

import vit
from vit.kernels.base import GRIDS, OptimizedViT
from vit.kernels.cpu import float32
from vit.kernels.cpu.model import PART, missing

SMALL = {"img_size": 64, "embed_dim": 64, "num_heads": 2, "depth": 3, "num_classes": 10}
RELATIVES = {
    "plain": {},
    "tanh": {"gelu": "tanh"},
    "layer scale": {"init_values": 0.5},
    "registers": {"reg_tokens": 4, "class_position": False},
    "distilled": {"dist_token": True, "global_pool": "dist"},
    "average": {"global_pool": "avg", "fc_norm": True},
    "both": {"global_pool": "token_avg"},
    "no head": {"num_classes": 0},
    "one block": {"depth": 1},
    "other patch and width": {"patch_size": 8, "embed_dim": 96, "num_heads": 3, "mlp_ratio": 2.5},
}
SIZES = [(64, 64), (16, 16), (112, 448), (48, 80)]


def model(**changes: object) -> vit.ViT:
    """A small one, with weights that matter."""
    made = vit.create_model("vit_small_patch16_224", **(SMALL | changes))
    randomize(made)
    return made.eval()


@torch.inference_mode()
@pytest.mark.parametrize("gelu", ["erf", "tanh"])
@pytest.mark.parametrize("fuses", [True, False])
def test_gelu_in_the_product_or_behind_it(monkeypatch: pytest.MonkeyPatch, fuses: bool, gelu: str) -> None:
    monkeypatch.setattr(float32, "FUSES_GELU", fuses)
    plain = model(gelu=gelu)
    fast = vit.kernels.optimize(plain)
    x = images(2, 3, 64, 64)
    ran = operations(lambda: fast(x))
    assert ("aten::gelu" in ran, ran.get("aten::gelu_", 0)) == (False, 0 if fuses else 3)
    with torch.inference_mode():
        assert difference(fast(x), plain(x)) <= FLOAT32
        assert difference(fast.forward_features(x), plain.forward_features(x)) <= FLOAT32


@pytest.mark.parametrize("relative", RELATIVES)
@torch.inference_mode()
def test_float32_gives_the_same(relative: str) -> None:
    plain = model(**RELATIVES[relative])
    fast = vit.kernels.optimize(plain)
    for size in SIZES:
        x = images(2, 3, *size)
        assert difference(fast(x), plain(x)) <= FLOAT32
        assert difference(fast.forward_features(x), plain.forward_features(x)) <= FLOAT32
        for ours, theirs in zip(fast.forward_intermediates(x, norm=True), plain.forward_intermediates(x, norm=True)):
            assert difference(ours, theirs) <= FLOAT32
    mixed = [images(3, 64, 32), images(3, 16, 80), images(3, 48, 48)]
    assert difference(fast.forward_packed(mixed), plain.forward_packed(mixed)) <= FLOAT32
    assert difference(fast(images(1, 3, 50, 70), ragged="pad"), plain(images(1, 3, 50, 70), ragged="pad")) <= FLOAT32


@torch.inference_mode()
def test_float32_of_the_whole_model_at_its_size() -> None:
    plain = vit.create_model("vit_small_patch16_224")
    randomize(plain)
    fast = vit.kernels.optimize(plain.eval())
    x = images(2, 3, 224, 224)
    assert difference(fast(x), plain(x)) <= FLOAT32


def test_packed_products_run_and_the_last_block_is_cut() -> None:
    fast = vit.kernels.optimize(model())
    x = images(2, 3, 64, 64)
    ran = operations(lambda: fast(x))
    assert ran["mkldnn::_linear_pointwise"] == 4 * 3
    assert "aten::gelu" not in ran
    tokens: list[int] = []
    first = fast.blocks[-1].mlp.fc1.forward
    fast.blocks[-1].mlp.fc1.forward = lambda x, **kind: tokens.append(x.shape[1]) or first(x, **kind)
    with torch.inference_mode():
        fast(x)
        fast.forward_features(x)
    assert tokens == [1, 17]


@torch.inference_mode()
def test_a_forgotten_gelu_would_be_seen() -> None:
    plain = model()
    fast = vit.kernels.optimize(plain)
    fc1 = fast.blocks[1].mlp.fc1
    fc1.forward = lambda x, gelu: float32.PackedLinear.forward(fc1, x)
    assert difference(fast(images(2, 3, 64, 64)), plain(images(2, 3, 64, 64))) > 100 * FLOAT32


@torch.inference_mode()
def test_a_cut_that_loses_keys_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = model()
    fast = vit.kernels.optimize(plain)
    cut = float32.FloatBlock.first
    monkeypatch.setattr(float32.FloatBlock, "first", lambda block, x, n: cut(block, x[:, :-1], n))
    assert difference(fast(images(2, 3, 64, 64)), plain(images(2, 3, 64, 64))) > 100 * FLOAT32


@torch.inference_mode()
def test_large_batches_go_through_in_parts() -> None:
    plain = model(depth=1)
    fast = vit.kernels.optimize(plain)
    x = images(2 * PART // 17 + 3, 3, 64, 64)
    assert difference(fast(x), plain(x)) <= FLOAT32
    assert difference(fast.forward_features(x), plain.forward_features(x)) <= FLOAT32
    assert operations(lambda: fast(x))["mkldnn::_linear_pointwise"] == 4 * 3


@torch.inference_mode()
def test_kept_positions_are_bounded_and_right() -> None:
    plain = model()
    fast = vit.kernels.optimize(plain)
    for _ in range(2):
        for h in range(1, GRIDS + 4):
            x = images(1, 3, 16 * h, 32)
            assert difference(fast(x), plain(x)) <= FLOAT32
    assert len(fast._positions) == GRIDS


@torch.inference_mode()
def test_other_attention_stays() -> None:
    plain = model()

    def nearest(q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None = None, grid: tuple, sharp: float) -> Tensor:
        assert grid == (4, 4)
        return vit.attention.sdpa(sharp * q, k, v, bias=bias)

    plain.set_attention(nearest, [1, 2], sharp=3.0)
    fast = vit.kernels.optimize(plain)
    x = images(2, 3, 64, 64)
    assert difference(fast(x), plain(x)) <= FLOAT32
    plain.set_attention("sdpa")
    assert difference(fast(x), plain(x)) > 100 * FLOAT32  # what it was made of may change
    fast.set_attention("reference")
    assert difference(fast(x), plain(x)) <= FLOAT32


class Scaled(nn.Module):
    """Attention with a weight of its own."""

    def __init__(self, config: vit.ViTConfig, block: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((config.num_heads, 1, 1), 5.0 + block))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None = None) -> Tensor:
        return vit.attention.sdpa(self.weight * q, k, v, bias=bias)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_attention_with_options_and_weights_of_its_own_stays(dtype: str) -> None:
    if missing(dtype):
        pytest.skip(missing(dtype))
    plain = model()
    given = images(32, 3, 64, 64) if dtype == "int8" else None
    x, bar = images(2, 3, 64, 64), FLOAT32 if dtype == "float32" else 0.1
    before = plain(x)
    for change in (lambda: plain.set_attention("sdpa", bias=9 * torch.eye(17)), lambda: plain.set_attention(Scaled)):
        change()
        fast = vit.kernels.optimize(plain, dtype, given)
        assert difference(fast(x), plain(x)) <= bar < difference(fast(x), before)
        assert not any(parameter.requires_grad for parameter in fast.parameters()) and not fast(x).requires_grad
        assert all(parameter.requires_grad for parameter in plain.parameters())


class Given(nn.Module):
    def __init__(self, config: vit.ViTConfig, block: int, scale: nn.Parameter) -> None:
        super().__init__()
        self.register_parameter("scale", scale)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None = None) -> Tensor:
        return vit.attention.sdpa(q, k, v * self.scale, bias=bias)


def test_attention_is_not_trained_either() -> None:
    plain, x = model(), images(2, 3, 64, 64)
    for bias in (torch.ones(17, 17, requires_grad=True), torch.ones(17, 17, requires_grad=True) * 2):
        plain.set_attention("sdpa", bias=bias)
        fast = vit.kernels.optimize(plain)
        assert not fast(x).requires_grad and plain.attends[0].options["bias"] is bias
        fast.set_attention("sdpa", bias=bias)
        assert not fast(x).requires_grad and bias.requires_grad
    scale = nn.Parameter(torch.ones(1))
    plain.set_attention(Given, scale=scale)
    taken = vit.kernels.optimize(plain)
    fast.set_attention(Given, scale=scale)
    for one in (taken, fast):
        assert not one(x).requires_grad and scale.requires_grad
        assert all(type(parameter) is nn.Parameter for parameter in one.parameters())
    fast.set_attention(Scaled)
    assert not any(parameter.requires_grad for parameter in fast.parameters()) and not fast(x).requires_grad


@torch.inference_mode()
def test_other_layouts_of_images() -> None:
    plain = model()
    fast = vit.kernels.optimize(plain)
    x = images(2, 3, 64, 48)
    for given in (
        x.to(memory_format=torch.channels_last),
        x.transpose(2, 3).contiguous().transpose(2, 3),
        x[:, [2, 1, 0]],
    ):
        assert difference(fast(given), plain(given)) <= FLOAT32


@torch.inference_mode()
def test_looking_inside() -> None:
    plain = model()
    fast = vit.kernels.optimize(plain)
    x = images(2, 3, 64, 64)
    inside = ("attention.weights", "attention.q", "residual_mlp", "mlp.fc1", "mlp.act")
    for name in ("blocks.2", *(f"blocks.1.{part}" for part in inside)):
        assert difference(vit.record(fast, x, name)[name], vit.record(plain, x, name)[name]) <= FLOAT32
    with (
        vit.patch(fast, {"blocks.2.attention.heads": torch.zeros_like}),
        vit.patch(plain, {"blocks.2.attention.heads": torch.zeros_like}),
    ):
        changed = fast(x)
        assert difference(changed, plain(x)) <= FLOAT32
    assert difference(changed, fast(x)) > 100 * FLOAT32
    maps = (vit.attention_maps(one, x, blocks=[-1]) for one in (fast, plain))
    ours, theirs = (one[0] if isinstance(one, list) else one for one in maps)
    assert difference(ours, theirs) <= FLOAT32


@torch.inference_mode()
def test_looking_inside_large_batches() -> None:
    plain = model(depth=1)
    fast = vit.kernels.optimize(plain)
    x = images(PART // 17 + 3, 3, 64, 64)
    for name in ("blocks.0", "norm"):
        assert difference(vit.record(fast, x, name)[name], vit.record(plain, x, name)[name]) <= FLOAT32


def test_optimizing_while_patched_is_refused() -> None:
    plain = model()
    with vit.patch(plain, {"blocks.1.attention.weights": torch.zeros_like}):
        with pytest.raises(ValueError, match="hooks"):
            vit.kernels.optimize(plain)
        plain(images(1, 3, 64, 64))  # a change that nothing reaches is warned of


@torch.inference_mode()
def test_attention_that_took_a_name_over_is_not_cut() -> None:
    before = vit.registry.get_attention("reference")
    try:
        vit.register_attention("reference", lambda q, k, v, *, bias=None: v * q.shape[2], overwrite=True)
        plain = model()
        plain.set_attention("reference")
        fast = vit.kernels.optimize(plain)
        x = images(2, 3, 64, 64)
        assert difference(fast(x), plain(x)) <= FLOAT32
    finally:
        vit.register_attention("reference", before, exact=True, overwrite=True)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
@torch.inference_mode()
def test_copies(again: Callable[[OptimizedViT], OptimizedViT]) -> None:
    fast = vit.kernels.optimize(model())
    x = images(2, 3, 64, 64)
    copied = again(fast)
    assert torch.equal(copied(x), fast(x))
    assert not any(module.training for module in copied.modules())
    numbers = [int(module.number) for one in (fast, copied) for module in one.modules() if hasattr(module, "number")]
    assert len(set(numbers)) == len(numbers) == 2 * 12


@torch.inference_mode()
def test_copies_keep_hooks() -> None:
    fast, seen = vit.kernels.optimize(model()), []
    fast.blocks[0].mlp.fc2.register_forward_hook(lambda module, given, out: seen.append(out.shape))
    copy.deepcopy(fast)(images(2, 3, 64, 64))
    assert seen == [(2, 17, 64)]


@torch.inference_mode()
def test_saved_and_loaded(tmp_path: Path) -> None:
    plain = model(init_values=0.3)
    plain.set_attention("reference", [1])
    plain.categories = [f"class {i}" for i in range(10)]
    parent = vit.metadata.Provenance("a.pth", "0" * 64, "timm")
    plain.provenance = vit.metadata.Provenance("b.safetensors", "1" * 64, "vit", parent=parent)
    fast = vit.kernels.optimize(plain)
    file = vit.kernels.save(fast, tmp_path / "fast.safetensors")
    loaded = vit.kernels.load(file)
    x = images(2, 3, 64, 48)
    assert torch.equal(loaded(x), fast(x))
    for part in ("config", "preprocessing", "categories", "provenance"):
        assert getattr(loaded, part) == getattr(fast, part)
    assert [attend.name for attend in loaded.attends] == ["sdpa", "reference", "sdpa"]
    assert list(tmp_path.iterdir()) == [file]
    other = tmp_path / "other"
    other.touch()
    assert file.stat().st_mode == other.stat().st_mode
    other.unlink()
    for categories in (["one"], list(range(10)), dict.fromkeys("abcdefghij")):
        fast.categories = categories
        with pytest.raises(ValueError, match="categories must be 10 texts or none"):
            vit.kernels.save(fast, tmp_path / "other.safetensors")
    assert list(tmp_path.iterdir()) == [file]


def test_what_is_not_saved(tmp_path: Path) -> None:
    plain = model()
    with pytest.raises(ValueError, match=r"expected what vit\.kernels\.optimize returns, not ViT"):
        vit.kernels.save(plain, tmp_path / "a.safetensors")
    fast = vit.kernels.optimize(plain)
    with pytest.raises(ValueError, match=r"a\.pt must end in \.safetensors"):
        vit.kernels.save(fast, tmp_path / "a.pt")
    fast.set_attention(lambda q, k, v, *, bias=None: v, [2])
    with pytest.raises(ValueError, match=r"block 2: attention .* cannot be named in a file"):
        vit.kernels.save(fast, tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


def test_files_that_are_not_loaded(tmp_path: Path) -> None:
    file = vit.kernels.save(vit.kernels.optimize(model()), tmp_path / "fast.safetensors")
    whole = file.read_bytes()
    with pytest.raises(FileNotFoundError, match="does not exist"):
        vit.kernels.load(tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match="no optimized model: load it with vit.load_pretrained"):
        vit.kernels.load(vit.save_checkpoint(model(), tmp_path / "plain.safetensors"))
    for name, content in {
        "not a complete safetensors file": whole[:-4],
        "blocks.0.mlp.fc1.bias is none": whole.replace(b"blocks.0.mlp.fc1.bias", b"blocks.0.mlp.fc9.bias"),
        "expected torch.float32": whole.replace(b'\\"embed_dim\\": 64', b'\\"embed_dim\\": 32'),
        "no optimized model as vit": whole.replace(b'\\"embed_dim\\": 64', b'\\"embed_din\\": 64'),
        "expected 3 names": whole.replace(b'[\\"sdpa\\", ', b"[          "),
        "fast.safetensors: the file is damaged": whole.replace(b'\\"sdpa\\"', b'\\"sdpb\\"'),
        "does not hold what was written": whole.replace(b'\\"num_heads\\": 2', b'\\"num_heads\\": 4'),
        "categories must be 10 texts or none, not 4444": whole.replace(
            b'\\"categories\\": null', b'\\"categories\\": 4444'
        ),
        "mean must be 3 numbers, not": whole.replace(b"[0.5, 0.5, 0.5]", b"[0.5, 0.5     ]", 1),
    }.items():
        assert content != whole
        file.write_bytes(content)
        with pytest.raises(ValueError, match=name):
            vit.kernels.load(file)


def test_a_damaged_byte_is_seen(tmp_path: Path) -> None:
    file = vit.kernels.save(vit.kernels.optimize(model()), tmp_path / "fast.safetensors")
    whole = bytearray(file.read_bytes())
    for place in (len(whole) - 1, len(whole) // 2, len(whole) - 40_000):
        whole[place] ^= 1
        file.write_bytes(whole)
        with pytest.raises(ValueError, match="fast.safetensors: the file is damaged"):
            vit.kernels.load(file)
        whole[place] ^= 1
    file.write_bytes(whole)
    vit.kernels.load(file)


def test_checkpoints_and_optimized_models_are_not_mixed_up(tmp_path: Path) -> None:
    file = vit.kernels.save(vit.kernels.optimize(model()), tmp_path / "fast.safetensors")
    for call in (lambda: vit.load_pretrained(file), lambda: vit.load_pretrained(file, num_heads=2)):
        with pytest.raises(ValueError, match=r"holds an optimized model, no checkpoint: vit\.kernels\.load reads it"):
            call()
    with pytest.raises(FileNotFoundError, match="there is no folder .*nowhere"):
        vit.kernels.save(vit.kernels.optimize(model()), tmp_path / "nowhere" / "fast.safetensors")
    with pytest.raises(FileNotFoundError, match="is no file"):
        vit.kernels.load(tmp_path)


def with_relu(plain: vit.ViT) -> vit.ViT:
    plain.blocks[0].mlp.act = nn.ReLU()
    return plain


def with_eps(plain: vit.ViT) -> vit.ViT:
    plain.blocks[2].norm1.eps = 1e-5
    return plain


def with_heads(plain: vit.ViT) -> vit.ViT:
    plain.blocks[1].attention.num_heads = 4
    return plain


def with_tanh(plain: vit.ViT) -> vit.ViT:
    plain.blocks[0].mlp.act.approximate = "tanh"
    return plain


def with_forward(plain: vit.ViT) -> vit.ViT:
    plain.blocks[1].mlp.forward = lambda x: 2 * x
    return plain


def with_method(plain: vit.ViT) -> vit.ViT:
    plain.forward_head = lambda tokens: tokens[:, 0]
    return plain


def with_scale(plain: vit.ViT) -> vit.ViT:
    plain.blocks[0].scale1 = torch.full((64,), 2.0)
    return plain


def with_buffer(plain: vit.ViT) -> vit.ViT:
    plain.blocks[0].register_buffer("table", torch.ones(1), persistent=False)
    return plain


def with_stride(plain: vit.ViT) -> vit.ViT:
    plain.patch_embed.proj.stride = (8, 8)
    return plain


def with_head(plain: vit.ViT, head: nn.Module) -> vit.ViT:
    plain.head = head
    return plain


def with_module(plain: vit.ViT) -> vit.ViT:
    plain.blocks[1].attention.attend = nn.Identity()
    return plain


def with_function(plain: vit.ViT) -> vit.ViT:
    plain.blocks[1].attention.attend.fn = vit.attention.reference
    return plain


def with_more(plain: vit.ViT) -> vit.ViT:
    plain.blocks[1].probe = nn.Linear(2, 2)
    return plain


def with_hook(plain: vit.ViT) -> vit.ViT:
    plain.blocks[1].register_forward_hook(lambda module, inputs, out: 2 * out)
    return plain


class Other(vit.ViT):
    """A model of another kind."""


def nan(plain: vit.ViT) -> vit.ViT:
    plain.head.weight.data[0, 0] = torch.nan
    return plain


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: nn.Linear(2, 2), r"expected a vit\.ViT, not Linear"),
        (lambda: vit.kernels.optimize(model()), "optimized already, to float32"),
        (lambda: model().train(), r"in training mode.*call model\.eval\(\)"),
        (lambda: model().half(), r"made from a model in torch\.float32, and this one's class_token is torch\.float16"),
        (lambda: model().to("meta"), "for a model on cpu, and this one's class_token is on meta"),
        (
            lambda: with_head(model(), nn.Linear(64, 3)),
            r"head\.out_features is 3.*use model\.reset_classifier",
        ),
        (lambda: with_head(model(), nn.Identity()), "head is Identity, expected Linear: use model.reset_classifier"),
        (lambda: with_relu(model()), r"blocks\.0\.mlp\.act is ReLU, expected GELU"),
        (lambda: with_eps(model()), r"blocks\.2\.norm1\.eps is 1e-05, expected 1e-06, as the config says"),
        (lambda: with_heads(model()), r"blocks\.1\.attention\.num_heads is 4, expected 2"),
        (lambda: with_tanh(model()), r"blocks\.0\.mlp\.act\.approximate is 'tanh', expected 'none'"),
        (lambda: with_forward(model()), r"blocks\.1\.mlp has a forward of its own, which would be lost"),
        (lambda: with_method(model()), "the model has a forward_head of its own, which would be lost"),
        (lambda: with_scale(model()), r"blocks\.0\.scale1 is a tensor, expected None, as the config says"),
        (lambda: with_buffer(model()), r"blocks\.0 has a buffer table, which would be lost"),
        (lambda: with_stride(model()), r"patch_embed\.proj\.stride is \(8, 8\), expected \(16, 16\)"),
        (lambda: with_module(model()), r"blocks\.1\.attention\.attend is Identity, expected Attend"),
        (lambda: with_function(model()), "block 1 attends by what set_attention did not set"),
        (lambda: with_more(model()), r"blocks\.1\.probe is Linear, expected none"),
        (lambda: with_hook(model()), "the model has hooks, which would be lost"),
        (lambda: Other(model().config).eval(), "the model is Other, expected ViT"),
        (lambda: nan(model()), r"head\.weight has values that are not finite"),
    ],
)
def test_models_that_are_refused(make: Callable[[], vit.ViT], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        vit.kernels.optimize(make())


@torch.inference_mode()
def test_what_changes_nothing_is_no_reason_to_refuse() -> None:
    plain = vit.create_model("vit_small_patch16_224", **SMALL, drop_path_rate=0.3).eval()
    plain.blocks[1].residual_mlp.drop_path_rate = 0.0
    mlp = plain.blocks[0].mlp
    before, mlp.forward = mlp.forward, lambda x: 2 * x
    mlp.forward = before  # as it was
    x = images(2, 3, 64, 64)
    assert difference(vit.kernels.optimize(plain)(x), plain(x)) <= FLOAT32


def test_other_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="unknown dtype 'int4'. Did you mean 'int8'"):
        vit.kernels.optimize(model(), "int4")
    with pytest.raises(ValueError, match="expected a dtype's name, float32, int8, .*, not Tensor"):
        vit.kernels.optimize(model(), images(32, 3, 64, 64))
    with pytest.raises(ValueError, match="float32 needs none"):
        vit.kernels.optimize(model(), images=images(32, 3, 64, 64))
    with torch.autocast("cpu"), pytest.raises(ValueError, match="autocast would round what .* leave it first"):
        vit.kernels.optimize(model())
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    with pytest.raises(ValueError, match="cannot run float32: PyTorch was built without oneDNN"):
        vit.kernels.optimize(model())


@torch.inference_mode()
def test_parts_that_were_replaced(tmp_path: Path) -> None:
    plain, random = model(), torch.get_rng_state()
    fast, seen = vit.kernels.optimize(plain), []
    assert torch.equal(random, torch.get_rng_state())  # nobody else's numbers change
    x = images(2, 3, 64, 64)
    fast(x)
    fast.blocks[-1].mlp = torch.nn.Sequential(fast.blocks[-1].mlp)
    fast.blocks[-1].mlp.register_forward_hook(lambda module, given, out: seen.append(out.shape))
    fast(x)
    assert seen == [(2, 17, 64)]  # of all tokens, where somebody looks
    fast.blocks[0].mlp.act = nn.ReLU()
    assert difference(fast(x), plain(x)) > 0.01
    fast.blocks[-1] = model().blocks[-1]
    assert torch.equal(fast(x), fast.forward_head(fast.forward_features(x)))
    with pytest.raises(ValueError, match="block 2 is Block, expected FloatBlock"):
        vit.kernels.save(fast, tmp_path / "fast.safetensors")
    before = fast(x)
    fast.position_embedding = torch.nn.Parameter(torch.zeros_like(fast.position_embedding), requires_grad=False)
    assert difference(fast(x), before) > 0.01


@pytest.mark.matrix
@pytest.mark.parametrize("dtype", ["float32", "int8"])
@torch.inference_mode()
def test_compiled_by_others(dtype: str) -> None:
    """As one graph, which heeds hooks that are set later."""
    if missing(dtype):
        pytest.skip(missing(dtype))
    fast = vit.kernels.optimize(model(depth=2), dtype, images(32, 3, 64, 64) if dtype == "int8" else None)
    torch._dynamo.reset()  # it compiles one function eight times at most
    together, seen = torch.compile(fast, fullgraph=True, dynamic=False), []
    for batch in (2, 1):
        x = images(batch, 3, 64, 64)
        assert difference(together(x), fast(x)) <= (FLOAT32 if dtype == "float32" else 0.05)
    fast.blocks[0].register_forward_hook(lambda module, given, out: seen.append(out.shape))
    together(x)
    assert len(seen) == 1


@pytest.mark.filterwarnings("ignore:The tensor attribute")  # about what is kept, before it is refused
def test_an_optimized_model_is_not_exported() -> None:
    with torch.no_grad(), pytest.raises(ValueError, match="export the model that it was made of"):
        torch.export.export(vit.kernels.optimize(model()), (images(1, 3, 64, 64),), strict=False)


def test_a_compiled_model_without_its_layers() -> None:
    with pytest.raises(RuntimeError, match="the optimized model that this was compiled from is gone"):
        torch.ops.vit.numbered_layer(torch.tensor(-1), images(1, 4), None, 4, torch.float32, None)


def test_what_an_optimized_model_refuses(tmp_path: Path) -> None:
    fast = vit.kernels.optimize(model())
    x = images(1, 3, 64, 64)
    assert not any(parameter.requires_grad for parameter in fast.parameters())
    assert not fast(x).requires_grad
    assert fast.eval() is fast and fast.float() is fast and fast.to("cpu") is fast
    assert not any(module.training for module in fast.modules())
    for call, text in [
        (lambda: fast(x.clone().requires_grad_()), "no gradients: detach the images"),
        (lambda: torch.func.jvp(fast, (x,), (x,)), "no forward-mode derivative"),
        (lambda: fast.train(), "cannot be trained"),
        (lambda: fast.requires_grad_(), "no gradients"),
        (lambda: fast.half(), "cannot be moved to torch.float16 on cpu"),
        (lambda: fast.to("meta"), "stays on cpu and in torch.float32: it cannot be moved to torch.float32 on meta"),
        (lambda: fast.state_dict(), r"saved with vit\.kernels\.save"),
        (lambda: fast.load_state_dict({}), "takes no other weights"),
        (lambda: fast.reset_classifier(5), "keeps its classifier"),
        (lambda: vit.save_checkpoint(fast, tmp_path / "a.safetensors"), r"vit\.kernels\.save"),
        (lambda: fast(x.double()), "float64: cast one of them"),
        (lambda: fast(images(1, 3, 60, 64)), "multiples of 16|whole patches|nearest"),
    ]:
        with pytest.raises(ValueError, match=text):
            call()
    with torch.autocast("cpu"), pytest.raises(ValueError, match="autocast cannot change that"):
        fast(x)


@torch.inference_mode()
def test_memory_is_given_back_at_once() -> None:
    fast = vit.kernels.optimize(model(depth=2))
    fast(images(1, 3, 64, 64))
    alive = weakref.ref(fast)
    gc.disable()
    try:
        del fast
        assert alive() is None
    finally:
        gc.enable()


@pytest.mark.matrix
@pytest.mark.parametrize("dtype", ["float32", "int8"])
@torch.inference_mode()
def test_what_was_compiled_is_remembered_whatever_the_weights(dtype: str) -> None:
    if missing(dtype):
        pytest.skip(missing(dtype))
    given = images(32, 3, 64, 64) if dtype == "int8" else None
    x = images(2, 3, 64, 64)
    with fresh_cache():
        for seed, event in ((1, "fxgraph_cache_miss"), (2, "fxgraph_cache_hit")):
            plain = randomize(model(depth=2), seed)
            fast = vit.kernels.optimize(plain, dtype, given)
            torch._dynamo.reset()  # as in another process
            counters.clear()
            together = torch.compile(fast, fullgraph=True, dynamic=False)
            assert difference(together(x), fast(x)) <= (FLOAT32 if dtype == "float32" else 0.05)
            assert [name for name in counters["inductor"] if "cache" in name] == [event]


@torch.inference_mode()
def test_modes(tmp_path: Path) -> None:
    plain = model()
    fast = vit.kernels.optimize(plain, mode="latency")
    file = vit.kernels.save(fast, tmp_path / "fast.safetensors")
    x = images(2, 3, 64, 64)
    assert torch.equal(vit.kernels.load(file, mode="latency")(x), fast(x))
    for mode, text in {
        "throughput": r"mode='throughput' is for bfloat16 and float16 on a GPU, not for float32: leave out mode",
        "fast": "unknown mode 'fast'",
    }.items():
        with pytest.raises(ValueError, match=text):
            vit.kernels.optimize(plain, mode=mode)
        with pytest.raises(ValueError, match=text):
            vit.kernels.load(file, mode=mode)
