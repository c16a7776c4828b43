"""What the files beside the weights say of the model, and whether they describe the part of it that is read."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from .checkpoint import Checkpoint, CheckpointError, read_json
from .description import Description
from .layouts import timm_config, transformers_config
from .layouts.vit import read_header
from .source import Source

# Where transformers' configs of larger models describe the ViT in them.
_PARTS = ("backbone_config", "vision_config", "encoder")
# What tells transformers' config.json and timm's from anything else of that name, as the log of a training.
_TRANSFORMERS = {"architectures", "transformers_version", "hidden_size", "backbone_config", "vision_config"}
_TIMM = {"pretrained_cfg", "model_args"}
_TIMM_NAME = re.compile("[a-z_]+[0-9][a-z0-9_.]*")  # vit_small_patch16_224, but not vit_small or ViT-S/16


def describe(found: Source, checkpoint: Checkpoint, prefix: str | None = None) -> Description:
    """What the checkpoint's header says of the model, or else config.json and preprocessor_config.json beside it.

    `notes` tells which of these files were not used, and why.

    Args:
        found: the files.
        checkpoint: the weights.
        prefix: the part that is read. In transformers' configs of larger models, a part describes it.

    Raises:
        CheckpointError: a file that cannot be used, or describes a model that this one cannot be.
    """
    if any(key.startswith("vit.") for key in checkpoint.metadata):
        return read_header(checkpoint.metadata)
    content, where = {} if found.config is None else read_json(found.config), str(found.config)
    whose = _whose(content)
    if whose == "timm":
        about = timm_config.read_config(_as_timm(content), where)
        classes = {"num_classes"} if prefix else set()  # a part may lack the classifier
        return replace(about, declared={name: value for name, value in about.declared.items() if name not in classes})
    if whose is None:
        note = f"{where} is neither timm's nor transformers' config.json, so nothing was read from it"
        return _prepared(Description(notes=() if found.config is None else (note,)), found)
    part = _part(content) if prefix else content
    if part is None:
        files = " and ".join(str(file) for file in (found.config, found.preprocessor) if file is not None)
        larger = f"a larger model ({content.get('model_type')}), so nothing was read from there about {prefix!r}"
        return Description(notes=(f"{files}: {larger}",))
    return _prepared(transformers_config.read_config(part, where), found, must=part is content)


def _whose(content: dict[str, Any]) -> str | None:
    """The library that wrote a config.json: "timm", "transformers", or None."""
    kind, architecture = content.get("model_type"), content.get("architecture")
    if kind != "timm_wrapper" and (transformers_config.is_known(kind) or content.keys() & _TRANSFORMERS):
        return "transformers"
    named = isinstance(architecture, str) and _TIMM_NAME.fullmatch(architecture)
    return "timm" if named or content.keys() & _TIMM else None


def _as_timm(content: dict[str, Any]) -> dict[str, Any]:
    """timm's config.json; transformers' TimmWrapper adds placeholders, and classes to a model that has none."""
    if content.get("model_type") != "timm_wrapper":
        return content
    if content.get("architectures") == ["TimmWrapperModel"]:
        return {name: value for name, value in content.items() if name != "label_names"} | {"num_classes": 0}
    names = content.get("label_names")
    if isinstance(names, list) and names == [f"LABEL_{i}" for i in range(len(names))]:
        return {name: value for name, value in content.items() if name != "label_names"}
    return content


def _part(content: dict[str, Any]) -> dict[str, Any] | None:
    """What transformers' config says of the ViT: all of it, a part of a larger model's, or nothing."""
    if transformers_config.is_known(content.get("model_type")):
        return content
    parts = [content[name] for name in _PARTS if isinstance(content.get(name), dict)]
    ours = [part for part in parts if transformers_config.is_known(part.get("model_type"))]
    # a backbone of another kind is refused by its name
    return next(iter(ours), content.get("backbone_config") or None)


def _prepared(about: Description, found: Source, must: bool = False) -> Description:
    """With what preprocessor_config.json says; if it cannot be used, a note says so unless it `must` be."""
    if found.preprocessor is None:
        return about
    content = read_json(found.preprocessor)
    if not about.where and not {"image_mean", "do_normalize"} & content.keys():
        return about  # with no word on how pixels are normalized, and no model that has defaults
    try:
        channels = about.declared.get("in_chans", 3)
        settings = transformers_config.read_preprocessing(content, str(found.preprocessor), channels)
    except CheckpointError as error:
        if must:
            raise
        return replace(about, notes=(*about.notes, f"{error}; nothing was read from it"))
    return replace(about, preprocessing=settings)
