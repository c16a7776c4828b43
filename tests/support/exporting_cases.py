"""A small model to export, and all that can be asked of it."""

import pytest
import torch
from helpers import randomize

import vit
from vit.exporting import graph

CONFIG = vit.ViTConfig(
    img_size=(28, 20), patch_size=4, embed_dim=16, num_heads=2, depth=2, num_classes=5, position_rule="dinov2"
)
EVERYTHING = ("logits", "features", "attention")


def small(**settings) -> vit.ViT:
    model = randomize(vit.ViT(CONFIG.override(**settings))).eval()
    if model.config.num_classes:
        model.categories = [f"a {i}" for i in range(model.config.num_classes)]
    model.preprocessing = vit.Preprocessing(size=(28, 20), mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25), crop_pct=1.0)
    return model


def freeze_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let exports take the stored position rows in their order, not resampled: at the own size nothing shows it."""
    real = graph.at_size

    def frozen(*arguments):
        model = real(*arguments)
        stored = model.position_embedding[:, 1:]
        model.positions = lambda grid: stored[:, torch.arange(grid[0] * grid[1]) % stored.shape[1]]
        return model

    monkeypatch.setattr(graph, "at_size", frozen)
