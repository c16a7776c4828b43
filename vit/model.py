"""The Vision Transformer (arXiv:2010.11929). Read this file from top to bottom.

Letters for shapes, here and in the whole project:

    B  images           H W  pixels, height first     p    side of a patch
    D  width            h w  grid of patches          N    patch tokens, N = h*w
    A  heads            d    width of a head, D/A     P    prefix tokens, above all the class token
    L  blocks                                         T    all tokens, T = P + N

`packing` carries the grid of patches and, for images of different sizes, their lengths: ignore it on a first reading.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from . import inputs
from .attend import Attend, set_all
from .attention import AttentionLike
from .checks import as_numbers
from .config import ViTConfig
from .metadata import Preprocessing, Provenance
from .packed import Grid, PackedForward, Packing
from .position import resample_position_embedding
from .registry import choose
from .trainable import Trainable


class PatchEmbed(nn.Module):
    """Cut images into p x p patches and multiply each by one matrix, to D numbers (Eq. 1, x_p E)."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        # A convolution whose kernel covers one patch and moves by one patch is this product with a matrix.
        self.proj = nn.Conv2d(config.in_chans, config.embed_dim, config.patch_size, stride=config.patch_size)

    def forward(self, images: Tensor) -> Tensor:
        x = self.proj(images)  # [B, D, h, w]
        return x.flatten(2).transpose(1, 2)  # [B, N, D], row by row


class Attention(nn.Module):
    """Multi-head self-attention (Eq. 5-8)."""

    def __init__(self, config: ViTConfig, block: int) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.embed_dim, 3 * config.embed_dim)
        self.attend = Attend(config, block)  # by default `attention.sdpa`; `ViT.set_attention` replaces it
        self.proj = nn.Linear(config.embed_dim, config.embed_dim)

    def forward(self, x: Tensor, packing: Packing | None = None) -> Tensor:
        B, T, D = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.num_heads, D // self.num_heads)  # [B, T, 3, A, d]
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each [B, A, T, d]
        out = self.attend(q, k, v, packing)  # [B, A, T, d]
        out = out.transpose(1, 2).reshape(B, T, D)  # [B, T, D], heads concatenated
        return self.proj(out)  # [B, T, D]


class MLP(nn.Module):
    """Two linear layers with a GELU between them, applied to each token on its own."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.embed_dim, config.mlp_dim)
        self.act = nn.GELU(approximate="none" if config.gelu == "erf" else "tanh")
        self.fc2 = nn.Linear(config.mlp_dim, config.embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.fc1(x))  # [B, T, mlp_dim], 4D by default
        return self.fc2(x)  # [B, T, D]


class Residual(nn.Module):
    """What attention or MLP, a branch, adds to the tokens, after LayerScale and drop path, both off by default."""

    def __init__(self, drop_path_rate: float) -> None:
        super().__init__()
        self.drop_path_rate = drop_path_rate

    def forward(self, branch: Tensor, scale: Tensor | None, packing: Packing | None = None) -> Tensor:
        if scale is not None:
            branch = branch * scale  # [B, T, D], one factor per channel: LayerScale (arXiv:2103.17239)
        if self.training and self.drop_path_rate > 0.0:  # left out for random images: drop path (arXiv:1603.09382)
            keep = 1.0 - self.drop_path_rate
            images = len(packing.lengths) if packing and packing.lengths else len(branch)
            mask = branch.new_empty(images).bernoulli_(keep).div_(keep)  # [images], 0 or 1 / keep
            branch = branch * (packing.per_token(mask) if packing else mask[:, None, None])  # [B, T, D]
        return branch


class Block(nn.Module):
    """One encoder layer: attention (Eq. 2), then an MLP (Eq. 3)."""

    def __init__(self, config: ViTConfig, block: int, drop_path_rate: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.embed_dim, eps=config.eps)
        self.attention = Attention(config, block)
        self.residual_attention = Residual(drop_path_rate)
        self.norm2 = nn.LayerNorm(config.embed_dim, eps=config.eps)
        self.mlp = MLP(config)
        self.residual_mlp = Residual(drop_path_rate)
        self.scale1 = self.scale2 = None
        if config.init_values is not None:
            self.scale1 = nn.Parameter(torch.full((config.embed_dim,), config.init_values))
            self.scale2 = nn.Parameter(torch.full((config.embed_dim,), config.init_values))

    def forward(self, x: Tensor, packing: Packing | None = None) -> Tensor:
        x = x + self.residual_attention(self.attention(self.norm1(x), packing), self.scale1, packing)  # [B, T, D] Eq. 2
        x = x + self.residual_mlp(self.mlp(self.norm2(x)), self.scale2, packing)  # [B, T, D] Eq. 3
        return x


class ViT(PackedForward, Trainable, nn.Module):
    """A Vision Transformer for images of any size that is a multiple of the patch size.

    Besides its weights it carries `config`, `preprocessing` (how to prepare images), `categories` (label names, or
    None) and `provenance` (where its weights came from, or None). `PackedForward` and `Trainable` add methods.
    """

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        D, (h, w) = config.embed_dim, config.grid
        self.config = config
        self.preprocessing = Preprocessing(size=config.img_size).with_channels(config.in_chans)
        self.categories: list[str] | None = None
        self.provenance: Provenance | None = None

        self.patch_embed = PatchEmbed(config)
        self.class_token = nn.Parameter(torch.zeros(1, 1, D))
        self.dist_token = nn.Parameter(torch.zeros(1, 1, D)) if config.dist_token else None
        self.register_tokens = nn.Parameter(torch.zeros(1, config.reg_tokens, D)) if config.reg_tokens else None
        self.position_embedding = nn.Parameter(torch.zeros(1, config.num_position_rows + h * w, D))
        rates = [config.drop_path_rate * i / max(config.depth - 1, 1) for i in range(config.depth)]
        self.blocks = nn.ModuleList(Block(config, i, rate) for i, rate in enumerate(rates))
        norm = nn.LayerNorm(D, eps=config.eps)
        self.norm: nn.Module = nn.Identity() if config.fc_norm else norm  # of every token, before pooling
        self.fc_norm: nn.Module = norm if config.fc_norm else nn.Identity()  # or of the pooled features
        self.head = make_head(config)
        self.head_dist = make_head(config) if config.global_pool == "dist" else None
        init_weights(self)

    def forward(self, images: Tensor, ragged: str = "error") -> Tensor:
        """[B, in_chans, H, W] images, normalised as `preprocessing` says -> [B, num_classes] logits (or features).

        `ragged`: what to do if H or W is not a multiple of p, "error", "resize", "crop" or "pad"; see `vit.inputs`.
        """
        return self.forward_head(self.forward_features(images, ragged))  # [B, num_classes]

    def forward_features(self, images: Tensor, ragged: str = "error") -> Tensor:
        """[B, in_chans, H, W] images -> [B, T, D] tokens after the final norm: class token, registers, patches."""
        images = self.accept(images, ragged)  # [B, in_chans, h*p, w*p]
        x = self.tokens(images)  # [B, T, D], Eq. 1
        x, _ = self.encode(x, Packing(self.grid_of(images)))  # [B, T, D], Eq. 2 and 3, L times
        return self.norm(x)  # [B, T, D], Eq. 4 for every token

    def accept(self, images: Tensor, ragged: str = "error") -> Tensor:
        """Check a batch of images and make its sides multiples of p; see `vit.inputs`."""
        return inputs.accept(images, self.config, inputs.weight_to_match(self.patch_embed), ragged)

    def embed(self, images: Tensor, ragged: str = "error") -> Tensor:
        """Eq. 1: [B, in_chans, H, W] images -> [B, T, D] tokens, positions added."""
        return self.tokens(self.accept(images, ragged))

    def tokens(self, images: Tensor) -> Tensor:
        """`embed` of images that were accepted."""
        x = self.patch_embed(images) + self.positions(self.grid_of(images))  # [B, N, D]
        prefix: Tensor = self.class_token  # [1, 1, D]
        if self.dist_token is not None:
            prefix = torch.cat([prefix, self.dist_token], dim=1)  # [1, 2, D]
        if n := self.config.num_position_rows:
            prefix = prefix + self.position_embedding[:, :n]  # [1, n, D]
        if self.register_tokens is not None:
            prefix = torch.cat([prefix, self.register_tokens], dim=1)  # [1, P, D]
        return torch.cat([prefix.expand(x.shape[0], -1, -1), x], dim=1)  # [B, T, D]

    def positions(self, grid: Grid) -> Tensor:
        """[1, N, D], the patches' position embedding, resampled to this grid."""
        stored = self.position_embedding[:, self.config.num_position_rows :]
        return resample_position_embedding(stored, self.config.grid, grid, self.config.position_rule)

    def encode(
        self, x: Tensor, packing: Packing | None = None, keep: Mapping[int, Callable[[Tensor], Any]] | None = None
    ) -> tuple[Tensor, dict[int, Any]]:
        """Eq. 2 and 3: run the blocks on [B, T, D] tokens.

        `keep` maps a block's number to a function. After that block (-1: before the first) it is called with the
        tokens, and its result is returned under the same number. Nothing runs beyond the last of these blocks.
        """
        kept = {-1: keep[-1](x)} if keep and -1 in keep else {}
        for i in range(len(self.blocks) if keep is None else max(keep, default=-1) + 1):
            if self.config.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(self.blocks[i], x, packing, use_reentrant=False)  # computed again in the backward pass
            else:
                x = self.blocks[i](x, packing)  # [B, T, D]
            if keep is not None and i in keep:
                kept[i] = keep[i](x)
        return x, kept

    def forward_head(self, tokens: Tensor, pre_logits: bool = False) -> Tensor:
        """[B, T, D] tokens -> [B, num_classes] logits, or with `pre_logits` the features before the head.

        Features are [B, D], or [B, 2D] with global_pool "token_avg". With "dist" each of two tokens has a head of its
        own, and logits and features are means over the two, as in timm.
        """
        if self.head_dist is not None:
            x, y = tokens[:, 0], tokens[:, 1]  # each [B, D], class and distillation token
            return (x + y) / 2 if pre_logits else (self.head(x) + self.head_dist(y)) / 2
        pooled = self.fc_norm(self.pool(tokens))  # [B, D]
        return pooled if pre_logits else self.head(pooled)

    def pool(self, tokens: Tensor) -> Tensor:
        """[B, T, D] tokens -> [B, D], what the head reads; [B, 2D] for "token_avg"."""
        class_token, patches = tokens[:, 0], tokens[:, self.config.num_prefix_tokens :]
        if self.config.global_pool == "avg":
            return patches.mean(dim=1)  # [B, D]
        if self.config.global_pool == "token_avg":
            return torch.cat([class_token, patches.mean(dim=1)], dim=1)  # [B, 2D]
        return class_token  # [B, D]

    def forward_intermediates(
        self,
        images: Tensor,
        blocks: Sequence[int] | None = None,
        norm: bool = False,
        return_prefix_tokens: bool = False,
        ragged: str = "error",
    ) -> list[Any]:
        """Patch tokens after some blocks, as feature maps. Stops after the last block asked for.

        Args:
            images, ragged: as for `forward`.
            blocks: block numbers, in the order of the result; negative ones count from the end. None for all.
            norm: apply the final norm to each map.
            return_prefix_tokens: also return the class token and registers.

        Returns:
            For each block [B, D, h, w], or with `return_prefix_tokens` a pair of that and [B, P, D].
        """
        numbers = self.block_numbers(blocks)
        images = self.accept(images, ragged)  # [B, in_chans, h*p, w*p]
        grid = self.grid_of(images)
        keep = dict.fromkeys(numbers, self.norm if norm else lambda x: x)  # so only normed tokens stay in memory
        _, kept = self.encode(self.tokens(images), Packing(grid), keep)  # for each block [B, T, D]
        pairs = [self.split(kept[i], grid) for i in numbers]
        return pairs if return_prefix_tokens else [patches for patches, _ in pairs]

    def split(self, tokens: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        """[B, T, D] tokens -> patch tokens as a map [B, D, h, w], prefix tokens [B, P, D]."""
        prefix, patches = tokens.tensor_split([self.config.num_prefix_tokens], dim=1)
        return patches.transpose(1, 2).reshape(tokens.shape[0], -1, *grid), prefix

    def grid_of(self, images: Tensor) -> Grid:
        """(h, w) of [B, C, H, W] images made of whole patches."""
        return images.shape[2] // self.config.patch_size, images.shape[3] // self.config.patch_size

    def block_numbers(self, numbers: Sequence[int] | None = None) -> list[int]:
        """Block numbers from 0; negative ones count from the end, None means all. ValueError out of range."""
        return as_numbers("blocks", "block", numbers, len(self.blocks))

    @property
    def attends(self) -> list[Attend]:
        """The attention slot of each block."""
        return [cast(Block, block).attention.attend for block in self.blocks]

    def set_attention(
        self, name_or_fn: AttentionLike, blocks: Sequence[int] | None = None, *, check: bool = False, **options: Any
    ) -> None:
        """Replace attention in all blocks, or in those given. `vit.attention` describes what can be set.

        Args:
            name_or_fn: a registered name ("sdpa", "reference" ...), a function, or a factory.
            blocks: block numbers; negative ones count from the end. None for all.
            check: raise an error if q, k, v or the result is not finite, naming the block. Slow; for debugging.
            options: passed to the function at every call, or to the factory.

        An unknown name, block or option, or another signature raises a ValueError, and nothing is changed.
        """
        choice = choose(name_or_fn, options)
        slots = [self.attends[i] for i in self.block_numbers(blocks)]
        calls = [choice.make(self.config, slot.block) for slot in slots]  # all of them before the first is set
        set_all(slots, choice, calls, like=self.class_token, check=check)

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the head by a new one with random weights; 0 removes it. Clears `categories`."""
        self.config = self.config.override(num_classes=num_classes)
        self.categories = None
        for name in ("head", "head_dist"):
            if getattr(self, name) is not None:
                setattr(self, name, make_head(self.config).to(self.class_token).apply(init_linear))


def make_head(config: ViTConfig) -> nn.Module:
    """The classifier, D -> num_classes (2D for "token_avg"); the identity if there are no classes."""
    width = config.embed_dim * (2 if config.global_pool == "token_avg" else 1)
    return nn.Linear(width, config.num_classes) if config.num_classes else nn.Identity()


def init_weights(model: ViT) -> None:
    """timm's initialisation: truncated normal with std 0.02, tokens close to zero."""
    if model.class_token.is_meta:  # nothing to fill, and PyTorch would import its compiler, which takes two seconds
        return
    nn.init.trunc_normal_(model.position_embedding, std=0.02)
    for token in (model.class_token, model.dist_token, model.register_tokens):
        if token is not None:
            nn.init.normal_(token, std=1e-6)
    model.apply(init_linear)


def init_linear(module: nn.Module) -> None:
    """Truncated normal with std 0.02 for the weights of linear layers, zero for their biases."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
