"""torch.compile and torch.export: one graph for all sizes."""

import pytest
import torch
from attention_cases import TINY as ATTENTIVE
from attention_cases import Scaled, sharp
from helpers import FLOAT32, MINI, difference, images, pixels, randomize
from torch.torch_version import TorchVersion

import vit
from vit.attention import reference, sdpa
from vit.config import ViTConfig

TINY = ViTConfig(img_size=32, patch_size=4, embed_dim=64, depth=2, num_heads=2, num_classes=7, init_values=0.5)


@pytest.fixture
def tiny() -> vit.ViT:
    return randomize(vit.ViT(TINY)).eval()


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    """What other tests compiled counts towards PyTorch's limit of graphs per function."""
    torch.compiler.reset()


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_as_one_graph_and_trains(backend):
    tiny = randomize(vit.ViT(TINY.override(depth=1))).eval()
    compiled = torch.compile(tiny, fullgraph=True, backend=backend)
    sizes = [(32, 32), (24, 40), (48, 12), (20, 20)]  # native, then changing
    if backend == "inductor" and torch.__version__ < TorchVersion(
        "2.15"
    ):  # which breaks there for nn.Conv2d alone, too
        sizes.remove((20, 20))
    for size in sizes:
        x = images(2, 3, *size)
        tiny.zero_grad()
        expected = tiny(x)
        expected.square().sum().backward()
        grads = [p.grad.clone() for p in tiny.parameters()]
        tiny.zero_grad()
        actual = compiled(x)
        assert difference(actual, expected) <= FLOAT32
        actual.square().sum().backward()
        for p, grad in zip(tiny.parameters(), grads):
            assert difference(p.grad, grad) <= 2 * FLOAT32


@pytest.mark.parametrize("strict", [True, False])
@torch.no_grad()
def test_exports_with_dynamic_batch_height_and_width(tiny, strict):
    B, h, w = (torch.export.Dim(name, min=2, max=64) for name in "Bhw")
    exported = torch.export.export(
        tiny, (images(2, 3, 32, 32),), dynamic_shapes={"images": {0: B, 2: 4 * h, 3: 4 * w}}, strict=strict
    ).module()
    for size in ((2, 3, 32, 32), (5, 3, 24, 40), (3, 3, 64, 8)):
        x = images(*size)
        assert difference(exported(x), tiny(x)) <= FLOAT32


TWENTY = [
    (14, 14), (24, 24), (7, 28), (28, 7), (13, 17), (19, 23), (3, 2), (14, 9), (9, 14), (16, 10), (11, 11), (5, 40),
    (2, 2), (31, 8), (2, 13), (64, 2), (23, 7), (6, 6), (14, 15), (40, 5),
]  # fmt: skip

SINGLE = [(1, 13), (13, 1), (1, 1), (1, 14), (14, 1)]  # PyTorch makes graphs of their own for sides of one


@torch.no_grad()
@pytest.mark.parametrize("dynamic", [None, pytest.param(True, marks=pytest.mark.matrix)])
def test_compiles_within_pytorchs_limit_for_twenty_grids(dynamic):
    model = randomize(vit.ViT(MINI.override(depth=1, embed_dim=24))).eval()
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    assert len(set(TWENTY)) == 20
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True), torch.inference_mode():
        for grid in TWENTY + SINGLE:
            x = pixels(grid, count=2)
            assert difference(compiled(x), model(x)) <= FLOAT32, grid


@torch.no_grad()
def test_one_exported_graph_serves_twenty_grids():
    model = randomize(vit.ViT(MINI.override(depth=1))).eval()
    h, w = (torch.export.Dim(name, min=2, max=64) for name in "hw")
    example = pixels((10, 12))
    exported = torch.export.export(model, (example,), dynamic_shapes={"images": {2: 4 * h, 3: 4 * w}}).module()
    for grid in TWENTY:
        x = pixels(grid)
        assert difference(exported(x), model(x)) <= FLOAT32, grid


# Attention


def test_attention_set_before_and_after_compiling(registered):
    tiny = randomize(vit.ViT(ATTENTIVE.override(depth=2))).eval()
    x = images(2, 3, 24, 40)
    registered("sharp", sharp)

    def use_grid(q, k, v, *, bias=None, grid, prefix, block):
        return reference(q / (1 + grid[0] + prefix + block), k, v)

    compiled = torch.compile(tiny, fullgraph=True, backend="eager")
    for setting, options in (("sdpa", {}), ("sharp", {}), ("sharp", {"power": 0.5}), (Scaled, {}), (use_grid, {})):
        tiny.set_attention(setting, **options)
        assert difference(compiled(x), tiny(x)) <= FLOAT32, setting
    expected = compiled(x)
    compiled.set_attention("reference", [0])  # through the wrapper, on the live model
    assert difference(compiled(x), expected) > 1e-4
    assert difference(compiled(x), tiny(x)) <= FLOAT32


def test_blocks_that_are_compiled_one_by_one_share_a_graph():
    from torch._dynamo.testing import CompileCounter

    model = randomize(vit.ViT(ATTENTIVE.override(depth=12))).eval()
    model.set_attention(lambda q, k, v, *, bias=None, grid, prefix: sdpa(q, k, v))
    counter = CompileCounter()
    for block in model.blocks:
        block.compile(backend=counter)
    model(images(1, 3, 32, 32))
    assert counter.frame_count == 1
