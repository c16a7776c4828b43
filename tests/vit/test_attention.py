"""The seam: what a replaced attention is given, what must come back, and what survives."""

import copy
import json
import pickle

import pytest
import torch
from helpers import FLOAT32, difference, images, randomize
from torch import nn

import vit
from vit.attend import Attend
from vit.attention import reference, sdpa
from vit.packed import Packing
from vit.registry import get_attention
from vit.weights import CheckpointError

TINY = vit.ViTConfig(img_size=32, patch_size=4, embed_dim=64, depth=3, num_heads=2, num_classes=7, reg_tokens=2)


@pytest.fixture
def tiny() -> vit.ViT:
    return randomize(vit.ViT(TINY)).eval()


@pytest.fixture
def registered():
    """Register for one test only."""
    vit.attention_names()  # with which the kernels' names come
    before = dict(vit.registry._registry)
    yield lambda name, fn, **more: vit.register_attention(name, fn, overwrite=True, **more) or name
    vit.registry._registry.clear()
    vit.registry._registry.update(before)


class Scaled(nn.Module):
    """Attention with a weight of its own: a temperature per head."""

    def __init__(self, config: vit.ViTConfig, block: int, start: float = 1.0) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((config.num_heads, 1, 1), start + block))
        self.register_buffer("order", torch.arange(3))

    def forward(self, q, k, v, *, bias=None):
        return sdpa(q * self.scale, k, v, bias=bias)


def sharp(q, k, v, *, bias=None, power=2.0):
    return reference(q * power, k, v, bias=bias)


def widened(q, k, v, *, bias=None, power):
    return reference(q * power, k, v, bias=bias)


# What a function is given


def test_keywords_come_by_name(tiny):
    seen = []

    def nosy(q, k, v, *, bias=None, grid, prefix, block):
        seen.append((grid, prefix, block, q.shape[2]))
        return sdpa(q, k, v, bias=bias)

    x = images(2, 3, 24, 40)
    expected = tiny(x)
    tiny.set_attention(nosy)
    assert torch.equal(tiny(x), expected)
    assert seen == [((6, 10), 3, i, 63) for i in range(3)]
    seen.clear()
    tiny.forward_packed([images(3, 8, 12), images(3, 16, 4)])  # it knows no lengths: image by image
    assert seen == [(grid, 3, i, 3 + grid[0] * grid[1]) for i in range(3) for grid in ((2, 3), (4, 1))]
    seen.clear()
    tiny.forward_intermediates(x, [0])
    with pytest.warns(UserWarning, match="attends by another"):
        vit.attention_maps(tiny, x, [1])
    assert seen == [((6, 10), 3, 0, 63)] * 2


def test_a_function_that_knows_lengths_gets_all_images_with_their_grids(tiny):
    seen = []

    def packed(q, k, v, *, bias=None, lengths=None, grid=None):
        seen.append((lengths, grid))
        parts = [sdpa(*(x.split(lengths, dim=2)[i] for x in (q, k, v))) for i in range(len(lengths))]
        return torch.cat(parts, dim=2)

    listed = [images(3, 8, 12), images(3, 16, 4)]
    expected = tiny.forward_packed(listed)
    tiny.set_attention(packed, [-1])
    assert difference(tiny.forward_packed(listed), expected) <= FLOAT32
    assert seen == [([9, 7], [(2, 3), (4, 1)])]


def test_a_block_called_by_hand_has_no_grid(tiny):
    tokens = images(1, 7, 64)
    tiny.blocks[0](tokens)
    tiny.set_attention(lambda q, k, v, *, bias=None, grid: v)
    with pytest.raises(ValueError, match="block 0: .*needs the grid: give the block a Packing"):
        tiny.blocks[0](tokens)
    assert tiny.blocks[0](tokens, Packing((2, 2))).shape == tokens.shape


def test_options(tiny):
    x = images(2, 3, 24, 40)
    plain = tiny(x)
    tiny.set_attention(sharp)
    doubled = tiny(x)
    assert difference(doubled, plain) > 1e-3
    tiny.set_attention(sharp, power=1.0)
    assert difference(tiny(x), plain) <= FLOAT32
    tiny.set_attention(sharp, blocks=[0, -1])
    tiny.set_attention(sharp, blocks=[1], power=2.0)
    assert torch.equal(tiny(x), doubled)
    bias = torch.zeros(1, 1, 1, 63).index_fill(3, torch.tensor([0]), float("-inf"))
    tiny.set_attention("sdpa", bias=bias)  # nobody looks at the class token
    assert difference(tiny(x), plain) > 1e-3 and tiny(x).isfinite().all()


def checked(q, k, v, *, bias=None, check=False):
    return v


@pytest.mark.parametrize(
    ("fn", "options", "message"),
    [
        (sharp, {"powr": 1.0}, r"'sharp' must be callable as .* with options powr: .*powr"),
        ("sdpa", {"window": 3}, "'sdpa' must be callable as .* with options window"),
        (widened, {}, "'widened' must be callable as .*power"),
        (sharp, {"block": 1}, "'sharp': the model itself passes block; rename the option"),
        (Scaled, {"strat": 1.0}, r"'Scaled' must be callable as fn\(config, block\) with options strat"),
        (Scaled(TINY, 0), {}, "is a module: pass its class or a factory"),
        (lambda config, block: 5, {}, "block 0: factory '<lambda>' returned int, expected an nn.Module"),
        (lambda config, block: nn.Linear(2, 2), {}, r"must be callable as fn\(q, k, v"),
        (checked, {"check": True}, "'checked': set_attention itself takes check; rename the option"),
        (nn.Identity, {}, "'Identity' is a class: its first two parameters must be named config and block"),
        (lambda c, i: Scaled(c, i), {}, r"must be callable as fn\(q, k, v, .*or a factory as fn\(config, block\)"),
    ],
)
def test_what_cannot_be_called_so_is_refused(tiny, fn, options, message):
    with pytest.raises(ValueError, match=message):
        tiny.set_attention(fn, **options)
    assert all(attend.fn is sdpa for attend in tiny.attends)


def test_nothing_is_half_done(tiny):
    def third_fails(config, block):
        if block == 2:
            raise ValueError("no third one")
        return Scaled(config, block)

    before = list(tiny.state_dict())
    with pytest.raises(ValueError, match="no third one"):
        tiny.set_attention(third_fails)
    assert list(tiny.state_dict()) == before and all(attend.fn is sdpa for attend in tiny.attends)


# What must come back


BAD_RESULTS = {
    "shape": (lambda q, k, v, *, bias=None: v[:, :, 1:], r"\[2, 2, 62, 32\] on cpu, expected .*\[2, 2, 63, 32\]"),
    "a head less": (lambda q, k, v, *, bias=None: v[:, :1], r"\[2, 1, 63, 32\] on cpu, expected"),
    "dtype": (lambda q, k, v, *, bias=None: v.bfloat16(), "returned torch.bfloat16 .* expected torch.float32"),
    "device": (lambda q, k, v, *, bias=None: v.to("meta"), "on meta, expected .* on cpu"),
    "nothing": (lambda q, k, v, *, bias=None: None, "returned NoneType"),
    "bias": (lambda q, k, v, *, bias=None: sdpa(q, k, v, bias=v), r"bias \[2, 2, 63, 32\] does not broadcast to .* = "),
    "bias of 5": (lambda q, k, v, *, bias=None: reference(q, k, v, bias=v[None]), "does not broadcast"),
    "bias dtype": (lambda q, k, v, *, bias=None: sdpa(q, k, v, bias=v[..., :1].half()), "bias is torch.float16 on cpu"),
    "mask": (lambda q, k, v, *, bias=None: reference(q, k, v, bias=v[..., :1] > 0), "bias is torch.bool"),
}


@pytest.mark.parametrize("case", BAD_RESULTS)
def test_bad_results_are_refused_with_the_blocks_number(tiny, case):
    fn, message = BAD_RESULTS[case]
    tiny.set_attention(fn, [1])
    with pytest.raises(ValueError, match=f"block 1: .*{message}"):
        tiny(images(2, 3, 24, 40))


def test_nan_is_found_where_it_begins(tiny):
    def breaks(q, k, v, *, bias=None, block):
        return sdpa(q, k, v) * (float("nan") if block >= 1 else 1.0)

    x = images(2, 3, 24, 40)
    tiny.set_attention(breaks)
    assert tiny(x).isnan().all()
    tiny.set_attention(breaks, check=True)
    with pytest.raises(ValueError, match="block 1: attention 'breaks' returned values that are not finite"):
        tiny(x)
    tiny.set_attention("sdpa", check=True)
    with pytest.raises(ValueError, match="block 0: attention 'sdpa' was given q with values that are not finite"):
        tiny(x * float("inf"))


# Weights of its own


def test_a_factory_makes_one_module_per_block(tiny):
    x = images(2, 3, 24, 40)
    plain = tiny(x)
    tiny.set_attention(Scaled, start=0.5)
    names = [name for name, _ in tiny.named_parameters() if "attend" in name]
    assert names == [f"blocks.{i}.attention.attend.fn.scale" for i in range(3)]
    assert [attend.fn.scale[0].item() for attend in tiny.attends] == [0.5, 1.5, 2.5]
    assert difference(tiny(x), plain) > 1e-3
    tiny(x).square().sum().backward()
    assert all(attend.fn.scale.grad.abs().sum() > 0 for attend in tiny.attends)
    tiny.set_attention("sdpa")
    assert torch.equal(tiny(x), plain)
    assert not [name for name in tiny.state_dict() if "attend" in name]


def test_a_module_goes_where_the_model_is(tiny):
    tiny.to(torch.bfloat16).train().set_attention(Scaled, [1])
    scale = tiny.attends[1].fn.scale
    assert scale.dtype == torch.bfloat16 and tiny.attends[1].fn.training
    assert tiny(images(1, 3, 32, 32).bfloat16()).dtype == torch.bfloat16


def test_copies_and_pickles(tiny, registered):
    x = images(2, 3, 24, 40)
    tiny.set_attention(
        registered("by name", lambda q, k, v, *, bias=None, power: sharp(q, k, v, power=power)), power=3.0
    )
    tiny.set_attention(Scaled, [1])
    expected = tiny(x)
    copies = [copy.deepcopy(tiny), pickle.loads(pickle.dumps(tiny))]
    for other in copies:
        assert torch.equal(other(x), expected)
        other.attends[1].fn.scale.data.zero_()
        other.set_attention("sdpa", [0])
    assert torch.equal(tiny(x), expected)
    data = pickle.dumps(tiny)
    del vit.registry._registry["by name"]
    with pytest.raises(ValueError, match="unknown attention 'by name'"):
        pickle.loads(data)


@pytest.mark.parametrize(("name", "options"), [("sdpa", {}), ("by name", {"power": 3.0}), ("scaled", {"start": 0.5})])
def test_pickles_of_version_1(tiny, registered, name, options):
    """Slots used to hold what is now a `Choice` in attributes of their own; functions went by name there, too."""
    registered("by name", lambda q, k, v, *, bias=None, block, power: sharp(q, k, v, power=power + block))
    registered("scaled", Scaled)
    tiny.set_attention(name, **options)
    slot = tiny.attends[1]
    state = {key: value for key, value in vars(slot).items() if key not in ("choice", "filled_in", "fn")}
    state |= {"name": name, "options": options, "exact": slot.exact, "given": slot.filled_in, "prefix": 3, "patched": 0}
    again = Attend.__new__(Attend)
    again.__setstate__(state)
    q, k, v = images(3, 2, 2, 63, 32)
    assert torch.equal(again(q, k, v), slot(q, k, v))
    assert (again.name, again.options, again.exact, again.source) == (name, options, slot.exact, slot.source)
    assert set(vars(again)) - set(vars(slot)) == set()


# Checkpoints


def test_checkpoints_remember_names_options_and_weights(tiny, registered, tmp_path):
    x = images(2, 3, 24, 40)
    tiny.set_attention(registered("scaled", Scaled), start=0.5)
    tiny.set_attention("reference", [0])
    randomize(tiny, 3)
    expected = tiny(x)
    file = vit.save_checkpoint(tiny, tmp_path / "m.safetensors")
    again = vit.load_pretrained(file)
    assert torch.equal(again(x), expected)
    assert [attend.name for attend in again.attends] == ["reference", "scaled", "scaled"]
    assert again.attends[2].options == {"start": 0.5}
    converted = vit.weights.convert(again.state_dict(), "vit", "vit", TINY)
    assert converted.state_dict.keys() == tiny.state_dict().keys()
    for layout in ("timm", "dinov2", "transformers_dinov2_registers"):
        with pytest.raises(CheckpointError, match=r"cannot hold .*blocks.\*.attention.attend.fn.order, .*fn.scale"):
            vit.save_checkpoint(tiny, tmp_path / layout, layout=layout)
    tiny.set_attention("sdpa")
    vit.load_pretrained(vit.save_checkpoint(tiny, tmp_path / "timm", layout="timm"))


def test_checkpoints_that_cannot_be_had_again(tiny, registered, tmp_path):
    file = tmp_path / "m.safetensors"
    tiny.set_attention(Scaled, [1])
    with pytest.raises(CheckpointError, match=r"block 1: attention 'Scaled' has weights and has no registered name"):
        vit.save_checkpoint(tiny, file)
    tiny.set_attention(registered("scaled", Scaled), [1])
    vit.save_checkpoint(tiny, file)
    registered("scaled", lambda config, block: nn.ModuleDict({"no": nn.Linear(2, 2)}).requires_grad_())
    with pytest.raises(CheckpointError, match="block 1 has attention 'scaled': .*register it before loading"):
        vit.load_pretrained(file)
    registered("scaled", sharp)
    with pytest.raises(CheckpointError, match="weights blocks.1.attention.attend.fn.*, but attention .* has none"):
        vit.load_pretrained(file)

    class More(Scaled):
        def __init__(self, config, block):
            super().__init__(config, block)
            self.more = nn.Parameter(torch.zeros(2))

    registered("scaled", More)
    with pytest.raises(CheckpointError, match=r"has weights .*, expected .*more \[2\]"):
        vit.load_pretrained(file)
    del vit.registry._registry["scaled"]
    with pytest.raises(CheckpointError, match="block 1 has attention 'scaled': unknown attention .*register it before"):
        vit.load_pretrained(file)


def test_options_that_json_cannot_hold(tiny, registered, tmp_path):
    registered("sharp", sharp)
    tiny.set_attention("sharp", power=torch.ones(1))
    with pytest.warns(
        UserWarning, match="blocks 0, 1, 2: attention 'sharp' has options that JSON cannot hold: set it again"
    ):
        vit.save_checkpoint(tiny, tmp_path / "m.safetensors")
    tiny.set_attention("sharp", power=1.5)
    with pytest.warns(UserWarning, match="cannot hold attention: readers will assume 'sdpa'"):
        vit.save_checkpoint(tiny, tmp_path / "timm", layout="timm")
    assert vit.load_pretrained(vit.save_checkpoint(tiny, tmp_path / "m.safetensors")).attends[1].options == {
        "power": 1.5
    }


@pytest.mark.parametrize(
    "bad", [{}, [1], [{"name": 1, "options": {}}], [{"name": "sdpa"}], [{"name": "sdpa", "options": {}}]]
)
def test_headers_that_say_otherwise(tiny, tmp_path, bad):
    from safetensors.torch import load_file, save_file

    file = vit.save_checkpoint(tiny, tmp_path / "m.safetensors")
    config = {"vit.config": json.dumps(TINY.to_dict()), "vit.attention": json.dumps(bad)}
    save_file(load_file(file), file, config)
    with pytest.raises(CheckpointError, match=r"header cannot be used|attention of [01] blocks, but the model"):
        vit.load_pretrained(file)


# torch.compile


def test_set_before_and_after_compiling(tiny, registered):
    x = images(2, 3, 24, 40)
    registered("sharp", sharp)

    def use_grid(q, k, v, *, bias=None, grid, prefix, block):
        return reference(q / (1 + grid[0] + prefix + block), k, v)

    compiled = torch.compile(tiny, fullgraph=True, backend="aot_eager")
    for setting, options in (("sdpa", {}), ("sharp", {}), ("sharp", {"power": 0.5}), (Scaled, {}), (use_grid, {})):
        tiny.set_attention(setting, **options)
        assert difference(compiled(x), tiny(x)) <= FLOAT32, setting
    expected = compiled(x)
    compiled.set_attention("reference", [0])  # through the wrapper, on the live model
    assert difference(compiled(x), expected) > 1e-4
    assert difference(compiled(x), tiny(x)) <= FLOAT32


# The registry


def test_names(registered):
    assert {"reference", "sdpa", "varlen"} <= set(vit.attention_names())
    registered("mine", sharp)
    assert get_attention("mine") is sharp
    with pytest.raises(ValueError, match="'mine' is registered already; pass overwrite=True"):
        vit.register_attention("mine", sharp)
    with pytest.raises(ValueError, match="'mine2' must be callable as"):
        vit.register_attention("mine2", lambda q: q)
    with pytest.raises(ValueError, match="unknown attention 'mime'. Did you mean 'mine'"):
        get_attention("mime")


def test_exactness_decides_who_is_warned(tiny, registered, recwarn):
    registered("as good", lambda q, k, v, *, bias=None: sdpa(q, k, v), exact=True)
    tiny.set_attention("as good")
    vit.attention_maps(tiny, images(1, 3, 32, 32))
    assert not [w for w in recwarn if "attends by another" in str(w.message)]
    registered("as good", sharp)  # what was set before stays what it was
    vit.attention_maps(tiny, images(1, 3, 32, 32))
    assert not [w for w in recwarn if "attends by another" in str(w.message)]
    tiny.set_attention("as good")
    with pytest.warns(UserWarning, match="attends by another"):
        vit.attention_maps(tiny, images(1, 3, 32, 32))


def test_the_seam_dispatches_nothing_of_its_own(tiny):
    """The operations of a forward pass through the seam are those of the call written out."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Log(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.ops = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.ops.append(str(func))
            return func(*args, **(kwargs or {}))

    q, k, v = images(3, 1, 2, 197, 32)
    attend = tiny.attends[0]
    with torch.no_grad(), Log() as seam:
        attend(q, k, v, Packing((14, 14)))
    with torch.no_grad(), Log() as plain:
        torch.nn.functional.scaled_dot_product_attention(q, k, v)
    assert seam.ops == plain.ops and plain.ops


def test_names_of_functions_are_found(tiny):
    tiny.set_attention(sdpa)
    assert [attend.name for attend in tiny.attends] == ["sdpa"] * 3 and tiny.attends[0].exact


def test_a_name_that_means_something_else_by_now(tiny, registered, tmp_path):
    registered("mine", sharp)
    tiny.set_attention("mine")
    expected = tiny(images(1, 3, 32, 32))
    registered("mine", lambda q, k, v, *, bias=None: v)
    assert torch.equal(copy.deepcopy(tiny)(images(1, 3, 32, 32)), expected)
    with pytest.warns(UserWarning, match="'mine' has a name that was registered again since"):
        vit.save_checkpoint(tiny, tmp_path / "m.safetensors")


def test_backends_names_are_taken_from_the_start():
    with pytest.raises(ValueError, match="'flash' is registered already"):
        vit.register_attention("flash", sharp)


def test_weights_that_are_dropped_are_said(tiny):
    tiny.set_attention(Scaled, [1])
    with pytest.warns(UserWarning, match="blocks 1: the weights of their attention are dropped"):
        tiny.set_attention("sdpa")


class Complex(nn.Module):
    """A buffer of complex numbers, as rotary embeddings have."""

    def __init__(self, config: vit.ViTConfig, block: int) -> None:
        super().__init__()
        self.register_buffer("turn", torch.polar(torch.ones(3), torch.ones(3)))

    def forward(self, q, k, v, *, bias=None):
        return sdpa(q, k, v, bias=bias)


def test_buffers_stay_what_they_are(tiny, registered, tmp_path):
    tiny.set_attention(Complex, [0])
    assert tiny.attends[0].fn.turn.dtype == torch.complex64 and tiny.attends[0].fn.turn.imag.abs().min() > 0.5
    tiny.set_attention(registered("masked", lambda config, block: Masked()), [0])
    x = images(1, 3, 32, 32)
    expected = tiny(x)
    assert torch.equal(vit.load_pretrained(vit.save_checkpoint(tiny, tmp_path / "m.safetensors"))(x), expected)


class Masked(nn.Module):
    """Half of the tokens are not looked at."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.full((1, 1, 1, 67), float("-inf")).index_fill(3, torch.arange(9), 0.0))

    def forward(self, q, k, v, *, bias=None):
        return sdpa(q, k, v, bias=self.mask)


def test_a_learned_bias_under_autocast(tiny):
    tiny.set_attention("sdpa", bias=torch.randn(1, 2, 1, 67))
    x = images(1, 3, 32, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert difference(tiny(x).float(), tiny(x).float()) == 0
    q = images(2, 3, 5, 8)
    for shape in ((), (1,), (5,), (3, 1, 5), (3, 5, 5)):
        bias = torch.randn(shape)
        assert difference(sdpa(q, q, q, bias=bias), reference(q, q, q, bias=bias)) <= FLOAT32
        assert difference(get_attention("flash")(q, q, q, bias=bias), reference(q, q, q, bias=bias)) <= FLOAT32


def test_errors_of_other_kinds_say_where(tiny):
    def broken(q, k, v, *, bias=None):
        return q @ k

    tiny.set_attention(broken, [2])
    with pytest.raises(RuntimeError) as error:
        tiny(images(1, 3, 32, 32))
    if hasattr(error.value, "__notes__"):  # since Python 3.11
        assert error.value.__notes__ == ["in block 2, attention 'broken'"]


def test_blocks_that_are_compiled_one_by_one_share_a_graph():
    from torch._dynamo.testing import CompileCounter

    model = randomize(vit.ViT(TINY.override(depth=12))).eval()
    model.set_attention(lambda q, k, v, *, bias=None, grid, prefix: sdpa(q, k, v))
    counter = CompileCounter()
    torch.compiler.reset()
    for block in model.blocks:
        block.compile(backend=counter)
    model(images(1, 3, 32, 32))
    assert counter.frame_count == 1
