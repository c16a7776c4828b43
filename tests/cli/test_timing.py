"""Timing: operations, memory, the order of measurements, and the peak of a machine."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import vit
from vit.cli import timing
from vit.cli.timing import Case

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small_peak(monkeypatch):
    """At its real size, the product that measures the machine's peak takes half a second."""
    monkeypatch.setitem(timing.PEAK_SIDE, "cpu", 64)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"reg_tokens": 4, "class_position": False},
        {"num_classes": 0},
        {"in_chans": 1, "mlp_ratio": 2},
        {"dist_token": True, "global_pool": "dist"},
        {"global_pool": "token_avg"},
    ],
)
@pytest.mark.parametrize("size", [(224, 224), (64, 160)])
def test_operations_are_those_that_pytorch_counts(fields, size):
    with torch.device("meta"):
        model = vit.create_model("vit_small_patch16_224", **fields).eval()
        images = torch.empty(3, model.config.in_chans, *size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(images)
    resampling = 0 if size == (224, 224) else counted_resampling(model, size)
    assert counter.get_total_flops() - resampling == 3 * timing.flops(model.config, size)


@pytest.mark.parametrize("cut", [True, False])
@pytest.mark.parametrize("fields", [{}, {"dist_token": True, "global_pool": "dist"}, {"global_pool": "avg"}])
def test_operations_of_an_optimized_model(fields, cut):
    """Fewer in the last block, if it is cut."""
    small = {"img_size": 32, "embed_dim": 64, "num_heads": 2, "depth": 3}
    model = vit.create_model("vit_small_patch16_224", **small, **fields).eval()
    model.set_attention("reference" if cut else lambda q, k, v, *, bias=None: vit.attention.reference(q, k, v))
    fast = vit.kernels.optimize(model)
    count = {torch.ops.mkldnn._linear_pointwise: lambda x, w, *_, **__: 2 * math.prod(x[:-1]) * w[0] * w[1]}
    with FlopCounterMode(display=False, custom_mapping=count) as counter, torch.inference_mode():
        fast(torch.randn(2, 3, 32, 32))
    read = fast.tokens_read()
    assert (read is None) == (not cut or "avg" in fields.values())
    assert counter.get_total_flops() == 2 * timing.flops(model.config, (32, 32), read)


def counted_resampling(model: vit.ViT, size: tuple[int, int]) -> int:
    """Products that resample positions, which `flops` leaves out: they run once per call, not per image."""
    from vit.position import resample_position_embedding

    positions = model.position_embedding[:, model.config.num_position_rows :]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        resample_position_embedding(positions, model.config.grid, (size[0] // 16, size[1] // 16))
    return counter.get_total_flops()


def test_cases_run_in_turn_and_backwards(monkeypatch):
    a, b, c = cases = [Case((32, 32), batch, None, "float32", "sdpa", 1) for batch in (1, 2, 4)]
    order = []
    monkeypatch.setattr(timing, "seconds", lambda call, threads, device: order.append(call()) or len(order))
    times = timing.race({case: lambda case=case: case for case in cases}, 3, CPU, lambda order: order)
    assert order == [c, b, a, a, b, c, c, b, a, a, b, c]
    assert times == {a: [4, 9, 10], b: [5, 8, 11], c: [6, 7, 12]}  # the first three calls warm up


def test_memory_is_what_is_allocated_at_the_highest():
    def call():
        a = torch.ones(2**18)  # 1 MiB
        del a
        return torch.ones(2**19), torch.ones(2**18)

    assert timing.peak_memory(call, CPU) == pytest.approx(3, abs=0.1)


def test_spread():
    assert timing.spread([3.0]) == (3.0, 3.0, 3.0)
    assert timing.spread([1.0, 2.0, 3.0, 4.0, 5.0]) == (2.0, 3.0, 4.0)


def test_smaller_products_measure_the_peak_if_large_ones_take_too_long(monkeypatch):
    sides = []
    monkeypatch.setattr(timing, "product", lambda kind, side, device: lambda: sides.append(side))
    for side, took in ((64, 0.003), (16, 0.1), (8, 2.0)):
        sides.clear()
        monkeypatch.setattr(timing, "seconds", lambda call, *_, took=took: call() or took)
        timing.peak_flops("bfloat16", 1, CPU)
        assert sides == [8] * 2 + [side] * 5
