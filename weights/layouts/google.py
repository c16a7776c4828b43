"""Google's Flax checkpoints: AugReg's npz files (vision_transformer) and big_vision's, plain and scanned.

Flax computes x @ kernel, so its kernels are our weights transposed, and it keeps the heads apart.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from vit.metadata import Preprocessing

from ..checkpoint import CheckpointError
from ..keymap import SAME, Assumptions, Detection, Entry, Files, Holds, Layout, Naming, Transform, same


def _require(tensor: Tensor, *shape: int | None) -> None:
    if tensor.ndim != len(shape) or any(want not in (None, side) for want, side in zip(shape, tensor.shape)):
        expected = ", ".join("*" if side is None else str(side) for side in shape)
        raise ValueError(f"has shape {list(tensor.shape)}, expected [{expected}]")


def _transposed(parts: list[Tensor], heads: int) -> Tensor:
    _require(parts[0], None, None)
    return parts[0].T.contiguous()


def _conv(parts: list[Tensor], heads: int) -> Tensor:
    _require(parts[0], None, None, None, None)
    return parts[0].permute(3, 2, 0, 1).contiguous()


def _qkv_kernels(parts: list[Tensor], heads: int) -> Tensor:
    _require(parts[0], None, heads, None)
    for part in parts:
        _require(part, *parts[0].shape)
    return torch.cat([part.flatten(1).T for part in parts])  # each [D, A, d] -> [D, A*d] -> [A*d, D]


def _split_kernels(whole: Tensor, heads: int) -> list[Tensor]:
    return [part.T.unflatten(1, (heads, -1)).contiguous() for part in whole.chunk(3)]


def _qkv_biases(parts: list[Tensor], heads: int) -> Tensor:
    _require(parts[0], heads, None)
    for part in parts:
        _require(part, *parts[0].shape)
    return torch.cat([part.flatten() for part in parts])  # each [A, d] -> [A*d]


def _split_biases(whole: Tensor, heads: int) -> list[Tensor]:
    return [part.unflatten(0, (heads, -1)) for part in whole.chunk(3)]


def _out(parts: list[Tensor], heads: int) -> Tensor:
    _require(parts[0], heads, None, None)
    return parts[0].flatten(0, 1).T.contiguous()  # [A, d, D] -> [A*d, D] -> [D, A*d]


TRANSPOSE = Transform("transpose", _transposed, lambda whole, heads: [whole.T.contiguous()])
CONV = Transform("HWIO to OIHW", _conv, lambda whole, heads: [whole.permute(2, 3, 1, 0).contiguous()])
QKV = Transform("join heads, transpose, fuse q, k, v", _qkv_kernels, _split_kernels)
QKV_BIAS = Transform("join heads, fuse q, k, v", _qkv_biases, _split_biases)
OUT = Transform("join heads, transpose", _out, lambda whole, heads: [whole.T.unflatten(0, (heads, -1)).contiguous()])


def _dense(ours: str, theirs: str) -> list[Entry]:
    return [Entry(f"{ours}.weight", (f"{theirs}/kernel",), TRANSPOSE), Entry(f"{ours}.bias", (f"{theirs}/bias",))]


def _norm(ours: str, theirs: str) -> list[Entry]:
    return [Entry(f"{ours}.weight", (f"{theirs}/scale",), SAME), Entry(f"{ours}.bias", (f"{theirs}/bias",))]


def _entries(position: str, attention: str, norm2: str, mlp: str) -> tuple[Entry, ...]:
    block = "Transformer/encoderblock_{}"
    query, key, value, out = (f"{block}/{attention}/{name}" for name in ("query", "key", "value", "out"))
    return (
        *same("class_token", "cls"),
        *same("position_embedding", position),
        Entry("patch_embed.proj.weight", ("embedding/kernel",), CONV),
        *same("patch_embed.proj.bias", "embedding/bias"),
        *_norm("blocks.{}.norm1", f"{block}/LayerNorm_0"),
        Entry("blocks.{}.attention.qkv.weight", (f"{query}/kernel", f"{key}/kernel", f"{value}/kernel"), QKV),
        Entry("blocks.{}.attention.qkv.bias", (f"{query}/bias", f"{key}/bias", f"{value}/bias"), QKV_BIAS),
        Entry("blocks.{}.attention.proj.weight", (f"{out}/kernel",), OUT),
        *same("blocks.{}.attention.proj.bias", f"{out}/bias"),
        *_norm("blocks.{}.norm2", f"{block}/{norm2}"),
        *_dense("blocks.{}.mlp.fc1", f"{block}/{mlp}/Dense_0"),
        *_dense("blocks.{}.mlp.fc2", f"{block}/{mlp}/Dense_1"),
        *_norm("norm", "Transformer/encoder_norm"),
        *_dense("head", "head"),
    )


def _heads(state_dict: Mapping[str, Tensor]) -> int:
    """The kernels keep the heads apart, so their shapes tell how many there are. 0 if there is no such kernel."""
    for key, tensor in state_dict.items():
        if key.endswith("/query/kernel") and tensor.ndim == 3:
            return tensor.shape[1]
    return 0


AUGREG = Layout(
    "augreg",
    "Google's vision_transformer, AugReg's npz files",
    _entries("Transformer/posembed_input/pos_embedding", "MultiHeadDotProductAttention_1", "LayerNorm_2", "MlpBlock_3"),
    Detection(("Transformer/encoderblock_0/MultiHeadDotProductAttention_1/query/kernel",)),
    assumptions=Assumptions(
        read_heads=_heads,
        defaults={"gelu": "tanh", "position_rule": "jax"},  # flax.linen.gelu approximates, scipy's zoom resamples
        preprocessing=Preprocessing(mode="squash", crop_pct=1.0, interpolation="bilinear"),
    ),
    holds=Holds({"dist_token": (False,), "global_pool": ("token",), "fc_norm": (False,)}),
    files=Files(npz=True),
    library="timm",
)

BIG_VISION = replace(
    AUGREG,
    name="big_vision",
    about="Google's big_vision",
    entries=_entries("pos_embedding", "MultiHeadDotProductAttention_0", "LayerNorm_1", "MlpBlock_0"),
    detection=Detection(
        ("Transformer/encoderblock_0/MultiHeadDotProductAttention_0/query/kernel", "pos_embedding"),
    ),
)


_STACKED, _NUMBERED = "Transformer/encoderblock/", re.compile(r"Transformer/encoderblock_([0-9]+)/(.*)")


def unstack(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A scanned model's parameters, [L, ...] for all blocks at once -> one tensor for each block."""
    result: dict[str, Tensor] = {}
    depths = set()
    for key, tensor in state_dict.items():
        if not key.startswith(_STACKED) or not isinstance(tensor, Tensor):
            result[key] = tensor
            continue
        if tensor.ndim == 0:
            raise CheckpointError(f"{key} has shape [], expected the blocks along its first dimension")
        depths.add(tensor.shape[0])
        if len(depths) > 1:
            raise CheckpointError(f"{key} has {tensor.shape[0]} blocks, others have {min(depths - {tensor.shape[0]})}")
        for i, one in enumerate(tensor):
            result[f"Transformer/encoderblock_{i}/{key.removeprefix(_STACKED)}"] = one.clone()  # memory of its own
    return result


def stack(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `unstack`."""
    result: dict[str, Tensor] = {}
    blocks: dict[str, list[Tensor]] = {}
    for key, tensor in state_dict.items():
        if (found := _NUMBERED.fullmatch(key)) is None:
            result[key] = tensor
        else:
            blocks.setdefault(found.group(2), []).append(tensor)  # our blocks come in order
    return result | {_STACKED + name: torch.stack(tensors) for name, tensors in blocks.items()}


BIG_VISION_SCANNED = replace(
    BIG_VISION,
    name="big_vision_scanned",
    about="Google's big_vision, scanned: the blocks stacked along a first dimension",
    detection=Detection(("Transformer/encoderblock/MultiHeadDotProductAttention_0/query/kernel", "pos_embedding")),
    naming=Naming(unpack=unstack, pack=stack),
)

LAYOUTS = (AUGREG, BIG_VISION, BIG_VISION_SCANNED)
