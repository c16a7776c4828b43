"""float32 models on a CPU: packed products, GELU in them, the last block cut, large batches in parts."""

import pytest
import torch
from cpu_cases import model
from helpers import FLOAT32, difference, images, operations, randomize

import vit
from vit.kernels.base import GRIDS
from vit.kernels.cpu import float32
from vit.kernels.cpu.model import PART

RELATIVES = {
    "plain": {},
    "tanh": {"gelu": "tanh"},
    "layer scale": {"init_values": 0.5},
    "registers": {"reg_tokens": 4, "class_position": False},
    "distilled": {"dist_token": True, "global_pool": "dist"},
    "average": {"global_pool": "avg", "fc_norm": True},
    "both": {"global_pool": "token_avg"},
    "no head": {"num_classes": 0},
    "one block": {"depth": 1},
    "other patch and width": {"patch_size": 8, "embed_dim": 96, "num_heads": 3, "mlp_ratio": 2.5},
}
SIZES = [(64, 64), (16, 16), (112, 448), (48, 80)]


@torch.inference_mode()
@pytest.mark.parametrize("gelu", ["erf", "tanh"])
@pytest.mark.parametrize("fuses", [True, False])
def test_gelu_in_the_product_or_behind_it(monkeypatch: pytest.MonkeyPatch, fuses: bool, gelu: str) -> None:
    monkeypatch.setattr(float32, "FUSES_GELU", fuses)
    plain = model(gelu=gelu)
    fast = vit.kernels.optimize(plain)
    x = images(2, 3, 64, 64)
    ran = operations(lambda: fast(x))
    assert ("aten::gelu" in ran, ran.get("aten::gelu_", 0)) == (False, 0 if fuses else 3)
    with torch.inference_mode():
        assert difference(fast(x), plain(x)) <= FLOAT32
        assert difference(fast.forward_features(x), plain.forward_features(x)) <= FLOAT32


@pytest.mark.parametrize("relative", RELATIVES)
@torch.inference_mode()
def test_float32_gives_the_same(relative: str) -> None:
    plain = model(**RELATIVES[relative])
    fast = vit.kernels.optimize(plain)
    for size in SIZES:
        x = images(2, 3, *size)
        assert difference(fast(x), plain(x)) <= FLOAT32
        assert difference(fast.forward_features(x), plain.forward_features(x)) <= FLOAT32
        for ours, theirs in zip(fast.forward_intermediates(x, norm=True), plain.forward_intermediates(x, norm=True)):
            assert difference(ours, theirs) <= FLOAT32
    mixed = [images(3, 64, 32), images(3, 16, 80), images(3, 48, 48)]
    assert difference(fast.forward_packed(mixed), plain.forward_packed(mixed)) <= FLOAT32
    assert difference(fast(images(1, 3, 50, 70), ragged="pad"), plain(images(1, 3, 50, 70), ragged="pad")) <= FLOAT32


@torch.inference_mode()
def test_float32_of_the_whole_model_at_its_size() -> None:
    plain = vit.create_model("vit_small_patch16_224")
    randomize(plain)
    fast = vit.kernels.optimize(plain.eval())
    x = images(2, 3, 224, 224)
    assert difference(fast(x), plain(x)) <= FLOAT32


def test_packed_products_run_and_the_last_block_is_cut() -> None:
    fast = vit.kernels.optimize(model())
    x = images(2, 3, 64, 64)
    ran = operations(lambda: fast(x))
    assert ran["mkldnn::_linear_pointwise"] == 4 * 3
    assert "aten::gelu" not in ran
    tokens: list[int] = []
    first = fast.blocks[-1].mlp.fc1.forward
    fast.blocks[-1].mlp.fc1.forward = lambda x, **kind: tokens.append(x.shape[1]) or first(x, **kind)
    with torch.inference_mode():
        fast(x)
        fast.forward_features(x)
    assert tokens == [1, 17]


@torch.inference_mode()
def test_a_forgotten_gelu_would_be_seen() -> None:
    plain = model()
    fast = vit.kernels.optimize(plain)
    fc1 = fast.blocks[1].mlp.fc1
    fc1.forward = lambda x, gelu: float32.PackedLinear.forward(fc1, x)
    assert difference(fast(images(2, 3, 64, 64)), plain(images(2, 3, 64, 64))) > 100 * FLOAT32


@torch.inference_mode()
def test_a_cut_that_loses_keys_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = model()
    fast = vit.kernels.optimize(plain)
    cut = float32.FloatBlock.first
    monkeypatch.setattr(float32.FloatBlock, "first", lambda block, x, n: cut(block, x[:, :-1], n))
    assert difference(fast(images(2, 3, 64, 64)), plain(images(2, 3, 64, 64))) > 100 * FLOAT32


@torch.inference_mode()
def test_large_batches_go_through_in_parts() -> None:
    plain = model(depth=1)
    fast = vit.kernels.optimize(plain)
    x = images(2 * PART // 17 + 3, 3, 64, 64)
    assert difference(fast(x), plain(x)) <= FLOAT32
    assert difference(fast.forward_features(x), plain.forward_features(x)) <= FLOAT32
    assert operations(lambda: fast(x))["mkldnn::_linear_pointwise"] == 4 * 3


@torch.inference_mode()
def test_kept_positions_are_bounded_and_right() -> None:
    plain = model()
    fast = vit.kernels.optimize(plain)
    for _ in range(2):
        for h in range(1, GRIDS + 4):
            x = images(1, 3, 16 * h, 32)
            assert difference(fast(x), plain(x)) <= FLOAT32
    assert len(fast._positions) == GRIDS


@torch.inference_mode()
def test_looking_inside_large_batches() -> None:
    plain = model(depth=1)
    fast = vit.kernels.optimize(plain)
    x = images(PART // 17 + 3, 3, 64, 64)
    for name in ("blocks.0", "norm"):
        assert difference(vit.record(fast, x, name)[name], vit.record(plain, x, name)[name]) <= FLOAT32
