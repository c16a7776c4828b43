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
    """The backbone alone has timm's names; a caller who states the layout gets its defaults."""
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
