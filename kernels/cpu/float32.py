"""float32 on a CPU: the same numbers from oneDNN's products, whose weights lie in its own layout from the start.

oneDNN (https://uxlfoundation.github.io/oneDNN) multiplies fastest by weights in blocks that fit its registers. Eager
PyTorch hands them over as rows, in every call; here they are brought into that layout once, GELU is applied to a
product while it is still in registers, and LayerScale is a part of the weights.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from vit.config import ViTConfig
from vit.model import Block

from ..optimized import frozen
from .numbered import NumberedLayer


def epilogue(gelu: str | None) -> tuple[str, list, str]:
    """How oneDNN's products are told to end in a GELU, "erf" or "tanh", or in nothing."""
    return ("gelu", [], "none" if gelu == "erf" else "tanh") if gelu else ("none", [], "")


class PackedLinear(NumberedLayer):
    """gelu(x W^T + b), or without the GELU, by oneDNN."""

    bias: Tensor
    packed: Tensor

    def __init__(self, weight: Tensor, bias: Tensor, gelu: str | None = None) -> None:
        """[N, K] and [N] float32; `gelu` "erf" or "tanh"."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.gelu = gelu
        self.register_buffer("bias", bias)
        self.register_buffer("packed", torch.ops.mkldnn._reorder_linear_weight(weight.contiguous()))
        self.epilogue = epilogue(gelu)

    def compute(self, x: Tensor, residual: Tensor | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
        """[..., K] -> [..., N]; float32, with no residual."""
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, *self.epilogue)

    @property
    def weight(self) -> Tensor:
        """[N, K], a copy in rows."""
        return self.packed.to_dense()

    def extra_repr(self) -> str:
        """For print(model)."""
        return f"in_features={self.in_features}, out_features={self.out_features}, gelu={self.gelu}"

    def __reduce__(self) -> tuple:  # copies and pickles go by rows: oneDNN's layout is this machine's
        return PackedLinear, (self.weight, self.bias, self.gelu)


class FloatBlock(Block):
    """A block whose products are packed: what runs is `vit.model.Block`."""

    def __init__(self, config: ViTConfig, block: int, tensors: Mapping[str, Tensor]) -> None:
        """`tensors`: the block's, by their names in it."""
        super().__init__(config, block, drop_path_rate=0.0)
        self.scale1 = self.scale2 = None
        for norm, name in ((self.norm1, "norm1"), (self.norm2, "norm2")):
            norm.weight, norm.bias = (frozen(tensors[f"{name}.{part}"]) for part in ("weight", "bias"))

        def packed(name: str, gelu: str | None = None) -> PackedLinear:
            return PackedLinear(tensors[f"{name}.weight"], tensors[f"{name}.bias"], gelu)

        for name in ("attention.qkv", "attention.proj", "mlp.fc1", "mlp.fc2"):
            owner, _, layer = name.rpartition(".")
            setattr(self.get_submodule(owner), layer, packed(name, config.gelu if layer == "fc1" else None))
        self.mlp.add_module("act", nn.Identity())  # fc1 does it

    def first(self, x: Tensor, n: int) -> Tensor:
        """[B, T, D] -> [B, n, D], what the block makes of the first n tokens: the others are keys and values only."""
        B, T, D = x.shape
        qkv = self.attention.qkv(self.norm1(x)).view(B, T, 3, self.attention.num_heads, -1)  # [B, T, 3, A, d]
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each [B, A, T, d]
        out = self.attention.attend(q[:, :, :n], k, v)  # [B, A, n, d]
        x = x[:, :n] + self.attention.proj(out.transpose(1, 2).reshape(B, n, D))  # [B, n, D]
        return x + self.mlp(self.norm2(x))  # [B, n, D]

    def tensors(self) -> dict[str, Tensor]:
        """What it was made of."""
        tensors: dict[str, Tensor] = dict(self.named_parameters())
        for name, module in self.named_modules():
            if isinstance(module, PackedLinear):
                tensors |= {f"{name}.weight": module.weight, f"{name}.bias": module.bias}
        return tensors
