"""What training tools ask a model for, under timm's names: its layers, its weight decay, its classifier.

The rule of layer-wise learning rates (BEiT, arXiv:2106.08254, and timm) stands here alone: the embeddings are layer 0,
block i is layer i + 1, the final norm belongs to the last block, and whatever is left, the head, is a layer after it.
"""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor, nn

from .config import ViTConfig

STEM = r"class_token|dist_token|register_tokens|position_embedding|patch_embed\."
BLOCK = r"blocks\.(\d+)\."
LAST_NORM = r"norm\."
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
    return parameter.ndim > 1 and name not in NO_DECAY


class Trainable:
    """The methods of `ViT` that training tools call, such as timm's `create_optimizer_v2(model, layer_decay=0.75)`."""

    config: ViTConfig
    head: nn.Module
    head_dist: nn.Module | None

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
