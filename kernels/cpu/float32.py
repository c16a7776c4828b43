"""float32 on a CPU: the same numbers from oneDNN's products, with weights stored in its own layout.

oneDNN (https://uxlfoundation.github.io/oneDNN) multiplies fastest by weights in blocks that fit its registers. Eager
PyTorch passes them in rows, in every call; here they are brought into that layout once, GELU is applied to a product
while it is still in registers, if there are enough of them, and LayerScale is folded into the weights.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from vit.config import ViTConfig
from vit.model import MLP, Block

from ..base import frozen, is_hooked
from .numbered import NumberedLayer

# In a product GELU shares its registers. AVX2 has only 16: there it takes two to three times as long as after it.
FUSES_GELU = torch.cpu._is_avx512_supported() or not torch.cpu._is_avx2_supported()


def epilogue(gelu: str | None) -> tuple[str, list, str]:
    """oneDNN's arguments for ending a product in a GELU, approximated by "none" or "tanh", or in nothing."""
    return ("gelu", [], gelu) if gelu else ("none", [], "")


class PackedLinear(NumberedLayer):
    """x W^T + b, and optionally a GELU: in the product, or on AVX2 in place after it."""

    bias: Tensor

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        """[N, K] and [N] float32."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.register_buffer("bias", bias)
        self.register_buffer("packed", self.pack(weight))

    @staticmethod
    def pack(weight: Tensor) -> Tensor:
        """As `NumberedLayer.pack`."""
        return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())

    @property
    def weight(self) -> Tensor:
        """As `NumberedLayer.weight`."""
        return self.packed.to_dense()

    def compute(self, x: Tensor, residual: Tensor | None, dtype: torch.dtype, gelu: str | None) -> Tensor:
        """[..., K] -> [..., N]; float32, with no residual."""
        out = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, *epilogue(gelu if FUSES_GELU else None))
        return out if gelu is None or FUSES_GELU else torch.ops.aten.gelu_(out, approximate=gelu)

    def extra_repr(self) -> str:
        """For print(model)."""
        return f"in_features={self.in_features}, out_features={self.out_features}"


class PackedMLP(MLP):
    """`vit.model.MLP` with its GELU applied by fc1, unless one of the two has hooks."""

    def forward(self, x: Tensor) -> Tensor:
        if type(self.act) is not nn.GELU or is_hooked((self.fc1, self.act)):
            return super().forward(x)
        return self.fc2(self.fc1(x, gelu=self.act.approximate))  # [B, T, D]


class FloatBlock(Block):
    """`vit.model.Block` with packed products."""

    def __init__(self, config: ViTConfig, block: int, tensors: Mapping[str, Tensor]) -> None:
        """`tensors`: the block's, by their names in it."""
        with torch.device("meta"):  # all of its tensors are replaced
            super().__init__(config, block, drop_path_rate=0.0)
            self.mlp = PackedMLP(config)
        self.scale1 = self.scale2 = None
        for norm, name in ((self.norm1, "norm1"), (self.norm2, "norm2")):
            norm.weight, norm.bias = (frozen(tensors[f"{name}.{part}"]) for part in ("weight", "bias"))

        for name in ("attention.qkv", "attention.proj", "mlp.fc1", "mlp.fc2"):
            owner, _, layer = name.rpartition(".")
            packed = PackedLinear(tensors[f"{name}.weight"], tensors[f"{name}.bias"])
            setattr(self.get_submodule(owner), layer, packed)

    def first(self, x: Tensor, n: int) -> Tensor:
        """[B, T, D] -> [B, n, D], the block's result for the first n tokens; the others are only keys and values."""
        B, T, D = x.shape
        qkv = self.attention.qkv(self.norm1(x)).view(B, T, 3, self.attention.num_heads, -1)  # [B, T, 3, A, d]
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each [B, A, T, d]
        out = self.attention.attend(q[:, :, :n], k, v)  # [B, A, n, d]
        x = x[:, :n] + self.attention.proj(out.transpose(1, 2).reshape(B, n, D))  # [B, n, D]
        return x + self.mlp(self.norm2(x))  # [B, n, D]

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that it was made of, by their names in it."""
        tensors: dict[str, Tensor] = dict(self.named_parameters())
        for name, module in self.named_modules():
            if isinstance(module, PackedLinear):
                tensors |= {f"{name}.weight": module.weight, f"{name}.bias": module.bias}
        return tensors
