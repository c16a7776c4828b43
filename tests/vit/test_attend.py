"""The slot in a block: what a function is given, what must come back, and what survives."""

import copy
import pickle

import pytest
import torch
from attention_cases import TINY, Scaled, sharp
from helpers import (
    FLOAT32,
    difference,
    images,
    randomize,
)
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import vit
from vit.attend import Attend
from vit.attention import reference, sdpa
from vit.packed import Packing


@pytest.fixture
def tiny() -> vit.ViT:
    return randomize(vit.ViT(TINY)).eval()


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
    tiny.forward_packed([images(3, 8, 12), images(3, 16, 4)])  # without lengths it is called image by image
    assert seen == [(grid, 3, i, 3 + grid[0] * grid[1]) for i in range(3) for grid in ((2, 3), (4, 1))]
    seen.clear()
    tiny.forward_intermediates(x, [0])
    with pytest.warns(UserWarning, match="attends by another"):
        vit.attention_maps(tiny, x, [1])
    assert seen == [((6, 10), 3, 0, 63)] * 2


def test_a_function_with_lengths_gets_all_images_with_their_grids(tiny):
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


def test_the_slot_adds_no_operations(tiny):
    """A call through the slot runs the operations of the function alone."""

    class Log(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.ops = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.ops.append(str(func))
            return func(*args, **(kwargs or {}))

    q, k, v = images(3, 1, 2, 197, 32)
    attend = tiny.attends[0]
    with torch.no_grad(), Log() as slot:
        attend(q, k, v, Packing((14, 14)))
    with torch.no_grad(), Log() as plain:
        torch.nn.functional.scaled_dot_product_attention(q, k, v)
    assert slot.ops == plain.ops and plain.ops


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


@pytest.mark.parametrize("wrong", [None, (1, 2), "double"])
def test_attention_that_returns_something_else(wrong):
    model = vit.create_model("vit_digits_patch4_32", depth=1).eval()
    model.set_attention(lambda q, k, v, *, bias=None: v.double() if wrong == "double" else wrong)
    with pytest.raises(ValueError, match="block 0: attention '<lambda>' returned .*, expected torch.float32"):
        model(torch.zeros(1, 3, 32, 32))


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


def test_other_errors_name_the_block(tiny):
    def broken(q, k, v, *, bias=None):
        return q @ k

    tiny.set_attention(broken, [2])
    with pytest.raises(RuntimeError) as error:
        tiny(images(1, 3, 32, 32))
    if hasattr(error.value, "__notes__"):  # since Python 3.11
        assert error.value.__notes__ == ["in block 2, attention 'broken'"]


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


class Everything(nn.Module):
    """A module that takes all that the model fills in, and checks it."""

    def __init__(self, config: vit.ViTConfig, block: int) -> None:
        super().__init__()
        self.shift, self.block = nn.Parameter(torch.zeros(config.num_heads, 1, 1)), block

    def forward(self, q, k, v, *, bias=None, grid, lengths, prefix, block):
        assert block == self.block
        grids = [grid] if lengths is None else grid
        sizes = [prefix + h * w for h, w in grids]
        assert sum(sizes) == q.shape[2] and lengths in (None, sizes)
        return torch.cat([sdpa(*one) for one in zip(*(x.split(sizes, dim=2) for x in (q + self.shift, k, v)))], dim=2)


def test_a_factory_may_take_all_that_the_model_fills_in(tiny):
    x, listed = images(2, 3, 24, 40), [images(3, 8, 12), images(3, 16, 4), images(3, 4, 4)]
    expected, packed = tiny(x), tiny.forward_packed(listed)
    tiny.set_attention(Everything)
    for model in (tiny, copy.deepcopy(tiny), pickle.loads(pickle.dumps(tiny))):
        assert difference(model(x), expected) <= FLOAT32
        assert difference(model.forward_packed(listed, budget=20), packed) <= FLOAT32
    slot = copy.deepcopy(tiny.attends[1])  # a part alone
    q, k, v = images(3, 1, 2, 9, 32)
    assert torch.equal(slot(q, k, v, Packing((2, 3))), tiny.attends[1](q, k, v, Packing((2, 3))))


def test_dropping_weights_warns(tiny):
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


class Masked(nn.Module):
    """Every token attends to the first nine only."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.full((1, 1, 1, 67), float("-inf")).index_fill(3, torch.arange(9), 0.0))

    def forward(self, q, k, v, *, bias=None):
        return sdpa(q, k, v, bias=self.mask)


def test_buffers_keep_their_dtype_and_values(tiny, registered, tmp_path):
    tiny.set_attention(Complex, [0])
    assert tiny.attends[0].fn.turn.dtype == torch.complex64 and tiny.attends[0].fn.turn.imag.abs().min() > 0.5
    tiny.set_attention(registered("masked", lambda config, block: Masked()), [0])
    x = images(1, 3, 32, 32)
    expected = tiny(x)
    assert torch.equal(vit.load_pretrained(vit.save_checkpoint(tiny, tmp_path / "m.safetensors"))(x), expected)


# Copies and pickles


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
def test_pickles_of_version_0_1(tiny, registered, name, options):
    """Slots used to hold what is now a `Choice` in attributes; functions were pickled by name there as well."""
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
    if name != "sdpa":
        del vit.registry._registry[name]
        with pytest.raises(ValueError, match="unknown attention .* Register it before unpickling"):
            Attend.__new__(Attend).__setstate__(state)


def test_a_pickle_takes_what_its_name_stands_for_now(tiny, registered):
    """An attention that needs a keyword which the pickled model does not fill in would fail, or miss it in silence."""
    registered("mine", lambda q, k, v, *, bias=None: sdpa(q, k, v), exact=True)
    tiny.set_attention("mine")
    data = pickle.dumps(tiny)
    registered("mine", sharp)
    again = pickle.loads(data)
    assert [(slot.source, slot.exact) for slot in again.attends] == [(sharp, False)] * 3
    assert torch.equal(again(images(1, 3, 24, 40)), pickle.loads(pickle.dumps(again))(images(1, 3, 24, 40)))
    for other in (lambda q, k, v, *, bias=None, grid=None: v, Scaled):
        registered("mine", other)
        with pytest.raises(ValueError, match="'mine' takes other keywords than the one that was pickled"):
            pickle.loads(data)
