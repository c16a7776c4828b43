"""timm's `config.json`: read, and written so that timm loads the model."""

from __future__ import annotations

import re
from typing import Any

from vit.checks import require_int
from vit.config import ViTConfig
from vit.metadata import Preprocessing
from vit.presets import NAMED_MODELS
from vit.resources import imagenet_categories

from ..checkpoint import CheckpointError, usable
from ..description import IMAGENET, Attributes, Description
from ..keymap import Files

# timm's model arguments that are fields of ours with the same name and value
_SAME = (
    "img_size", "patch_size", "in_chans", "num_classes", "global_pool", "embed_dim", "depth", "num_heads", "mlp_ratio",
    "init_values", "reg_tokens", "drop_path_rate", "fc_norm",
)  # fmt: skip
# arguments that change nothing here: any size works, and the weights show whether a norm follows the pooling
_WITHOUT_EFFECT = {
    "dynamic_img_size": (True, False),
    "strict_img_size": (True, False),
    "dynamic_img_pad": (False,),
    "fc_norm": (None,),
    "class_token": (True,),
    "qkv_bias": (True,),
}
_ACTS = {"gelu": "erf", "gelu_tanh": "tanh"}
# timm's names for plain ViTs: what weights do not show is the same in all of them (eps 1e-6, the exact GELU, positions
# that are added once) or follows from the name (heads). Other words (rope, clip, 18x2, DINOv2's giant ...) stand for
# models that compute otherwise, some of them with the same weights: those are refused, and so is a name of the future.
_PLAIN = re.compile(
    r"(?!vit_giant_.*_dinov2)(vit|deit3?)_(tiny|small|medium|base|large|huge|giant|gigantic)(_distilled)?_patch[0-9]+"
    r"(_plus|_36x1)?(_reg[0-9]+)?(_[0-9]+|_dinov2)?(_in21k|_in21ft1k|_dino|_sam)?"
    r"|vit_(base|large|so400m)_patch14_reg1_tipsv2|flexivit_(small|base|large)|eva_large_patch14_[0-9]+|test_vit"
)
_VIT = re.compile("vit|deit|eva|beit")  # in the names of timm's ViTs, plain or not
# a word in the name -> heads and width, if model_args state no others; the first word counts
_SIZES = {
    "plus": (14, 896), "test": (2, 64), "tiny": (3, 192), "small": (6, 384), "medium": (8, 512), "base": (12, 768),
    "large": (16, 1024), "huge": (16, 1280), "giant": (16, 1408), "gigantic": (16, 1664), "so400m": (16, 1152),
}  # fmt: skip


def names_a_vit(content: dict[str, Any]) -> bool:
    """Whether the architecture is a ViT, plain or not, and so may be the part that is read out of a larger model."""
    architecture = content.get("architecture")
    return isinstance(architecture, str) and _VIT.search(architecture) is not None


def computes_otherwise(content: dict[str, Any]) -> bool:
    """Whether the architecture is one of timm's ViTs that are not plain, whose weights a plain one may load wrongly."""
    name = str(content.get("architecture")).partition(".")[0]
    return names_a_vit(content) and "_patch" in name and not _PLAIN.fullmatch(name)


def read_config(content: dict[str, Any], where: str) -> Description:
    """Read timm's `config.json`.

    Args:
        content: the parsed file.
        where: its path, for errors.

    Raises:
        CheckpointError: not timm's format, an architecture that is not known to compute as this model does, or a
            model argument that this model lacks.
    """
    architecture = content.get("architecture")
    if not isinstance(architecture, str):
        raise CheckpointError(f"{where} is not timm's config.json: it has no 'architecture'")
    with usable(where):
        return _read(content, architecture.partition(".")[0], where)


def _read(content: dict[str, Any], name: str, where: str) -> Description:
    assumed = _known_by_name(name, where)
    settings = content.get("pretrained_cfg", content)  # older files are one flat object
    declared: dict[str, Any] = {}
    if "input_size" in settings:
        channels, height, width = settings["input_size"]
        declared |= {"in_chans": channels, "img_size": (height, width)}
    if "num_classes" in content:
        declared["num_classes"] = content["num_classes"]
    if content.get("global_pool"):
        declared["global_pool"] = content["global_pool"]
    declared.update(_read_model_args(content.get("model_args") or {}, where))
    width = assumed.pop("embed_dim")
    if "num_heads" not in declared:  # at another width than that of the name, its heads would be a wrong guess
        declared.setdefault("embed_dim", width)
    if "_distilled_" in name:  # for which timm says "token" and averages both heads
        declared |= {"dist_token": True, "global_pool": "dist"}
    categories, categories_from = _read_categories(content, settings, declared.get("num_classes"), where)
    return Description(
        where="config.json",
        declared=declared,
        assumed=assumed,
        preprocessing=_read_preprocessing(settings, where),
        categories=categories,
        categories_from=categories_from,
        license=settings.get("license"),
    )


def _known_by_name(name: str, where: str) -> dict[str, Any]:
    """What an architecture's name says that weights do not show."""
    known: dict[str, Any] = {"eps": 1e-6, "gelu": "erf"}
    if name in NAMED_MODELS:
        named = NAMED_MODELS[name].config
        return known | {"num_heads": named.num_heads, "embed_dim": named.embed_dim, "img_size": named.img_size}
    if not _PLAIN.fullmatch(name):
        raise CheckpointError(
            f"{where}: the architecture {name!r} is not one of timm's plain ViTs (vit_small_patch16_224, "
            "deit3_base_patch16_384, vit_large_patch14_reg4_dinov2 ...): it may compute otherwise with the same "
            "weights. If you know that it does not, write the name of a plain ViT of its size in that file"
        )
    heads, width = next(size for word, size in _SIZES.items() if word in name.split("_"))
    return known | {"num_heads": heads, "embed_dim": width}


def _read_model_args(args: dict[str, Any], where: str) -> dict[str, Any]:
    declared = {}
    for name, value in args.items():
        if name in _SAME and not (name == "fc_norm" and value is None):
            declared[name] = value
        elif name == "no_embed_class" and isinstance(value, bool):
            declared["class_position"] = not value
        elif name == "act_layer" and isinstance(value, str) and value in _ACTS:
            declared["gelu"] = _ACTS[value]
        elif not any(value is harmless for harmless in _WITHOUT_EFFECT.get(name, ())):
            raise CheckpointError(f"{where}: timm's argument {name}={value!r} is not supported")
    return declared


# timm's defaults for what `pretrained_cfg` leaves out.
_DEFAULTS: dict[str, Any] = {
    "input_size": [3, 224, 224],
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
    "interpolation": "bicubic",
    "crop_pct": 0.875,
}


def _read_preprocessing(settings: dict[str, Any], where: str) -> Preprocessing | None:
    """The preprocessing in `pretrained_cfg`, completed as timm does it; None if it has none."""
    if not any(name in settings for name in _DEFAULTS):
        return None
    crop_mode = settings.get("crop_mode", "center")
    if crop_mode not in ("center", "squash") or (crop_mode == "squash" and settings.get("crop_pct") != 1.0):
        raise CheckpointError(f"{where}: crop_mode {crop_mode!r}, expected 'center', or 'squash' with crop_pct 1.0")
    values = {name: settings.get(name, default) for name, default in _DEFAULTS.items()}
    channels, *size = values.pop("input_size")
    require_int("input_size's channels", channels, least=1)
    if channels > 10_000:  # the mean of each would be kept
        raise CheckpointError(f"{where}: input_size has {channels} channels, expected as many as the images have")
    mode = "squash" if crop_mode == "squash" else "crop"
    return Preprocessing(tuple(size), **values, mode=mode).with_channels(channels)


def _read_categories(
    content: dict, settings: dict, num_classes: int | None, where: str
) -> tuple[list[str] | None, str]:
    """The labels' descriptions or names, or ImageNet's for 1,000 classes as timm does; and where they come from."""
    labels = content.get("label_names", settings.get("label_names"))
    if isinstance(labels, dict):
        labels = [labels.get(str(i)) for i in range(len(labels))]
    if labels is None:
        return (imagenet_categories(), IMAGENET) if num_classes == 1000 else (None, "")
    if not isinstance(labels, list) or len(labels) != num_classes or not all(isinstance(n, str) for n in labels):
        raise CheckpointError(f"{where}: label_names must name each of the {num_classes} classes")
    described = content.get("label_descriptions", settings.get("label_descriptions")) or {}
    return [described.get(name, name) for name in labels], "from config.json"


def write_config(config: ViTConfig, attributes: Attributes) -> dict[str, Any]:
    """The `config.json` with which timm loads a model; it states every argument, so no default matters.

    Args:
        config: of the weights as they are written.
        attributes: its preprocessing, categories and licence.

    Raises:
        CheckpointError: timm's `config.json` cannot hold one of the model's settings.
    """
    settings = attributes.preprocessing
    if config.eps != 1e-6:
        raise CheckpointError(
            f"timm's config.json cannot hold eps {config.eps}: its ViT has 1e-6 (--set eps=1e-6, or eps=1e-6 in "
            "Python, changes it; logits change, from 1e-12 by less than 1e-3 of the largest)"
        )
    args = {name: getattr(config, name) for name in _SAME if name not in ("in_chans", "num_classes")}
    args["init_values"] = None if config.init_values is None else config.init_values or 1e-5  # timm reads 0 as none
    args |= {
        "no_embed_class": not config.class_position,
        "global_pool": "token" if config.dist_token else args["global_pool"],
    }
    other_size = settings.size != config.img_size
    if other_size:  # without this timm prepares img_size, which is the size that the positions are stored at
        args["dynamic_img_size"] = True
    args["act_layer"] = next(theirs for theirs, ours in _ACTS.items() if ours == config.gelu)
    content: dict[str, Any] = {
        "architecture": _architecture(config),
        "num_classes": config.num_classes,
        "num_features": config.embed_dim,
        "global_pool": args["global_pool"],
        "model_args": args,
        "pretrained_cfg": {
            "input_size": [config.in_chans, *settings.size],
            "fixed_input_size": not other_size,
            "interpolation": settings.interpolation,
            "crop_pct": settings.crop_pct if settings.mode == "crop" else 1.0,
            "crop_mode": "center" if settings.mode == "crop" else "squash",
            "mean": settings.mean,
            "std": settings.std,
            "num_classes": config.num_classes,
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": ["head", "head_dist"] if config.dist_token else "head",
        },
    }
    if attributes.categories is not None:
        content["label_names"] = attributes.categories
    if attributes.license is not None:
        content["pretrained_cfg"]["license"] = attributes.license
    return content


def _architecture(config: ViTConfig) -> str:
    """The named model of the same shape. The model arguments give the rest."""
    if config.dist_token:
        return "deit_small_distilled_patch16_224"
    for name, named in NAMED_MODELS.items():
        same = ("patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "img_size")
        if named.tag and all(getattr(named.config, field) == getattr(config, field) for field in same):
            return name
    return "vit_small_patch16_224"


FILES = Files(
    beside=("config.json",),
    write=lambda config, attributes: {"config.json": write_config(config, attributes)},
    read=lambda contents: read_config(contents["config.json"], "config.json"),
)
