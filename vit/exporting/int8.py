"""int8 for exported files: products of bytes, written as QuantizeLinear and DequantizeLinear around float ones.

Runtimes fuse each product with what stands around it. Activations are unsigned bytes and weights signed ones, [K, N]
with a scale for each column, calibrated as `vit.kernels.cpu.calibrate` does it, with two differences that make graphs
faster: the MLP's widest hidden channels are made narrower behind the GELU, by a factor that the next weight is
multiplied by, instead of getting products of their own; and queries and keys are bytes, too. First each channel of the
queries is multiplied, and that of the keys divided, by a factor, so that both reach equally far, and all heads alike.

Processors without VNNI add two products of an unsigned and a signed byte in 16 bits, where 2 * 255 * 127 does not fit;
with a reduced range weights and keys reach to 63 only, and it does.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from random import Random
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from vit.model import Block, ViT

LEAST, MOST = 40, 640  # images to calibrate on, with those that are held out
FULL, REDUCED = 127, 63  # how far weights and keys reach
MARGIN = 1.05  # queries and keys may reach this much farther than what was seen
LAYERS = ("attention.qkv", "attention.proj", "mlp.fc1", "mlp.fc2")


class Images(NamedTuple):
    """The images of a calibration."""

    used: list[Tensor]  # each [C, H, W], normalised
    held_out: list[Tensor]  # for the check


def split(images: list[Tensor], groups: list[int], seed: int = 0) -> Images:
    """Hold out a fifth of the groups, at least one, drawn with a seed; `groups` has the group of each image."""
    names = sorted(set(groups))
    held_out = set(Random(seed).sample(names, max(1, len(names) // 5)))
    parts: tuple[list[Tensor], list[Tensor]] = ([], [])
    for image, group in zip(images, groups):
        parts[group in held_out].append(image)
    return Images(*parts)


def images_for(model: ViT, images: Tensor | Sequence[Tensor] | None) -> Images:
    """The caller's images, or parts of the photographs that ship, of which whole photographs are held out.

    Raises:
        ValueError: too few or unsuitable images, as in `vit.kernels.optimize`.
    """
    from vit.kernels.cpu.images import photographs

    if images is None:
        crops = list(photographs(model))
        return split(crops, [i * 7 // len(crops) for i in range(len(crops))], seed=5)  # holds out hubble_deep_field
    found = list(images) if isinstance(images, (Tensor, list, tuple)) else images
    if not isinstance(found, list):
        raise ValueError(f"expected a tensor [n, C, H, W] or a list of [C, H, W] to calibrate on, not {type(found)}")
    if not LEAST <= len(found) <= MOST:
        raise ValueError(
            f"expected {LEAST} to {MOST} images to calibrate on, a fifth of which is held out for the check, not"
            f" {len(found)}"
        )
    return split(found, list(range(len(found))))


@torch.no_grad()
def quantized(model: ViT, images: list[Tensor], limit: int = FULL) -> ViT:
    """A copy whose blocks multiply bytes once it is exported, calibrated on images, each [C, H, W].

    `limit` is how far weights and keys reach, `FULL` or `REDUCED`.

    In PyTorch it computes the same with rounded floats, slowly: it is the readable twin of the graph.

    Raises:
        ValueError: attention other than softmax(q k^T / sqrt(d)) v; too few or unsuitable images.
    """
    from vit.kernels.cpu.images import batches

    for i, attend in enumerate(model.attends):
        if not attend.exact:
            raise ValueError(
                f"int8 is for softmax(q k^T / sqrt(d)) v, and block {i} attends by {attend.choice.called!r}:"
                " export it in float32"
            )
    tensors = calibrate(model, batches(model, images), limit)
    twin = copy.deepcopy(model)
    for name, tensor in tensors.items():
        owner, _, part = name.rpartition(".")
        if tensor.is_floating_point() and part in ("weight", "bias") and ".norm" in name:
            setattr(twin.get_submodule(owner), part, nn.Parameter(tensor, requires_grad=False))
    for i, block in enumerate(cast(Any, twin.blocks)):
        of_block = {
            name.removeprefix(f"blocks.{i}."): x for name, x in tensors.items() if name.startswith(f"blocks.{i}.")
        }
        block.scale1 = block.scale2 = None  # in the weights
        for layer in LAYERS:
            owner, _, part = layer.rpartition(".")
            setattr(block.get_submodule(owner), part, ByteLinear(of_block, layer))
        block.mlp.act = nn.Sequential(block.mlp.act, Narrow(of_block["mlp.narrow"]))
        block.attention.attend = ByteAttend(of_block["attention.factor"], limit)
    return twin


class Quantize(nn.Module):
    """Numbers to bytes and back: x is rounded to one of 256 levels (arXiv:1712.05877, Eq. 1)."""

    scale: Tensor
    zero: Tensor

    def __init__(self, scale: Tensor, zero: Tensor) -> None:
        """`scale`: float32, a scalar. `zero`: a scalar in uint8, or in int8 for signed bytes."""
        super().__init__()
        self.register_buffer("scale", scale)
        self.register_buffer("zero", zero)

    def forward(self, x: Tensor) -> Tensor:
        """x, of any shape, as float32."""
        if torch.compiler.is_exporting():
            dtype, shape = self.zero.dtype, list(x.shape)
            q = torch.onnx.ops.symbolic("QuantizeLinear", (x, self.scale, self.zero), dtype=dtype, shape=shape)
            numbers = (q, self.scale, self.zero)
            return torch.onnx.ops.symbolic("DequantizeLinear", numbers, dtype=torch.float32, shape=shape)
        kind, zero = torch.iinfo(self.zero.dtype), self.zero.float()
        return ((x / self.scale).round() + zero).clamp(kind.min, kind.max).sub(zero) * self.scale


class ByteLinear(nn.Module):
    """x W + b of bytes."""

    weight: Tensor  # [K, N] int8
    weight_scale: Tensor  # [N]
    weight_zero: Tensor  # [N] int8, zeros
    bias: Tensor  # [1, 1, N]: ONNX Runtime makes a float product of a bias [N] and the product before it

    def __init__(self, tensors: dict[str, Tensor], name: str) -> None:
        """`tensors`: this layer's under `name`, as `calibrate` gives them."""
        super().__init__()
        self.quantize = Quantize(tensors[f"{name}.scale"], tensors[f"{name}.zero"].to(torch.uint8))
        self.register_buffer("weight", tensors[f"{name}.weight"].t().contiguous())
        self.register_buffer("weight_scale", tensors[f"{name}.weight_scale"])
        self.register_buffer("weight_zero", torch.zeros_like(self.weight_scale, dtype=torch.int8))
        self.register_buffer("bias", tensors[f"{name}.bias"].view(1, 1, -1))

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, K] -> [B, T, N]."""
        weight = self.weight.float() * self.weight_scale
        if torch.compiler.is_exporting():
            numbers = (self.weight, self.weight_scale, self.weight_zero)
            weight = torch.onnx.ops.symbolic(
                "DequantizeLinear", numbers, {"axis": 1}, dtype=torch.float32, shape=list(self.weight.shape)
            )
        return self.quantize(x) @ weight + self.bias


class Narrow(nn.Module):
    """Multiplies each channel by a factor."""

    factor: Tensor

    def __init__(self, factor: Tensor) -> None:
        super().__init__()
        self.register_buffer("factor", factor)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor  # [B, T, mlp_dim]


class ByteAttend(nn.Module):
    """Takes the place of `vit.attend.Attend`: softmax attention with queries and keys in bytes."""

    exact = True
    factor: Tensor  # [A, 1, 1]

    def __init__(self, factor: Tensor, limit: int) -> None:
        """`factor` [A, 1, 1]: what the product of queries and keys, which reach to 1 in each head, is multiplied by."""
        super().__init__()
        zero = torch.zeros((), dtype=torch.int8)
        self.queries = Quantize(torch.tensor(MARGIN / FULL), zero)
        self.keys = Quantize(torch.tensor(MARGIN / limit), zero.clone())
        self.register_buffer("factor", factor)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, packing: object = None) -> Tensor:
        """[B, A, T', d], [B, A, T, d], [B, A, T, d] -> [B, A, T', d]."""
        return self.weights(q, k) @ v

    def weights(self, q: Tensor, k: Tensor) -> Tensor:
        """[B, A, T', d], [B, A, T, d] -> [B, A, T', T], rows that sum to 1."""
        scores = self.queries(q) @ self.keys(k).transpose(-2, -1)  # [B, A, T', T]
        return (scores * self.factor).softmax(dim=-1)


def calibrate(model: ViT, images: list[Tensor], limit: int) -> dict[str, Tensor]:
    """The tensors of the blocks, by name, from images in batches [B, C, H, W].

    Of each layer weight [N, K] int8, weight_scale [N], bias [N], and scale and zero of its inputs; of each block
    mlp.narrow [mlp_dim] and attention.factor [A, 1, 1].
    """
    from vit.kernels.base import float_tensors
    from vit.kernels.cpu.calibrate import look, quantize, smooth

    D, tensors = model.config.embed_dim, float_tensors(model)
    with ExitStack() as stack:
        reach = [torch.zeros(3 * D) for _ in model.blocks]  # the largest of q, k and v, per channel
        for block, largest in zip(cast("list[Block]", model.blocks), reach):
            hook = block.attention.qkv.register_forward_hook(partial(_note, largest))
            stack.callback(hook.remove)
        seen = look(model, images)
    for i in range(model.config.depth):
        start, q, k = f"blocks.{i}.", reach[i][:D], reach[i][D : 2 * D]
        of_block = {layer: seen[start + layer] for layer in LAYERS}
        for layer in ("attention.qkv", "mlp.fc1", "attention.proj"):
            of_block[layer] = smooth(tensors, start, layer, of_block[layer])
        of_block["mlp.fc2"] = _narrow(tensors, start, of_block["mlp.fc2"])
        _balance(tensors, start, q, k, model.config.num_heads)
        for layer in LAYERS:
            quantize(tensors, start + layer, of_block[layer], limit)
    return tensors


def _note(largest: Tensor, layer: nn.Module, inputs: object, output: Tensor) -> None:
    """A hook: keep the largest absolute value of each channel."""
    torch.maximum(largest, output.abs().amax((0, 1)), out=largest)


def _narrow(tensors: dict[str, Tensor], block: str, seen: Any) -> Any:
    """Bring the widest hidden channels down to the next one, and say what the inputs of fc2 then are."""
    from vit.kernels.cpu.calibrate import Seen
    from vit.kernels.cpu.int8 import wide_channels

    largest = torch.maximum(seen.low.abs(), seen.high.abs()).clamp(min=1e-5)  # [H]
    bound = largest.sort().values[-wide_channels(len(largest)) - 1]
    factor = (largest / bound).clamp(min=1)  # [H]
    tensors[f"{block}mlp.fc2.weight"] = tensors[f"{block}mlp.fc2.weight"] * factor
    tensors[f"{block}mlp.narrow"] = 1 / factor
    return Seen(seen.low / factor, seen.high / factor, seen.mean / factor)


def _balance(tensors: dict[str, Tensor], block: str, q: Tensor, k: Tensor, heads: int) -> None:
    """Let each channel of queries and keys, which reach to q and k [D], reach as far, the farthest of a head to 1."""
    q, k = q.clamp(min=1e-5).view(heads, -1), k.clamp(min=1e-5).view(heads, -1)  # [A, d]
    farthest = (q * k).sqrt().amax(1, keepdim=True)  # [A, 1]
    ratio = (k / q).sqrt()  # [A, d]
    factors = torch.cat([(ratio / farthest).flatten(), (1 / ratio / farthest).flatten(), torch.ones(q.numel())])  # [3D]
    tensors[f"{block}attention.qkv.weight"] = tensors[f"{block}attention.qkv.weight"] * factors[:, None]
    tensors[f"{block}attention.qkv.bias"] = tensors[f"{block}attention.qkv.bias"] * factors
    tensors[f"{block}attention.factor"] = (farthest**2 * q.shape[1] ** -0.5)[:, :, None]  # [A, 1, 1]
