"""The blocks of a ViT as a few fused kernels each, and the tensors that they are made of."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from vit.attend import Attend
from vit.attention import sdpa
from vit.config import ViTConfig
from vit.model import ViT
from vit.packed import Packing

from ..base import Kinds, float_tensors, is_hooked
from . import fused, plain
from .tiles import Tile
from .tuning import fastest

LAYERS = ("attention.qkv", "attention.proj", "mlp.fc1", "mlp.fc2")  # of a block
OPAQUE = "a block of Triton kernels, chosen by measurement, is fused already"  # why torch.compile leaves it out
NORMS = {"attention.qkv": "norm1", "mlp.fc1": "norm2"}  # which are folded into them


def half_tensors(model: ViT, dtype: torch.dtype) -> dict[str, Tensor]:
    """A model's weights in `dtype`, LayerScale and the blocks' norms folded in; biases of products stay in float32."""
    tensors = float_tensors(model)
    for i in range(model.config.depth):
        for layer in LAYERS:
            name = f"blocks.{i}.{layer}"
            if layer in NORMS:
                gamma, beta = (tensors.pop(f"blocks.{i}.{NORMS[layer]}.{part}") for part in ("weight", "bias"))
                folded = fused.fold_norm(tensors[f"{name}.weight"], tensors[f"{name}.bias"], gamma, beta, dtype)
                tensors |= {f"{name}.{part}": x for part, x in folded.items()}
    wide = [name for name, (_, kind) in expected(model, dtype).items() if kind == torch.float32]
    return {name: x if name in wide else x.to(dtype) for name, x in tensors.items()}


def expected(model: ViT, dtype: torch.dtype) -> Kinds:
    """The shapes and dtypes of the tensors that such a model is made of, by name."""
    kinds: Kinds = {}
    for name, x in model.named_parameters():
        layer, _, part = name.rpartition(".")
        of_block = name.startswith("blocks.")
        if of_block and layer.partition(".")[2].partition(".")[2] not in LAYERS:
            continue  # norms and scales, which are folded
        wide = name in ("position_embedding", "patch_embed.proj.bias") or (of_block and part == "bias")
        kinds[name] = list(x.shape), torch.float32 if wide else dtype
        if of_block and part == "bias" and layer.endswith(tuple(NORMS)):
            kinds[f"{layer}.sums"] = list(x.shape), torch.float32
    return kinds


class FusedLinear(nn.Module):
    """gelu(norm(x) W^T + b) + residual, in one kernel; see `plain.linear`."""

    weight: Tensor
    bias: Tensor
    sums: Tensor | None

    def __init__(self, tensors: Mapping[str, Tensor], name: str, eps: float, gelu: str = "") -> None:
        super().__init__()
        self.eps, self.gelu = eps, gelu
        for part in ("weight", "bias", "sums"):
            self.register_buffer(part, tensors.get(f"{name}.{part}"))

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """[..., K] -> [..., N]."""
        args = (x, self.weight, self.bias, self.sums, self.eps, self.gelu, residual)

        def call(tile: Tile | None) -> Tensor:
            return plain.linear(*args) if tile is None else fused.linear(*args, tile)

        kind = ("norm, " * (self.sums is not None)) + (self.gelu and "gelu, ") + ("sum, " * (residual is not None))
        return fastest("linear", f"{kind}{list(self.weight.shape)}", x, x.shape[:-1].numel(), call)

    def extra_repr(self) -> str:
        """For print(model)."""
        N, K = self.weight.shape
        return f"in_features={K}, out_features={N}, norm={self.sums is not None}, gelu={self.gelu or None}"


def add_to(residual: Tensor | None, layer: FusedLinear, x: Tensor) -> Tensor:
    """residual + layer(x), in one kernel unless the layer has hooks, which see its output alone."""
    if residual is not None and is_hooked([layer]):
        return residual + layer(x)
    return layer(x, residual)


class FusedAttention(nn.Module):
    """`vit.model.Attention` with the norm before it and the residual addition after it."""

    def __init__(self, config: ViTConfig, block: int, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = FusedLinear(tensors, "attention.qkv", config.eps)
        self.attend = Attend(config, block)
        self.proj = FusedLinear(tensors, "attention.proj", config.eps)

    def forward(self, x: Tensor, residual: Tensor | None, packing: Packing | None = None) -> Tensor:
        """[B, T, D] -> [B, T, D], residual + attention(norm(x)); if the residual is None, what is to be added to it."""
        q, k, v = self.split(self.qkv(x))
        out = self.attend(q, k, v, packing)  # [B, A, T, d]
        return add_to(residual, self.proj, out.transpose(1, 2).reshape(x.shape))  # [B, T, D]

    def first(self, x: Tensor, n: int) -> Tensor:
        """[B, T, D] -> [B, n, D], for the first n tokens; the others are only keys and values."""
        q, k, v = self.split(self.qkv(x))
        out = sdpa(q[:, :, :n], k, v).transpose(1, 2)  # [B, n, A, d]
        return self.proj(out.reshape(len(x), n, -1), x[:, :n])  # [B, n, D]

    def split(self, qkv: Tensor) -> tuple[Tensor, ...]:
        """[B, T, 3D] -> q, k and v, views [B, A, T, d]."""
        B, T, _ = qkv.shape
        return qkv.view(B, T, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)


class FusedMLP(nn.Module):
    """`vit.model.MLP` with the norm before it and the residual addition after it: one kernel, or two if faster."""

    def __init__(self, config: ViTConfig, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.fc1 = FusedLinear(tensors, "mlp.fc1", config.eps, config.gelu)
        self.fc2 = FusedLinear(tensors, "mlp.fc2", config.eps)

    def forward(self, x: Tensor, residual: Tensor | None) -> Tensor:
        """[B, T, D] -> [B, T, D]: residual, which is x, + mlp(norm(x)); if it is None, what is to be added to it."""
        fc1, fc2 = self.fc1, self.fc2

        def call(tile: Tile | None) -> Tensor:
            if tile is None:
                return add_to(residual, fc2, fc1(x))
            assert fc1.sums is not None
            first, second = (fc1.weight, fc1.bias, fc1.sums), (fc2.weight, fc2.bias)
            return fused.mlp(x, *first, *second, fc1.eps, fc1.gelu, residual is not None, tile)

        H, D = fc1.weight.shape
        if D not in fused.THIRDS or is_hooked(self.children()):
            return call(None)
        return fastest("mlp", f"{[H, D]}", x, x.shape[:-1].numel(), call)


class FusedBlock(nn.Module):
    """`vit.model.Block` in four or five kernels."""

    def __init__(self, config: ViTConfig, block: int, tensors: Mapping[str, Tensor]) -> None:
        """`tensors`: the block's, by their names in it, as `half_tensors` gives them."""
        super().__init__()
        self.norm1 = nn.Identity()  # the norm is part of qkv; `vit.attention_maps` reads norm1
        self.attention = FusedAttention(config, block, tensors)
        self.mlp = FusedMLP(config, tensors)

    @torch.compiler.disable(reason=OPAQUE)
    def forward(self, x: Tensor, packing: Packing | None = None) -> Tensor:
        """As `vit.model.Block.forward`."""
        if is_hooked((self.attention, self.mlp)):  # hooks see the same as in the original model
            x = x + self.attention(x, None, packing)  # [B, T, D]
            return x + self.mlp(x, None)  # [B, T, D]
        x = self.attention(x, x, packing)  # [B, T, D]
        return self.mlp(x, x)  # [B, T, D]

    def first(self, x: Tensor, n: int) -> Tensor:
        """[B, T, D] -> [B, n, D], the block's result for the first n tokens."""
        x = self.attention.first(x, n)  # [B, n, D]
        return self.mlp(x, x)  # [B, n, D]
