"""From files to models, and what the caller states."""

import hashlib
import warnings
from pathlib import Path

import pytest
import torch
from checkpoints import CONFIG, SMALL, TINY, same
from helpers import difference, images, timm_twin
from safetensors.torch import save_file

import vit
from vit.presets import NAMED_MODELS
from vit.weights import CheckpointError


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


def test_the_file_may_change_after_loading(tmp_path, rectangular):
    path = vit.save_checkpoint(rectangular, tmp_path / "m.safetensors")
    again = vit.load_pretrained(path)
    path.write_bytes(b"\0" * path.stat().st_size)
    assert same(rectangular, again)


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


def test_categories_of_the_callers(tmp_path, timm_file):
    names = [f"class {i}" for i in range(1000)]
    model = vit.load_pretrained(timm_file, categories=names)
    assert model.categories == names
    assert vit.load_pretrained(vit.save_checkpoint(model, tmp_path / "m.safetensors")).categories == names
    with pytest.warns(UserWarning, match="is replaced by a new one for 2"):
        assert vit.load_pretrained(timm_file, num_classes=2, categories=("a", "b")).categories == ["a", "b"]
    for wrong, message in (
        (names[1:], "there are 999 categories for 1000 classes"),
        ("abc", "categories must be a list of strings, one for each of the 1000 classes"),
        ([1] * 1000, "categories must be a list of strings"),
        (3, "categories must be a list of strings"),
    ):
        with pytest.raises(ValueError, match=message):
            vit.load_pretrained(timm_file, categories=wrong)


def test_weights_exist_once_in_memory(timm_file):
    """The parameters own their memory and no more: a saved head is not the whole file."""
    model = vit.load_pretrained(timm_file)
    for name, parameter in model.named_parameters():
        assert parameter.untyped_storage().nbytes() == parameter.numel() * 4, name
        assert parameter.requires_grad and parameter.is_leaf


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
        "unknown layout 'pytorch'. Known: augreg, ": {
            "layout": "pytorch"
        },  # torchvision is too far from it to be meant
    }.items():
        with pytest.raises(ValueError, match=message):
            vit.load_pretrained(timm_file, **arguments)
    with pytest.raises(CheckpointError, match="is of type int, expected a tensor"):
        vit.weights.convert({"blocks.0.attn.qkv.weight": 3})


@pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16", "torch.bfloat16"])
def test_a_dtype_by_name(timm_file, dtype):
    assert vit.load_pretrained(timm_file, dtype=dtype).class_token.dtype == torch.bfloat16


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
    with pytest.raises(ValueError, match="^size 50 x 50 is not made of whole patches of 4 x 4"):  # names no file
        vit.load_pretrained("vit_digits_patch4_32", size=50)
    with pytest.raises(ValueError, match="65 rows, which does not fit img_size 48x48.*size=... sets the size"):
        vit.load_pretrained("vit_digits_patch4_32", img_size=48)


def test_preprocessing_can_be_stated(tmp_path, model):
    state = vit.weights.convert(model.state_dict(), target="timm", config=TINY).state_dict
    save_file(state, tmp_path / "m.safetensors")
    again = vit.load_pretrained(tmp_path / "m.safetensors", mean=[0.1, 0.2, 0.3], crop_pct=1.0)
    assert again.preprocessing.mean == (0.1, 0.2, 0.3) and again.preprocessing.crop_pct == 1.0
    for stated, message in (
        ({"crop_pct": 2.0}, "^crop_pct must lie in"),
        ({"mode": "center"}, "^unknown mode 'center'. Known: crop, squash"),
    ):
        with pytest.raises(ValueError, match=message):
            vit.load_pretrained(tmp_path / "m.safetensors", **stated)
    other = vit.load_pretrained(tmp_path / "m.safetensors", in_chans=1, patch_size=4)
    assert {other.config.sources[name] for name in ("in_chans", "patch_size")} == {"the caller"}
    assert other.config.sources["img_size"] == "the timm layout's default"  # the grid is the same, and still a guess


def test_a_larger_models_config_is_not_the_backbones(tmp_path, model):
    state = {f"backbone.{name}": tensor for name, tensor in model.state_dict().items()} | {"x": torch.ones(1)}
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "depth_anything"}')
    with pytest.warns(UserWarning, match="left behind"):
        assert same(model, vit.load_pretrained(tmp_path, prefix="backbone.", num_heads=2))


def torch_file(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


def test_code_in_a_checkpoint_does_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    with pytest.raises(CheckpointError, match="holds no dense tensors, but model.x"):
        vit.load_pretrained(torch_file(tmp_path / "c.pth", {"model": {"x": Evil()}}))
    assert not (tmp_path / "ran").exists()


def test_a_hash_that_is_asked_for(tmp_path, model):
    path = vit.save_checkpoint(model, tmp_path, layout="transformers")
    right = hashlib.sha256(path.read_bytes()).hexdigest()
    assert same(model, vit.load_pretrained(path, sha256=right.upper()))
    with pytest.raises(CheckpointError, match=f"has sha256 {right}, expected {'0' * 64}"):
        vit.load_pretrained(path, sha256="0" * 64)
    with pytest.raises(ValueError, match="sha256 must be 64 hexadecimal digits, got 'abc'"):
        vit.load_pretrained(path, sha256="abc")


def test_nothing_is_said_where_nothing_is_left_out(tmp_path, model):
    path = vit.save_checkpoint(model, tmp_path / "a", layout="timm")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vit.load_pretrained(path)
