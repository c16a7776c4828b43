"""Optimized models to files and back: safetensors, with all that is no tensor in the header."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from vit.config import ViTConfig
from vit.metadata import Preprocessing, Provenance
from vit.registry import registered

from .base import OptimizedViT
from .optimize import DTYPES, check_mode, kind, machine, missing

_HEADER = "vit.optimized"
_PARTS = {"sha256", "dtype", "config", "preprocessing", "categories", "provenance", "attention"}


def save(model: OptimizedViT, path: str | Path) -> Path:
    """Write an optimized model, from which `load` brings back the same one on any machine that can run it.

    Args:
        model: what `optimize` returned.
        path: a `.safetensors` file. One that is there is replaced, by a whole one or not at all.

    Returns:
        The file.

    Raises:
        ValueError: another model, a path with another ending, attention that a file cannot name (a function without a
            registered name, with options or with weights of its own), names of classes or a preprocessing that are not
            this model's. Attention's `check` is not kept.
        FileNotFoundError: a folder that there is not.
    """
    if not isinstance(model, OptimizedViT):
        raise ValueError(f"expected what vit.kernels.optimize returns, not {type(model).__name__}")
    path = Path(os.path.realpath(path))
    if path.suffix != ".safetensors":
        raise ValueError(f"{path} must end in .safetensors")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {path.parent}")
    for attend in model.attends:
        if attend.options or attend.state_dict() or registered(attend.name) is not attend.source:
            raise ValueError(f"block {attend.block}: attention {attend.choice.called!r} cannot be named in a file")
    tensors = model.tensors()
    header = {
        "dtype": model.optimized, "config": model.config.to_dict(),
        "preprocessing": asdict(model.preprocessing), "categories": model.categories,
        "attention": [attend.name for attend in model.attends],
        "provenance": None if model.provenance is None else asdict(model.provenance),
    }  # fmt: skip
    header = json.loads(json.dumps(header))  # as it will be read
    check_described(model, header)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        metadata = {_HEADER: json.dumps(header | {"sha256": sha256(tensors, header)})}
        temporary.write_bytes(to_bytes(tensors, metadata))  # which others may read, unlike what `save_file` makes
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def load(path: str | Path, mode: str = "latency") -> OptimizedViT:
    """Read what `save` wrote, for the `mode` that `optimize` describes. Nothing is calibrated again.

    What was made for a GPU is put on the current one.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another kind of file, a damaged one, or one for a processor of another kind; an unknown mode, or
            "throughput" for what runs on a CPU.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist" if not Path(path).exists() else f"{path} is no file")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - not a dict
    except SafetensorError as error:
        raise ValueError(f"{path} is not a complete safetensors file: {error}") from None
    if _HEADER not in metadata:
        raise ValueError(f"{path} holds no optimized model: load it with vit.load_pretrained, then optimize it")
    try:
        return _assemble(json.loads(metadata[_HEADER]), tensors, mode)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is damaged: its header {_HEADER} is not JSON: {error}") from None
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{path} is no optimized model as vit.kernels.save writes it: {error!r}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _assemble(header: dict[str, Any], tensors: dict[str, Tensor], mode: str) -> OptimizedViT:
    if header.keys() != _PARTS or header["dtype"] not in DTYPES:
        found = f"{sorted(header)} and dtype {header.get('dtype')!r}"
        raise ValueError(f"the header has {found}, expected {sorted(_PARTS)}")
    check_mode(mode, header["dtype"])
    attention, depth = header["attention"], header["config"]["depth"]
    if not isinstance(attention, list) or len(attention) != depth:
        raise ValueError(f"the header names {attention!r} as attention, expected {depth} names")
    device = torch.device(machine(header["dtype"]))
    if reason := missing(header["dtype"], device):
        raise ValueError(f"this machine cannot run {header['dtype']}: {reason}")
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ValueError(f"{name} has values that are not finite")
    tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
    model = kind(header["dtype"])(ViTConfig(**header["config"]), header["dtype"], tensors, mode)
    check_described(model, header)
    if header["sha256"] != sha256(tensors, header):
        raise ValueError("the file is damaged, or of an older version: it does not hold what was written")
    model.preprocessing = Preprocessing(**header["preprocessing"])
    model.categories = header["categories"]
    model.provenance = None if header["provenance"] is None else Provenance.from_dict(header["provenance"])
    for i, name in enumerate(header["attention"]):
        if name != model.attends[i].name:
            OptimizedViT.set_attention(model, name, [i])  # which it was calibrated for
    return model


def check_described(model: OptimizedViT, header: dict[str, Any]) -> None:
    """ValueError for names of classes, or a preprocessing, that are not this model's."""
    names, classes, channels = header["categories"], model.config.num_classes, model.config.in_chans
    if names is not None and not (
        isinstance(names, list) and len(names) == classes and all(isinstance(name, str) for name in names)
    ):
        raise ValueError(f"categories must be {classes} texts or none, not {str(names)[:80]}")
    for part in ("mean", "std"):
        if len(header["preprocessing"][part]) != channels:
            raise ValueError(f"{part} must be {channels} numbers, not {header['preprocessing'][part]}")


def sha256(tensors: dict[str, Tensor], header: dict[str, Any]) -> str:
    """Of tensors, by name: what they hold, and their shapes and dtypes; and of the rest of the header."""
    rest = {name: value for name, value in header.items() if name != "sha256"}
    whole = hashlib.sha256(json.dumps(rest, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        whole.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        whole.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()
