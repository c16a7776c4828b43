"""Each layout against its own library, and all pairs of layouts there and back: bit for bit, or refused."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoints import TINY, holdable, timm_state, under
from helpers import FLOAT32, GRADIENT, difference, images, randomize
from layout_cases import BASE, CASES, WRITTEN_ONLY, case_config, read_theirs, written_to_them
from layout_table import as_markdown, rows

import vit
from vit.weights import CheckpointError, convert, detect_layout
from vit.weights.keymap import FUSE, split_number
from vit.weights.layouts import LAYOUTS, google
from vit.weights.layouts.timm import DINOV2

README = Path(__file__).parents[2] / "weights" / "README.md"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_their_model_is_ours(case):
    out, gradient = read_theirs(case_config(case, 2), gradients=True)
    assert out <= FLOAT32 and gradient <= GRADIENT


WRITTEN = [(case.layout, case.config) for case in CASES] + [(layout, config) for layout, _, config in WRITTEN_ONLY]


@pytest.mark.parametrize(("layout", "config"), WRITTEN)
def test_their_library_runs_what_we_write(layout, config):
    assert written_to_them(layout, config.override(depth=2)) <= FLOAT32


def test_a_layout_that_is_wrong_would_be_seen(monkeypatch):
    """Square weights fit whether or not they are transposed, and q, k and v in any order."""
    swapped = replace(FUSE, to_theirs=lambda whole, heads: list(whole.chunk(3))[::-1])
    upright = replace(google.OUT, to_theirs=lambda whole, heads: [whole.unflatten(0, (heads, -1)).contiguous()])
    for layout, right, wrong in (("transformers", FUSE, swapped), ("augreg", google.OUT, upright)):
        assert written_to_them(layout, BASE.override(depth=2)) <= FLOAT32
        entries = [replace(e, transform=wrong) if e.transform is right else e for e in LAYOUTS[layout].entries]
        monkeypatch.setitem(LAYOUTS, layout, replace(LAYOUTS[layout], entries=tuple(entries)))
        assert written_to_them(layout, BASE.override(depth=2)) > 100 * FLOAT32


def test_eps_matters_and_is_kept():
    """1e-12, 1e-6 and 1e-3 give different numbers, and transformers' model has the one that we write."""
    results = {eps: written_to_them("transformers", BASE.override(depth=2, eps=eps)) for eps in (1e-12, 1e-3)}
    assert max(results.values()) <= FLOAT32
    model = randomize(vit.ViT(BASE.override(depth=2))).eval()
    other = vit.ViT(BASE.override(depth=2, eps=1e-3)).eval()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        x = images(1, 3, 64, 64)
        assert difference(other(x), model(x)) > 10 * FLOAT32


def test_the_table_in_the_readme():
    """Computed with one block at a small size; weights/README.md has it for the whole ViT-S at 224 x 224."""
    table = rows(depth=1, img_size=32)
    print(as_markdown(table))
    row = re.compile(r"\| `\w+` \| .* \| .*\de[-+]\d")
    shown = [line for line in README.read_text(encoding="utf-8").splitlines() if row.match(line)]
    numbers = re.compile(r"\d\.\de[-+]\d\d")
    assert [numbers.sub("", line) for line in shown] == [
        numbers.sub("", line) for line in as_markdown(table).splitlines()[2:]
    ]
    assert all(float(number) <= FLOAT32 for line in shown for number in numbers.findall(line))


def test_the_layout_that_the_readme_adds(monkeypatch):
    """Its example is a whole layout: detected, converted to and from bit for bit, and complete."""
    (example,) = re.findall(r"^```python\n(from vit\.weights\.keymap.*?)^```$", README.read_text("utf-8"), re.S | re.M)
    file: dict = {}
    exec(example, file)
    (acme,) = file["LAYOUTS"]
    monkeypatch.setitem(LAYOUTS, acme.name, acme)  # as its name in layouts/__init__.py does
    config = TINY.override(eps=1e-5)
    ours = randomize(vit.ViT(config)).state_dict()
    theirs = convert(ours, target="acme", config=config).state_dict
    assert "layers.1.k.bias" in theirs and detect_layout(theirs) == "acme"
    again = convert(theirs)
    assert again.config == config and again.report.source == "acme"
    assert again.state_dict.keys() == ours.keys()
    assert all(torch.equal(again.state_dict[name], ours[name]) for name in ours)
    with pytest.raises(CheckpointError, match="do not fit the acme layout: missing keys: layers.1.k.bias"):
        convert({key: tensor for key, tensor in theirs.items() if key != "layers.1.k.bias"})
    with pytest.raises(CheckpointError, match="the acme layout cannot hold register_tokens"):
        convert(vit.ViT(TINY.override(reg_tokens=2)).state_dict(), target="acme", config=TINY.override(reg_tokens=2))


# --- round trips


@pytest.mark.parametrize("first", LAYOUTS)
def test_there_and_back_through_every_other_layout(first):
    """first -> ours -> second -> ours -> first, bit for bit; otherwise refused by name, or marked as one way."""
    config = holdable(first)
    state = convert(randomize(vit.ViT(config)).state_dict(), "vit", first, config).state_dict
    stated = config.to_dict()
    outcomes = {}
    for second in LAYOUTS:
        try:
            there = convert(state, first, second, stated)
        except CheckpointError as error:
            assert f"the {second} layout cannot hold " in str(error)
            outcomes[second] = "refused"
            continue
        if there.config.class_position != config.class_position:
            outcomes[second] = "one way"
            assert any("position" in note for note in there.report.notes)
            continue
        back = convert(there.state_dict, second, first, there.config).state_dict
        assert back.keys() == state.keys()
        assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(state.values(), map(back.get, state)))
        outcomes[second] = "equal"
    assert outcomes["vit"] == outcomes[first] == "equal"
    plain = {"timm", "transformers", "transformers_memory", "torchvision", "torchvision_old", "augreg", "big_vision",
             "big_vision_scanned"}  # fmt: skip
    if first in plain:
        assert {name for name in plain if outcomes[name] == "equal"} == plain


def test_one_way_compares_by_outputs():
    """timm's register models have no position for the class token: it is folded into the token."""
    config = TINY.override(num_classes=0, reg_tokens=3, init_values=0.5)
    model = randomize(vit.ViT(config)).eval()
    x = images(2, 3, 32, 32)
    folded = convert(model.state_dict(), "vit", "timm", config)
    assert folded.config == config.override(class_position=False) and len(folded.report.notes) == 1
    assert written_to_them("timm", config) <= FLOAT32
    # and back: a row of zeros for it
    again = convert(folded.state_dict, "timm", "transformers_dinov2_registers", folded.config)
    ours = convert(again.state_dict, config=again.config)
    other = vit.ViT(ours.config).eval()
    other.load_state_dict(ours.state_dict)
    with torch.no_grad():
        assert ours.config.class_position
        assert difference(other.forward_features(x), model.forward_features(x)) <= FLOAT32


def test_a_distillation_tokens_position_is_folded_too():
    config = TINY.override(dist_token=True, num_classes=0, class_position=False, global_pool="dist")
    written = convert(randomize(vit.ViT(config)).state_dict(), config=config, target="deit")
    assert written.state_dict["pos_embed"].shape[1] == 18 and not written.state_dict["pos_embed"][:, :2].any()


# --- tables


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_tables_are_one_to_one(layout):
    theirs = [key for entry in layout.entries for key in entry.theirs]
    assert len(set(theirs)) == len(theirs)
    assert len({entry.ours for entry in layout.entries}) == len(layout.entries)
    known = {split_number(name)[0] for name in vit.ViT(TINY.override(
        dist_token=True, global_pool="dist", reg_tokens=1, init_values=0.1)).state_dict()}  # fmt: skip
    assert {entry.ours for entry in layout.entries} <= known | {"fc_norm.weight", "fc_norm.bias"}
    for entry in layout.entries:  # numbered on both sides or on neither
        assert all(("{}" in key) == ("{}" in entry.ours) for key in entry.theirs)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_transform_has_its_inverse(layout):
    generator = torch.Generator().manual_seed(0)
    shapes = {name: tensor.shape for name, tensor in vit.ViT(holdable(layout)).state_dict().items()}
    for entry in LAYOUTS[layout].entries:
        name = entry.ours.replace("{}", "1")
        if name in shapes:
            value = torch.randn(shapes[name], generator=generator)
            parts = entry.transform.to_theirs(value, 2)
            assert len(parts) == len(entry.theirs) and torch.equal(entry.transform.to_ours(parts, 2), value)


# --- what shapes cannot show


def test_mocos_small_has_twelve_heads():
    """Shapes cannot show it: with 6 heads it loads without an error and is wrong."""
    config = BASE.override(num_classes=0, depth=2, num_heads=12)
    theirs = convert(randomize(vit.ViT(config)).state_dict(), "vit", "moco", config).state_dict
    found = convert(under("module.", theirs)).config
    assert found.num_heads == 12 and found.sources["num_heads"] == "the moco layout's default"
    stated = convert(theirs, config={"num_heads": 6}).config
    assert stated.num_heads == 6 and stated.sources["num_heads"] == "the caller"
    outputs = []
    for heads in (12, 6):
        model = vit.ViT(config.override(num_heads=heads)).eval()
        model.load_state_dict(convert(theirs).state_dict)
        with torch.no_grad():
            outputs.append(model.forward_features(images(1, 3, 64, 64)))
    assert difference(outputs[1], outputs[0]) > 0.1


def test_googles_kernels_tell_the_heads():
    config = TINY.override(num_heads=4)
    state = convert(vit.ViT(config).state_dict(), "vit", "augreg", config).state_dict
    found = convert(state).config
    assert found.num_heads == 4 and found.sources["num_heads"] == "the shapes"
    with pytest.raises(CheckpointError, match="num_heads is declared to be 2, but the weights have 4"):
        convert(state, config={"num_heads": 2})
    for odd in (torch.ones(64, 4, 32), torch.ones(())):
        with pytest.raises(CheckpointError, match="has shape .*, expected"):
            convert(state | {"Transformer/encoderblock_0/MultiHeadDotProductAttention_1/value/kernel": odd})
        with pytest.raises(CheckpointError, match="has shape .*, expected"):
            convert(state | {"Transformer/encoderblock_1/MultiHeadDotProductAttention_1/query/bias": odd})
    state["Transformer/encoderblock_1/MultiHeadDotProductAttention_1/key/kernel"] = torch.ones(128, 8, 16)
    with pytest.raises(CheckpointError, match=r"key/kernel.*has shape \[128, 8, 16\], expected \[128, 4, 32\]"):
        convert(state)


@pytest.mark.parametrize(
    ("layout", "rule"),
    [("timm", "timm"), ("transformers", "transformers"), ("torchvision", "torchvision"), ("augreg", "jax"),
     ("dinov2", "dinov2"), ("transformers_dinov2", "transformers"), ("transformers_dinov2_registers", "timm")],
)  # fmt: skip
def test_a_layout_chooses_the_rule_for_positions(layout, rule):
    state = convert(vit.ViT(holdable(layout)).state_dict(), "vit", layout, holdable(layout)).state_dict
    assert convert(state, config={"num_heads": 2}).config.position_rule == rule
    assert convert(state, config={"num_heads": 2, "position_rule": "jax"}).config.position_rule == "jax"


def test_dinov2s_register_models_antialias():
    config = TINY.override(num_classes=0, init_values=0.5, reg_tokens=2)
    state = convert(vit.ViT(config).state_dict(), "vit", "dinov2", config).state_dict
    found = convert(state).config
    assert found.position_rule == "timm" and found.class_position and found.reg_tokens == 2
    assert DINOV2.naming.drops.keys() >= DINOV2.naming.zeros.keys()


def test_every_field_says_where_it_came_from():
    found = convert(timm_state(), config={"eps": 1e-5}).config
    assert found.sources.keys() == set(vit.ViTConfig.field_names())
    assert found.sources["eps"] == "the caller" and found.sources["depth"] == "the shapes"
    assert found.sources["num_heads"] == "the timm layout's default" == found.sources["gelu"]
    assert found.sources["drop_path_rate"] == "the default"
    assert "eps" not in found.override(eps=1e-6).sources  # no longer what was read


# --- what a target cannot hold


@pytest.mark.parametrize(
    ("changes", "target", "message"),
    [
        ({"reg_tokens": 2}, "torchvision", "cannot hold register_tokens"),
        ({"init_values": 0.1}, "transformers", r"cannot hold blocks.\*.scale1, blocks.\*.scale2"),
        ({"global_pool": "avg"}, "augreg", "cannot hold global_pool 'avg' .it has 'token'"),
        ({"global_pool": "avg", "fc_norm": True}, "transformers", "cannot hold .*fc_norm"),
        ({"gelu": "tanh"}, "torchvision", "cannot hold gelu 'tanh' .it has 'erf'"),
        ({}, "transformers_dinov2", r"cannot hold .*a model without blocks.\*.scale1"),
        ({"init_values": 0.1}, "transformers_dinov2", r"cannot hold global_pool 'token' with a classifier"),
        (
            {"img_size": (32, 64), "num_classes": 0, "init_values": 0.1},
            "transformers_dinov2",
            "positions of 4x8 patches",
        ),
        ({"img_size": (32, 64)}, "torchvision", "positions of 4x8 patches .its grids are square"),
        ({"in_chans": 1}, "torchvision", "cannot hold in_chans 1 .it has 3"),
        ({"dist_token": True, "num_classes": 0}, "transformers_deit_plain", "a model without head.weight"),
        ({}, "dinov2", "cannot hold num_classes 5"),
        ({"dist_token": True, "global_pool": "dist"}, "timm", "cannot hold dist_token True"),
    ],
)
def test_what_a_target_cannot_hold_is_refused_by_name(changes, target, message):
    config = TINY.override(**changes)
    with pytest.raises(CheckpointError, match=message):
        convert(vit.ViT(config).state_dict(), target=target, config=config)
