"""transformers' files, both ways."""

import json
from dataclasses import replace

import pytest
import torch
import transformers
from checkpoints import TINY, same
from helpers import FLOAT32, difference, images, randomize
from hub_server import COMMIT, HubServer
from layout_cases import _transformers
from PIL import Image
from safetensors.torch import load_file
from skimage import data

import vit
from vit.image import create_transform
from vit.weights import CheckpointError
from vit.weights.hub import download

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
    assert files.sha256 == model.provenance.sha256
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
        {"do_normalize": 0},
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
    settings = json.loads(file.read_text())
    file.write_text(json.dumps({**settings, "do_normalize": False}))
    assert vit.load_pretrained(tmp_path).preprocessing.std == (1.0, 1.0, 1.0)
    file.write_text(json.dumps({**settings, "size": 32, "do_center_crop": False}))
    vit.load_pretrained(tmp_path)  # sound before the change
    file.write_text(json.dumps({**settings, "size": 32, "do_center_crop": False, **change}))
    with pytest.raises(CheckpointError, match="preprocessor_config.json(: do_| cannot be used)"):
        vit.load_pretrained(tmp_path)


def test_labels_of_a_model_without_a_head(tmp_path):
    theirs, _ = _transformers("ViTModel", add_pooling_layer=False)(TINY.override(num_classes=0))
    theirs.config.id2label = {0: "a", 1: "b"}
    theirs.save_pretrained(tmp_path)
    assert vit.load_pretrained(tmp_path).categories is None
