"""What `set_attention` accepts, and attention by name."""

import warnings
from functools import partial

import pytest
import torch
from attention_cases import TINY, Scaled, sharp, widened
from helpers import FLOAT32, difference, images, randomize
from torch import nn

import vit
from vit.attention import sdpa
from vit.registry import get_attention


@pytest.fixture
def tiny() -> vit.ViT:
    return randomize(vit.ViT(TINY)).eval()


def test_attention_refusals(tiny):
    with pytest.raises(ValueError, match="unknown attention 'sdpaa'. Did you mean 'sdpa'"):
        tiny.set_attention("sdpaa")
    with pytest.raises(ValueError, match="block 3 is out of range"):
        tiny.set_attention("reference", blocks=[0, 3])
    assert all(attend.fn is vit.attention.sdpa for attend in tiny.attends)  # nothing was changed
    with pytest.raises(ValueError, match=r"expected \(q, k, v, \*, bias=None\)"):
        tiny.set_attention(lambda q, k: q)
    with pytest.raises(ValueError, match="is registered already"):
        vit.register_attention("sdpa", lambda q, k, v, *, bias=None: v)
    tiny.set_attention(lambda q, k, v, *, bias=None: v.transpose(1, 2))
    shapes = r"block 0: .* returned .* \[1, 67, 2, 32\] on cpu, expected .* \[1, 2, 67, 32\]"
    with pytest.raises(ValueError, match=shapes):
        tiny(images(1, 3, 32, 32))


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
    tiny.set_attention("sdpa", bias=bias)  # no token attends to the class token
    assert difference(tiny(x), plain) > 1e-3 and tiny(x).isfinite().all()


def checked(q, k, v, *, bias=None, check=False):
    return v


@pytest.mark.parametrize(
    ("fn", "options", "message"),
    [
        (sharp, {"powr": 1.0}, "'sharp' has no option 'powr'; its options: bias, power"),
        ("sdpa", {"window": 3}, "'sdpa' has no option 'window'; its options: bias"),
        (widened, {}, "'widened' has the signature .*power"),
        (sharp, {"block": 1}, "'sharp': the model itself passes block; rename the option"),
        (Scaled, {"strat": 1.0}, "'Scaled' has no option 'strat'; its options: start"),
        (Scaled(TINY, 0), {}, "is a module: pass its class or a factory"),
        (lambda config, block: 5, {}, "block 0: factory '<lambda>' returned int, expected an nn.Module"),
        (lambda config, block: nn.Linear(2, 2), {}, r"has the signature .*, expected \(q, k, v"),
        (checked, {"check": True}, "'checked': set_attention itself takes check; rename the option"),
        (nn.Identity, {}, "'Identity' is a class: its first two parameters must be named config and block"),
        (
            lambda c, i: Scaled(c, i),
            {},
            r"signature \(c, i\), expected \(q, k, v, .* or, for a factory, \(config, block\)",
        ),
    ],
)
def test_what_cannot_be_called_as_attention_is_refused(tiny, fn, options, message):
    with pytest.raises(ValueError, match=message):
        tiny.set_attention(fn, **options)
    assert all(attend.fn is sdpa for attend in tiny.attends)


def test_a_failing_factory_changes_nothing(tiny):
    def third_fails(config, block):
        if block == 2:
            raise ValueError("no third one")
        return Scaled(config, block)

    before = list(tiny.state_dict())
    with pytest.raises(ValueError, match="no third one"):
        tiny.set_attention(third_fails)
    assert list(tiny.state_dict()) == before and all(attend.fn is sdpa for attend in tiny.attends)


def refuses_training(config, block):
    module = Scaled(config, block)
    module.train = lambda mode=True: (_ for _ in ()).throw(ValueError("cannot be trained")) if block == 2 else module
    return module


@pytest.mark.parametrize(
    ("fn", "settings", "message"),
    [
        ("sdpaa", {}, "unknown attention"),
        ("reference", {"window": 7}, "no option 'window'"),
        ("reference", {"blocks": [0, 3]}, "block 3 is out of range"),
        ("reference", {"blocks": []}, "at least one number"),
        (lambda config, block: nn.Linear(2, 2) if block else Scaled(config, block), {}, "'<lambda>' has the signature"),
        (lambda config, block: None if block == 2 else Scaled(config, block), {}, "block 2: factory"),
        (refuses_training, {}, "cannot be trained"),
    ],
)
def test_a_refused_attention_changes_no_slot(tiny, fn, settings, message):
    tiny.set_attention(sharp, power=3.0)
    tiny.set_attention(Scaled, [1], start=0.5)
    tiny.set_attention("reference", [2], check=True)
    x = images(1, 3, 24, 40)
    expected = tiny(x)
    before = [(a.fn, a.choice, a.filled_in, a.keywords, a.check) for a in tiny.attends]
    names = list(tiny.state_dict())
    with pytest.raises(ValueError, match=message):
        tiny.set_attention(fn, **settings)
    after = [(a.fn, a.choice, a.filled_in, a.keywords, a.check) for a in tiny.attends]
    assert all(one is other for slots in zip(before, after) for one, other in zip(*slots))
    assert list(tiny.state_dict()) == names and torch.equal(tiny(x), expected)


def test_what_is_no_function_is_refused(tiny):
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


# Names


def test_names(registered):
    assert {"reference", "sdpa", "varlen"} <= set(vit.attention_names())
    registered("mine", sharp)
    assert get_attention("mine") is sharp
    with pytest.raises(ValueError, match="'mine' is registered already; pass overwrite=True"):
        vit.register_attention("mine", sharp)
    with pytest.raises(ValueError, match="'mine2' has the signature"):
        vit.register_attention("mine2", lambda q: q)
    with pytest.raises(ValueError, match="unknown attention 'mime'. Did you mean 'mine'"):
        get_attention("mime")


def test_registered_functions_are_known_by_name(tiny):
    tiny.set_attention(sdpa)
    assert [attend.name for attend in tiny.attends] == ["sdpa"] * 3 and tiny.attends[0].exact


def test_names_of_backends_are_taken():
    with pytest.raises(ValueError, match="'flash' is registered already"):
        vit.register_attention("flash", sharp)


def test_registering_changes_no_other_model():
    try:
        vit.register_attention("sdpa", lambda q, k, v, *, bias=None: v, overwrite=True)
        assert vit.ViT(TINY).attends[0].fn is vit.attention.sdpa
    finally:
        vit.register_attention("sdpa", vit.attention.sdpa, exact=True, overwrite=True)


def test_maps_warn_of_inexact_attention_only(tiny, registered, recwarn):
    registered("as good", lambda q, k, v, *, bias=None: sdpa(q, k, v), exact=True)
    tiny.set_attention("as good")
    vit.attention_maps(tiny, images(1, 3, 32, 32))
    assert not [w for w in recwarn if "attends by another" in str(w.message)]
    registered("as good", sharp)  # what was set before stays as it was
    vit.attention_maps(tiny, images(1, 3, 32, 32))
    assert not [w for w in recwarn if "attends by another" in str(w.message)]
    tiny.set_attention("as good")
    with pytest.warns(UserWarning, match="attends by another"):
        vit.attention_maps(tiny, images(1, 3, 32, 32))


def test_maps_and_checkpoints_warn_of_another_function(tmp_path):
    model = vit.create_model("vit_digits_patch4_32", depth=2).eval()
    model.set_attention(lambda q, k, v, *, bias=None: v, blocks=[0])
    with pytest.warns(UserWarning, match="attends by another function"):
        vit.attention_maps(model, torch.zeros(1, 3, 32, 32), blocks=[0])
    with pytest.warns(UserWarning, match="blocks 0: .*has no registered name .*: set it again"):
        vit.save_checkpoint(model, tmp_path / "m.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vit.attention_maps(model, torch.zeros(1, 3, 32, 32), blocks=[1])
        model.set_attention("reference")
        vit.save_checkpoint(model, tmp_path / "m.safetensors")


def test_functions_without_parameters_and_without_signatures(tiny):
    """A function that takes nothing is refused; a builtin that has no signature is called as it is."""
    x = images(2, 3, 24, 40)
    for wrong in (lambda: 1, lambda *, bias=None: 1):
        with pytest.raises(ValueError, match="has the signature"):
            tiny.set_attention(wrong)
        with pytest.raises(ValueError, match="has the signature"):
            vit.register_attention("nothing", wrong)
    expected = tiny(x)
    tiny.set_attention(torch.nn.functional.scaled_dot_product_attention)
    assert difference(tiny(x), expected) <= FLOAT32


def test_keywords_of_a_module_may_have_any_names(tiny):
    class Checked(nn.Module):
        def __init__(self, config, block):
            super().__init__()

        def forward(self, q, k, v, *, bias=None, check=False, blocks=()):
            return vit.attention.sdpa(q, k, v, bias=bias)

    x = images(2, 3, 24, 40)
    expected = tiny(x)
    tiny.set_attention(Checked)
    assert difference(tiny(x), expected) <= FLOAT32


def test_what_would_lose_weights_or_overwrite_values(tiny):
    layer = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="is a module: pass its class or a factory"):
        tiny.set_attention(layer.forward)
    for wrong in (int, dict, type):
        with pytest.raises(ValueError, match="is a class"):
            tiny.set_attention(wrong)

    seen = []

    def fn(q, k, v, *, bias=None, prefix):
        seen.append(prefix)
        return sdpa(q, k, v)

    tiny.set_attention(partial(fn, prefix=77))
    tiny(images(1, 3, 24, 40))
    assert set(seen) == {77}


def test_a_factory_may_name_its_options_as_the_model_does(tiny):
    class Windows(nn.Module):
        def __init__(self, config, block, grid=None):
            super().__init__()
            self.grid = grid

        def forward(self, q, k, v, *, bias=None):
            return sdpa(q, k, v)

    tiny.set_attention(Windows, grid=3)
    assert [slot.fn.grid for slot in tiny.attends] == [3] * len(tiny.blocks)
