"""What training tools ask a model for, under timm's names: its layers, its weight decay, its classifier.

The rule of layer-wise learning rates (BEiT, arXiv:2106.08254, and timm) stands here alone: the embeddings are layer 0,
block i is layer i + 1, the final norm belongs to the last block, and whatever is left, the head, is a layer after it.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from torch import Tensor, nn

from .config import ViTConfig

# Patterns that match from the start of a name, of a parameter or a module.
STEM = r"class_token|dist_token|register_tokens|position_embedding|patch_embed"
BLOCK = r"blocks\.(\d+)"
LAST_NORM = r"norm"  # not `fc_norm`
NO_DECAY = frozenset({"class_token", "dist_token", "register_tokens", "position_embedding"})


def layer_of(name: str, depth: int) -> int:
    """The layer that a parameter belongs to, from 0 to depth + 1."""
    if re.match(STEM, name):
        return 0
    if block := re.match(BLOCK, name):
        return int(block[1]) + 1
    return depth if re.match(LAST_NORM, name) else depth + 1


def decays(name: str, parameter: Tensor) -> bool:
    """Whether weight decay applies to a parameter: not to biases, norms, LayerScale, tokens and positions."""
    return parameter.ndim > 1 and name.rpartition(".")[2] not in NO_DECAY


Model = TypeVar("Model", bound="Trainable")


class Trainable:
    """The methods of `ViT` that training tools call, such as timm's `create_optimizer_v2(model, layer_decay=0.75)`."""

    config: ViTConfig
    head: nn.Module
    head_dist: nn.Module | None
    categories: list[str] | None
    norm: nn.Module
    fc_norm: nn.Module
    blocks: nn.ModuleList
    block_numbers: Callable[[Sequence[int] | None], list[int]]

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """`layer_of` as patterns, for timm's `group_parameters`. `coarse` changes nothing, as in timm's ViT."""
        in_the_last_block = (99999,)  # timm's MATCH_PREV_GROUP
        return {"stem": STEM, "blocks": [(BLOCK, None), (LAST_NORM, in_the_last_block)]}

    def no_weight_decay(self) -> set[str]:
        """The parameters without weight decay besides those with one dimension, which timm finds by itself."""
        return set(NO_DECAY)

    def get_classifier(self) -> nn.Module | tuple[nn.Module, nn.Module]:
        """The head; with global_pool "dist" both heads."""
        return self.head if self.head_dist is None else (self.head, self.head_dist)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute the blocks again in the backward pass, which saves memory and takes a third longer."""
        self.config = self.config.override(grad_checkpointing=enable)

    def backbone(self: Model, blocks: Sequence[int] | None = None, norm: bool = True) -> Model:
        """A model that shares this one's weights, and owns only those that its features need.

        Modules that are built on features hold it in place of the model: DistributedDataParallel stops at parameters
        that get no gradient, such as those of a head that is never called. This model is not changed.

        Args:
            blocks: those that `forward_intermediates` will be asked for; later ones are left out. None for all.
            norm: whether the final norm will be used: always by `forward_features`.

        Returns:
            A model for `forward_features` and `forward_intermediates`, with the same attention, without the head and
            the norm of pooled features.
        """
        alone = copy.copy(self)
        for name, value in vars(alone).items():
            if isinstance(value, dict) and name != "_parameters":  # modules and hooks, but not the weights
                vars(alone)[name] = value.copy()
        depth, rate = max(self.block_numbers(blocks)) + 1, self.config.drop_path_rate
        if depth < len(self.blocks):
            alone.blocks = self.blocks[:depth]
            rate *= (depth - 1) / (len(self.blocks) - 1)  # that of the last block which is left
        alone.config = self.config.override(num_classes=0, depth=depth, drop_path_rate=rate)
        alone.categories = None
        for name in ("head", "head_dist"):
            if getattr(alone, name) is not None:
                setattr(alone, name, nn.Identity())
        if self.config.fc_norm:
            alone.fc_norm = LeftOut("norm of pooled features: call forward_features or forward_intermediates")
        elif not norm:
            alone.norm = LeftOut("final norm: make it with backbone(norm=True)")
        return alone


class LeftOut(nn.Module):
    """In place of a norm that a backbone was made without: an identity would give other features in silence."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what

    def forward(self, x: Tensor) -> Tensor:
        raise ValueError(f"this backbone has no {self.what}")
