"""Detection of layouts and of the wrappers around them."""

import time

import pytest
import torch
from checkpoints import TINY, holdable, timm_state, under
from helpers import randomize

import vit
from vit.weights import CheckpointError, convert, detect_layout
from vit.weights.keymap import split_number
from vit.weights.layouts import LAYOUTS
from vit.weights.verify import convert_file


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


# What is read of two models of the same shapes, and what is not: averages and teachers first, at any depth.
PAIRS = [
    ("state_dict_ema.", "state_dict."),
    ("model_ema.", "model."),
    ("ema.", "model."),
    ("ema_model.module.", "model."),
    ("teacher.", "student."),
    ("teacher.backbone.", "student.module.backbone."),
    ("model.teacher.backbone.", "model.student.backbone."),
    ("state_dict.model.teacher.backbone.", "state_dict.model.student.backbone."),
    ("state_dict.teacher.", "state_dict.model.student."),
    ("state_dict.teacher._orig_mod.", "state_dict.student._orig_mod."),
    ("model_ema.module.student.", "model.teacher."),  # the containers are compared from the outside
    ("state_dict.", "current_model_state."),  # Lightning's WeightAveraging
]


@pytest.mark.parametrize(("better", "worse"), PAIRS)
@pytest.mark.parametrize("layout", [None, "timm"])
def test_of_two_models_the_average_or_the_teacher_is_read(better, worse, layout):
    first, second = timm_state(), {key: tensor + 1 for key, tensor in timm_state().items()}
    both = under(worse, second) | under(better, first) | {"epoch": torch.ones(1)}
    assert detect_layout(both).prefix == detect_layout(list(both)).prefix == better
    converted = convert(both, layout)
    assert torch.equal(converted.state_dict["class_token"], first["cls_token"])
    assert converted.report.prefix == better and {"epoch", f"{worse}cls_token"} <= set(converted.report.left)
    taken = f"took {better!r}, one of 2 models of the same shapes in the file"
    assert converted.report.notes == [f"{taken}; prefix={worse!r} (--prefix on the command line) takes another"]
    chosen = convert(both, layout, prefix=worse)
    assert chosen.report.notes == []
    assert torch.equal(chosen.state_dict["class_token"], second["cls_token"])


def test_the_choice_is_a_warning_and_in_the_provenance(tmp_path):
    both = {"model": {"student": {"backbone": timm_state()}, "teacher": {"backbone": timm_state()}}}
    both["model"]["teacher"]["backbone"]["cls_token"] += 1
    torch.save(both, tmp_path / "c.pth")
    with pytest.warns(UserWarning, match="took 'model.teacher.backbone.', one of 2 .* prefix='model.student") as caught:
        model = vit.load_pretrained(tmp_path / "c.pth")
    assert len(caught) == 1 and model.provenance.part == "model.teacher.backbone."
    assert torch.equal(model.class_token, both["model"]["teacher"]["backbone"]["cls_token"])
    again = vit.load_pretrained(vit.save_checkpoint(model, tmp_path / "m.safetensors"))
    assert again.provenance.part is None and again.provenance.parent == model.provenance
    assert "part" not in again.provenance.to_dict()  # which earlier versions could not read
    with pytest.warns(UserWarning, match="left behind: model"):
        chosen = vit.load_pretrained(tmp_path / "c.pth", prefix="model.student.")
    assert chosen.provenance.part == "model.student.backbone."
    assert torch.equal(chosen.class_token, both["model"]["student"]["backbone"]["cls_token"])


WIDER = {"embed_dim": 192, "num_heads": 3}
REFUSED_PAIRS = {
    # why, the choices -> the models
    ("of different shapes", "student.", "teacher."): ({}, WIDER),  # distillation
    ("of different shapes", "model.student.", "model.teacher."): ({}, {"depth": 3}),
    ("of different shapes", "state_dict.", "teacher."): ({}, {"patch_size": 16}),
    ("of different shapes", "student.", "teacher.module."): ({}, {"num_classes": 7}),
    ("and their names do not tell", "encoder.module.", "target_encoder.module."): ({}, {}),  # I-JEPA
    ("and their names do not tell", "model.", "target_network."): ({}, {}),  # BYOL
    ("and their names do not tell", "encoder_k.", "encoder_q."): ({}, {}),
    ("and their names do not tell", "students.0.", "students.1."): ({}, {}),
    ("and their names do not tell", "discriminator.", "generator."): ({}, WIDER),
    ("and their names do not tell", "backbone.", "module."): ({}, {}),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED_PAIRS)
def test_several_models_are_refused_with_the_choices(case):
    why, a, b = case
    one, two = (timm_state(**changes) for changes in REFUSED_PAIRS[case])
    both = under(a, one) | under(b, two)
    with pytest.raises(CheckpointError, match=f"there are 2 models.* {why}.*: state one, prefix={a!r} or prefix={b!r}"):
        convert(both)
    for prefix, state in ((a, one), (b, two)):
        assert torch.equal(convert(both, prefix=prefix).state_dict["class_token"], state["cls_token"])


def test_a_model_within_another_is_refused_with_the_choices():
    for outer, inner in (("", "teacher."), ("model.", "model.ema."), ("state_dict.backbone.", "state_dict.model.")):
        both = under(outer, timm_state()) | under(inner, timm_state())
        with pytest.raises(CheckpointError, match=f"2 models, one among .* another: state one, .*prefix={inner!r}"):
            convert(both)
        assert convert(both, prefix=inner).report.prefix == inner


def test_choices_within_a_stated_prefix_are_whole():
    both = (
        under("old.", timm_state()) | under("net.student.", timm_state()) | under("net.teacher.", timm_state(depth=1))
    )
    with pytest.raises(CheckpointError, match="prefix='net.student.' or prefix='net.teacher.' "):
        convert(both, prefix="net.")


def test_what_only_resembles_a_second_model_is_no_choice():
    """A decoder, a text tower, the moments of an optimizer, a teacher that lacks only the classifier."""
    state = timm_state()
    blocks = {key: tensor for key, tensor in state.items() if key.startswith("blocks.")}
    for beside in (
        under("decoder.", blocks),
        under("optimizer.state.exp_avg.", state),
        under("optimizer_state_dict.exp_avg.", state) | under("optimizer_state_dict.exp_avg_sq.", state),
        under("optim_state_dict.exp_avg.", state),
        under("optim.exp_avg.", state) | under("adam.exp_avg.", state) | under("adamw_state.exp_avg.", state),
        under("text.", blocks | {"pos_embed": torch.ones(1, 77, 128)}),
    ):
        for outer in ("", "state_dict."):
            converted = convert(under(outer, under("model.", state) | beside))
            assert converted.report.notes == [] and converted.report.prefix == f"{outer}model."
    moments = convert(vit.ViT(TINY).state_dict(), "vit", "big_vision", TINY).state_dict
    assert convert(under("params/", moments) | under("opt/0/mu/", moments)).report.prefix == "params/"
    bare = {key: tensor for key, tensor in state.items() if not key.startswith("head")}
    assert convert(under("student.", state) | under("teacher.backbone.", bare)).report.prefix == "teacher.backbone."


def without(name: str) -> dict:
    return {key: tensor for key, tensor in timm_state().items() if key != name}


def renamed(old: str, new: str) -> dict:
    return {key.replace(old, new): tensor for key, tensor in timm_state().items()}


UNREADABLE = {  # a moving average: of the trained parameters alone, with a projection head, with LoRA, reparametrized
    "without positions": without("pos_embed"),
    "without a class token": without("cls_token"),
    "with more": timm_state() | {"head.mlp.0.weight": torch.ones(3, 3)},
    "LoRA": renamed("qkv.weight", "qkv.base_layer.weight"),
    "LoRA of a part": under("base_model.model.", renamed("qkv.weight", "qkv.base_layer.weight")),
    "reparametrized": renamed("qkv.weight", "qkv.parametrizations.weight.original"),
    "in a wrapper": under("module.backbone.", without("pos_embed")),
    "the last block": {key: tensor for key, tensor in timm_state().items() if key.startswith("blocks.1.")},
}


@pytest.mark.parametrize("case", UNREADABLE)
@pytest.mark.parametrize(("better", "worse"), [("model_ema.", "model."), ("teacher.", "student.")])
def test_a_better_model_that_cannot_be_read_is_not_passed_over(better, worse, case):
    state = timm_state()
    both = under(worse, state) | under(better, UNREADABLE[case])
    with pytest.raises(CheckpointError, match=f"'{better}.* comes before '{worse}'.*one, prefix='{worse}' or prefix="):
        convert(both)
    assert torch.equal(convert(both, prefix=worse).state_dict["class_token"], state["cls_token"])
    with pytest.raises(CheckpointError):
        convert(both, prefix=better)
    swapped = under(better, state) | under(worse, UNREADABLE[case])  # what is left out comes after what is read
    assert convert(swapped).report.prefix == better


@pytest.mark.parametrize("better", ["model_ema", "ema.module"])
def test_a_better_model_that_is_an_object_is_not_passed_over(better, tmp_path):
    state, network = timm_state(), torch.nn.Linear(2, 2)
    outer, _, inner = better.partition(".")
    torch.save({"model": state, outer: {inner: network} if inner else network}, tmp_path / "c.pth")
    with (
        pytest.warns(UserWarning, match=f"the tensors within {better}, which is Linear, are not read"),
        pytest.raises(CheckpointError, match=f"'{better}.' comes before 'model.'.*: state one, prefix='model.' "),
    ):
        vit.load_pretrained(tmp_path / "c.pth")
    with pytest.warns(UserWarning, match="left behind"):
        model = vit.load_pretrained(tmp_path / "c.pth", prefix="model.")
    assert torch.equal(model.class_token, state["cls_token"])


def test_numbers_and_texts_in_the_place_of_a_better_model_are_none(tmp_path):
    torch.save({"model": timm_state(), "model_ema": None, "ema": 0.99, "teacher": "deit_base"}, tmp_path / "c.pth")
    assert vit.load_pretrained(tmp_path / "c.pth").provenance.part is None


def test_an_averaged_model_counts_its_averages():
    """torch.optim.swa_utils.AveragedModel, by itself and beside the model."""
    network = vit.ViT(TINY)
    averaged = torch.optim.swa_utils.AveragedModel(network).state_dict()
    converted = convert(averaged, config=TINY)
    assert list(converted.report.dropped) == ["n_averaged"] and converted.report.prefix == "module."
    both = under("swa_model.", averaged) | under("model.", network.state_dict())
    assert convert(both, config=TINY).report.prefix == "swa_model.module."


@pytest.mark.parametrize("wrapper", ["ema.", "ema.module.", "ema_state_dict.module.backbone."])
@pytest.mark.parametrize("name", ["num_updates", "updates", "steps", "step", "initted", "decay"])
def test_what_keeps_moving_averages_counts(name, wrapper, tmp_path):
    state, container = timm_state(), wrapper.partition(".")[0]
    for value in (torch.tensor(3), 0.99):
        for front in {f"{container}.", wrapper}:
            both = under("student.", state) | under(wrapper, state) | {f"{front}{name}": value}
            torch.save(both, tmp_path / "c.pth")
            report = convert_file(tmp_path / "c.pth", tmp_path / "m.safetensors", "vit")
            assert set(report["dropped"]) == {f"{front}{name}"} and f"took {wrapper!r}" in report["notes"][0]
    with pytest.raises(CheckpointError, match=f"unexpected keys: {name}.bias"):
        convert(under(wrapper, state | {f"{name}.bias": torch.ones(2)}))


def test_numbers_and_texts_beside_the_model_are_dropped_and_objects_are_not(tmp_path):
    content = {"backbone": timm_state(num_classes=0), "momentum": 0.9, "name": "x", "next": None}
    torch.save({"ema": content}, tmp_path / "c.pth")
    report = convert_file(tmp_path / "c.pth", tmp_path / "m.safetensors", "vit")
    assert report["dropped"] == {
        f"ema.{name}": f"beside the model, and not a tensor but of type {kind}"
        for name, kind in (("momentum", "float"), ("name", "str"), ("next", "NoneType"))
    }
    torch.save({"ema": content | {"head": torch.nn.Linear(2, 2)}}, tmp_path / "c.pth")
    with pytest.warns(UserWarning, match="are not read"), pytest.raises(CheckpointError, match="keys: ema.head"):
        vit.load_pretrained(tmp_path / "c.pth")


@pytest.mark.parametrize("last", ["weight_v", "parametrizations.weight.original1"])  # by an old torch, by a newer
def test_the_heads_of_dino_and_ibot_are_beside_the_backbone(last):
    backbone, head = timm_state(num_classes=0), {"mlp.0.weight": torch.ones(2), f"last_layer.{last}": torch.ones(2)}
    student = under("student.module.", under("backbone.", backbone) | under("head.", head))
    assert convert(student).report.source == "dino"
    teacher = under("teacher.", under("backbone.", backbone) | under("head.", head))
    converted = convert(student | teacher).report
    assert converted.source == "dino" and converted.prefix == "teacher." and len(converted.dropped) == 2


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
    for count, message in ((90, "there are 90 models.* or prefix='m15.' or one of 82 more"), (30_000, "more than 100")):
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
    """The backbone alone has timm's names; a caller who states the layout gets its defaults."""
    state = under("model.", timm_state(num_classes=0, embed_dim=96))
    assert detect_layout(state) == "timm"
    report = convert(state, layout, config={"num_heads": 12}).report
    assert report.source == layout and report.prefix == "model."
    assert report.why.startswith("stated by the caller, and it lacks ")


def test_a_stated_layout_does_not_swallow_a_classifier():
    state = timm_state()
    assert convert(state, "timm").report.why == "stated by the caller"
    lacks = r"do not fit the dino layout \(stated by the caller, and it lacks head.last_layer.\)"
    with pytest.raises(CheckpointError, match=lacks + ": unexpected keys: head.weight, head.bias"):
        convert(state, "dino")
    moco = under("base_encoder.", state)  # a probe on it
    with pytest.raises(CheckpointError, match="unexpected keys: base_encoder.head.weight, base_encoder.head.bias"):
        convert(moco | {"base_encoder.head.0.weight": torch.ones(2)}, "moco")
    trained = under("teacher.backbone.", timm_state(num_classes=0)) | {
        "teacher.head.mlp.0.weight": torch.ones(2), "teacher.head.last_layer.weight_v": torch.ones(2)
    }  # fmt: skip
    assert len(convert(trained, "dino").report.dropped) == 2
