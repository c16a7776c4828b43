"""Reading and changing activations by name; afterwards the model is as before."""

import copy
import io
import math
import warnings
from itertools import permutations
from pathlib import Path

import pytest
import torch
from helpers import FLOAT32, difference, images, randomize

import vit
from vit.attention import sdpa

TINY = vit.ViTConfig(img_size=32, patch_size=4, embed_dim=64, depth=3, num_heads=2, num_classes=7, init_values=0.5)
X = images(2, 3, 24, 40)
PARTS = ["q", "k", "v", "scores", "weights", "heads", "out"]


@pytest.fixture
def tiny() -> vit.ViT:
    return randomize(vit.ViT(TINY)).eval()


def by_hand(model: vit.ViT, x: torch.Tensor, number: int) -> dict[str, torch.Tensor]:
    """The activations of one block, computed from its weights alone."""
    for block in model.blocks[:number]:
        x = block(x)
    block = model.blocks[number]
    qkv = block.attention.qkv(block.norm1(x)).unflatten(2, (3, 2, 32)).permute(2, 0, 3, 1, 4)
    values = dict(zip("qkv", qkv))
    values["scores"] = torch.einsum("batd,basd->bats", values["q"], values["k"]) / math.sqrt(32)
    values["weights"] = values["scores"].softmax(dim=-1)
    values["heads"] = values["weights"] @ values["v"]
    values["out"] = block.attention.proj(values["heads"].transpose(1, 2).flatten(2))
    return {f"blocks.{number}.attention.{name}": value for name, value in values.items()} | {
        f"blocks.{number}.residual_attention": values["out"] * block.scale1,
        f"blocks.{number}": block(x),
    }


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_each_name_gives_its_activation(tiny, backend):
    tiny.set_attention(backend)
    expected = by_hand(tiny, tiny.embed(X), 1)
    found = vit.record(tiny, X, expected)
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert difference(found[name], value) <= FLOAT32, name
    assert difference(found["blocks.1.attention.q"], expected["blocks.1.attention.k"]) > 1e-2
    assert torch.equal(vit.record(tiny, X, "head")["head"], tiny(X))


def test_all_names_can_be_recorded_unless_not_reached(tiny):
    names = vit.record(tiny, X, "?")
    assert len(names) == len(set(names)) and {"blocks.0.attention.scores", "patch_embed", "blocks.2.mlp.act"} <= set(
        names
    )
    assert not [name for name in names if name.endswith((".attend", ".attention"))]
    assert list(vit.record(tiny, X, names)) == names
    assert vit.record(tiny, X, []) == {}
    headless = vit.ViT(TINY.override(global_pool="avg", num_classes=0)).eval()
    headless.unused = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="unused: not reached by this model's forward pass"):
        vit.record(headless, X, ["unused", "norm"])


def test_scores_are_computed_only_if_asked_for(tiny, monkeypatch):
    shapes = []
    plain = torch.Tensor.__matmul__
    monkeypatch.setattr(
        torch.Tensor, "__matmul__", lambda a, b: plain(a, b) if a.ndim < 4 else shapes.append(a.shape) or plain(a, b)
    )
    vit.record(tiny, X, ["blocks.0.attention.q", "blocks.2.attention.heads", "blocks.1"])
    assert not shapes
    vit.record(tiny, X, ["blocks.2.attention.weights"])
    assert shapes == [(2, 2, 61, 32)]


def test_gradients_flow_through_what_is_recorded(tiny):
    weights = vit.record(tiny, X, "blocks.1.attention.weights")["blocks.1.attention.weights"]
    weights[..., 0].sum().backward()
    assert tiny.blocks[0].mlp.fc1.weight.grad.abs().sum() > 0 and tiny.blocks[2].mlp.fc1.weight.grad is None


@pytest.mark.parametrize("part", ["qkv", "q", "k", "v", "heads"])
def test_later_activations_have_gradients_of_recorded_ones(tiny, part):
    name = f"blocks.0.attention.{part}"
    kept = vit.record(tiny, X, [name, "head"])
    (gradient,) = torch.autograd.grad(kept["head"].sum(), kept[name])
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize("part", PARTS)
def test_a_patch_equals_the_same_change_by_hand(tiny, part):
    """A patch gives what the same change by hand gives, and leaving it restores every bit."""
    name = f"blocks.2.attention.{part}"
    plain = tiny(X)
    with vit.patch(tiny, {name: lambda x: x}):
        assert difference(tiny(X), plain) <= FLOAT32
    with vit.patch(tiny, {name: lambda x: x * 0.5}) as same:
        assert same is tiny
        changed, seen = tiny(X), vit.record(tiny, X, ["blocks.2.attention.heads", name])
    values = by_hand(tiny, tiny.embed(X), 2)
    q, k, v = (values[f"blocks.2.attention.{one}"] * (0.5 if one == part else 1) for one in "qkv")
    scores = torch.einsum("batd,basd->bats", q, k) / math.sqrt(32) * (0.5 if part == "scores" else 1)
    heads = scores.softmax(dim=-1) * (0.5 if part == "weights" else 1) @ v * (0.5 if part == "heads" else 1)
    assert difference(seen["blocks.2.attention.heads"], heads) <= FLOAT32
    assert difference(seen[name], values[name] * 0.5) <= FLOAT32  # recorded after it was changed
    assert difference(changed, plain) > 1e-3
    assert torch.equal(tiny(X), plain)
    assert [attend.fn for attend in tiny.attends] == [sdpa] * 3
    assert not [module for module in tiny.modules() if module._forward_hooks or module._forward_pre_hooks]


@pytest.mark.parametrize("part", PARTS)
def test_what_is_recorded_inside_a_patch_is_what_the_patched_model_computes(tiny, part):
    """Each part follows from the recorded parts before it, except the one that is patched."""
    with vit.patch(tiny, {f"blocks.1.attention.{part}": lambda x: x * 0.5 + 0.1}):
        found = vit.record(tiny, X, [f"blocks.1.attention.{one}" for one in PARTS])
        assert torch.equal(vit.record(tiny, X, "head")["head"], tiny(X))
    q, k, v, scores, weights, heads, _ = found.values()
    expected = {
        "scores": q @ k.mT / math.sqrt(32), "weights": scores.softmax(dim=-1), "heads": weights @ v,
        "out": tiny.blocks[1].attention.proj(heads.transpose(1, 2).flatten(2)),
    }  # fmt: skip
    for name, value in expected.items():
        difference_of = difference(found[f"blocks.1.attention.{name}"], value)
        assert difference_of <= FLOAT32 if name != part else difference_of > 1e-2, name


PAIRS = [pair for pair in permutations(PARTS, 2) if set(pair) != {"scores", "weights"}]  # which are refused


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_nested_patches_equal_one_patch(tiny, one, other):
    names = [f"blocks.1.attention.{part}" for part in (one, other)]
    with vit.patch(tiny, dict.fromkeys(names, lambda x: x * 0.5 + 0.1)):
        together = tiny(X)
    with vit.patch(tiny, {names[0]: lambda x: x * 0.5 + 0.1}):
        first = tiny(X)
        with vit.patch(tiny, {names[1]: lambda x: x * 0.5 + 0.1}):
            assert torch.equal(tiny(X), together)
        assert torch.equal(tiny(X), first) and difference(first, together) > 1e-3


def test_several_changes_and_nested_ones(tiny):
    double, zero = (lambda x: x * 2), torch.zeros_like
    with vit.patch(tiny, {"blocks.0.attention.scores": double, "blocks.0.attention.weights": zero}):
        assert not vit.record(tiny, X, "blocks.0.attention.heads")["blocks.0.attention.heads"].any()
        with vit.patch(tiny, {"blocks.1.attention.scores": double, "blocks.0.attention.heads": torch.ones_like}):
            names = ["blocks.0.attention.heads", "blocks.0.attention.weights", "blocks.1.attention.scores"]
            heads, weights, scores = vit.record(tiny, X, names).values()
            assert heads.min() == 1 and not weights.any() and scores.any()
        assert not vit.record(tiny, X, "blocks.0.attention.heads")["blocks.0.attention.heads"].any()
    assert not [module for module in tiny.modules() if module._forward_hooks or module._forward_pre_hooks]


def test_heads_patched_outside_of_scores(tiny):
    """Heads are patched after scores, whichever patch is the outer one."""
    heads, scores = "blocks.0.attention.heads", "blocks.0.attention.scores"
    with vit.patch(tiny, {heads: torch.ones_like}), vit.patch(tiny, {scores: lambda x: x * 2}):
        assert vit.record(tiny, X, heads)[heads].unique().tolist() == [1]


def test_scores_of_packed_images(tiny):
    """Each packed image has scores of its own."""
    x = [images(3, 24, 40), images(3, 8, 16)]
    plain = tiny.forward_packed(x)
    with vit.patch(tiny, {"blocks.1.attention.scores": lambda scores: scores}):
        assert difference(tiny.forward_packed(x), plain) <= FLOAT32
    with vit.patch(tiny, {"blocks.1.attention.scores": lambda scores: scores * 2}):
        alone = torch.cat([tiny(one[None]) for one in x])
        assert difference(tiny.forward_packed(x), alone) <= FLOAT32 < difference(alone, plain)


def test_a_slot_called_by_hand_while_patched(tiny):
    q, k, v = images(3, 1, 2, 5, 32)
    slot = tiny.attends[0]
    with vit.patch(tiny, {"blocks.0.attention.scores": torch.zeros_like}):
        assert difference(slot(q, k, v), uniform(q, k, v)) <= FLOAT32
    assert difference(slot(q, k, v), uniform(q, k, v)) > 1e-2


def test_activation_patching(tiny):
    """The tokens of one image after block 1, put into the pass of another: the output is that of the first."""
    one, other = images(2, 3, 24, 40, seed=5), X
    kept = vit.record(tiny, one, "blocks.1")
    with vit.patch(tiny, kept):
        assert torch.equal(tiny(other), tiny(one))
    assert difference(tiny(other), tiny(one)) > 1e-2


def test_an_error_inside_leaves_the_model_as_it_was(tiny):
    plain = tiny(X)
    with pytest.raises(ValueError, match="wish"), vit.patch(tiny, {"blocks.0.attention.weights": torch.zeros_like}):
        raise ValueError("wish")
    with pytest.raises(ValueError, match="unknown activation 'blocks.9'"):
        vit.record(tiny, X, ["blocks.0.attention.q", "blocks.9"])
    assert torch.equal(tiny(X), plain)
    assert not [module for module in tiny.modules() if module._forward_hooks or module._forward_pre_hooks]


def uniform(q, k, v, *, bias=None):
    return v.mean(dim=2, keepdim=True).expand_as(v)


def test_refusals(tiny):
    with pytest.raises(
        ValueError,
        match=r"activation 'blocks.1.attention.wights': did you mean 'blocks.1.attention.weights'\? vit.record",
    ):
        vit.record(tiny, X, "blocks.1.attention.wights")
    for name in ("", "blocks", "blocks.0.attention.attend"):
        with pytest.raises(ValueError, match=f"unknown activation '{name}'"):
            vit.record(tiny, X, name)
    for change, message in (
        (lambda x: x[:1], r"blocks.0.attention.heads is changed to .*\[1, 2, 61, 32\].*, expected .*\[2, 2, 61, 32\]"),
        (lambda x: x.double(), "float64.*expected.*float32"),
        (lambda x: None, "NoneType"),
        (torch.zeros(1), r"\[1\]"),
    ):
        with vit.patch(tiny, {"blocks.0.attention.heads": change}), pytest.raises(ValueError, match=message):
            tiny(X)
    with pytest.raises(ValueError, match="expected a vit.ViT, not OptimizedModule: pass the model"):
        vit.record(torch.compile(tiny), X, "head")
    tiny.set_attention(uniform, [1])
    with pytest.warns(UserWarning, match=r"blocks.1.attention.scores is that of softmax attention"):
        vit.record(tiny, X, ["blocks.1.attention.scores", "blocks.0.attention.scores"])
    refused = vit.patch(tiny, {"blocks.1.attention.weights": torch.zeros_like})
    with pytest.raises(ValueError, match="block 1: attention 'uniform' computes no scores"), refused:
        pass
    with vit.patch(tiny, {"blocks.1.attention.heads": torch.zeros_like}):
        tiny(X)
    tiny.compile()
    with pytest.raises(ValueError, match="parts of this model are compiled"):
        vit.record(tiny, X, "head")


def test_a_second_patch_of_the_same_scores(tiny):
    plain = tiny(X)
    zero = {"blocks.0.attention.weights": torch.zeros_like}
    with vit.patch(tiny, {"blocks.0.attention.scores": lambda x: x * 2}):
        doubled = tiny(X)
        with pytest.raises(ValueError, match="scores or weights of block 0 are patched already"), vit.patch(tiny, zero):
            pass
        assert torch.equal(tiny(X), doubled)
    with vit.patch(tiny, zero):
        assert difference(tiny(X), plain) > 1e-3
    assert torch.equal(tiny(X), plain)


def test_attention_set_while_patched(tiny):
    with vit.patch(tiny, {"blocks.0.attention.scores": lambda x: x * 2}):
        doubled = tiny(X)
        tiny.set_attention("reference")
        assert difference(tiny(X), doubled) <= FLOAT32
        tiny.set_attention(uniform)
        with pytest.raises(ValueError, match="block 0: attention 'uniform' computes no scores"):
            tiny(X)


def test_what_bypasses_hooks_is_refused(tiny):
    checkpointed = vit.ViT(TINY.override(grad_checkpointing=True))
    with pytest.raises(ValueError, match="gradient checkpointing runs blocks again"):
        vit.record(checkpointed, X, "head")
    with torch.no_grad():
        vit.record(checkpointed, X, "head")
    with (
        pytest.warns(UserWarning, match="blocks.0.attention.heads: never reached while patched"),
        vit.patch(tiny, {"blocks.0.attention.heads": torch.zeros_like}),
    ):
        pass
    with pytest.raises(ValueError, match="blocks are numbered from 0"):
        vit.record(tiny, X, "blocks.-1.attention.q")


def test_a_function_that_changes_q_in_place_does_not_change_the_record(tiny):
    def wiped(q, k, v, *, bias=None):
        q *= 0
        return sdpa(q, k, v, bias=bias)

    x = images(1, 3, 24, 32)
    with torch.no_grad():
        expected = vit.record(tiny, x, "blocks.0.attention.q")["blocks.0.attention.q"]
        tiny.set_attention(wiped)
        names = (name for name in ["blocks.0.attention.q"])  # a generator can be read only once
        assert torch.equal(vit.record(tiny, x, names)["blocks.0.attention.q"], expected)
        qkv = vit.record(tiny, x, "blocks.0.attention.qkv")["blocks.0.attention.qkv"]
        assert torch.equal(qkv.view(1, -1, 3, *expected.shape[1::2])[:, :, 0].transpose(1, 2), expected)
        given = expected.clone()
        with vit.patch(tiny, {"blocks.0.attention.q": given}):
            tiny(x)
        assert torch.equal(given, expected)
    assert expected.abs().max() > 0


def test_warnings_point_to_the_callers_line(tiny):
    class Own(torch.nn.Module):
        def __init__(self, config, block):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1))

        def forward(self, q, k, v, *, bias=None):
            return v * self.weight

    tiny.set_attention(Own)
    x = images(1, 3, 24, 32)
    with torch.no_grad(), warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        fast = vit.kernels.optimize(tiny)
        with vit.patch(tiny, {"blocks.0": lambda x: x}):
            pass
        for call in (
            lambda: vit.record(tiny, x, "blocks.0.attention.weights"),
            lambda: tiny.set_attention("sdpa"),
            lambda: fast.set_attention("sdpa"),
        ):
            call()
        places = [Path(one.filename).name for one in seen]
    assert places == ["test_activations.py"] * 4


def test_copies_and_maps_while_patched(tiny, tmp_path):
    x = images(1, 3, 24, 32)
    plain = tiny(x)
    for part in ("attention.weights", "attention.q", "mlp"):
        with vit.patch(tiny, {f"blocks.1.{part}": lambda w: w}):
            tiny(x)
            for again in (copy.deepcopy, lambda model: torch.save(model, io.BytesIO())):
                for one in (tiny, tiny.blocks):
                    with pytest.raises(ValueError, match="the model is patched, and a copy would stay patched"):
                        again(one)
            file = vit.save_checkpoint(tiny, tmp_path / f"{part}.safetensors")  # which no patch changes
        assert torch.equal(vit.load_pretrained(file)(x), plain)
    assert torch.equal(copy.deepcopy(tiny)(x), plain)
    for part in ("q", "k", "v", "scores", "weights"):
        change = {f"blocks.1.attention.{part}": torch.zeros_like}
        with vit.patch(tiny, change), pytest.warns(UserWarning, match="patched, but not in these maps"):
            vit.attention_maps(tiny, x, blocks=[1])
            tiny(x)
    with vit.patch(tiny, {"blocks.1.attention.heads": torch.zeros_like}), warnings.catch_warnings():
        warnings.simplefilter("error")  # these maps are right
        vit.attention_maps(tiny, x, blocks=[1])
        tiny(x)
    with pytest.raises(ValueError, match="the change of blocks.1 must be a function or a tensor, not float"), \
         vit.patch(tiny, {"blocks.1": 0.0}):  # fmt: skip
        pass
    with pytest.raises(ValueError, match="changes must map names to functions or tensors, not list"), \
         vit.patch(tiny, ["blocks.1"]):  # fmt: skip
        pass
    for names in (None, [3]):
        with pytest.raises(ValueError, match="names must be a string or several"):
            vit.record(tiny, x, names)


def test_what_changes_its_inputs_in_place_does_not_change_patched_scores(tiny):
    """The formula is called in place of the attention function, never after it; results are checked as ever."""
    calls = []

    def scaled(q, k, v, *, bias=None):
        calls.append(1)
        return sdpa(q.mul_(2.0), k.mul_(0.5), v, bias=bias)

    vit.register_attention("in place", scaled, exact=True, overwrite=True)
    try:
        with torch.no_grad(), vit.patch(tiny, {"blocks.1.attention.scores": lambda x: 2 * x}):
            expected = tiny(X)
            tiny.set_attention("in place")
            assert difference(tiny(X), expected) <= FLOAT32 and len(calls) == 2
        tiny.set_attention("sdpa", check=True)
        with (
            vit.patch(tiny, {"blocks.2.attention.scores": lambda x: x * float("nan")}),
            pytest.raises(ValueError, match="block 2: .* returned values that are not finite"),
        ):
            tiny(X)
    finally:
        del vit.registry._registry["in place"]


def test_a_patched_slot_is_called_like_any_other(tiny):
    q, k, v = images(3, 2, 2, 61, 32)
    with vit.patch(tiny, {"blocks.0.attention.scores": lambda x: x}):
        assert difference(tiny.attends[0](q, k, v), sdpa(q, k, v)) <= FLOAT32
        assert difference(tiny.attends[0](q, k, v, packing=None), sdpa(q, k, v)) <= FLOAT32


def test_changes_in_place_leave_what_comes_before_alone(tiny):
    """`residual_attention` passes its input's tensor on where nothing scales it."""
    plain = randomize(vit.ViT(TINY.override(init_values=None))).eval()
    name = "blocks.1.attention.out"
    expected = vit.record(plain, X, name)[name]
    with torch.no_grad(), vit.patch(plain, {"blocks.1.residual_attention": lambda x: x.mul_(2)}):
        assert torch.equal(vit.record(plain, X, name)[name], expected)


def test_a_compiled_model_is_not_compiled_again_after_patches(tiny):
    from torch._dynamo.testing import CompileCounter

    torch.compiler.reset()
    counter = CompileCounter()
    compiled = torch.compile(tiny, backend=counter, fullgraph=True)
    compiled(X)
    for i in range(3):
        with vit.patch(tiny, {f"blocks.{i}.attention.weights": lambda x: x}):
            tiny(X)
        compiled(X)
    assert counter.frame_count == 1


def test_names_of_another_kind(tiny):
    with pytest.raises(ValueError, match="names must be strings"), vit.patch(tiny, {3: torch.zeros_like}):
        pass
    with pytest.raises(ValueError, match="unknown activation 'blocks.\u00b2'"):
        vit.record(tiny, X, "blocks.\u00b2")
