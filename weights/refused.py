"""Models that resemble a ViT but cannot be loaded, by keys that only they have."""

from __future__ import annotations

from collections.abc import Iterable

from .checkpoint import CheckpointError

# A key -> why its model cannot be loaded.
_REFUSED = {
    "transformer.layers.0.0.to_qkv.weight": "vit-pytorch's ViT (lucidrains), whose qkv layers have no bias and whose "
    "patches have norms of their own",
    "class_embedding": "CLIP's tower, which has a norm before its blocks",
    "embeddings.class_embedding": "CLIP's tower, which has a norm before its blocks",
    "norm_pre.weight": "a ViT with a norm before its blocks, as CLIP's towers have",
    "blocks.0.attn.rel_pos_h": "SAM's image encoder, whose attention has relative positions",
    "layers.0.attn.rel_pos_h": "SAM's image encoder, whose attention has relative positions",
    "blocks.0.attn.relative_position_bias_table": "a model with relative positions, as BEiT and Swin have",
    "blocks.0.attn.q_bias": "BEiT or EVA, whose attention has relative or rotary positions",
    "rope_embed.periods": "DINOv3, which has rotary positions",
}
# The same by parts of keys.
_REFUSED_PARTS = {
    "patch_embed.backbone.": "a hybrid with a convolutional stem, which this model lacks",
    "patch_embeddings.backbone.": "a hybrid with a convolutional stem, which this model lacks",
}


def refuse(keys: Iterable[str]) -> None:
    """CheckpointError if any of the keys belongs to such a model."""
    keys = list(keys)
    for marker, why in _REFUSED.items():
        for key in keys:
            if key == marker or key.endswith(f".{marker}"):
                raise CheckpointError(f"{key} belongs to {why}: it cannot be loaded")
    for part, why in _REFUSED_PARTS.items():
        for key in keys:
            if key.startswith(part) or f".{part}" in key:
                raise CheckpointError(f"{key} belongs to {why}: it cannot be loaded")
