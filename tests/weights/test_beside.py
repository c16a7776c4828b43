"""config.json and preprocessor_config.json beside weights: used where they describe what is read, or said not to be."""

import json
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from checkpoints import TINY, same, timm_state, under
from helpers import FLOAT32, difference, images, randomize
from PIL import Image
from safetensors.torch import load_file, save_file
from skimage import data

import vit
from vit.weights import CheckpointError
from vit.weights.verify import convert_file

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
SIZES = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256,
         "image_size": 32, "patch_size": 8}  # fmt: skip
# unlike what is assumed without them: heads 64 wide, the exact GELU and a mean of 0.5
CONFIG = transformers.ViTConfig(**SIZES, hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-3, num_labels=5)


def folder(path: Path, model: torch.nn.Module) -> Path:
    """What transformers writes for a model with random weights, and how its images are prepared."""
    randomize(model).eval().save_pretrained(path)
    mean, std = IMAGENET
    size = {"height": 32, "width": 32}
    transformers.ViTImageProcessor(size=size, image_mean=list(mean), image_std=list(std)).save_pretrained(path)
    return path


def rename(path: Path, change: dict[str, object], renamed: tuple[str, str] = ("", "")) -> None:
    """Change a folder's config.json and how its weights' names begin."""
    content = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(change if "model_type" in change else content | change))
    old, new = renamed
    state = load_file(path / "model.safetensors")
    save_file({new + key.removeprefix(old): tensor for key, tensor in state.items()}, path / "model.safetensors")


@torch.no_grad()
def test_a_prefix_keeps_the_config_that_describes_it(tmp_path):
    theirs = transformers.ViTForImageClassification(CONFIG)
    folder(tmp_path, theirs)
    with pytest.warns(UserWarning, match=r"left behind: classifier \(2\)") as caught:
        ours = vit.load_pretrained(tmp_path, prefix="vit.")
    assert len(caught) == 1
    whole = vit.load_pretrained(tmp_path)
    assert ours.config == whole.config.override(num_classes=0) and ours.config.num_heads == 4
    assert ours.config.gelu == "tanh" and ours.config.eps == 1e-3 and ours.config.sources["eps"] == "config.json"
    assert ours.preprocessing == whole.preprocessing and ours.preprocessing.mean == IMAGENET[0]
    x = images(2, 3, 32, 32)
    assert difference(ours.forward_features(x), theirs.vit(x).last_hidden_state) <= FLOAT32


PARTS = {
    "backbone.": {"model_type": "depth_anything", "backbone_config": CONFIG.to_dict()},
    "encoder.": {
        "model_type": "vision-encoder-decoder",
        "encoder": CONFIG.to_dict(),
        "decoder": {"model_type": "gpt2"},
    },
    "vision_model.": {"model_type": "vision-text-dual-encoder", "vision_config": CONFIG.to_dict(), "hidden_size": 9},
}


@torch.no_grad()
@pytest.mark.parametrize("prefix", PARTS)
def test_a_part_of_a_larger_models_config_describes_its_vit(prefix, tmp_path):
    theirs = transformers.ViTModel(CONFIG, add_pooling_layer=False)
    folder(tmp_path, theirs)
    rename(tmp_path, PARTS[prefix] | {"architectures": ["Larger"]}, ("", prefix))
    ours = vit.load_pretrained(tmp_path, prefix=prefix)
    assert ours.config.gelu == "tanh" and ours.preprocessing.mean == IMAGENET[0]
    x = images(2, 3, 32, 32)
    assert difference(ours.forward_features(x), theirs(x).last_hidden_state) <= FLOAT32


def test_a_config_of_a_larger_model_is_not_used_and_a_warning_says_so(tmp_path):
    folder(tmp_path, transformers.ViTModel(CONFIG, add_pooling_layer=False))
    rename(tmp_path, {"model_type": "upernet", "architectures": ["U"]}, ("", "trunk."))
    said = (
        r"config.json and .*preprocessor_config.json: a larger model \(upernet\), so nothing was read from .*'trunk.'"
    )
    with pytest.warns(UserWarning, match=said):
        ours = vit.load_pretrained(tmp_path, prefix="trunk.")
    assert ours.config.num_heads == 2 and ours.preprocessing.mean == (0.5, 0.5, 0.5)
    report = convert_file(tmp_path, tmp_path / "m.safetensors", "vit", prefix="trunk.")
    assert "a larger model (upernet)" in report["notes"][0]
    with pytest.raises(CheckpointError, match="model_type 'upernet', expected one of vit, "):
        vit.load_pretrained(tmp_path)
    other = {"model_type": "upernet", "backbone_config": {"model_type": "swin"}}
    rename(tmp_path, other)
    with pytest.raises(CheckpointError, match="model_type 'swin', expected one of vit, "):
        vit.load_pretrained(tmp_path, prefix="trunk.")


def test_a_config_that_contradicts_the_part_is_not_used(tmp_path):
    """It describes the student, and the teacher is read."""
    folder(tmp_path, transformers.ViTModel(CONFIG, add_pooling_layer=False))
    teacher = timm_state(num_classes=0, depth=1)
    state = under("student.", load_file(tmp_path / "model.safetensors")) | under("teacher.", teacher)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.warns(
        UserWarning, match="config.json does not describe 'teacher.' and was not used: .*depth is declar"
    ):
        ours = vit.load_pretrained(tmp_path, prefix="teacher.")
    assert ours.config.depth == 1 and ours.config.num_heads == 2 and ours.preprocessing.mean == (0.5, 0.5, 0.5)
    with pytest.warns(UserWarning, match="left behind"):
        assert vit.load_pretrained(tmp_path, prefix="student.").config.num_heads == 4


def test_a_preprocessor_of_a_larger_model_that_cannot_be_read_is_not_used(tmp_path):
    folder(tmp_path, transformers.ViTModel(CONFIG, add_pooling_layer=False))
    rename(tmp_path, PARTS["backbone."], ("", "backbone."))
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps({"do_resize": False, "image_mean": [0, 0, 0]}))
    with pytest.warns(UserWarning, match="do_resize=False, expected true; nothing was read from it"):
        assert vit.load_pretrained(tmp_path, prefix="backbone.").config.num_heads == 4


def test_timms_config_describes_a_part_without_its_classifier(tmp_path):
    model = randomize(vit.ViT(TINY.override(num_heads=4)))
    vit.save_checkpoint(model, tmp_path, layout="timm")
    state = load_file(tmp_path / "model.safetensors")
    bare = {key: tensor for key, tensor in state.items() if not key.startswith("head")}
    save_file(under("net.", bare) | {"probe.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.warns(UserWarning, match="left behind: probe"):
        ours = vit.load_pretrained(tmp_path, prefix="net.")
    assert ours.config.num_heads == 4 and ours.config.sources["num_heads"] == "config.json"


LOGS = [
    {},
    {"lr": 1e-3, "epochs": 300, "model": "vit_small", "args": {"seed": 0}},
    {"architecture": "ViT-S/16", "batch_size": 64},
    {"architecture": "vit_small", "num_features": 384},
    {"model_type": "vit_small", "optimizer": {"name": "adamw"}},
    {"encoder": {"depth": 12}, "_wandb": {"desc": None, "value": {}}},
    {"hidden_size": 64, "num_layers": 2, "lr": 1e-3},
    {"model_args": {"depth": 2}, "seed": 0},
    {"architecture": "my_vit_v2", "lr": 0.1},
    {"architecture": "resnet50", "lr": 0.1},
    {"architecture": "vit_tiny_patch16_224", "input_size": 224, "num_classes": 5},
    {"architecture": "vit_tiny_patch16_224", "mean": None, "std": None, "crop_pct": None, "num_classes": 7},
    {"architectures": "vit", "transformers_version": "4", "model_type": None},
    {"vision_config": {"width": 64}, "backbone_config": {"depth": 2}},
]
TEXTS = {
    '[{"epoch": 1}]': "holds list",
    '{"epoch": 1}\n{"epoch": 2}\n': "Extra data",
    "lr: 0.1\n": "begins with 'lr: 0.1'",
}


@pytest.mark.parametrize("text", TEXTS)
def test_a_log_that_is_no_json_object_does_not_block_the_weights_beside_it(text, tmp_path):
    save_file(under("net.", timm_state()), tmp_path / "model.safetensors")
    bare = vit.load_pretrained(tmp_path, prefix="net.")
    (tmp_path / "config.json").write_text(text)
    with pytest.warns(UserWarning, match=f"config.json .*{TEXTS[text]}.*; nothing was read from it"):
        ours = vit.load_pretrained(tmp_path, prefix="net.")
    assert same(ours, bare) and ours.config == bare.config


@pytest.mark.parametrize(
    "text", ["", '{"hidden_size": 64, ', '[{"a":', "version https://git-lfs.github.com/spec/v1\n", "<html>", "\ufeff{}"]
)
def test_a_config_that_did_not_arrive_is_no_log(text, tmp_path):
    save_file(timm_state(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError, match="config.json is "):
        vit.load_pretrained(tmp_path)


@pytest.mark.parametrize(
    "content",
    [{"architecture": "resnet50", "pretrained_cfg": {}}, {"architecture": "segmenter_v2", "model_args": {"a": 1}},
     {"architecture": "swin_tiny", "mean": [0.5] * 3, "std": [0.5] * 3}],
)  # fmt: skip
def test_timms_config_of_a_larger_model_is_not_used_for_a_part(content, tmp_path):
    save_file(under("encoder.", timm_state()), tmp_path / "model.safetensors")
    bare = vit.load_pretrained(tmp_path, prefix="encoder.")
    (tmp_path / "config.json").write_text(json.dumps(content))
    name = content["architecture"]
    with pytest.warns(
        UserWarning, match=rf"a larger model \({name}\), so nothing was read from there about 'encoder.'"
    ):
        ours = vit.load_pretrained(tmp_path, prefix="encoder.")
    assert same(ours, bare) and ours.config == bare.config
    (tmp_path / "config.json").write_text(json.dumps(content | {"architecture": "vit_base_patch16_clip_224"}))
    with pytest.raises(CheckpointError, match="is not one of timm's plain ViTs"):  # which may be this part
        vit.load_pretrained(tmp_path, prefix="encoder.")


@pytest.mark.parametrize("content", LOGS)
def test_the_log_of_a_training_does_not_block_the_weights_beside_it(content, tmp_path):
    save_file(timm_state(), tmp_path / "model.safetensors")
    bare = vit.load_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.warns(UserWarning, match="config.json is neither timm's nor transformers' config.json") as caught:
        ours = vit.load_pretrained(tmp_path)
    assert len(caught) == 1 and same(ours, bare) and ours.config == bare.config
    report = convert_file(tmp_path, tmp_path / "m.safetensors", "vit")
    assert "nothing was read from it" in report["notes"][0]


def test_a_file_that_describes_a_model_is_no_log(tmp_path):
    save_file(timm_state(), tmp_path / "model.safetensors")
    for content, message in (
        ({"hidden_size": 128, "architectures": ["ViTModel"]}, "model_type None, expected one of vit, "),
        ({"model_type": "swin", "architectures": ["SwinModel"]}, "model_type 'swin', expected one of vit, "),
        ({"model_type": "swin", "transformers_version": "5.0"}, "model_type 'swin', expected one of vit, "),
        ({"architecture": "resnet50", "mean": [0, 0, 0], "std": [1, 1, 1]}, "the architecture 'resnet50' is not one"),
        ({"architecture": "resnet50", "pretrained_cfg": {}}, "the architecture 'resnet50' is not one of timm's plain"),
        (
            {"architecture": "vit_small_patch16_rope_ape_224.x", "lr": 0.1},
            "may compute otherwise with the same weights",
        ),
        ({"pretrained_cfg": {}}, "is not timm's config.json: it has no 'architecture'"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(content))
        with pytest.raises(CheckpointError, match=message):
            vit.load_pretrained(tmp_path)


def test_a_preprocessor_without_a_config(tmp_path):
    save_file(timm_state(), tmp_path / "model.safetensors")
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps({"image_mean": IMAGENET[0], "image_std": IMAGENET[1], "size": 48, "resample": 3}))
    assert vit.load_pretrained(tmp_path).preprocessing == vit.Preprocessing(
        (48, 48), *IMAGENET, "bicubic", 1.0, "squash"
    )
    file.write_text(json.dumps({"image_mean": IMAGENET[0], "image_std": IMAGENET[1]}))  # at the weights' own size
    assert vit.load_pretrained(tmp_path).preprocessing == vit.Preprocessing(
        (32, 32), *IMAGENET, "bilinear", 1.0, "squash"
    )
    file.write_text('{"sampling_rate": 16000}')
    assert vit.load_pretrained(tmp_path).preprocessing.size == (32, 32)


def test_without_normalization_pixels_stay_between_0_and_1(tmp_path):
    theirs = transformers.ViTForImageClassification(CONFIG)
    folder(tmp_path, theirs)
    processor = transformers.ViTImageProcessor(size={"height": 32, "width": 32}, do_normalize=False, resample=3)
    processor.save_pretrained(tmp_path)
    ours = vit.load_pretrained(tmp_path)
    assert ours.preprocessing.mean == (0.0, 0.0, 0.0) and ours.preprocessing.std == (1.0, 1.0, 1.0)
    image = Image.fromarray(data.chelsea())
    expected = processor(image, return_tensors="pt")["pixel_values"]
    pixels = vit.create_transform(ours)(image)[None]
    assert pixels.min() >= 0 and difference(pixels, expected) <= 0.05  # they resize by torchvision's tensors


def test_without_normalization_of_one_channel(tmp_path):
    config = transformers.ViTConfig(**SIZES, num_channels=1)
    folder(tmp_path, transformers.ViTModel(config, add_pooling_layer=False))
    (tmp_path / "preprocessor_config.json").write_text('{"do_normalize": false, "size": 32}')
    assert vit.load_pretrained(tmp_path).preprocessing.std == (1.0,)


MAE = transformers.ViTMAEConfig(
    **SIZES, layer_norm_eps=1e-3, mask_ratio=0.0, decoder_hidden_size=16, decoder_num_attention_heads=2,
    decoder_num_hidden_layers=1, decoder_intermediate_size=32,
)  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("kind", ["ViTMAEModel", "ViTMAEForPreTraining"])
def test_transformers_mae_is_read_without_its_decoder(kind, tmp_path):
    theirs = getattr(transformers, kind)(MAE)
    folder(tmp_path, theirs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = vit.load_pretrained(tmp_path)
    assert ours.config.num_heads == 4 and ours.config.eps == 1e-3 and ours.preprocessing.mean == IMAGENET[0]
    x, encoder = images(2, 3, 32, 32), getattr(theirs, "vit", theirs)
    out = encoder(x, noise=torch.rand(2, 16))  # the patches are shuffled by it
    back = 1 + out.ids_restore[..., None].expand(-1, -1, 128)
    tokens = torch.cat([out.last_hidden_state[:, :1], out.last_hidden_state.gather(1, back)], dim=1)
    assert difference(ours.forward_features(x), tokens) <= FLOAT32
    assert difference(ours.forward_features(x), out.last_hidden_state) > 0.1
    dropped = convert_file(tmp_path, tmp_path / "m.safetensors", "vit")["dropped"]
    assert bool(dropped) == (kind == "ViTMAEForPreTraining")
    assert all(key.startswith("decoder.") and "MAE's decoder" in why for key, why in dropped.items())


def test_only_known_decoders_are_dropped(tmp_path):
    masked = transformers.ViTForMaskedImageModeling(transformers.ViTConfig(**SIZES, encoder_stride=8))
    folder(tmp_path, masked)
    dropped = convert_file(tmp_path, tmp_path / "m.safetensors", "vit")["dropped"]
    assert set(dropped) == {"decoder.0.weight", "decoder.0.bias", "vit.embeddings.mask_token"}
    state = load_file(tmp_path / "model.safetensors")
    save_file(state | {"decoder.up.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="unexpected keys: decoder.up"):
        vit.load_pretrained(tmp_path)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["ViTMSNModel", "ViTMSNForImageClassification"])
def test_transformers_msn(kind, tmp_path):
    """Version 5 writes the blocks of one with a classifier without the prefix that all else has."""
    theirs = getattr(transformers, kind)(transformers.ViTMSNConfig(**SIZES, num_labels=7))
    folder(tmp_path, theirs)
    ours = vit.load_pretrained(tmp_path)
    x = images(2, 3, 32, 32)
    assert ours.config.eps == 1e-6
    out = theirs(x)
    if kind == "ViTMSNModel":
        assert difference(ours.forward_features(x), out.last_hidden_state) <= FLOAT32
    else:
        assert difference(ours(x), out.logits) <= FLOAT32 and ours.config.num_classes == 7
    state = load_file(tmp_path / "model.safetensors")
    torch.save({"model": under("module.", state), "epoch": 3}, tmp_path / "c.pth")
    (tmp_path / "model.safetensors").unlink()
    assert same(vit.load_pretrained(tmp_path / "c.pth", num_heads=4, eps=1e-6), ours)
    if kind == "ViTMSNForImageClassification":
        for extra in ("embeddings.cls_token", "vit.encoder.layer.0.output.dense.bias"):
            torch.save(state | {extra: torch.ones(128)}, tmp_path / "c.pth")
            with pytest.raises(CheckpointError, match="unexpected keys: .*vit.embeddings.cls_token"):
                vit.load_pretrained(tmp_path / "c.pth")


TIMM = {"img_size": 32, "patch_size": 8, "embed_dim": 128, "depth": 2, "num_heads": 4}
PREPARED = {"input_size": [3, 32, 32], "mean": list(IMAGENET[0]), "std": list(IMAGENET[1]), "crop_pct": 0.8,
            "interpolation": "bilinear", "crop_mode": "center"}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize(
    ("architecture", "extra"),
    [("vit_small_patch16_224", {"global_pool": "avg"}), ("vit_small_patch14_reg4_dinov2", {"init_values": 0.1}),
     ("deit_small_distilled_patch16_224", {})],
)  # fmt: skip
@pytest.mark.parametrize("prefix", [None, "timm_model."])
def test_transformers_wrapper_of_timm(architecture, extra, prefix, tmp_path):
    config = transformers.TimmWrapperConfig(
        architecture=architecture, model_args=TIMM | extra, pretrained_cfg=PREPARED, id2label=dict(enumerate("abcde"))
    )
    theirs = randomize(transformers.TimmWrapperForImageClassification(config)).eval()
    theirs.save_pretrained(tmp_path)
    ours = vit.load_pretrained(tmp_path, prefix=prefix)
    assert ours.categories == list("abcde") and ours.config.num_heads == 4
    image = Image.fromarray(data.chelsea())
    x = transformers.TimmWrapperImageProcessor.from_pretrained(tmp_path)(image)["pixel_values"]
    assert torch.equal(vit.create_transform(ours)(image)[None], x)
    assert difference(ours(x), theirs(x).logits) <= FLOAT32
    assert vit.load_pretrained(tmp_path, num_heads=2).config.num_heads == 2


@torch.no_grad()
def test_transformers_wrapper_of_timm_without_a_classifier(tmp_path):
    config = transformers.TimmWrapperConfig(architecture="vit_small_patch16_224", model_args=TIMM)
    theirs = randomize(transformers.TimmWrapperModel(config)).eval()
    theirs.save_pretrained(tmp_path)
    ours = vit.load_pretrained(tmp_path)  # though its config.json speaks of two classes
    x = images(2, 3, 32, 32)
    assert difference(ours.forward_features(x), theirs(x).last_hidden_state) <= FLOAT32
    assert difference(ours(x), theirs(x).pooler_output) <= FLOAT32
    theirs = transformers.TimmWrapperForImageClassification(config)
    theirs.save_pretrained(tmp_path)
    assert vit.load_pretrained(tmp_path).categories is None  # LABEL_0, LABEL_1
