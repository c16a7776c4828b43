"""FlexAttention: changed scores, masks, and what it refuses on a CPU."""

import pytest
import torch
from helpers import FLOAT32, difference, images, randomize
from matrix import DEVICE, DTYPES, Cell, cells, run

import vit
import vit.kernels.attention.flex as flex_module
from vit.attention import reference
from vit.kernels.attention.flex import flex, remembered_mask
from vit.registry import get_attention

TINY = vit.ViTConfig(img_size=32, patch_size=4, embed_dim=64, depth=3, num_heads=2, num_classes=7)
CPU_ONLY = pytest.mark.skipif(DEVICE != "cpu", reason="says what a machine without CUDA says")


def check(cell: Cell) -> None:
    found = run(cell)
    assert found.refused or found.error <= found.bar, (cell, found)


def near(b, h, i, j):
    return (i - j).abs() <= 2 + h


def test_flex():
    check(Cell("flex", torch.float32, 17, bias=True, backward=DEVICE == "cuda", compiled=False))


@pytest.mark.matrix
@pytest.mark.parametrize("dtype", DTYPES)
def test_matrix_flex(dtype):
    for cell in cells(["flex"], [1, 17, 197]):
        if cell.dtype == dtype and cell.compiled == (cell.T == 17):
            check(cell)


@pytest.mark.matrix
@torch.no_grad()
def test_flex_with_both_modifications():
    """A window whose width depends on the head, over scores that fall with the distance; T is no multiple of 128."""
    q, k, v = images(3, 2, 2, 150, 32).to(DEVICE)
    i = torch.arange(150, device=DEVICE)
    distance = (i[:, None] - i).abs()
    mask = torch.zeros(1, 2, 150, 150, device=DEVICE)
    for head in range(2):
        mask[:, head].masked_fill_(distance > 2 + head, float("-inf"))
    expected = reference(q, k, v, bias=mask - 0.1 * distance)
    remembered_mask.cache_clear()
    for _ in range(2):
        found = flex(q, k, v, score_mod=lambda s, b, h, i, j: s - 0.1 * (i - j).abs(), mask_mod=near)
        assert difference(found, expected) <= FLOAT32
    assert remembered_mask.cache_info()[:2] == (1, 1)  # it was made once
    assert difference(found, reference(q, k, v)) > 1e-2


@pytest.mark.matrix
@torch.no_grad()
def test_flex_through_the_seam_with_options():
    model = randomize(vit.ViT(TINY)).eval().to(DEVICE)
    x = images(2, 3, 24, 40).to(DEVICE)
    model.set_attention("flex", blocks=[1], mask_mod=near)
    found = model(x)
    i = torch.arange(61, device=DEVICE)
    far = torch.stack([(i[:, None] - i).abs() > 2 + head for head in range(2)])
    model.set_attention("sdpa", [1], bias=torch.zeros(1, 2, 61, 61, device=DEVICE).masked_fill(far, float("-inf")))
    assert difference(found, model(x)) <= FLOAT32
    with pytest.raises(ValueError, match="'flex' has no option 'mask'; its options: bias, score_mod, mask_mod"):
        model.set_attention("flex", mask=near)


@pytest.mark.matrix
@torch.no_grad()
def test_a_mask_is_the_same_for_all_images():
    q, k, v = images(3, 2, 2, 150, 32).to(DEVICE)
    mask = torch.ones(150, 150, dtype=torch.bool, device=DEVICE).tril().logical_not()
    expected = reference(q, k, v, bias=torch.zeros(150, 150, device=DEVICE).masked_fill(mask, float("-inf")))
    assert difference(flex(q, k, v, mask_mod=lambda b, h, i, j: (j <= i) | (b > 0)), expected) <= FLOAT32
    for wrong in (3, [], {}):
        with pytest.raises(ValueError, match="'flex' takes a hashable function as mask_mod"):
            flex(q, k, v, mask_mod=wrong)


@CPU_ONLY
def test_flex_refuses_what_is_trained_within_a_score_mod():
    q, table, scale = images(1, 2, 20, 32), torch.nn.Linear(1, 1), images(1)

    def late(score, b, h, i, j):
        return score + unknown

    with pytest.raises(ValueError, match="'flex' has no backward pass on a cpu"):
        flex(q, q, q, score_mod=lambda score, b, h, i, j: score * table.weight[0, 0])
    assert flex_module._held(late) == []
    unknown = scale
    assert flex_module._held(late) == [unknown]


@torch.no_grad()
def test_a_mask_without_values_is_not_kept():
    model = randomize(vit.create_model("vit_digits_patch4_32")).eval()
    model.set_attention("flex", [1], mask_mod=near)
    remembered_mask.cache_clear()
    torch.export.export(model, (images(1, 3, 32, 32),), strict=False)
    assert remembered_mask.cache_info().currsize == 0
    with torch.inference_mode():
        assert not remembered_mask(near, 1, 5, 5, torch.device("cpu")).kv_indices.is_inference()


@torch.no_grad()
def test_a_forward_mode_derivative_is_refused_and_spoils_no_mask():
    flex = get_attention("flex")
    q = images(1, 1, 5, 32)
    remembered_mask.cache_clear()
    with pytest.raises(ValueError, match="'flex' has no forward-mode derivative"):
        torch.func.jvp(lambda x: flex(x, q, q, mask_mod=near), (q,), (q,))
    assert remembered_mask.cache_info().currsize == 0
    assert torch.isfinite(flex(q, q, q, mask_mod=near)).all() and remembered_mask.cache_info().currsize == 1
