"""int8 on a CPU: unsigned activations times signed weights, by the processor's VNNI instructions through oneDNN.

A number x is stored as q = round(x / scale) + zero, 0 to 255 (arXiv:1712.05877, Eq. 1). Weights have a scale for each
row and no zero; activations have one scale and zero for a whole tensor, fixed by calibration (`calibrate`). Only the
residual stream, LayerNorm's sums and attention are held in float32 between two products: LayerNorm ends in quantizing,
and fc1 in GELU and quantizing. Hooks see norms and the output of fc1 as bytes, the latter after the GELU and without
its widest channels, and v and heads smoothed.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vit.attend import Attend
from vit.config import ViTConfig
from vit.packed import Packing

from ..base import frozen, is_hooked
from .float32 import epilogue
from .numbered import NumberedLayer

LAYERS = ("attention.qkv", "attention.proj", "mlp.fc1", "mlp.fc2", "mlp.wide1", "mlp.wide2")  # of a block


def wide_channels(hidden: int) -> int:
    """How many of the MLP's hidden channels get a scale of their own."""
    return min(32, hidden // 2)


def expected(config: ViTConfig) -> dict[str, tuple[list[int], torch.dtype]]:
    """Shapes and dtypes of the tensors that the layers of a block are made of, by name."""
    D, H = config.embed_dim, config.mlp_dim
    wide = wide_channels(H)
    sizes = [(3 * D, D), (D, D), (H - wide, D), (D, H - wide), (wide, D), (D, wide)]
    kinds: dict[str, tuple[list[int], torch.dtype]] = {}
    for layer, (N, K) in zip(LAYERS, sizes):
        kinds |= {f"{layer}.weight": ([N, K], torch.int8), f"{layer}.weight_scale": ([N], torch.float32)}
        kinds |= {f"{layer}.bias": ([N], torch.float32), f"{layer}.scale": ([], torch.float32)}
        kinds[f"{layer}.zero"] = [], torch.int32
    return kinds


with warnings.catch_warnings():  # it warns once that it may be removed; nothing else is as fast
    warnings.simplefilter("ignore")
    if hasattr(torch, "quantize_per_tensor"):
        torch.quantize_per_tensor(torch.zeros(1), 1.0, 0, torch.quint8)


class Quantize(nn.Module):
    """float -> unsigned bytes."""

    def __init__(self, scale: Tensor, zero: Tensor) -> None:
        """Scalars: float32 above 0, and int32 from 0 to 255."""
        super().__init__()
        self.scale, self.zero = scale.item(), int(zero.item())
        self.factor, self.offset = 1 / scale.float(), zero.float()  # inputs of a compiled graph

    def forward(self, x: Tensor) -> Tensor:
        """x, of any shape, in bytes."""
        if torch.compiler.is_compiling():  # fused with what comes before it
            return (x * self.factor).round().add(self.offset).clamp(0, 255).to(torch.uint8)
        q = torch.quantize_per_tensor(x, self.scale, self.zero, torch.quint8)
        return torch.empty(0, dtype=torch.uint8).set_(q.untyped_storage(), 0, q.shape, q.stride())  # int_repr() copies


class QuantizedNorm(nn.Module):
    """LayerNorm, then `Quantize`."""

    def __init__(self, weight: Tensor, bias: Tensor, eps: float, quantize: Quantize) -> None:
        super().__init__()
        self.weight, self.bias, self.eps, self.quantize = weight, bias, eps, quantize

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] float32 -> [..., D] bytes."""
        return self.quantize(F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps))


class Int8Linear(NumberedLayer):
    """x W^T + b of bytes, then in registers GELU and quantizing, or the addition of the residual."""

    bias: Tensor
    weight_scale: Tensor
    weight_zero: Tensor

    def __init__(self, tensors: Mapping[str, Tensor], name: str, then: Quantize | None = None) -> None:
        """`tensors`: this layer's under `name`: weight [N, K] int8, weight_scale [N], bias [N], scale and zero of x."""
        super().__init__()
        weight = tensors[f"{name}.weight"]
        self.out_features, self.in_features = weight.shape
        self.quantize = Quantize(tensors[f"{name}.scale"], tensors[f"{name}.zero"])
        self.then = then
        self.register_buffer("bias", tensors[f"{name}.bias"])
        self.register_buffer("weight_scale", tensors[f"{name}.weight_scale"])
        self.register_buffer("weight_zero", torch.zeros(self.out_features, dtype=torch.int32))
        self.register_buffer("packed", self.pack(weight))

    @staticmethod
    def pack(weight: Tensor) -> Tensor:
        """As `NumberedLayer.pack`, of int8."""
        return torch.ops.onednn.qlinear_prepack(weight.contiguous(), None)

    @property
    def weight(self) -> Tensor:
        """As `NumberedLayer.weight`, in int8."""
        return self.packed.to_dense().t().contiguous()

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that it was made of."""
        scale, zero = torch.tensor(self.quantize.scale), torch.tensor(self.quantize.zero, dtype=torch.int32)
        parts = {"weight": self.weight, "weight_scale": self.weight_scale, "bias": self.bias}
        return {**parts, "scale": scale, "zero": zero}

    def dtype(self, wanted: torch.dtype) -> torch.dtype:
        """Bytes if quantizing follows."""
        return wanted if self.then is None else torch.uint8

    def compute(self, x: Tensor, residual: Tensor | None, dtype: torch.dtype, gelu: str | None) -> Tensor:
        """[..., K] bytes -> [..., N] of `dtype`, or bytes if quantizing follows."""
        start = x, self.quantize.scale, self.quantize.zero, self.packed, self.weight_scale, self.weight_zero
        linear = torch.ops.onednn.qlinear_pointwise
        if residual is not None:
            return linear.binary(*start, residual, self.bias, 1.0, 0, dtype, 1.0, 0, "add", 1.0, "none", [], "")
        if self.then is not None:
            return linear(*start, self.bias, self.then.scale, self.then.zero, torch.uint8, *epilogue(gelu))
        return linear(*start, self.bias, 1.0, 0, dtype, *epilogue(gelu))


def square_product(side: int) -> Callable[[], Tensor]:
    """A product of two square matrices of random bytes, to measure a machine's peak."""
    tensors = {
        "x.weight": torch.randint(-128, 128, (side, side), dtype=torch.int8), "x.weight_scale": torch.ones(side),
        "x.bias": torch.zeros(side), "x.scale": torch.tensor(1.0), "x.zero": torch.tensor(128, dtype=torch.int32),
    }  # fmt: skip
    return partial(Int8Linear(tensors, "x"), torch.randint(256, (side, side), dtype=torch.uint8))


def multiplies_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 faster than float32."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


class Int8Attention(nn.Module):
    """`vit.model.Attention` between bytes and the residual stream."""

    def __init__(self, config: ViTConfig, block: int, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.multiplies_bfloat16 = multiplies_bfloat16()
        self.qkv = Int8Linear(tensors, "attention.qkv")
        self.attend = Attend(config, block)
        self.proj = Int8Linear(tensors, "attention.proj")

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of q, k and v: bfloat16 for `bmm` where that is fast, float32 for other functions."""
        return torch.bfloat16 if self.attend.name == "bmm" and self.multiplies_bfloat16 else torch.float32

    def forward(self, x: Tensor, residual: Tensor | None, packing: Packing | None = None) -> Tensor:
        """[B, T, D] bytes, and the residual stream [B, T', D] -> [B, T', D], with the first T' tokens as queries.

        If the residual stream is None, what is to be added to it.
        """
        B, T, D = x.shape
        n = T if residual is None else residual.shape[1]
        qkv = self.qkv(x, dtype=self.dtype).view(B, T, 3, self.num_heads, D // self.num_heads)  # [B, T, 3, A, d]
        q, k, v = qkv.permute(2, 0, 3, 1, 4).contiguous().unbind(0)  # each [B, A, T, d]
        out = self.attend(q[:, :, :n], k, v, packing).transpose(1, 2)  # [B, T', A, d]
        out = out.to(torch.float32, memory_format=torch.contiguous_format).reshape(B, n, D)
        return self.proj(self.proj.quantize(out), residual)


class Int8MLP(nn.Module):
    """`vit.model.MLP` between bytes and the residual stream; the widest hidden channels have layers of their own."""

    def __init__(self, config: ViTConfig, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.fc2, self.wide2 = Int8Linear(tensors, "mlp.fc2"), Int8Linear(tensors, "mlp.wide2")
        self.fc1 = Int8Linear(tensors, "mlp.fc1", self.fc2.quantize)
        self.wide1 = Int8Linear(tensors, "mlp.wide1", self.wide2.quantize)
        self.gelu = "none" if config.gelu == "erf" else "tanh"

    def forward(self, x: Tensor, residual: Tensor | None) -> Tensor:
        """[B, T, D] bytes, and the residual stream [B, T, D] -> [B, T, D]; if None, what is to be added to it."""
        hidden, wide = self.fc1(x, gelu=self.gelu), self.wide1(x, gelu=self.gelu)  # [B, T, 4D] in two parts
        return self.wide2(wide, self.fc2(hidden, residual))


class Int8Block(nn.Module):
    """`vit.model.Block`, with its norms and products in bytes."""

    def __init__(self, config: ViTConfig, block: int, tensors: Mapping[str, Tensor]) -> None:
        """`tensors`: the block's, by their names in it, as `calibrate` gives them."""
        super().__init__()
        self.attention = Int8Attention(config, block, tensors)
        self.mlp = Int8MLP(config, tensors)
        parts = (("norm1", self.attention.qkv), ("norm2", self.mlp.fc1))
        self.norm1, self.norm2 = (
            QuantizedNorm(frozen(tensors[f"{n}.weight"]), frozen(tensors[f"{n}.bias"]), config.eps, layer.quantize)
            for n, layer in parts
        )

    def forward(self, x: Tensor, packing: Packing | None = None) -> Tensor:
        """As `vit.model.Block.forward`."""
        if is_hooked((self.attention, self.mlp)):  # hooks see the same as in the original model
            x = x + self.attention(self.norm1(x), None, packing)  # [B, T, D]
            return x + self.mlp(self.norm2(x), None)  # [B, T, D]
        x = self.attention(self.norm1(x), x, packing)  # [B, T, D]
        return self.mlp(self.norm2(x), x)  # [B, T, D]

    def first(self, x: Tensor, n: int) -> Tensor:
        """[B, T, D] -> [B, n, D], the block's result for the first n tokens; the others are only keys and values."""
        x = self.attention(self.norm1(x), x[:, :n].contiguous())  # [B, n, D]
        return self.mlp(self.norm2(x), x)  # [B, n, D]

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that it was made of, by their names in it."""
        tensors: dict[str, Tensor] = dict(self.named_parameters())
        for name, module in self.named_modules():
            if isinstance(module, Int8Linear):
                tensors |= {f"{name}.{part}": x for part, x in module.tensors().items()}
        return tensors
