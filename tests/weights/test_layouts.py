"""The layouts, each against the library that it is from: both ways, to the bit, and refused where it does not fit."""

import re
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoints import TINY
from helpers import FLOAT32, GRADIENT, difference, images, randomize
from layout_cases import BASE, CASES, WRITTEN_ONLY, case_config, read_theirs, written_to_them
from layout_table import as_markdown, rows

import vit
from vit.weights import CheckpointError, convert, detect_layout
from vit.weights.keymap import FUSE, split_number
from vit.weights.layouts import LAYOUTS, google
from vit.weights.layouts.timm import DINOV2

README = Path(__file__).parents[2] / "weights" / "README.md"


def holdable(layout: str) -> vit.ViTConfig:
    """A tiny config that a layout can hold."""
    config = TINY.override(**{name: values[0] for name, values in LAYOUTS[layout].holds.needs.items()})
    if "dinov2" in layout or layout == "deit3":
        config = config.override(init_values=0.5)
    if "transformers_dinov2" in layout:
        config = config.override(global_pool="token_avg")
    if "registers" in layout:
        config = config.override(reg_tokens=3)
    if layout == "deit3":
        config = config.override(class_position=False)
    return config


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
    """Printed at two blocks and a small size; the README has it for the whole ViT-S at 224 x 224."""
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
    """first -> ours -> second -> ours -> first, bit for bit; else refused by name, or marked as one way."""
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


# --- detection


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_are_told_apart(layout):
    state = convert(vit.ViT(holdable(layout)).state_dict(), "vit", layout, holdable(layout)).state_dict
    if layout in ("dino", "mae"):  # without what they were trained with, these are timm's names
        assert detect_layout(state) == "timm"
        return
    found = detect_layout(state)
    assert found == layout and all(marker in found.why for marker in LAYOUTS[layout].detection.markers)
    if layout not in ("moco",):
        wrapped = {f"state_dict.module.{key}": tensor for key, tensor in state.items()}
        if "/" not in next(iter(state)):
            assert detect_layout(wrapped) == layout and detect_layout(wrapped).prefix == "state_dict.module."


def timm_state(**changes: object) -> dict[str, torch.Tensor]:
    return convert(
        randomize(vit.ViT(TINY.override(**changes))).state_dict(), "vit", "timm", TINY.override(**changes)
    ).state_dict


def under(prefix: str, state: dict) -> dict:
    return {prefix + key: tensor for key, tensor in state.items()}


def test_of_two_models_the_better_known_container_counts():
    first, second = timm_state(), {key: tensor + 1 for key, tensor in timm_state().items()}
    for better, worse in (("state_dict_ema.", "state_dict."), ("model_ema.", "model."), ("teacher.", "student.")):
        both = under(worse, second) | under(better, first) | {"epoch": torch.ones(1)}
        converted = convert(both)
        assert torch.equal(converted.state_dict["class_token"], first["cls_token"])
        assert converted.report.prefix == better and "epoch" in converted.report.left
        assert f"{worse}cls_token" in converted.report.left
        note = f"took {better}; {worse} is there too: --prefix {worse} takes that"
        assert converted.report.notes == [note]
        chosen = convert(both, prefix=worse)
        assert chosen.report.notes == []
        assert torch.equal(chosen.state_dict["class_token"], second["cls_token"])


@pytest.mark.parametrize("prefix", ["opt/target/", "params/", "params/img/"])
def test_googles_prefixes(prefix):
    state = convert(vit.ViT(TINY).state_dict(), "vit", "big_vision", TINY).state_dict
    converted = convert(under(prefix, state) | {"opt/state/step": torch.ones(())})
    assert converted.report.source == "big_vision" and converted.report.prefix == prefix
    assert converted.report.left == ["opt/state/step"]


def test_within_the_model_nothing_is_left_over():
    for extra in ("teacher.decoder.weight", "teacher.backbone.extra"):
        state = under("teacher.backbone.", timm_state()) | {extra: torch.ones(2)}
        with pytest.raises(CheckpointError, match=f"unexpected keys: .*{extra.split('.')[-1]}"):
            convert(state)


def test_an_unknown_prefix_is_named_and_can_be_stated():
    state = under("image_tower.trunk.", timm_state()) | {"text.weight": torch.ones(2)}
    with pytest.raises(CheckpointError, match="in the timm layout under 'image_tower.trunk.': state it, prefix="):
        convert(state)
    converted = convert(state, prefix="image_tower.trunk.")
    assert converted.report.left == ["text.weight"] and converted.report.prefix == "image_tower.trunk."
    with pytest.raises(CheckpointError, match="no key begins with the prefix 'nowhere.'; the first keys are image_tow"):
        convert(state, prefix="nowhere.")
    with pytest.raises(CheckpointError, match="did you mean --prefix 'image_tower.trunk.'"):
        convert(state, prefix="trunk.")
    with pytest.raises(CheckpointError, match="no key begins with the prefix 'runk.'; the first keys are"):
        convert(state, prefix="runk.")  # the middle of a name


def test_a_prefix_may_lie_behind_a_wrapper():
    backbone = under("backbone.", timm_state()) | {"decoder.weight": torch.ones(2)}
    for wrapper in ("model.", "state_dict.module."):
        wrapped = under(wrapper, backbone) | {"epoch": torch.ones(1)}
        converted = convert(wrapped, prefix="backbone.")
        assert converted.report.prefix == f"{wrapper}backbone." == f"{wrapper}{detect_layout(backbone).prefix}"
        assert set(converted.report.left) == {f"{wrapper}decoder.weight", "epoch"}
        assert converted.report.steps[0].source == [f"{wrapper}backbone.cls_token"]
        assert detect_layout(wrapped, prefix="backbone.").prefix == f"{wrapper}backbone."
    both = under("model.", backbone) | under("model_ema.", backbone)
    with pytest.raises(CheckpointError, match="did you mean --prefix 'model.backbone.' or --prefix 'model_ema.backb"):
        convert(both, prefix="backbone.")


def test_a_backbone_beside_other_parts_is_pointed_to():
    beside = under("model.backbone.", timm_state()) | {"model.neck.weight": torch.ones(2)}
    with pytest.raises(CheckpointError, match="unexpected keys: model.neck.weight; --prefix 'model.backbone.' takes"):
        convert(beside)
    assert convert(beside, prefix="model.backbone.").report.left == ["model.neck.weight"]
    with pytest.raises(CheckpointError, match="unexpected keys: neck.weight; --prefix 'model.backbone.' takes"):
        convert(beside, prefix="model.")
    with pytest.raises(CheckpointError) as error:  # something is wrong within as well
        convert(beside | {"model.backbone.norm3.bias": torch.ones(2)})
    assert "--prefix" not in str(error.value)


def test_two_layouts_at_once_are_refused():
    both = timm_state() | convert(vit.ViT(TINY).state_dict(), "vit", "torchvision", TINY).state_dict
    with pytest.raises(CheckpointError, match="fit several layouts: timm, torchvision; state which"):
        detect_layout(both)


def test_chunks_of_dinov2():
    """Blocks in chunks, as the large models were trained: blocks.0.0, blocks.0.1, blocks.1.2 ..."""
    config = TINY.override(num_classes=0, init_values=0.5, depth=3)
    plain = convert(randomize(vit.ViT(config)).state_dict(), "vit", "dinov2", config).state_dict
    chunked = {}
    for key, tensor in plain.items():
        template, number = split_number(key)
        chunked[template.replace("{}", f"{int(number or 0) // 2}.{number}")] = tensor
    assert "blocks.1.2.norm1.bias" in chunked
    assert detect_layout(chunked) == detect_layout(under("teacher.backbone.", chunked)) == "dinov2"
    ours = convert(under("teacher.backbone.", chunked) | {"teacher.dino_head.mlp.0.weight": torch.ones(2)})
    assert "projection heads" in ours.report.dropped["teacher.dino_head.mlp.0.weight"]
    assert torch.equal(ours.state_dict["blocks.2.norm1.bias"], plain["blocks.2.norm1.bias"])
    with pytest.raises(CheckpointError, match="are both blocks.2.norm1.bias"):
        convert(chunked | {"blocks.0.2.norm1.bias": torch.ones(128)}, "dinov2", "vit")


REFUSED = {
    "transformer.layers.0.0.to_qkv.weight": "vit-pytorch",
    "visual.class_embedding": "CLIP",
    "vision_model.embeddings.class_embedding": "CLIP",
    "image_encoder.blocks.0.attn.rel_pos_h": "SAM",
    "blocks.0.attn.q_bias": "BEiT",
    "rope_embed.periods": "DINOv3",
}


@pytest.mark.parametrize("before", ["", "model."])
@pytest.mark.parametrize("part", ["patch_embed.backbone.stem.conv.weight", "patch_embeddings.backbone.bit.x"])
def test_hybrids_are_refused_by_name(before, part):
    with pytest.raises(CheckpointError, match=f"{before}{part} belongs to a hybrid with a convolutional stem"):
        convert(under(before, timm_state() | {part: torch.ones(3)}))


@pytest.mark.parametrize("key", REFUSED)
def test_models_that_this_one_cannot_be_are_refused_by_name(key):
    with pytest.raises(CheckpointError, match=f"{key} belongs to .*{REFUSED[key]}.*: it cannot be loaded"):
        convert(timm_state() | {key: torch.ones(3)})


def test_many_models_in_one_file_are_refused_quickly():
    start = time.perf_counter()
    for count, message in ((90, "under 'm0.' and 'm1.' and 'm10.' and 87 more"), (30_000, "more than 100 models")):
        with pytest.raises(CheckpointError, match=message):
            detect_layout([f"m{i}.blocks.0.attn.qkv.weight" for i in range(count)])
    assert time.perf_counter() - start < 10


def test_mocos_batch_norms_do_not_disturb():
    """Dropped keys may hold anything: MoCo's projector counts its batches in int64."""
    config = TINY.override(num_classes=0)
    state = convert(vit.ViT(config).state_dict(), "vit", "moco", config).state_dict
    extra = {
        "base_encoder.head.1.num_batches_tracked": torch.tensor(3),
        "predictor.0.weight": torch.full((2,), torch.nan),
    }
    full = under("state_dict.module.", state | extra)
    assert set(convert(full, config={"num_heads": 2}).report.dropped) == set(extra)
    with pytest.raises(CheckpointError, match="several dtypes"):
        convert(full | {"state_dict.module.base_encoder.norm.bias": torch.ones(128).half()})


@pytest.mark.parametrize("layout", ["dino", "mae", "moco"])
def test_a_stated_layout_needs_no_markers(layout):
    """The backbone alone has timm's names; who knows better states the layout and gets its defaults."""
    state = under("model.", timm_state(num_classes=0, embed_dim=96))
    assert detect_layout(state) == "timm"
    report = convert(state, layout, config={"num_heads": 12}).report
    assert report.source == layout and report.prefix == "model."
    assert report.why.startswith("stated by the caller, and it lacks ")


def test_a_stated_layout_does_not_swallow_a_classifier():
    state = timm_state()
    assert convert(state, "timm").report.why == "stated by the caller"
    lacks = r"do not fit the dino layout \(stated by the caller, and it lacks head.last_layer.weight_v\)"
    with pytest.raises(CheckpointError, match=lacks + ": unexpected keys: head.weight, head.bias"):
        convert(state, "dino")
    moco = under("base_encoder.", state)  # a probe on it
    with pytest.raises(CheckpointError, match="unexpected keys: base_encoder.head.weight, base_encoder.head.bias"):
        convert(moco | {"base_encoder.head.0.weight": torch.ones(2)}, "moco")
    trained = under("teacher.backbone.", timm_state(num_classes=0)) | {
        "teacher.head.mlp.0.weight": torch.ones(2), "teacher.head.last_layer.weight_v": torch.ones(2)
    }  # fmt: skip
    assert len(convert(trained, "dino").report.dropped) == 2


# --- what shapes cannot tell


def test_mocos_small_has_twelve_heads():
    """Shapes cannot tell: with 6 heads it loads without complaint and is wrong."""
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
