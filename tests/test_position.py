"""Resampled position embeddings against timm's function."""

import pytest
import torch
from helpers import FLOAT32, difference, images
from timm.layers import resample_abs_pos_embed

from vit.position import RULES, resample_position_embedding

GRIDS = [
    ((14, 14), (24, 24)), ((14, 14), (16, 10)), ((14, 14), (7, 28)), ((7, 28), (14, 14)), ((14, 14), (1, 13)),
    ((14, 14), (3, 2)), ((37, 37), (16, 16)), ((14, 14), (64, 128)), ((1, 1), (5, 3)), ((3, 1), (1, 7)),
    ((13, 17), (17, 13)), ((14, 14), (1, 1)),
]  # fmt: skip


@pytest.mark.parametrize(("stored", "wanted"), GRIDS)
def test_equals_timm(stored, wanted):
    embedding = images(1, stored[0] * stored[1], 24, 1)[..., 0]
    theirs = resample_abs_pos_embed(embedding, list(wanted), list(stored), num_prefix_tokens=0)
    assert difference(resample_position_embedding(embedding, stored, wanted), theirs) <= FLOAT32


def test_other_rules_would_be_seen():
    """Without antialiasing PyTorch's cubic has another coefficient, even when enlarging."""
    embedding = images(1, 196, 24, 1)[..., 0]
    grid = embedding.unflatten(1, (14, 14)).permute(0, 3, 1, 2)
    for size in ((24, 24), (7, 28)):
        ours = resample_position_embedding(embedding, (14, 14), size)
        other = torch.nn.functional.interpolate(grid, size=size, mode="bicubic").flatten(2).transpose(1, 2)
        assert difference(ours, other) > 1e-2


@pytest.mark.parametrize("grid", [(14, 14), (7, 28), (1, 13)])
def test_the_same_grid_is_the_identity(grid):
    embedding = images(1, grid[0] * grid[1], 24, 1)[..., 0]
    assert resample_position_embedding(embedding, grid, grid) is embedding
    for n in grid:  # what an exported graph computes
        assert torch.equal(RULES["timm"](n, n, embedding.device), torch.eye(n))


def test_keeps_the_dtype_and_computes_in_float32():
    embedding = images(1, 196, 24, 1)[..., 0]
    exact = resample_position_embedding(embedding.bfloat16().float(), (14, 14), (9, 20))
    half = resample_position_embedding(embedding.bfloat16(), (14, 14), (9, 20))
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, exact.bfloat16())


def test_gradient_equals_timm():
    gradients = []
    for function in (
        lambda e: resample_position_embedding(e, (14, 14), (9, 20)),
        lambda e: resample_abs_pos_embed(e, [9, 20], [14, 14], num_prefix_tokens=0),
    ):
        embedding = images(1, 196, 24, 1)[..., 0].requires_grad_()
        (function(embedding) * images(1, 180, 24, 1, seed=2)[..., 0]).sum().backward()
        gradients.append(embedding.grad)
    assert difference(*gradients) <= FLOAT32
