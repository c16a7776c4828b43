"""Checkpoints in and out: to the bit, completely or not at all."""

import hashlib
import json
import math
import struct
import time
from dataclasses import asdict

import pytest
import timm
import torch
from helpers import difference, images, ours_from, randomize, timm_twin
from safetensors.torch import load_file, save_file
from timm.models._manipulate import adapt_input_conv

import vit
from vit.config import ViTConfig
from vit.presets import NAMED_MODELS
from vit.resources import imagenet_categories
from vit.weights import CheckpointError

CONFIG = ViTConfig(img_size=(32, 48), patch_size=8, embed_dim=64, depth=2, num_heads=1, num_classes=7, init_values=0.5)
SMALL = NAMED_MODELS["vit_small_patch16_224"].config.override(depth=2)


@pytest.fixture
def model() -> vit.ViT:
    return randomize(vit.ViT(CONFIG)).eval()


@pytest.fixture
def timm_file(tmp_path):
    """A bare state dict of timm's, as people save it: no header, no config.json."""
    path = tmp_path / "plain" / "model.safetensors"
    path.parent.mkdir()
    save_file(timm_twin(SMALL).state_dict(), path)
    return path


def same(a: vit.ViT, b: vit.ViT) -> bool:
    one, two = a.state_dict(), b.state_dict()
    return one.keys() == two.keys() and all(
        one[name].dtype == two[name].dtype and torch.equal(one[name], two[name]) for name in one
    )


def test_timm_to_ours_and_back_is_the_same_state_dict():
    theirs = timm_twin(CONFIG).state_dict()
    ours = vit.weights.convert(theirs, config=CONFIG)
    back = vit.weights.convert(ours.state_dict, target="timm", config=CONFIG)
    assert ours.report.source == "timm" and back.report.source == "vit"
    assert back.state_dict.keys() == theirs.keys()
    assert all(back.state_dict[name] is theirs[name] for name in theirs)  # renamed, neither copied nor changed
    steps = {step.ours: step for step in ours.report.steps}
    assert steps["blocks.1.attention.qkv.weight"].source == ["blocks.1.attn.qkv.weight"]
    assert not any(step.transforms for step in ours.report.steps)


@pytest.mark.parametrize("name", sorted(NAMED_MODELS))
def test_configs_are_read_from_shapes(name):
    config = NAMED_MODELS[name].config
    with torch.device("meta"):
        tensors = vit.ViT(config).state_dict()
    tensors = {name: torch.zeros(1).expand(tensor.shape) for name, tensor in tensors.items()}
    declared = {"num_heads": config.num_heads}
    found = vit.weights.convert(tensors, config=declared).config
    assert found == config.override(init_values=found.init_values)
    assert (found.init_values is None) == (config.init_values is None)


def test_a_bare_timm_file(timm_file):
    model = vit.load_pretrained(timm_file)
    twin = timm_twin(SMALL)
    assert not model.training and model.config == SMALL
    assert model.preprocessing == vit.Preprocessing()
    assert model.categories[:1] == ["tench, Tinca tinca"] and len(model.categories) == 1000
    assert model.provenance.source == str(timm_file) and model.provenance.layout == "timm"
    assert model.provenance.sha256 == hashlib.sha256(timm_file.read_bytes()).hexdigest()
    with torch.no_grad():
        x = images(1, 3, 112, 80)
        assert difference(model(x), twin(x)) < 1e-5


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_our_files_come_back_to_the_bit(tmp_path, model, dtype):
    model.to(dtype)
    model.preprocessing = vit.Preprocessing((32, 48), (0.1, 0.2, 0.3), (0.7, 0.8, 0.9), "lanczos", 0.75)
    model.categories = ["ä", "b", "c", "d", "e", "f", 'g "quoted"']
    model.provenance = vit.Provenance("somewhere", "0" * 64, "timm", "abc", "apache-2.0")
    again = vit.load_pretrained(vit.save_checkpoint(model, tmp_path / "m.safetensors"))
    assert same(model, again)
    assert again.config == model.config and again.preprocessing == model.preprocessing
    assert again.categories == model.categories
    assert again.provenance.parent == model.provenance and again.provenance.layout == "vit"
    assert again.provenance.license == "apache-2.0"
    second = vit.load_pretrained(vit.save_checkpoint(again, tmp_path / "m.safetensors"))
    assert same(model, second) and second.provenance.parent == again.provenance


def test_saving_keeps_the_old_file_when_writing_fails(tmp_path, model, monkeypatch):
    path = vit.save_checkpoint(model, tmp_path / "m.safetensors")
    before = path.read_bytes()

    def full_disk(path, tensors, metadata):
        path.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr("vit.weights.save.write_safetensors", full_disk)
    with pytest.raises(OSError, match="no space left"):
        vit.save_checkpoint(model, path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_the_file_may_change_after_loading(tmp_path, model):
    path = vit.save_checkpoint(model, tmp_path / "m.safetensors")
    again = vit.load_pretrained(path)
    path.write_bytes(b"\0" * path.stat().st_size)
    assert same(model, again)


def test_the_bundled_checkpoint():
    model = vit.load_pretrained("vit_digits_patch4_32")
    assert model.config == NAMED_MODELS["vit_digits_patch4_32"].config
    assert model.categories == list("0123456789")
    assert model.provenance.layout == "timm"


def test_a_new_head_says_so(timm_file):
    with pytest.warns(UserWarning, match="head for 1000 classes is replaced by a new one for 5 with random weights"):
        model = vit.load_pretrained(timm_file, num_classes=5)
    assert model.head.weight.shape == (5, 384) and model.config.num_classes == 5 and model.categories is None
    with pytest.warns(UserWarning, match="is replaced by none"):
        model = vit.load_pretrained(timm_file, num_classes=0)
    assert not model.training and model(images(1, 3, 32, 32)).shape == (1, 384)
    assert vit.load_pretrained(timm_file, num_classes=1000).categories is not None  # no warning: nothing is replaced


def test_a_head_for_imagenet_21k_loads_as_it_is(tmp_path):
    config = SMALL.override(depth=1, num_classes=21_843)
    twin = timm_twin(config)
    extra = {"pre_logits.fc.weight": torch.ones(3), "pre_logits.fc.bias": torch.ones(3)}
    save_file(twin.state_dict() | extra, tmp_path / "m.safetensors")
    model = vit.load_pretrained(tmp_path / "m.safetensors")
    assert model.config.num_classes == 21_843 and model.categories is None
    report = vit.weights.convert(twin.state_dict() | extra).report
    assert set(report.dropped) == set(extra) and "representation layer" in report.dropped["pre_logits.fc.bias"]


@pytest.mark.parametrize("channels", [1, 2, 4, 7])
def test_other_channels_are_adapted_as_timm_adapts_them(timm_file, channels):
    model = vit.load_pretrained(timm_file, in_chans=channels)
    original = load_file(timm_file)["patch_embed.proj.weight"]
    assert torch.equal(model.patch_embed.proj.weight, adapt_input_conv(channels, original))
    assert len(model.preprocessing.mean) == channels
    assert model(images(1, channels, 32, 32)).shape == (1, 1000)
    if channels == 1:
        grey = images(1, 1, 32, 32)
        rgb = vit.load_pretrained(timm_file)(grey.expand(-1, 3, -1, -1))
        assert difference(model(grey), rgb) < 1e-5


def test_only_three_channels_can_be_adapted(tmp_path):
    path = vit.save_checkpoint(vit.ViT(CONFIG.override(in_chans=5)), tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match="in_chans=4: only 3 channels can be adapted, the checkpoint has 5"):
        vit.load_pretrained(path, in_chans=4)


def test_overrides(timm_file):
    model = vit.load_pretrained(timm_file, num_heads=12, eps=1e-5, drop_path_rate=0.1, dtype=torch.bfloat16)
    assert (model.config.num_heads, model.config.eps, model.config.drop_path_rate) == (12, 1e-5, 0.1)
    assert model.head.weight.dtype == torch.bfloat16
    assert vit.load_pretrained(timm_file, dtype="bfloat16").head.weight.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="unknown config field 'num_head'. Did you mean 'num_heads'"):
        vit.load_pretrained(timm_file, num_head=12)
    with pytest.raises(CheckpointError, match="embed_dim is declared to be 192, but the weights have 384"):
        vit.load_pretrained(timm_file, embed_dim=192)
    with pytest.raises(CheckpointError, match="declared as None, the weights have LayerScale"):
        vit.weights.convert(vit.ViT(CONFIG).state_dict(), config={"init_values": None, "num_heads": 1})


# Damage to a state dict of timm's -> the error that names it
BAD_TENSORS = {
    "missing keys: blocks.1.norm2.bias": lambda sd: sd.pop("blocks.1.norm2.bias"),
    "missing keys: pos_embed": lambda sd: sd.pop("pos_embed"),
    "missing keys: head.bias": lambda sd: sd.pop("head.bias"),
    "unexpected keys: attn_pool.weight, norm3.bias": lambda sd: sd.update(
        {"attn_pool.weight": torch.ones(64), "norm3.bias": torch.ones(64)}
    ),
    "unexpected keys: norm.(weight|bias), norm": lambda sd: sd.update(
        {"fc_norm.weight": torch.ones(64), "fc_norm.bias": torch.ones(64)}
    ),
    "norm_pre.weight belongs to a ViT with a norm before its blocks": lambda sd: sd.update(
        {"norm_pre.weight": torch.ones(64)}
    ),
    r"missing keys: .*blocks.1.norm1.weight.*unexpected keys: .*blocks.7.norm1.weight": lambda sd: [
        sd.update({key.replace("blocks.1.", "blocks.7."): sd.pop(key)}) for key in list(sd) if "blocks.1." in key
    ],
    "unexpected keys: blocks.01.norm1.weight": lambda sd: sd.update({"blocks.01.norm1.weight": torch.ones(64)}),
    r"wrong shapes: norm.bias \[63\], expected \[64\]": lambda sd: sd.update({"norm.bias": torch.ones(63)}),
    r"wrong shapes: blocks.0.attn.qkv.weight \[64, 192\], expected \[192, 64\]": lambda sd: sd.update(
        {"blocks.0.attn.qkv.weight": sd["blocks.0.attn.qkv.weight"].T.contiguous()}
    ),
    "blocks.0.mlp.fc2.bias holds values that are not finite": lambda sd: sd["blocks.0.mlp.fc2.bias"][3].fill_(math.nan),
    "head.weight holds values that are not finite": lambda sd: sd["head.weight"][0, 0].fill_(-math.inf),
    "norm.weight has dtype torch.int64, expected one of": lambda sd: sd.update(
        {"norm.weight": torch.ones(64, dtype=torch.int64)}
    ),
    r"several dtypes, expected one: torch.float32 \(.*\), torch.float16 \(norm.weight\)": lambda sd: sd.update(
        {"norm.weight": torch.ones(64, dtype=torch.float16)}
    ),
    "position_embedding has 26 rows, which does not fit img_size": lambda sd: sd.update(
        {"pos_embed": torch.ones(1, 26, 64)}
    ),
    "position_embedding has shape .*, expected 3 dimensions": lambda sd: sd.update({"pos_embed": torch.ones(25, 64)}),
    "unknown layout: the nearest is timm, which has the keys blocks.0": lambda sd: sd.pop("blocks.0.attn.qkv.weight"),
    "fit several layouts: timm, vit": lambda sd: sd.update({"blocks.0.attention.qkv.weight": torch.ones(192, 64)}),
}


@pytest.mark.parametrize("message", BAD_TENSORS)
def test_a_checkpoint_maps_completely_or_not_at_all(message, tmp_path):
    state_dict = {name: tensor.clone() for name, tensor in timm_twin(CONFIG).state_dict().items()}
    known = {"num_heads": 1, "img_size": (32, 48)}
    vit.weights.convert(state_dict, config=known)  # it is sound before
    BAD_TENSORS[message](state_dict)
    with pytest.raises(CheckpointError, match=message):
        vit.weights.convert(state_dict, config=known)
    save_file(state_dict, tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match="m.safetensors: .*" + message):
        vit.load_pretrained(tmp_path / "m.safetensors", **known)


def test_an_error_lists_every_problem():
    state_dict = timm_twin(CONFIG).state_dict()
    state_dict["stranger"] = state_dict.pop("norm.bias")
    state_dict["head.bias"] = torch.ones(3)
    with pytest.raises(CheckpointError) as error:
        vit.weights.convert(state_dict, config=CONFIG)
    for part in ("missing keys: norm.bias", "unexpected keys: stranger", "wrong shapes: head.bias [3], expected [7]"):
        assert part in str(error.value)


def test_what_shapes_cannot_tell_is_asked_for():
    square = timm_twin(CONFIG.override(img_size=32)).state_dict()
    assert vit.weights.convert(square).config.num_heads == 1  # 64 wide
    wide = timm_twin(CONFIG.override(embed_dim=96, num_heads=3)).state_dict()
    with pytest.raises(CheckpointError, match="the number of heads is not known for the width 96: state num_heads"):
        vit.weights.convert(wide)
    with pytest.raises(CheckpointError, match=r"25 rows, which do not make a square grid: state img_size="):
        vit.weights.convert(timm_twin(CONFIG.override(init_values=None)).state_dict())
    registers = CONFIG.override(img_size=40, reg_tokens=2, class_position=False)
    assert vit.weights.convert(timm_twin(registers).state_dict()).config.img_size == (40, 40)
    no_row = timm_twin(CONFIG.override(img_size=40, class_position=False)).state_dict()
    assert not vit.weights.convert(no_row, config={"img_size": (40, 40)}).config.class_position


def header(path, change):
    """Rewrite the header of a safetensors file."""
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    content = json.loads(data[8 : 8 + length])
    change(content)
    content["__metadata__"].pop("vit.seal", None)  # which would give the change away
    text = json.dumps(content).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def change_part(key, change):
    def rewrite(content):
        part = json.loads(content["__metadata__"][key])
        content["__metadata__"][key] = json.dumps(change(part))

    return rewrite


BAD_FILES = {
    "not a complete safetensors file": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "not a complete safetensors file: .*": lambda path: path.write_bytes(b""),
    "not a complete safetensors file: .*[hH]eader": lambda path: torch.save({"a": torch.ones(3)}, path),
    "not a complete safetensors file:": lambda path: path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:]),
    "unknown config field 'num_headz'": lambda path: header(
        path, change_part("vit.config", lambda c: c | {"num_headz": 3})
    ),
    "num_heads must be a whole number": lambda path: header(
        path, change_part("vit.config", lambda c: c | {"num_heads": "3"})
    ),
    "depth is declared to be 3, but the weights have 2": lambda path: header(
        path, change_part("vit.config", lambda c: c | {"depth": 3})
    ),
    "the file's header cannot be used: dictionary update": lambda path: header(path, change_part("vit.config", list)),
    "the file's header cannot be used: TypeError": lambda path: header(
        path, lambda c: c["__metadata__"].update({"vit.assumed": '{"eps": 1}'})
    ),
    "the file's header cannot be used: Expecting property name": lambda path: header(
        path, lambda c: c["__metadata__"].update({"vit.config": "{"})
    ),
    "the file's header cannot be used: std must be above 0": lambda path: header(
        path, change_part("vit.preprocessing", lambda c: c | {"std": [0, 1, 1]})
    ),
    "the file's header cannot be used: vit.categories must be a list of texts": lambda path: header(
        path, lambda c: c["__metadata__"].update({"vit.categories": "[1, 2]"})
    ),
    "there are 2 categories for 7 classes": lambda path: header(
        path, lambda c: c["__metadata__"].update({"vit.categories": '["a", "b"]'})
    ),
    "the file's header cannot be used: provenance must be an object": lambda path: header(
        path, lambda c: c["__metadata__"].update({"vit.provenance": '{"source": 1}'})
    ),
}


@pytest.mark.parametrize("message", BAD_FILES)
def test_bad_files(tmp_path, model, message):
    path = vit.save_checkpoint(model, tmp_path / "m.safetensors")
    vit.load_pretrained(path)
    BAD_FILES[message](path)
    with pytest.raises(CheckpointError, match=message) as error:
        vit.load_pretrained(path)
    assert str(path) in str(error.value)


def test_a_guess_does_not_become_a_fact(tmp_path, timm_file):
    """Who loads what was guessed once is still told so, however often it was written since."""
    config = vit.load_pretrained(timm_file, eps=1e-5).config
    assert config.sources["num_heads"] == "the timm layout's default" and config.sources["eps"] == "the caller"
    path = timm_file
    for i in range(2):
        path = vit.save_checkpoint(vit.load_pretrained(path, eps=1e-5), tmp_path / f"{i}.safetensors")
        sources = vit.load_pretrained(path).config.sources
        assert sources["num_heads"] == sources["gelu"] == "the timm layout's default, by way of the file's header"
        assert sources["eps"] == sources["depth"] == "the file's header"
    stated = vit.load_pretrained(path, num_heads=6)
    assert stated.config.sources["num_heads"] == "the caller"
    again = vit.load_pretrained(vit.save_checkpoint(stated, path)).config
    assert again.sources["num_heads"] == "the file's header" and again == stated.config
    header(path, lambda content: content["__metadata__"].pop("vit.assumed"))  # as files were written before
    old = vit.load_pretrained(path).config
    assert old == again and old.sources["gelu"] == "the file's header"


def test_categories_of_the_callers(tmp_path, timm_file):
    names = [f"class {i}" for i in range(1000)]
    model = vit.load_pretrained(timm_file, categories=names)
    assert model.categories == names
    assert vit.load_pretrained(vit.save_checkpoint(model, tmp_path / "m.safetensors")).categories == names
    with pytest.warns(UserWarning, match="is replaced by a new one for 2"):
        assert vit.load_pretrained(timm_file, num_classes=2, categories=("a", "b")).categories == ["a", "b"]
    for wrong, message in (
        (names[1:], "there are 999 categories for 1000 classes"),
        ("abc", "categories must be a list of texts, one for each of the 1000 classes"),
        ([1] * 1000, "categories must be a list of texts"),
        (3, "categories must be a list of texts"),
    ):
        with pytest.raises(ValueError, match=message):
            vit.load_pretrained(timm_file, categories=wrong)


BAD_CONFIGS = {
    "is not JSON": "{",
    "holds list, expected an object": "[]",
    "is not timm's config.json: it has no 'architecture'": "{}",
    "unknown architecture 'resnet50'.*state its number of heads": '{"architecture": "resnet50"}',
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


def test_paths_that_lead_nowhere(tmp_path, model):
    (tmp_path / "empty").mkdir()
    for source, kind, message in (
        (tmp_path / "empty", FileNotFoundError, "empty has none of model.safetensors"),
        (tmp_path / "gone.safetensors", FileNotFoundError, "gone.safetensors does not exist"),
        ("timm/vit_small_patch16_224.augreg_in21k_ft_in1k", FileNotFoundError, "is written hf-hub:timm/vit_small"),
        ("vit_smal_patch16_224.augreg_in21k_ft_in1k", ValueError, "Did you mean 'vit_small_patch16_224.augreg_in21k"),
        ("resnet50", ValueError, "unknown model 'resnet50'"),
        ("nodir/", FileNotFoundError, "^nodir/ does not exist$"),
    ):
        with pytest.raises(kind, match=message):
            vit.load_pretrained(source)
    with pytest.raises(ValueError, match="revision='main' is for repositories on the Hub"):
        vit.load_pretrained(tmp_path / "empty", revision="main")
    with pytest.raises(ValueError, match="already contains a revision"):
        vit.load_pretrained("hf-hub:a/b@main", revision="main")
    with pytest.raises(ValueError, match=r"unknown layout 'tim'. Did you mean 'timm'"):
        vit.save_checkpoint(model, tmp_path / "m.safetensors", layout="tim")
    with pytest.raises(
        ValueError, match="must end in .safetensors or be a folder: other formats are not written as vit"
    ):
        vit.save_checkpoint(model, tmp_path / "m.pth")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty"]


def test_provenance_and_config_are_plain_data(model):
    assert json.loads(json.dumps(asdict(model.config)))["embed_dim"] == 64
    record = vit.Provenance("a", "b", "vit", parent=vit.Provenance("c", "d", "timm"))
    assert vit.Provenance.from_dict(asdict(record)) == record


def test_imagenet_names_are_those_of_timm():
    from timm.data import ImageNetInfo

    info = ImageNetInfo()
    assert imagenet_categories() == [info.index_to_description(i) for i in range(1000)]
    assert vit.resources.imagenet_synsets() == info.label_names()


def test_weights_exist_once_in_memory(timm_file):
    """The parameters own their memory and no more: a saved head is not the whole file."""
    model = vit.load_pretrained(timm_file)
    for name, parameter in model.named_parameters():
        assert parameter.untyped_storage().nbytes() == parameter.numel() * 4, name
        assert parameter.requires_grad and parameter.is_leaf


def test_converting_keeps_gradients_possible(timm_file):
    model = vit.load_pretrained(timm_file).train()
    model(images(1, 3, 32, 48)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert same(ours_from(timm_twin(SMALL), SMALL), model)


def test_what_does_not_fit_the_model_is_not_saved(tmp_path, model):
    """A file that could not be read back, or would come back otherwise, is refused before anything is written."""
    original = model.preprocessing
    for change, message in (
        (lambda: setattr(model, "categories", ["a"]), "1 categories for 7 classes"),
        (lambda: setattr(model, "categories", list(range(7))), "must be a list of texts"),
        (lambda: setattr(model, "preprocessing", vit.Preprocessing(32, (0.5,), (0.5,))), "1 channels, the model has 3"),
        (lambda: model.norm.weight.data.fill_(math.nan), "norm.weight holds values that are not finite"),
    ):
        change()
        for layout in ("vit", "timm"):
            with pytest.raises(CheckpointError, match=message):
                vit.save_checkpoint(model, tmp_path / "m", layout=layout)
        model.categories, model.preprocessing = None, original
    with pytest.raises(ValueError, match="expected a vit.ViT, got Linear"):
        vit.save_checkpoint(torch.nn.Linear(2, 2), tmp_path / "m")
    with pytest.raises(CheckpointError, match="has no values: .* on device meta"):
        vit.save_checkpoint(vit.ViT(CONFIG).to("meta"), tmp_path / "m")
    with pytest.raises(ValueError, match=r"x.safetensors must be a folder: the timm layout is"):
        vit.save_checkpoint(vit.ViT(CONFIG), tmp_path / "x.safetensors", layout="timm")
    assert list(tmp_path.iterdir()) == []


def test_tied_weights_are_written_out(tmp_path, model):
    model.blocks[1] = model.blocks[0]
    again = vit.load_pretrained(vit.save_checkpoint(model, tmp_path / "m.safetensors"))
    assert same(model, again)


def test_a_link_stays_a_link(tmp_path, model):
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "real.safetensors")
    vit.save_checkpoint(model, tmp_path / "link.safetensors")
    assert (tmp_path / "link.safetensors").is_symlink() and same(
        model, vit.load_pretrained(tmp_path / "real.safetensors")
    )


def test_our_own_names_without_our_header_say_nothing_of_heads(tmp_path, model):
    save_file(model.state_dict(), tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match="the number of heads is not known for the width 64"):
        vit.load_pretrained(tmp_path / "m.safetensors", img_size=(32, 48))
    assert same(model, vit.load_pretrained(tmp_path / "m.safetensors", img_size=(32, 48), num_heads=1))


def raw(path, tensors):
    """A safetensors file that claims shapes of float32 tensors and holds `data` for each."""
    entries, data = {}, b""
    for name, (shape, content) in tensors.items():
        entries[name] = {"dtype": "F32", "shape": shape, "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    text = json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


@pytest.mark.parametrize("shape", [[0], [10**17, 0], [2**63, 0], [3, 0, 5]])
def test_shapes_without_values_are_refused(tmp_path, shape):
    with pytest.raises(CheckpointError, match="has no values|not a complete safetensors file"):
        vit.load_pretrained(raw(tmp_path / "m.safetensors", {"blocks.0.attn.qkv.weight": (shape, b"")}))


def test_thousands_of_tiny_blocks_are_refused_quickly(tmp_path):
    tensors = {f"blocks.{i}.attn.qkv.weight": ([1], b"\0" * 4) for i in range(20_000)}
    start = time.perf_counter()
    with pytest.raises(CheckpointError, match="missing keys"):
        vit.load_pretrained(raw(tmp_path / "m.safetensors", tensors))
    assert time.perf_counter() - start < 20


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


def test_arguments_of_other_kinds(timm_file):
    for message, arguments in {
        "no `strict`: checkpoints map completely or not at all": {"strict": False},
        "in_chans must be a whole number of at least 1, not 0": {"in_chans": 0},
        "in_chans must be a whole number of at least 1, not '3'": {"in_chans": "3"},
        "num_classes must be a whole number": {"num_classes": -1},
        "dtype must be a floating dtype such as torch.bfloat16 or 'bfloat16', not torch.int32": {"dtype": torch.int32},
        "dtype must be a floating dtype .* not 'int32'": {"dtype": "int32"},
        "dtype must be a floating dtype .* not 'fp16'": {"dtype": "fp16"},
        r"unknown layout \[\]": {"layout": []},
        "unknown layout 'timn'. Did you mean 'timm'": {"layout": "timn"},
    }.items():
        with pytest.raises(ValueError, match=message):
            vit.load_pretrained(timm_file, **arguments)
    with pytest.raises(CheckpointError, match="is of type int, expected a tensor"):
        vit.weights.convert({"blocks.0.attn.qkv.weight": 3})


def test_loading_for_another_size_keeps_the_stored_grid(tmp_path):
    model = vit.load_pretrained("vit_digits_patch4_32")
    larger = vit.load_pretrained("vit_digits_patch4_32", size=(48, 64))
    assert larger.preprocessing.size == (48, 64) and larger.config == model.config
    assert torch.equal(larger.position_embedding, model.position_embedding)
    x = torch.randn(1, 3, 48, 64)
    assert torch.equal(larger.eval()(x), model.eval()(x))
    again = vit.load_pretrained(vit.save_checkpoint(larger, tmp_path / "larger.safetensors"))
    assert again.preprocessing.size == (48, 64) and again.config.grid == (8, 8)
    finer = vit.load_pretrained("vit_digits_patch4_32", patch_size=2, size=48)
    assert finer.preprocessing.size == (48, 48) and finer.config.img_size == (16, 16)
    with pytest.raises(ValueError, match="size 50 x 50 is not made of whole patches of 4 x 4"):
        vit.load_pretrained("vit_digits_patch4_32", size=50)
    with pytest.raises(ValueError, match="65 rows, which does not fit img_size 48x48.*size=... sets the size"):
        vit.load_pretrained("vit_digits_patch4_32", img_size=48)
