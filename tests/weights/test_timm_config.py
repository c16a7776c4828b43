"""timm's files, both ways."""

import json

import pytest
import timm
import torch
from checkpoints import CONFIG, TINY, same
from helpers import FLOAT32, difference, images, randomize
from hub_server import COMMIT, HubServer
from PIL import Image
from skimage import data

import vit
from vit.image import create_transform
from vit.presets import NAMED_MODELS
from vit.resources import imagenet_categories
from vit.weights import CheckpointError
from vit.weights.hub import download


def test_a_timm_repository_as_timm_writes_it(tmp_path):
    twin = randomize(timm.create_model("vit_small_patch32_224", num_classes=11, in_chans=3))
    timm.models.save_for_hf(twin, tmp_path, safe_serialization=True, model_config={"label_names": list("abcdefghijk")})
    model = vit.load_pretrained(tmp_path)
    assert model.config == NAMED_MODELS["vit_small_patch32_224"].config.override(num_classes=11)
    assert model.categories == list("abcdefghijk")
    assert model.provenance.license == "apache-2.0"
    assert model.preprocessing.crop_pct == 0.9
    twin.eval()
    with torch.no_grad():
        x = images(1, 3, 224, 224)
        assert difference(model(x), twin(x)) < 1e-5


def test_a_timm_repository_with_only_a_pickle(tmp_path, monkeypatch):
    """As timm before safetensors wrote them: on the Hub, the same as in a folder."""
    twin = randomize(timm.create_model("vit_small_patch32_224", num_classes=11, depth=1))
    timm.models.save_for_hf(twin, tmp_path / "a", safe_serialization=False, model_args={"depth": 1})
    content = {file.name: file.read_bytes() for file in (tmp_path / "a").iterdir()}
    assert content.keys() == {"config.json", "pytorch_model.bin"}
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with HubServer("org/vit", {COMMIT: content}, {"main": COMMIT}) as hub:
        files = download("org/vit", endpoint=hub.endpoint, cache_dir=tmp_path / "cache")
    assert files.weights.name == "pytorch_model.bin" and files.sha256 is not None
    monkeypatch.setattr("vit.weights.source.download", lambda repo, revision: files)
    model, local = vit.load_pretrained("hf-hub:org/vit"), vit.load_pretrained(tmp_path / "a")
    assert same(model, local) and model.config == local.config and model.preprocessing == local.preprocessing
    assert torch.equal(model.head.weight, twin.head.weight)


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        CONFIG.override(init_values=None, reg_tokens=3, class_position=False),
        CONFIG.override(global_pool="avg", gelu="tanh", in_chans=1, num_heads=2),
        CONFIG.override(num_classes=0, img_size=(16, 72)),
    ],
)
def test_timm_loads_what_we_write(tmp_path, config):
    model = randomize(vit.ViT(config)).eval()
    settings = vit.Preprocessing(config.img_size, crop_pct=0.8, interpolation="bilinear")
    model.preprocessing = settings.with_channels(config.in_chans)
    file = vit.save_checkpoint(model, tmp_path / "out", layout="timm")
    assert file == tmp_path / "out" / "model.safetensors"
    twin = timm.create_model(f"local-dir:{file.parent}", pretrained=True).eval()
    with torch.no_grad():
        x = images(2, config.in_chans, *config.img_size)
        assert difference(model(x), twin(x)) < 1e-5
    settings = timm.data.resolve_model_data_config(twin)
    assert settings["crop_pct"] == 0.8 and settings["interpolation"] == "bilinear"
    assert settings["input_size"] == (config.in_chans, *config.img_size)
    again = vit.load_pretrained(file.parent)
    assert same(model, again) and again.config == config and again.preprocessing == model.preprocessing


def test_what_timm_cannot_hold_is_refused_and_nothing_is_written(tmp_path):
    for config, message in (
        (CONFIG.override(eps=1e-12), r"timm's config.json cannot hold eps 1e-12: .*\(--set eps=1e-6, or eps=1e-6 in"),
        (CONFIG.override(global_pool="token_avg"), "timm layout cannot hold global_pool 'token_avg'"),
        (CONFIG.override(dist_token=True), r"timm layout cannot hold dist_token True .*, dist_token"),
    ):
        with pytest.raises(CheckpointError, match=message):
            vit.save_checkpoint(vit.ViT(config), tmp_path / "new", layout="timm")
    assert list(tmp_path.iterdir()) == []


BAD_CONFIGS = {
    "is not JSON": "{",
    "is not timm's config.json: it has no 'architecture'": '{"pretrained_cfg": {}}',
    "the architecture 'resnet50' is not one of timm's plain ViTs": '{"architecture": "resnet50", "pretrained_cfg": {}}',
    "timm's argument qk_norm=True is not supported": '{"architecture": "X", "model_args": {"qk_norm": true}}',
    "crop_mode 'border', expected 'center'": (
        '{"architecture": "X", "pretrained_cfg": {"input_size": [3, 224, 224], "mean": [0.5], "crop_mode": "border"}}'
    ),
    "num_classes is declared to be 7, but the weights have 1000": (
        '{"architecture": "X", "num_classes": 7, "model_args": {"depth": 2}}'
    ),
    "config.json cannot be used: TypeError: cannot unpack non-iterable int": (
        '{"architecture": "X", "pretrained_cfg": {"input_size": 224}}'
    ),
    "label_names must name each of the 1000 classes": (
        '{"architecture": "X", "num_classes": 1000, "label_names": ["a"], "model_args": {"depth": 2}}'
    ),
    "config.json cannot be used: AttributeError": '{"architecture": "X", "model_args": 3}',
    "in_chans is declared to be 1, but": '{"architecture": "X", "pretrained_cfg": {"input_size": [1, 224, 224]}}',
}


@pytest.mark.parametrize("message", BAD_CONFIGS)
def test_bad_configs(timm_file, message):
    beside = timm_file.parent / "config.json"
    beside.write_text('{"architecture": "vit_small_patch16_224", "model_args": {"depth": 2}}')
    vit.load_pretrained(timm_file)
    beside.write_text(BAD_CONFIGS[message].replace("X", "vit_small_patch16_224"))
    with pytest.raises(CheckpointError, match=message):
        vit.load_pretrained(timm_file)


def test_imagenet_names_are_those_of_timm():
    from timm.data import ImageNetInfo

    info = ImageNetInfo()
    assert imagenet_categories() == [info.index_to_description(i) for i in range(1000)]
    assert vit.resources.imagenet_synsets() == info.label_names()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "is not JSON"),
        ('{"a": ' + "9" * 5000 + "}", "is not JSON"),
        ('{"architecture": "X", "pretrained_cfg": {"mean": [1' + "0" * 400 + "]}}", "must be a finite number"),
        ('{"architecture": "X", "model_args": {"act_layer": []}}', r"timm's argument act_layer=\[\] is not supported"),
        ('{"architecture": "X", "pretrained_cfg": {"input_size": [-1, 2, 3]}}', "whole number of at least 1, not -1"),
        ('{"architecture": "X", "pretrained_cfg": 3}', "config.json cannot be used: TypeError"),
    ],
)
def test_hostile_configs(timm_file, text, message):
    (timm_file.parent / "config.json").write_text(text.replace("X", "vit_small_patch16_224"))
    with pytest.raises(CheckpointError, match=message):
        vit.load_pretrained(timm_file)


def test_what_a_config_leaves_out_is_what_timm_takes(timm_file):
    text = '{"architecture": "vit_small_patch16_224", "model_args": {"depth": 2}, "pretrained_cfg": {"crop_pct": 0.7}}'
    (timm_file.parent / "config.json").write_text(text)
    expected = timm.data.resolve_data_config(pretrained_cfg={"crop_pct": 0.7, "input_size": (3, 224, 224)})
    found = vit.load_pretrained(timm_file).preprocessing
    assert (found.mean, found.std, found.interpolation) == tuple(expected[k] for k in ("mean", "std", "interpolation"))
    assert found.crop_pct == 0.7 and found.size == expected["input_size"][1:]


def test_label_descriptions_are_the_names(timm_file):
    names = [f"n{i}" for i in range(1000)]
    content = {
        "architecture": "vit_small_patch16_224",
        "model_args": {"depth": 2},
        "num_classes": 1000,
        "label_names": names,
        "label_descriptions": {"n1": "goldfish"},
    }
    (timm_file.parent / "config.json").write_text(json.dumps(content))
    assert vit.load_pretrained(timm_file).categories == ["n0", "goldfish", *names[2:]]


@torch.no_grad()
@pytest.mark.parametrize("layout", ["timm", "deit"])
@pytest.mark.parametrize("changes", [{"size": 48}, {"size": (24, 48), "crop_pct": 0.7}, {"size": 64, "mode": "squash"}])
def test_timm_prepares_the_size_that_the_model_does(layout, changes, tmp_path):
    """Not that of the stored positions: `size=` at loading is kept."""
    config = TINY.override(dist_token=True, global_pool="dist") if layout == "deit" else TINY
    vit.save_checkpoint(randomize(vit.ViT(config)), tmp_path / "vit.safetensors")
    ours = vit.load_pretrained(tmp_path / "vit.safetensors", **changes)
    vit.save_checkpoint(ours, tmp_path / "timm", layout=layout)
    theirs = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    settings = timm.data.resolve_model_data_config(theirs)
    picture = Image.fromarray(data.chelsea())
    prepared = timm.data.create_transform(**settings)(picture)[None]
    assert torch.equal(prepared, vit.create_transform(ours)(picture)[None])
    assert prepared.shape[-2:] == ours.preprocessing.size != ours.config.img_size
    assert difference(ours(prepared), theirs(prepared)) <= FLOAT32
    again = vit.load_pretrained(tmp_path / "timm")
    assert again.config == ours.config and create_transform(again) == create_transform(ours)
    again.preprocessing = vit.Preprocessing(config.img_size)  # at its own size, timm's model takes no other
    vit.save_checkpoint(again, tmp_path / "same", layout=layout)
    assert not timm.create_model(f"local-dir:{tmp_path / 'same'}", pretrained=True).dynamic_img_size


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
