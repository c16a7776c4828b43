"""What the files beside the weights say of the model, and whether they describe the part of it that is read."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from .checkpoint import Checkpoint, CheckpointError, read_json
from .content import is_text
from .description import Description
from .layouts import timm_config, transformers_config
from .layouts.vit import read_header
from .source import Source

# Where transformers' configs of larger models describe the ViT in them.
_PARTS = ("backbone_config", "vision_config", "encoder")


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
    content: dict[str, Any] = {}
    where = str(found.config)
    if found.config is not None:
        try:
            content = read_json(found.config)
        except CheckpointError as error:
            if not _is_log(found.config):
                raise
            return _prepared(Description(notes=(f"{error}; nothing was read from it",)), found)
    whose = _whose(content)
    if whose == "timm":
        if prefix and not (content.get("model_type") == "timm_wrapper" or timm_config.names_a_vit(content)):
            return _larger(content.get("architecture"), found, prefix)
        about = timm_config.read_config(_as_timm(content), where)
        classes = {"num_classes"} if prefix else set()  # a part may lack the classifier
        return replace(about, declared={name: value for name, value in about.declared.items() if name not in classes})
    if whose is None:
        note = f"{where} is neither timm's nor transformers' config.json, so nothing was read from it"
        return _prepared(Description(notes=() if found.config is None else (note,)), found)
    part = _part(content) if prefix else content
    if part is None:
        return _larger(content.get("model_type"), found, prefix)
    return _prepared(transformers_config.read_config(part, where), found, must=part is content)


def _larger(name: Any, found: Source, prefix: str | None) -> Description:
    files = " and ".join(str(file) for file in (found.config, found.preprocessor) if file is not None)
    return Description(notes=(f"{files}: a larger model ({name}), so nothing was read from there about {prefix!r}",))


def _is_log(path: Path) -> bool:
    """Whether it is another text than a JSON object: a list, JSON lines, YAML, but not an object that is cut off."""
    if not is_text(path):
        return False
    text = path.read_text(encoding="utf-8", errors="replace").lstrip()
    try:
        json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        return not text.startswith(("{", "[", "\ufeff"))
    return True


def _whose(content: dict[str, Any]) -> str | None:
    """The library that wrote a config.json: "timm", "transformers", or None, as for the log of a training."""
    kind, named = content.get("model_type"), isinstance(content.get("architecture"), str)
    if kind != "timm_wrapper":
        parts = any("model_type" in part for part in _parts(content))
        written = isinstance(kind, str) and ("transformers_version" in content or parts)
        if transformers_config.is_known(kind) or isinstance(content.get("architectures"), list) or written:
            return "transformers"
    flat = all(isinstance(content.get(name), list) for name in ("mean", "std"))  # timm's before pretrained_cfg
    sure = flat or "model_args" in content or timm_config.computes_otherwise(content)
    return "timm" if "pretrained_cfg" in content or (named and sure) else None


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


def _parts(content: dict[str, Any]) -> list[dict[str, Any]]:
    return [content[name] for name in _PARTS if isinstance(content.get(name), dict)]


def _part(content: dict[str, Any]) -> dict[str, Any] | None:
    """What transformers' config says of the ViT: all of it, a part of a larger model's, or nothing."""
    if transformers_config.is_known(content.get("model_type")):
        return content
    ours = [part for part in _parts(content) if transformers_config.is_known(part.get("model_type"))]
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
    # without a config.json, transformers' own default of 224 would be a guess about these weights
    return replace(about, preprocessing=settings, sized=bool(about.where or {"size", "crop_size"} & content.keys()))
