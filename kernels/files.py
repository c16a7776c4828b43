"""Optimized models to files and back: safetensors, with everything but the tensors in its header."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from vit.checks import dtype_name
from vit.config import ViTConfig
from vit.files import replacing
from vit.metadata import Preprocessing, Provenance
from vit.registry import registered

from .base import OptimizedViT
from .optimize import DTYPES, check_mode, kind, machine, missing

_HEADER = "vit.optimized"  # OPTIMIZED_KEY in weights/layouts/vit.py, where such a file is refused, is the same
_PARTS = {"sha256", "dtype", "config", "preprocessing", "categories", "provenance", "attention"}


def save(model: OptimizedViT, path: str | Path) -> Path:
    """Write an optimized model to a file, from which `load` makes the same one on any machine that can run it.

    Args:
        model: what `optimize` returned.
        path: a `.safetensors` file. An existing file is replaced whole or not at all.

    Returns:
        The path of the file.

    Raises:
        ValueError: a model that is not optimized, a path with another suffix, attention that a file cannot name (a
            function without a registered name, with options, or with weights of its own), `categories` or
            `preprocessing` that do not fit the model. The `check` of `set_attention` is not saved.
        FileNotFoundError: the folder does not exist.
    """
    if not isinstance(model, OptimizedViT):
        raise ValueError(f"expected what vit.kernels.optimize returns, not {type(model).__name__}")
    path = Path(path).resolve()
    if path.suffix != ".safetensors":
        raise ValueError(f"{path} must end in .safetensors")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {path.parent}")
    for attend in model.attends:
        if attend.options or attend.state_dict() or registered(attend.name) is not attend.source:
            raise ValueError(f"block {attend.block}: a file cannot name its attention {attend.choice.called!r}")
    tensors = model.tensors()
    header = {
        "dtype": model.optimized, "config": model.config.to_dict(),
        "preprocessing": asdict(model.preprocessing), "categories": model.categories,
        "attention": [attend.name for attend in model.attends],
        "provenance": None if model.provenance is None else model.provenance.to_dict(),
    }  # fmt: skip
    header = json.loads(json.dumps(header))  # as `load` will read it
    check_fit(model.config, header["categories"], model.preprocessing)
    metadata = {_HEADER: json.dumps(header | {"sha256": sha256(tensors, header)})}
    with replacing(path) as temporary:
        temporary.write_bytes(to_bytes(tensors, metadata))  # readable by others, unlike what `save_file` writes
    return path


def load(path: str | Path, mode: str = "latency") -> OptimizedViT:
    """Read what `save` wrote. Nothing is calibrated again.

    Args:
        path: the file. A model for a GPU is put on the current one.
        mode: as for `optimize`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another kind of file, a damaged one, or one that this machine cannot run; an unknown mode, or one
            that the file's dtype does not have.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} is not a file" if Path(path).exists() else f"{path} does not exist")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - not a dict
    except SafetensorError as error:
        raise ValueError(f"{path} is not a complete safetensors file: {error}") from None
    if _HEADER not in metadata:
        raise ValueError(f"{path} holds no optimized model: load it with vit.load_pretrained, then optimize it")
    try:
        return assemble(json.loads(metadata[_HEADER]), tensors, mode)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is damaged: its header {_HEADER} is not JSON: {error}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    except (TypeError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:  # of another version
        what = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} is not an optimized model as this version of vit saves it: {what}") from None


def assemble(header: dict[str, Any], tensors: dict[str, Tensor], mode: str) -> OptimizedViT:
    """The model that a file holds."""
    if not isinstance(header, dict) or header.keys() != _PARTS or header["sha256"] != sha256(tensors, header):
        raise ValueError("the file is damaged, or was written by another version: its sha256 does not match")
    dtype, config = dtype_name(header["dtype"], DTYPES), ViTConfig(**header["config"])
    preprocessing = Preprocessing(**header["preprocessing"])
    check_mode(mode, dtype)
    check_fit(config, header["categories"], preprocessing)
    if (count := len(header["attention"])) != config.depth:
        raise ValueError(f"the header names the attention of {count} blocks, but the model has {config.depth}")
    device = torch.device(machine(dtype))
    if reason := missing(dtype, device):
        raise ValueError(f"this machine cannot run {dtype}: {reason}")
    model = kind(dtype)(config, dtype, {name: tensor.to(device) for name, tensor in tensors.items()}, mode)
    model.preprocessing, model.categories = preprocessing, header["categories"]
    model.provenance = None if header["provenance"] is None else Provenance.from_dict(header["provenance"])
    for i, name in enumerate(header["attention"]):
        if name != model.attends[i].name:
            OptimizedViT.set_attention(model, name, [i])  # int8's warning is for attention set after calibration
    return model


def check_fit(config: ViTConfig, categories: object, preprocessing: Preprocessing) -> None:
    """ValueError for categories or preprocessing that do not fit the model."""
    classes, found = config.num_classes, len(preprocessing.mean)
    if found != config.in_chans:
        raise ValueError(f"preprocessing has {found} channels, the model has {config.in_chans}")
    if categories is None:
        return
    if (
        not isinstance(categories, list)
        or len(categories) != classes
        or not all(isinstance(name, str) for name in categories)
    ):
        raise ValueError(f"categories must be {classes} strings or None, not {str(categories)[:80]}")


def sha256(tensors: dict[str, Tensor], header: dict[str, Any]) -> str:
    """The hash of all tensors (name, dtype, shape, values) and of the header."""
    rest = {name: value for name, value in header.items() if name != "sha256"}
    whole = hashlib.sha256(json.dumps(rest, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        whole.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        whole.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()
