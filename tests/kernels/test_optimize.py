"""Optimized models: what they keep of the original model, and what they refuse."""

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cpu_cases import SMALL, model
from helpers import FLOAT32, difference, images, randomize
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache

import vit
from vit.kernels.base import OptimizedViT
from vit.kernels.cpu.model import missing


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
    assert difference(fast(x), plain(x)) > 100 * FLOAT32  # the original model may change
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


def test_optimizing_while_patched_is_refused() -> None:
    plain = model()
    with vit.patch(plain, {"blocks.1.attention.weights": torch.zeros_like}):
        with pytest.raises(ValueError, match="hooks"):
            vit.kernels.optimize(plain)
        plain(images(1, 3, 64, 64))  # vit.patch warns of a patch that never ran


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


def with_relu(plain: vit.ViT) -> vit.ViT:
    plain.blocks[0].mlp.act = nn.ReLU()
    return plain


def with_eps(plain: vit.ViT) -> vit.ViT:
    plain.blocks[2].norm1.eps = 1e-5
    return plain


def with_tanh(plain: vit.ViT) -> vit.ViT:
    plain.blocks[0].mlp.act.approximate = "tanh"
    return plain


def with_forward(plain: vit.ViT) -> vit.ViT:
    plain.blocks[1].mlp.forward = lambda x: 2 * x
    return plain


def with_stride(plain: vit.ViT) -> vit.ViT:
    plain.patch_embed.proj.stride = (8, 8)
    return plain


def with_head(plain: vit.ViT, head: nn.Module) -> vit.ViT:
    plain.head = head
    return plain


def with_parametrization(plain: vit.ViT) -> vit.ViT:
    nn.utils.parametrizations.weight_norm(plain.blocks[1].mlp.fc1)
    return plain


def with_module(plain: vit.ViT) -> vit.ViT:
    plain.blocks[1].attention.attend = nn.Identity()
    return plain


def with_more(plain: vit.ViT) -> vit.ViT:
    plain.blocks[1].probe = nn.Linear(2, 2)
    return plain


def with_method(plain: vit.ViT, name: str) -> vit.ViT:
    setattr(plain, name, lambda x: x.mean(dim=1))
    return plain


def with_heads(plain: vit.ViT) -> vit.ViT:
    plain.blocks[1].attention.num_heads = 1
    return plain


def with_function(plain: vit.ViT) -> vit.ViT:
    plain.attends[1].fn = lambda q, k, v: v * 2
    return plain


def with_attention_module(plain: vit.ViT) -> vit.ViT:
    del plain.attends[1].fn
    plain.attends[1].fn = nn.Identity()
    return plain


def truncated(plain: vit.ViT) -> vit.ViT:
    plain.blocks = plain.blocks[:1]
    return plain


def with_hook(plain: vit.ViT) -> vit.ViT:
    plain.blocks[1].register_forward_hook(lambda module, inputs, out: 2 * out)
    return plain


class Other(vit.ViT):
    """A subclass."""


def nan(plain: vit.ViT) -> vit.ViT:
    plain.head.weight.data[0, 0] = torch.nan
    return plain


class Adapter(nn.Linear):
    """LoRA as peft has it: the layer itself is kept inside."""

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__(base_layer.in_features, base_layer.out_features)
        self.base_layer = base_layer


def with_adapter(model: vit.ViT) -> vit.ViT:
    model.blocks[1].attention.qkv = Adapter(model.blocks[1].attention.qkv)
    return model


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: nn.Linear(2, 2), r"expected a vit\.ViT, not Linear$"),
        (lambda: nn.DataParallel(model()), r"not DataParallel: optimize the model in it, its \.module$"),
        (
            lambda: with_adapter(model()),
            r"^blocks\.1\.attention\.qkv is an adapter \(Adapter, as of LoRA\) around Linear: merge it first",
        ),
        (lambda: vit.kernels.optimize(model()), "already optimized, to float32: optimize the original model"),
        (lambda: model().train(), r"in training mode.*call model\.eval\(\) first"),
        (lambda: model().half(), r"made from a model in torch\.float32, and its class_token is torch\.float16"),
        (lambda: model().to("meta"), "needs a model on cpu, and its class_token is on meta"),
        (lambda: with_head(model(), nn.Linear(64, 3)), r"head .*out_features=3.*; use model\.reset_classifier"),
        (lambda: with_head(model(), nn.Identity()), r"head is .*Identity\(\), .*; use model\.reset_classifier"),
        (lambda: with_relu(model()), r"blocks\.0\.mlp\.act is .*ReLU\(\), expected .*GELU.*: its work would be lost"),
        (lambda: with_parametrization(model()), r"blocks\.1\.mlp\.fc1 is .*ParametrizedLinear.*; merge it into"),
        (lambda: with_eps(model()), r"blocks\.2\.norm1 is .*eps=1e-05.*, expected .*eps=1e-06"),
        (lambda: with_tanh(model()), r"blocks\.0\.mlp\.act is .*approximate='tanh'.*, expected .*approximate='none'"),
        (lambda: with_forward(model()), r"the forward of blocks\.1\.mlp was replaced: its work would be lost"),
        (lambda: with_method(model(), "pool"), "the pool of the model was replaced: its work would be lost"),
        (lambda: with_method(model(), "embed"), "the embed of the model was replaced: its work would be lost"),
        (lambda: with_heads(model()), r"blocks\.1\.attention is .*1 heads.*, expected .*2 heads"),
        (lambda: with_function(model()), r"attention of block 1 was replaced by hand: use model\.set_attention"),
        (
            lambda: with_attention_module(model()),
            r"attention of block 1 was replaced by hand: use model\.set_attention",
        ),
        (lambda: truncated(model()), r"blocks\.1 is nothing, expected vit\.model\.Block"),
        (lambda: with_stride(model()), r"patch_embed\.proj is .*stride=\(8, 8\).*, expected .*stride=\(16, 16\)"),
        (lambda: with_module(model()), r"blocks\.1\.attention\.attend is .*Identity.*, expected vit\.attend\.Attend"),
        (lambda: with_more(model()), r"blocks\.1\.probe is .*Linear.*, expected nothing"),
        (lambda: with_hook(model()), "the model has hooks, whose work would be lost"),
        (lambda: Other(model().config).eval(), r"the model is .*Other\(\), expected vit\.model\.ViT"),
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
    with pytest.raises(ValueError, match="unknown dtype 'Tensor'. Known: float32, int8"):
        vit.kernels.optimize(model(), images(32, 3, 64, 64))
    with pytest.raises(ValueError, match="unknown dtype 'float64'"):
        vit.kernels.optimize(model(), torch.float64)
    with pytest.raises(ValueError, match="images are for calibrating int8, and dtype is float32"):
        vit.kernels.optimize(model(), images=images(32, 3, 64, 64))
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    with pytest.raises(ValueError, match="cannot run float32: PyTorch was built without oneDNN"):
        vit.kernels.optimize(model())


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@torch.inference_mode()
def test_a_dtype_by_name_or_as_torch_has_it_and_autocast_changes_nothing(dtype: str) -> None:
    if missing(dtype):
        pytest.skip(missing(dtype))
    plain, x = model(), images(2, 3, 64, 64)
    given = images(32, 3, 64, 64) if dtype == "int8" else None
    fast = vit.kernels.optimize(plain, dtype, given)
    with torch.autocast("cpu"):
        again = vit.kernels.optimize(plain, getattr(torch, dtype), given)
    assert again.optimized == dtype and torch.equal(again(x), fast(x))


@torch.inference_mode()
def test_parts_that_were_replaced() -> None:
    plain, random = model(), torch.get_rng_state()
    fast, seen = vit.kernels.optimize(plain), []
    assert torch.equal(random, torch.get_rng_state())  # the global generator is left alone
    x = images(2, 3, 64, 64)
    fast(x)
    fast.blocks[-1].mlp = torch.nn.Sequential(fast.blocks[-1].mlp)
    fast.blocks[-1].mlp.register_forward_hook(lambda module, given, out: seen.append(out.shape))
    fast(x)
    assert seen == [(2, 17, 64)]  # of all tokens, since there is a hook
    fast.blocks[0].mlp.act = nn.ReLU()
    assert difference(fast(x), plain(x)) > 0.01
    fast.blocks[-1] = model().blocks[-1]
    assert torch.equal(fast(x), fast.forward_head(fast.forward_features(x)))
    before = fast(x)
    fast.position_embedding = torch.nn.Parameter(torch.zeros_like(fast.position_embedding), requires_grad=False)
    assert difference(fast(x), before) > 0.01


@pytest.mark.matrix
@pytest.mark.parametrize("dtype", ["float32", "int8"])
@torch.inference_mode()
def test_compiled_by_others(dtype: str) -> None:
    """As one graph, which calls hooks that are registered later."""
    if missing(dtype):
        pytest.skip(missing(dtype))
    fast = vit.kernels.optimize(model(depth=2), dtype, images(32, 3, 64, 64) if dtype == "int8" else None)
    torch._dynamo.reset()  # it compiles one function at most eight times
    together, seen = torch.compile(fast, fullgraph=True, dynamic=False), []
    for batch in (2, 1):
        x = images(batch, 3, 64, 64)
        assert difference(together(x), fast(x)) <= (FLOAT32 if dtype == "float32" else 0.05)
    fast.blocks[0].register_forward_hook(lambda module, given, out: seen.append(out.shape))
    together(x)
    assert len(seen) == 1


@pytest.mark.filterwarnings("ignore:The tensor attribute")  # about what is kept, before it is refused
def test_an_optimized_model_is_not_exported() -> None:
    with torch.no_grad(), pytest.raises(ValueError, match="export the original model"):
        torch.export.export(vit.kernels.optimize(model()), (images(1, 3, 64, 64),), strict=False)


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
        (lambda: fast.to("meta"), "stays in torch.float32 on cpu: it cannot be moved to torch.float32 on meta"),
        (lambda: fast.state_dict(), r"no state dict: save it with vit\.kernels\.save"),
        (lambda: fast.load_state_dict({}), "keeps its weights: load others into the original model"),
        (lambda: fast.reset_classifier(5), "keeps its classifier"),
        (lambda: vit.save_checkpoint(fast, tmp_path / "a.safetensors"), r"vit\.kernels\.save"),
        (lambda: fast(x.double()), "float64: use images.to"),
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
