"""The Vision Transformer (arXiv:2010.11929), to be read from top to bottom.

Letters for shapes, here and everywhere:

    B  images           H W  pixels, height first     p    side of a patch
    D  width            h w  the grid of patches      N    patch tokens, N = h*w
    A  heads            d    width of a head, D/A     P    prefix tokens: the class token, then registers
                                                      T    tokens in all, T = P + N
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from . import packed
from .attend import Attend, Grid, choose
from .attention import AttentionFactory, AttentionFunction, get_attention, name_of
from .checks import as_numbers, warn
from .config import ViTConfig
from .inputs import complete_patches
from .metadata import Preprocessing, Provenance
from .packed import BUDGET
from .position import resample_position_embedding


class PatchEmbed(nn.Module):
    """Cut images into patches of p x p pixels and project each to D numbers (Eq. 1, x_p E).

    A convolution whose stride is its kernel's side sees each patch once: it is that projection.
    """

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(config.in_chans, config.embed_dim, config.patch_size, stride=config.patch_size)

    def forward(self, images: Tensor) -> Tensor:
        x = self.proj(images)  # [B, D, h, w]
        return x.flatten(2).transpose(1, 2)  # [B, N, D], in reading order


class Attention(nn.Module):
    """Multi-head self-attention (Eq. 6-8): every token asks, and every token answers."""

    def __init__(self, config: ViTConfig, block: int) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.embed_dim, 3 * config.embed_dim)
        self.attend = Attend(config, block)  # softmax(q k^T / sqrt(d)) v, until `ViT.set_attention` replaces it
        self.proj = nn.Linear(config.embed_dim, config.embed_dim)

    def forward(self, x: Tensor, grid: Grid | list[Grid] | None = None, lengths: list[int] | None = None) -> Tensor:
        """[B, T, D] tokens -> [B, T, D]; with `lengths`, of several images, each of which keeps to its own tokens."""
        B, T, D = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.num_heads, D // self.num_heads)  # [B, T, 3, A, d]
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each [B, A, T, d]
        out = self.attend(q, k, v, grid, lengths)  # [B, A, T, d]
        out = out.transpose(1, 2).reshape(B, T, D)  # [B, T, D], heads side by side
        return self.proj(out)  # [B, T, D]


class MLP(nn.Module):
    """Two layers with a GELU between them, applied to each token by itself."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.embed_dim, config.mlp_dim)
        self.act = nn.GELU(approximate="none" if config.gelu == "erf" else "tanh")
        self.fc2 = nn.Linear(config.mlp_dim, config.embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.fc1(x))  # [B, T, 4D]
        return self.fc2(x)  # [B, T, D]


class Residual(nn.Module):
    """What a branch adds to the residual stream: scaled, and left out for some images in training.

    LayerScale (arXiv:2103.17239) scales per channel; drop path is stochastic depth (arXiv:1603.09382).
    """

    def __init__(self, drop_path_rate: float) -> None:
        super().__init__()
        self.drop_path_rate = drop_path_rate

    def forward(self, branch: Tensor, scale: Tensor | None, lengths: list[int] | None = None) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        if scale is not None:
            branch = branch * scale
        if self.training and self.drop_path_rate > 0.0:
            keep = 1.0 - self.drop_path_rate
            mask = branch.new_empty(len(lengths or branch), 1, 1).bernoulli_(keep).div_(keep)  # [B, 1, 1]
            if lengths is not None:  # one image's tokens live or die together
                mask = torch.cat([one.expand(1, length, 1) for one, length in zip(mask, lengths)], dim=1)  # [1, T, 1]
            branch = branch * mask
        return branch


class Block(nn.Module):
    """One layer of the encoder: tokens mix (Eq. 2), then each thinks for itself (Eq. 3)."""

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

    def forward(self, x: Tensor, grid: Grid | list[Grid] | None = None, lengths: list[int] | None = None) -> Tensor:
        x = x + self.residual_attention(self.attention(self.norm1(x), grid, lengths), self.scale1, lengths)  # [B, T, D]
        x = x + self.residual_mlp(self.mlp(self.norm2(x)), self.scale2, lengths)  # [B, T, D]
        return x


class ViT(nn.Module):
    """A Vision Transformer for images of any height and width that are multiples of the patch.

    Besides its weights it carries `config`, `preprocessing` (how its images are prepared), `categories` (a list of
    label names, or None) and `provenance` (where its weights came from, or None).
    """

    patches = 0  # how many active `vit.patch` contexts hold it

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
        self.norm: nn.Module = nn.Identity() if config.fc_norm else norm  # of every token, before the pooling
        self.fc_norm: nn.Module = norm if config.fc_norm else nn.Identity()  # or of the pooled features
        self.head = make_head(config)
        self.head_dist = make_head(config) if config.global_pool == "dist" else None
        self.init_weights()

    def __getstate__(self) -> dict[str, Any]:
        if self.patches:
            raise ValueError("the model is patched, and a copy would stay so: leave vit.patch first")
        return super().__getstate__()

    def forward(self, images: Tensor, ragged: str = "error") -> Tensor:
        """Classify.

        Args:
            images: [B, in_chans, H, W], floating, normalised as `preprocessing` says; H and W any multiples of p.
            ragged: what becomes of other sides: "error", "resize", "crop" or "pad", see `vit.inputs`.

        Returns:
            [B, num_classes] logits, or [B, D] features where there is no head.

        Raises:
            ValueError: images of another rank, dtype or number of channels, none at all, or with ragged sides.
        """
        return self.forward_head(self.forward_features(images, ragged))  # [B, num_classes]

    def forward_features(self, images: Tensor, ragged: str = "error") -> Tensor:
        """[B, in_chans, H, W] images -> [B, P + N, D] tokens after the final norm: class token, registers, patches."""
        images = self.accept(images, ragged)  # [B, in_chans, h*p, w*p]
        grid = self.grid_of(images)
        x = self.embed(images)  # [B, T, D], Eq. 1
        for block in self.blocks:  # Eq. 2 and 3, L times
            x = self.run(block, x, grid)  # [B, T, D]
        return self.norm(x)  # [B, T, D], Eq. 4 for every token

    def run(
        self, block: nn.Module, x: Tensor, grid: Grid | list[Grid] | None = None, lengths: list[int] | None = None
    ) -> Tensor:
        """One block, whose activations are computed again in the backward pass where `grad_checkpointing` is set."""
        if self.config.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, x, grid, lengths, use_reentrant=False)
        return block(x, grid, lengths)

    def forward_intermediates(
        self,
        images: Tensor,
        blocks: Sequence[int] | None = None,
        norm: bool = False,
        return_prefix_tokens: bool = False,
        ragged: str = "error",
    ) -> list[Any]:
        """The patch tokens after some blocks, as maps; nothing is computed beyond the last of them.

        Args:
            images: [B, in_chans, H, W], as for `forward`.
            blocks: which, in the order of the result; negative numbers count from the end. None for all.
            norm: apply the final norm to each.
            return_prefix_tokens: give the class token and registers too.
            ragged: as for `forward`.

        Returns:
            For each block [B, D, h, w], or with `return_prefix_tokens` a pair of that and [B, P, D].

        Raises:
            ValueError: as `forward`, or blocks that there are not.
        """
        numbers = self.block_numbers(blocks)
        images = self.accept(images, ragged)
        grid = self.grid_of(images)
        x = self.embed(images)  # [B, T, D]
        kept = {}
        for i in range(max(numbers) + 1):
            x = self.run(self.blocks[i], x, grid)  # [B, T, D]
            if i in numbers:
                kept[i] = self.split(self.norm(x) if norm else x, grid)
        return [kept[i] if return_prefix_tokens else kept[i][0] for i in numbers]

    def split(self, tokens: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """[B, P + N, D] tokens -> those of the patches as a map [B, D, h, w], and the others [B, P, D]."""
        prefix, patches = tokens.tensor_split([self.config.num_prefix_tokens], dim=1)
        return patches.transpose(1, 2).reshape(tokens.shape[0], -1, *grid), prefix

    def forward_packed(self, images: Sequence[Tensor], ragged: str = "error", budget: int = BUDGET) -> Tensor:
        """Classify images of different sizes without padding them.

        Their tokens go through the linear layers side by side, and attention stays within each image.

        Args:
            images: a list of [in_chans, H_i, W_i], of one dtype and on one device.
            ragged: as for `forward`.
            budget: tokens that go through at a time, in the order of the images; an image with more goes by itself.

        Returns:
            [B, num_classes] logits: those of `forward` on each image.

        Raises:
            ValueError: as `forward`, naming the image; an empty list, several dtypes or devices.
        """
        tokens = self.forward_features_packed(images, ragged, budget)  # each [P + N_i, D]
        return self.forward_head(torch.stack([packed.summary(x, self.config.num_prefix_tokens) for x in tokens]))

    def forward_features_packed(
        self, images: Sequence[Tensor], ragged: str = "error", budget: int = BUDGET
    ) -> list[Tensor]:
        """A list of [in_chans, H_i, W_i] images -> for each [P + N_i, D]; see `forward_packed`, `forward_features`."""
        return packed.features(self, packed.parts(self, images, ragged, budget))

    def forward_intermediates_packed(
        self,
        images: Sequence[Tensor],
        blocks: Sequence[int] | None = None,
        norm: bool = False,
        return_prefix_tokens: bool = False,
        ragged: str = "error",
        budget: int = BUDGET,
    ) -> list[list[Any]]:
        """For each block and each image [D, h_i, w_i]; see `forward_packed` and `forward_intermediates`.

        With `return_prefix_tokens` a pair of that and [P, D].
        """
        kept = packed.intermediates(self, packed.parts(self, images, ragged, budget), self.block_numbers(blocks), norm)
        return kept if return_prefix_tokens else [[patches for patches, _ in one] for one in kept]

    def forward_head(self, tokens: Tensor, pre_logits: bool = False) -> Tensor:
        """[B, P + N, D] tokens -> [B, num_classes] logits, or with `pre_logits` the [B, D] features before the head.

        With global_pool "token_avg" the features are [B, 2D]; with "dist" each token has its own head, and logits as
        well as features are the mean of the two (timm's, whether training or not).
        """
        if self.head_dist is not None:
            x, y = tokens[:, 0], tokens[:, 1]  # each [B, D], the class and the distillation token
            return (x + y) / 2 if pre_logits else (self.head(x) + self.head_dist(y)) / 2
        pooled = self.fc_norm(self.pool(tokens))  # [B, D]
        return pooled if pre_logits else self.head(pooled)

    def pool(self, tokens: Tensor) -> Tensor:
        """[B, P + N, D] tokens -> [B, D], what the head reads; [B, 2D] for "token_avg"."""
        class_token, patches = tokens[:, 0], tokens[:, self.config.num_prefix_tokens :]
        if self.config.global_pool == "avg":
            return patches.mean(dim=1)  # [B, D]
        if self.config.global_pool == "token_avg":
            return torch.cat([class_token, patches.mean(dim=1)], dim=1)  # [B, 2D]
        return class_token  # [B, D]

    def embed(self, images: Tensor, ragged: str = "error") -> Tensor:
        """Eq. 1: [B, in_chans, H, W] images -> [B, P + N, D] tokens, positions added."""
        images = self.accept(images, ragged)  # [B, in_chans, h*p, w*p]
        grid = self.grid_of(images)
        x = self.patch_embed(images)  # [B, N, D]

        x = x + self.positions(grid)  # [B, N, D]

        prefix: Tensor = self.class_token  # [1, 1, D]
        if self.dist_token is not None:
            prefix = torch.cat([prefix, self.dist_token], dim=1)  # [1, 2, D]
        if n := self.config.num_position_rows:
            prefix = prefix + self.position_embedding[:, :n]  # [1, n, D]
        if self.register_tokens is not None:
            prefix = torch.cat([prefix, self.register_tokens], dim=1)  # [1, P, D]
        return torch.cat([prefix.expand(x.shape[0], -1, -1), x], dim=1)  # [B, P + N, D]

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """[1, N, D], the patches' position embedding, resampled to this grid."""
        stored = self.position_embedding[:, self.config.num_position_rows :]
        return resample_position_embedding(stored, self.config.grid, grid, self.config.position_rule)

    def grid_of(self, images: Tensor) -> tuple[int, int]:
        """(h, w) of [B, C, H, W] images with whole patches."""
        return images.shape[2] // self.config.patch_size, images.shape[3] // self.config.patch_size

    def accept(self, images: Tensor, ragged: str) -> Tensor:
        """A batch of images that this model takes, its sides made multiples of p; ValueError for any other."""
        p, chans = self.config.patch_size, self.config.in_chans
        expected = f"expected [B, {chans}, H, W] floating images, H and W multiples of {p}"
        if not isinstance(images, Tensor):
            raise ValueError(f"{expected}; got {type(images).__name__}, not a tensor")
        if images.ndim != 4:
            raise ValueError(f"{expected}; got {images.ndim} dimensions: {list(images.shape)}")
        if images.shape[1] != chans:
            raise ValueError(f"{expected}; got {images.shape[1]} channels: {list(images.shape)}")
        if not images.is_floating_point():
            raise ValueError(f"{expected}; got {images.dtype}: scale and normalise as model.preprocessing says")
        weights, device = self.patch_embed.proj.weight, images.device.type
        autocast = device != "meta" and torch.is_autocast_enabled(device)  # meta tensors have none
        if images.device != weights.device:
            raise ValueError(f"{expected} on the model's {weights.device}; got {images.device}: move one of them")
        if images.dtype != weights.dtype and (not autocast or images.dtype == torch.float64):  # which it does not cast
            raise ValueError(f"{expected} in the model's {weights.dtype}; got {images.dtype}: cast one of them")
        B, _, H, W = images.shape
        if 0 in (B, H, W):
            raise ValueError(f"{expected}; got {'an empty batch' if B == 0 else 'no pixels'}: {list(images.shape)}")
        return complete_patches(images, p, ragged)

    def set_attention(
        self,
        name_or_fn: str | AttentionFunction | AttentionFactory,
        blocks: Sequence[int] | None = None,
        *,
        check: bool = False,
        **options: Any,
    ) -> None:
        """Replace attention, in all blocks or in those with the given numbers (negative ones count from the end).

        Args:
            name_or_fn: a registered name ("sdpa", "reference" ...), a function or a factory, as `vit.attention`
                describes them.
            blocks: which blocks; None for all.
            check: refuse results that are not finite, naming the first block that gives one. Slow, and a compiled
                graph breaks there: to look for a mistake.
            options: handed to the function at every call, or to the factory, which is called anew each time: weights
                that attention had before are dropped, with a warning.

        Raises:
            ValueError: an unknown name, a function that cannot be called so or knows no such option, or a block that
                there is not. Nothing is changed then.
        """
        source = get_attention(name_or_fn) if isinstance(name_or_fn, str) else name_or_fn
        name = name_or_fn if isinstance(name_or_fn, str) else name_of(source)
        make, weights = choose(source, name, self.config, options), self.patch_embed.proj.weight
        made = [(block, make(block)) for block in self.block_numbers(blocks)]
        if any(self.attends[block].patched for block, _ in made):
            raise ValueError("vit.patch holds the attention of these blocks: leave its `with` first")
        lost = [block for block, _ in made if self.attends[block].state_dict()]
        if lost:
            warn(f"blocks {', '.join(map(str, lost))}: the weights of their attention are dropped")
        for block, fn in made:
            if isinstance(fn, nn.Module):  # complex numbers stay so, which `Module.to` would make real
                fn._apply(lambda x: x.to(weights.device, weights.dtype if x.is_floating_point() else None))
                fn.train(self.training)
            self.attends[block].set(fn, name, options, check, source)

    @property
    def attends(self) -> list[Attend]:
        """What attends in each block."""
        return [block.attention.attend for block in self.select_blocks()]

    def select_blocks(self, numbers: Sequence[int] | None = None) -> list[Block]:
        """The blocks with these numbers, negative ones counted from the end; None for all. ValueError beyond them."""
        return [cast(Block, self.blocks[i]) for i in self.block_numbers(numbers)]

    def block_numbers(self, numbers: Sequence[int] | None = None) -> list[int]:
        """Numbers of blocks, from 0: negative ones count from the end, None is all. ValueError beyond them."""
        return as_numbers("blocks", "block", numbers, len(self.blocks))

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the head by a new one with random weights; 0 removes it. Forgets `categories`."""
        self.config = self.config.override(num_classes=num_classes)
        self.categories = None
        weights = self.patch_embed.proj.weight
        self.head = make_head(self.config).to(weights.device, weights.dtype)
        self.head.apply(init_linear)
        if self.head_dist is not None:
            self.head_dist = make_head(self.config).to(weights.device, weights.dtype)
            self.head_dist.apply(init_linear)

    def init_weights(self) -> None:
        """Random weights as timm draws them: truncated normals of std 0.02, a nearly zero class token."""
        if self.class_token.is_meta:  # nothing to fill, and PyTorch would load its compiler for that, for two seconds
            return
        nn.init.trunc_normal_(self.position_embedding, std=0.02)
        for token in (self.class_token, self.dist_token, self.register_tokens):
            if token is not None:
                nn.init.normal_(token, std=1e-6)
        self.apply(init_linear)


def make_head(config: ViTConfig) -> nn.Module:
    """The classifier, D -> num_classes (2D -> for "token_avg"); the identity where there are no classes."""
    width = config.embed_dim * (2 if config.global_pool == "token_avg" else 1)
    return nn.Linear(width, config.num_classes) if config.num_classes else nn.Identity()


def init_linear(module: nn.Module) -> None:
    """Weights from a truncated normal of std 0.02, biases zero, for linear layers."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
