"""A ViT for a CPU, with blocks of `float32` or `int8`, that computes only what its head reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor

from vit.attention import reference, sdpa
from vit.checks import warn
from vit.config import ViTConfig
from vit.model import ViT

from ..attention.products import bmm
from ..base import PREFIX, Kinds, OptimizedViT, check_tensors, frozen, is_watched
from . import int8
from .float32 import FloatBlock

BLOCKS: dict[str, type] = {"float32": FloatBlock, "int8": int8.Int8Block}

# glibc returns memory that is freed at the top of its heap to the system, and every forward would fetch it again, page
# by page: a tenth of the time at batch 8. Once it has freed a block of this size it keeps twice as much
# (M_MMAP_THRESHOLD in mallopt(3)); 32 MiB is the largest block that it adapts to.
KEPT = 31 * 2**20  # bytes
PART = 4096  # tokens that go through at a time; their largest activation is smaller than that: 24 MiB in ViT-S


class CPUViT(OptimizedViT):
    """A model with its weights in oneDNN's layout, in float32 or int8."""

    def __init__(self, config: ViTConfig, dtype: str, tensors: Mapping[str, Tensor], mode: str = "latency") -> None:
        """`tensors`: by name, as `float_tensors` or `int8_tensors` returns them; the rest as for `optimize`.

        Raises:
            ValueError: tensors with other names, shapes or dtypes.
        """
        super().__init__(config, dtype, tensors, mode)
        check_tensors(tensors, expected(self, dtype))
        for i in range(config.depth):
            prefix = f"blocks.{i}."
            own = {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
            self.blocks[i] = BLOCKS[dtype](config, i, own)
        for name in [name for name, _ in self.named_parameters() if not name.startswith("blocks.")]:
            owner, _, part = name.rpartition(".")
            setattr(self.get_submodule(owner), part, frozen(tensors[name]))
        self.eval()
        torch.empty(KEPT, dtype=torch.uint8)

    def forward(self, images: Tensor, ragged: str = "error") -> Tensor:
        """As `ViT.forward`; without hooks, the last block computes only the tokens that the head reads."""
        if is_watched(self):
            return super().forward(images, ragged)
        parts = self._parts(self.accept(images, ragged))
        return torch.cat([self.forward_head(self.read(part, self.tokens_read())) for part in parts])

    def forward_features(self, images: Tensor, ragged: str = "error") -> Tensor:
        """As `ViT.forward_features`."""
        if is_watched(self):
            return super().forward_features(images, ragged)
        parts = [self.read(part, None) for part in self._parts(self.accept(images, ragged))]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _parts(self, images: Tensor) -> tuple[Tensor, ...]:
        """Batches of at most `PART` tokens, of sizes as equal as possible; a larger image goes alone."""
        h, w = self.grid_of(images)
        most = max(1, PART // (self.config.num_prefix_tokens + h * w))
        return images.tensor_split(-(-len(images) // most))

    def tokens_read(self) -> int | None:
        """As `OptimizedViT.tokens_read`."""
        return PREFIX.get(self.config.global_pool) if self._is_plain() else None

    def _is_plain(self) -> bool:
        """Whether the last block is ours, with softmax attention for any number of queries, without options."""
        last = self.blocks[-1]
        if type(last) is not BLOCKS[self.optimized]:
            return False
        attend = cast(Any, last).attention.attend
        return attend.fn in (sdpa, reference, bmm) and not attend.options

    def set_attention(self, *args: Any, **keywords: Any) -> None:
        """As `ViT.set_attention`; int8 warns of attention that it was not calibrated for."""
        before = [attend.exact for attend in self.attends]
        super().set_attention(*args, **keywords)
        if self.optimized == "int8" and not all(before + [attend.exact for attend in self.attends]):
            warn("int8 was calibrated for other attention: set it on the original model, and optimize that again")

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that it was made of, by name."""
        tensors = {name: x for name, x in self.named_parameters() if not name.startswith("blocks.")}
        for i, block in enumerate(self.blocks):
            tensors |= {f"blocks.{i}.{name}": x for name, x in block.tensors().items()}  # type: ignore[operator]
        return {name: x.detach().contiguous() for name, x in tensors.items()}


def expected(model: ViT, dtype: str) -> Kinds:
    """The shapes and dtypes of the tensors that such a model is made of, by name."""
    kinds = {
        name: (list(x.shape), torch.float32)
        for name, x in model.named_parameters()
        if name.rpartition(".")[2] not in ("scale1", "scale2")
    }
    if dtype == "int8":
        for i in range(model.config.depth):
            kinds |= {f"blocks.{i}.{name}": kind for name, kind in int8.expected(model.config).items()}
    return kinds


def missing(dtype: str) -> str | None:
    """What this machine lacks for a dtype; None if nothing."""
    if not torch.backends.mkldnn.is_available():
        return "PyTorch was built without oneDNN"
    if dtype == "int8" and not torch.cpu._is_vnni_supported():
        return "its processor lacks VNNI, without which sums of bytes overflow: use float32"
    if dtype == "int8" and not hasattr(torch, "quantize_per_tensor"):
        return f"PyTorch {torch.__version__} no longer has quantize_per_tensor: use float32"
    return None
