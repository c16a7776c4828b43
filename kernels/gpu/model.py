"""A ViT of fused blocks, which reads pixels where they lie."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vit.attend import Attend
from vit.config import ViTConfig
from vit.inputs import complete_patches
from vit.metadata import Preprocessing

from ..base import PREFIX, OptimizedViT, check_tensors, frozen, is_watched
from . import DTYPES, fused, plain
from .blocks import OPAQUE, FusedBlock, expected
from .capture import is_recording
from .graphs import Graphs
from .tiles import Tile
from .tuning import fastest

GRAPHED = 65536  # tokens in a batch; with more, its kernels take longer than launching them one by one
# Backends that read nothing back from the GPU, as a CUDA graph requires.
CAPTURED = ("sdpa", "reference", "bmm", "math", "flash", "efficient", "cudnn", "triton")


class CUDAViT(OptimizedViT):
    """A model in bfloat16 or float16 on an NVIDIA GPU.

    It takes images in its own dtype or in float32, normalised, and unsigned bytes as they come from a file, 0 to 255,
    which it normalises as `preprocessing` says. They are converted while patches are embedded.
    """

    def __init__(self, config: ViTConfig, dtype: str, tensors: Mapping[str, Tensor], mode: str = "latency") -> None:
        """`tensors`: as `half_tensors` returns them, on the device that is to run them; the rest as for `optimize`.

        Raises:
            ValueError: tensors with other names, shapes or dtypes.
        """
        super().__init__(config, dtype, tensors, mode)
        check_tensors(tensors, expected(self, DTYPES[dtype]))
        self._graphs = Graphs() if mode == "latency" else None
        self._of_bytes: dict[Preprocessing, tuple[Tensor, Tensor]] = {}
        for i in range(config.depth):
            prefix = f"blocks.{i}."
            own = {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
            self.blocks[i] = FusedBlock(config, i, own)
        for name in [name for name, _ in self.named_parameters()]:
            owner, _, part = name.rpartition(".")
            setattr(self.get_submodule(owner), part, frozen(tensors[name]))
        self.eval()

    @torch.compiler.disable(reason=OPAQUE)
    def forward(self, images: Tensor, ragged: str = "error") -> Tensor:
        """As `ViT.forward`; without hooks, the last block computes only the tokens that the head reads."""
        if is_watched(self):
            return super().forward(images, ragged)
        images = self.accept(images, ragged)
        if self._graphs is None or not self._is_recordable(images):
            return self._logits(images)
        return self._graphs(self._logits, images, self.preprocessing, self._read_besides)

    def _is_recordable(self, images: Tensor) -> bool:
        """Whether a CUDA graph can be recorded and is likely to be faster; not while the caller records one."""
        h, w = self.grid_of(images)
        few = len(images) * (self.config.num_prefix_tokens + h * w) <= GRAPHED
        parts = self._listed or self.listed()  # which `is_watched` has just checked
        return few and images.is_cuda and not is_recording(images) and all(map(is_captured, parts.attends))

    def _logits(self, images: Tensor) -> Tensor:
        """Accepted images -> [B, num_classes] logits."""
        return self.forward_head(self.read(images, self.tokens_read()))  # [B, num_classes]

    def tokens_read(self) -> int | None:
        """As `OptimizedViT.tokens_read`."""
        last: Any = self.blocks[-1]
        cut = type(last) is FusedBlock and is_plain(last.attention.attend)
        return PREFIX.get(self.config.global_pool) if cut else None

    def accept(self, images: Tensor, ragged: str = "error") -> Tensor:
        """As `ViT.accept`, also for float32 and uint8 images."""
        if not isinstance(images, Tensor) or images.dtype not in (torch.float32, torch.uint8):
            return super().accept(images, ragged)
        if images.dtype == torch.uint8 and ragged != "error":
            raise ValueError(f"unsigned bytes are not made whole patches by {ragged!r}: expected ragged='error'")
        if images.ndim == 4:
            images = complete_patches(images, self.config.patch_size, ragged)
        like = torch.empty(1, dtype=self.class_token.dtype, device=images.device, requires_grad=images.requires_grad)
        super().accept(like.expand(images.shape), "error")
        return images

    @torch.compiler.disable(reason=OPAQUE)
    def tokens(self, images: Tensor) -> Tensor:
        """As `ViT.tokens`, in one kernel that writes where the blocks read."""
        (h, w), P, D = self.grid_of(images), self.config.num_prefix_tokens, self.config.embed_dim
        weight, bias = self._patch_weights(images)
        x = weight.new_empty(len(images), P + h * w, D)  # [B, T, D]
        x[:, :P] = self._prefix()
        args = (images, weight, bias, self.positions((h, w))[0], x, P)

        def call(tile: Tile | None) -> Tensor:
            if tile is None:
                plain.patches(*args)
            else:
                fused.patches(*args, tile)
            return x[:, P:]

        kind = f"{images.dtype}, {list(weight.shape)}"
        fastest("patches", kind, x, len(images) * h * w, call)
        return x

    def _prefix(self) -> Tensor:
        """[1, P, D], the tokens before those of the patches, with their positions."""
        tokens: list[Tensor] = [x for x in (self.class_token, self.dist_token) if x is not None]
        prefix = torch.cat(tokens, dim=1)  # [1, 1 or 2, D]
        if n := self.config.num_position_rows:
            prefix = prefix + self.position_embedding[:, :n]  # [1, n, D], in float32
        return prefix if self.register_tokens is None else torch.cat([prefix, self.register_tokens], dim=1)

    def _patch_weights(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The convolution's weight [D, chans, p, p] and bias [D]; for bytes, as 256ths, they normalise, too."""
        weight, bias = self.patch_embed.proj.weight, self.patch_embed.proj.bias
        assert bias is not None
        if images.dtype != torch.uint8:
            return weight, bias
        if self.preprocessing not in self._of_bytes:
            mean, std = (weight.new_tensor(x, dtype=torch.float32) for x in
                         (self.preprocessing.mean, self.preprocessing.std))  # fmt: skip
            folded = (weight.float() * 256 / (255 * std[:, None, None])).to(weight.dtype)  # [D, chans, p, p]
            made = folded, bias - folded.float().sum((2, 3)) @ (255 / 256 * mean)
            if not self.is_there(folded):
                return made
            self._of_bytes[self.preprocessing] = made
        return self._of_bytes[self.preprocessing]

    def is_there(self, x: Tensor) -> bool:
        """Wait until it is computed, since another stream may read it next; False while a graph is being recorded.

        After waiting, nothing still reads the tensor that it replaces.
        """
        if is_recording(x):
            return False
        if x.is_cuda:
            torch.cuda.synchronize(x.device)
        return True

    def _read_besides(self) -> list[Tensor]:
        """All tensors that a graph reads; they must live as long as it, even if the model drops them."""
        folded = [x for pair in self._of_bytes.values() for x in pair]
        return [*self._positions.values(), *folded, *self.parameters(), *self.buffers()]

    def forget(self) -> None:
        """As `OptimizedViT.forget`."""
        if self._graphs is not None:
            self._graphs.forget()
        super().forget()
        self._of_bytes.clear()

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that it was made of, by name."""
        tensors = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        return {name: x.detach().contiguous() for name, x in tensors.items() if ".attend." not in name}


def is_plain(attend: Attend) -> bool:
    """Whether it computes what `sdpa` does, without `check`, which reads results back from the GPU."""
    return attend.exact and not attend.check


def is_captured(attend: Attend) -> bool:
    """Whether it can be part of a CUDA graph."""
    return is_plain(attend) and attend.name in CAPTURED
