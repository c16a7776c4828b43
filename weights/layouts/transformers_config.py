"""transformers' `config.json` and `preprocessor_config.json`: read, and written for its own loaders."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from vit.config import ViTConfig
from vit.metadata import Preprocessing

from ..checkpoint import CheckpointError, usable
from ..description import Attributes, Description
from ..keymap import Files

# transformers' names -> our fields of the same value
_SAME = {
    "hidden_size": "embed_dim",
    "num_hidden_layers": "depth",
    "num_attention_heads": "num_heads",
    "patch_size": "patch_size",
    "num_channels": "in_chans",
    "layer_norm_eps": "eps",
    "drop_path_rate": "drop_path_rate",
    "num_register_tokens": "reg_tokens",
}
_GELUS = {"gelu": "erf", "gelu_python": "erf", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu_fast": "tanh"}
# the only supported values of some arguments
_WITHOUT_EFFECT = {"qkv_bias": True, "use_swiglu_ffn": False, "apply_layernorm": True}
# the defaults of transformers' classes for what config.json leaves out
_KINDS: dict[str, dict[str, Any]] = {
    "vit": {"layer_norm_eps": 1e-12, "patch_size": 16, "image_size": 224, "intermediate_size": 3072},
    "deit": {"layer_norm_eps": 1e-12, "patch_size": 16, "image_size": 224, "intermediate_size": 3072},
    "vit_mae": {"layer_norm_eps": 1e-12, "patch_size": 16, "image_size": 224, "intermediate_size": 3072},
    "vit_msn": {"layer_norm_eps": 1e-6, "patch_size": 16, "image_size": 224, "intermediate_size": 3072},
    "dinov2": {"layer_norm_eps": 1e-6, "patch_size": 14, "image_size": 224, "mlp_ratio": 4},
    "dinov2_with_registers": {
        "layer_norm_eps": 1e-6, "patch_size": 16, "image_size": 224, "mlp_ratio": 4, "num_register_tokens": 4
    },
}  # fmt: skip
_COMMON = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "num_channels": 3}


def is_known(kind: Any) -> bool:
    """Whether this is a model_type that `read_config` reads."""
    return kind in list(_KINDS)


def read_config(content: dict[str, Any], where: str) -> Description:
    """Read transformers' `config.json`, completed by the defaults of its classes.

    Raises:
        CheckpointError: another kind of model, or a setting that this model lacks.
    """
    kind = content.get("model_type")
    if not is_known(kind):
        hint = "" if kind is not None else ": state it there, or move the file away if it is not about these weights"
        raise CheckpointError(f"{where}: model_type {kind!r}, expected one of {', '.join(_KINDS)}{hint}")
    with usable(where):
        return _read_values(_COMMON | _KINDS[content["model_type"]] | content, where)


def _read_values(values: dict[str, Any], where: str) -> Description:
    for name, harmless in _WITHOUT_EFFECT.items():
        if values.get(name, harmless) != harmless:
            raise CheckpointError(f"{where}: transformers' setting {name}={values[name]!r} is not supported")
    act = values.get("hidden_act", "gelu")
    if act not in _GELUS:
        raise CheckpointError(f"{where}: hidden_act {act!r}, expected one of {', '.join(_GELUS)}")
    declared = {ours: values[theirs] for theirs, ours in _SAME.items() if theirs in values}
    size = values["image_size"]
    declared |= {"gelu": _GELUS[act], "img_size": tuple(size) if isinstance(size, list) else size}
    by_ratio = "mlp_ratio" in _KINDS[values["model_type"]]
    declared["mlp_ratio"] = values["mlp_ratio"] if by_ratio else values["intermediate_size"] / values["hidden_size"]
    categories = _categories(values.get("id2label"), where)
    return Description("config.json", declared, categories=categories, categories_from="from config.json")


def _categories(labels: dict[str, str] | None, where: str) -> list[str] | None:
    """The labels, in order; None if they are the placeholders that transformers writes."""
    if labels is None:
        return None
    if set(labels) != {str(i) for i in range(len(labels))}:
        raise CheckpointError(f"{where}: id2label must number its labels from 0 to {len(labels) - 1}")
    names = [labels[str(i)] for i in range(len(labels))]
    return None if names == [f"LABEL_{i}" for i in range(len(names))] else names


# Pillow's numbers for its filters
_FILTERS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}


def read_preprocessing(content: dict[str, Any], where: str, channels: int = 3) -> Preprocessing:
    """Read transformers' `preprocessor_config.json`.

    transformers squashes an image for DeiT before it crops the middle. Here the short side is resized, as in the
    paper's code, and a warning says so. Without normalization (do_normalize false), mean is 0 and std 1 in each of
    the `channels`.

    Raises:
        CheckpointError: an unsupported way to prepare images.
    """
    for step in ("do_resize", "do_rescale"):
        if content.get(step, True) is not True:
            raise CheckpointError(f"{where}: {step}={content[step]!r}, expected true")
    normalize = content.get("do_normalize", True)
    if not isinstance(normalize, bool):
        raise CheckpointError(f"{where}: do_normalize={normalize!r}, expected true or false")
    crop, size = content.get("crop_size"), content.get("size", 224)
    cropped = bool(content.get("do_center_crop", crop is not None))
    with usable(where):
        height, width = _sides(crop if cropped else size)
        if not cropped and isinstance(size, dict) and "shortest_edge" in size:
            raise ValueError("a shortest_edge without a crop gives images of different sizes")
        resized = min(_sides(size)) if cropped else height
        if not math.isclose(content.get("rescale_factor", 1 / 255), 1 / 255, rel_tol=1e-3):
            raise ValueError(f"rescale_factor {content['rescale_factor']!r}, expected 1/255")
        if cropped and height != width:
            raise ValueError(f"a crop of {height}x{width}, expected a square")
        if cropped and isinstance(size, dict) and "shortest_edge" not in size:
            warnings.warn(f"{where} squashes images before it crops them; here the short side is resized", stacklevel=2)
        return Preprocessing(
            (height, width),
            content.get("image_mean", (0.5, 0.5, 0.5)) if normalize else (0.0,) * channels,
            content.get("image_std", (0.5, 0.5, 0.5)) if normalize else (1.0,) * channels,
            _FILTERS[content.get("resample", 2)],
            crop_pct=_crop_pct(min(height, width), resized) if cropped else 1.0,
            mode="crop" if cropped else "squash",
        )


def _crop_pct(crop: int, resized: int) -> float:
    """The crop_pct that resizes to exactly this side: floor(crop / crop_pct) == resized."""
    share = crop / resized
    return share if math.floor(crop / share) == resized else math.nextafter(share, 0.0)


def _sides(size: Any) -> tuple[int, int]:
    if isinstance(size, dict):
        return (size["shortest_edge"],) * 2 if "shortest_edge" in size else (size["height"], size["width"])
    return (size, size)


def write_config(config: ViTConfig, attributes: Attributes) -> dict[str, Any]:
    """The `config.json` with which transformers loads a model; it states every setting, so no default counts."""
    kind, name = _kind(config)
    values: dict[str, Any] = {
        "architectures": [name],
        "model_type": kind,
        **{theirs: getattr(config, ours) for theirs, ours in _SAME.items()},
        "image_size": config.img_size[0] if config.img_size[0] == config.img_size[1] else list(config.img_size),
        "hidden_act": "gelu" if config.gelu == "erf" else "gelu_pytorch_tanh",
        "qkv_bias": True,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    if kind in ("vit", "deit"):
        values["intermediate_size"] = config.mlp_dim
        del values["num_register_tokens"], values["drop_path_rate"]
    else:
        values |= {"mlp_ratio": _whole(config.mlp_ratio), "use_swiglu_ffn": False}
        if kind == "dinov2":
            del values["num_register_tokens"]
    if config.num_classes:
        labels = attributes.categories or [f"LABEL_{i}" for i in range(config.num_classes)]
        values["id2label"] = {str(i): label for i, label in enumerate(labels)}
        values["label2id"] = {label: i for i, label in enumerate(labels)}
    return values


def _whole(ratio: float) -> int | float:
    """The ratio as an int if it is whole: transformers needs the product with the width to be an int."""
    return int(ratio) if float(ratio).is_integer() else ratio


def _kind(config: ViTConfig) -> tuple[str, str]:
    """model_type, and the class of the model."""
    if config.init_values is not None:
        kind, name = ("dinov2_with_registers", "Dinov2WithRegisters") if config.reg_tokens else ("dinov2", "Dinov2")
        return kind, name + ("ForImageClassification" if config.num_classes else "Model")
    if config.dist_token:
        with_teacher = "WithTeacher" if config.global_pool == "dist" else ""
        return "deit", f"DeiTForImageClassification{with_teacher}" if config.num_classes else "DeiTModel"
    return "vit", "ViTForImageClassification" if config.num_classes else "ViTModel"


def write_preprocessing(attributes: Attributes) -> dict[str, Any]:
    """The `preprocessor_config.json` that goes with it."""
    settings = attributes.preprocessing
    height, width = settings.size
    values: dict[str, Any] = {
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "image_mean": list(settings.mean),
        "image_std": list(settings.std),
        "rescale_factor": 1 / 255,
        "resample": next(number for number, name in _FILTERS.items() if name == settings.interpolation),
    }
    if settings.mode == "squash" or height != width:  # a crop there needs a square
        return values | {"image_processor_type": "ViTImageProcessor", "size": {"height": height, "width": width}}
    return values | {
        "image_processor_type": "BitImageProcessor",
        "do_center_crop": True,
        "size": {"shortest_edge": int(min(height, width) / settings.crop_pct)},
        "crop_size": {"height": height, "width": width},
    }


def _write(config: ViTConfig, attributes: Attributes) -> dict[str, dict[str, Any]]:
    return {
        "config.json": write_config(config, attributes),
        "preprocessor_config.json": write_preprocessing(attributes),
    }


def _read(contents: Mapping[str, dict[str, Any]]) -> Description:
    (config, about), (preprocessor, settings) = contents.items()
    return replace(read_config(about, config), preprocessing=read_preprocessing(settings, preprocessor))


FILES = Files(beside=("config.json", "preprocessor_config.json"), write=_write, read=_read)
