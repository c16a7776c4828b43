"""The fused kernels against their plain twins in float64."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from gpu_cases import DEVICE, DTYPES, MARKS, interpreter_only, loss, needs_cuda
from helpers import difference, images
from torch import Tensor

import vit
from vit.kernels.gpu import fused, plain, tiles
from vit.kernels.gpu.tiles import Tile

pytestmark = MARKS
ODD = [Tile(16, 16, 16, 1, 1), Tile(64, 32, 64, 4, 1)]  # besides the usual one


def layer(N: int, K: int, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    """A weight, bias and sums as `fold_norm` makes them."""
    weight, bias = 0.1 * images(N, K, seed=seed), images(N, seed=seed + 1)
    folded = fused.fold_norm(weight, bias, 1 + 0.2 * images(K, seed=seed + 2), images(K, seed=seed + 3), dtype)
    return [folded[name].to(DEVICE) for name in ("weight", "bias", "sums")]


def exact(fn: Callable[..., Tensor], *args: object, **keywords: object) -> Tensor:
    """The plain twin in float64."""
    wide = [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in args]
    return fn(*wide, **{key: x.double() if isinstance(x, Tensor) else x for key, x in keywords.items()})


def rms(ours: Tensor, theirs: Tensor) -> float:
    return (ours.double() - theirs).square().mean().sqrt().item()


@pytest.mark.parametrize("tile", [None, *ODD])
@pytest.mark.parametrize("gelu", ["", "erf", "tanh"])
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear(dtype: torch.dtype, norm: bool, gelu: str, tile: Tile | None) -> None:
    """M, N and K that no tile divides; rows whose mean is far from 0; with the residual and without."""
    weight, bias, sums = layer(104, 72, dtype)
    x = (3 + images(2, 37, 72)).to(DEVICE, dtype)
    residual = images(2, 37, 104, seed=5).to(DEVICE, dtype)
    for added in (None, residual):
        args = x, weight, bias, sums if norm else None, 1e-6, gelu, added
        expected = exact(plain.linear, *args)
        ours = fused.linear(*args, tile)
        assert ours.dtype == dtype and difference(ours, expected) <= loss(dtype)
        if dtype != torch.float32:  # the kernel rounds less often than the twin, so it is closer
            assert rms(ours, expected) <= rms(plain.linear(*args), expected)


@pytest.mark.parametrize("tile", [None, *ODD])
@pytest.mark.parametrize("gelu", ["erf", "tanh"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_mlp(dtype: torch.dtype, gelu: str, tile: Tile | None) -> None:
    """A hidden layer that no tile divides."""
    weight1, bias1, sums1 = layer(248, 96, dtype)
    weight2, bias2, _ = layer(96, 248, dtype, seed=9)
    x = (1 + images(2, 37, 96)).to(DEVICE, dtype)
    for residual in (True, False):
        args = x, weight1, bias1, sums1, weight2, bias2, 1e-6, gelu, residual
        expected = exact(plain.mlp, *args)
        ours = fused.mlp(*args, tile)
        assert ours.dtype == dtype and difference(ours, expected) <= loss(dtype)
        if dtype != torch.float32:
            assert rms(ours, expected) <= rms(plain.mlp(*args), expected)


@pytest.mark.parametrize("tile", [None, *ODD])
@pytest.mark.parametrize("pixels", [torch.uint8, torch.float32, None])
@pytest.mark.parametrize("p", [4, 14])
@pytest.mark.parametrize("dtype", DTYPES)
def test_patches(dtype: torch.dtype, p: int, pixels: torch.dtype | None, tile: Tile | None) -> None:
    """Images that are neither square nor contiguous; rows before `first` are left alone, all others are written."""
    weight = (0.1 * images(72, 3, p, p)).to(DEVICE, dtype)
    bias, positions = images(72).to(DEVICE), images(15, 72, seed=3).to(DEVICE)
    given = (255 * torch.rand(3, 3, 3 * p, 6 * p)).to(DEVICE, pixels or dtype)[..., : 5 * p]
    if dtype != torch.float32 and pixels == torch.float32:
        given = given.round()  # so that rounding pixels, which the float64 twin does not do, changes nothing
    ours = torch.full((3, 17, 72), torch.nan, dtype=dtype, device=DEVICE)
    expected = ours.double()
    wide = given.double() / 256 if pixels == torch.uint8 else given.double()
    plain.patches(wide, weight.double(), bias.double(), positions.double(), expected, 2)
    fused.patches(given, weight, bias, positions, ours, 2, tile)
    assert ours[:, :2].isnan().all()
    assert difference(ours[:, 2:], expected[:, 2:]) <= loss(dtype)


def test_a_wrong_kernel_is_seen() -> None:
    """The tests above, with one mistake in the expected result."""
    dtype = DTYPES[0]
    weight, bias, sums = layer(104, 96, dtype)
    x = (3 + images(2, 37, 96)).to(DEVICE, dtype)
    ours = fused.linear(x, weight, bias, sums, 1e-6)
    for args in [(weight, bias, None, 1e-6), (weight, 0 * bias, sums, 1e-6), (weight.flip(0), bias, sums, 1e-6)]:
        assert difference(ours, exact(plain.linear, x, *args)) > 10 * loss(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_small_things_are_seen(dtype: torch.dtype) -> None:
    """The kind of GELU and eps change less than half precision loses: the right ones give the smaller error."""
    weight, bias, sums = layer(104, 96, dtype)
    x = (1e-3 * images(2, 37, 96)).to(DEVICE, dtype)  # whose variance is about eps
    ours = fused.linear(x, weight, bias, sums, 1e-6, "erf")
    near = rms(ours, exact(plain.linear, x, weight, bias, sums, 1e-6, "erf"))
    for eps, gelu in [(1e-6, "tanh"), (1e-7, "erf")]:
        assert rms(ours, exact(plain.linear, x, weight, bias, sums, eps, gelu)) > (1.1 if gelu == "tanh" else 10) * near


def test_bytes_are_no_smaller_than_other_weights() -> None:
    """Weights that would fall below float16's smallest normal number if they were divided by 255."""
    weight, bias, positions = 1e-3 * images(72, 3, 4, 4), torch.zeros(72), torch.zeros(1, 72)
    pixels = torch.randint(256, (2, 3, 4, 4), dtype=torch.uint8)
    ours = torch.empty(2, 1, 72, dtype=torch.float16, device=DEVICE)
    fused.patches(*(x.to(DEVICE) for x in (pixels, weight.half(), bias, positions)), ours, 0)
    expected = (pixels.flatten(1).double() / 256) @ weight.half().double().flatten(1).T
    assert difference(ours[:, 0], expected.to(DEVICE)) <= 1e-3


@needs_cuda
@pytest.mark.parametrize("kernel", tiles.TILES)
def test_every_layout_gives_the_same(kernel: tuple[str, bool]) -> None:
    """With the sizes of a ViT-S, at a number of rows that no tile divides."""
    name, dtype = kernel[0], torch.bfloat16
    x = (1 + images(1203, 384)).to(DEVICE, dtype)
    fc1, (fc2, bias, _) = layer(1536, 384, dtype), layer(384, 1536, dtype, seed=9)
    pixels = torch.randint(256, (2, 3, 64, 80), dtype=torch.uint8, device=DEVICE)
    for tile in tiles.TILES[kernel]:
        if name == "linear":
            for args in [(x, *fc1, 1e-6, "erf"), (x.repeat(1, 4), fc2, bias, None, 0.0, "", x)]:
                assert difference(fused.linear(*args, tile=tile), exact(plain.linear, *args)) <= loss(dtype), tile
        elif name == "mlp":
            args = x, *fc1, fc2, bias, 1e-6, "erf"
            assert difference(fused.mlp(*args, tile=tile), exact(plain.mlp, *args)) <= loss(dtype), tile
        else:
            weight, positions = (0.1 * images(384, 3, 16, 16)).to(DEVICE, dtype), images(20, 384).to(DEVICE)
            ours = torch.empty(2, 21, 384, dtype=dtype, device=DEVICE)
            expected = ours.double()
            fused.patches(pixels, weight, bias, positions, ours, 1, tile)
            plain.patches(pixels.double() / 256, weight.double(), bias.double(), positions.double(), expected, 1)
            assert difference(ours[:, 1:], expected[:, 1:]) <= loss(dtype), tile


def test_more_tiles_than_programs_and_none_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each program takes several tiles, or none."""
    weight, bias, _ = layer(64, 32, DTYPES[0])
    x = images(300, 32).to(DEVICE, DTYPES[0])
    for count in (1, 3, 1000):
        monkeypatch.setattr(tiles, "processors", lambda device, count=count: count)
        assert difference(fused.linear(x, weight, bias), exact(plain.linear, x, weight, bias)) <= loss(DTYPES[0])


def test_rows_with_gaps_and_memory_that_begins_anywhere() -> None:
    weight, bias, sums = layer(64, 32, DTYPES[0])
    wide, shifted = images(5, 48), images(5 * 32 + 1)
    for x in (wide[:, 8:40], wide[::2, :32], shifted[1:].view(5, 32), wide[:, :32].flip(1)):
        x = x.to(DEVICE, DTYPES[0])
        args = x, weight, bias, sums, 1e-6
        assert difference(fused.linear(*args), exact(plain.linear, *args)) <= loss(DTYPES[0])


def test_no_rows_and_one() -> None:
    weight, bias, sums = layer(64, 96, DTYPES[0])
    back, other, _ = layer(96, 64, DTYPES[0])
    for shape in [(0, 96), (3, 0, 96), (96,), (1, 96)]:
        x = images(*shape).to(DEVICE, DTYPES[0])
        x = x.as_strided((1, 96), (1, 1)) if shape == (1, 96) else x  # a row whose stride means nothing
        for ours, args in [(fused.linear, (x, weight, bias, sums, 1e-6)),
                           (fused.mlp, (x, weight, bias, sums, back, other, 1e-6, "erf"))]:  # fmt: skip
            found, expected = ours(*args), exact(getattr(plain, ours.__name__), *args)
            assert found.shape == expected.shape
            assert found.numel() == 0 or difference(found, expected) <= loss(DTYPES[0])
    none = torch.empty(0, 3, 16, 16, device=DEVICE)
    out = torch.empty(0, 17, 64, dtype=DTYPES[0], device=DEVICE)
    fused.patches(none, images(64, 3, 4, 4).to(out), bias, images(16, 64).to(DEVICE), out, 1)


def test_nan_and_infinity_are_not_lost() -> None:
    weight, bias, sums = layer(64, 32, DTYPES[0])
    x = images(3, 32).to(DEVICE, DTYPES[0])
    x[1, 5], x[2, 7] = torch.nan, torch.inf
    ours = fused.linear(x, weight, bias, sums, 1e-6)
    assert ours[0].isfinite().all() and ours[1:].isnan().all()


def test_products_and_sums_are_one_instruction(monkeypatch: pytest.MonkeyPatch) -> None:
    """In every kernel: Triton's own default is to change, and 3.9 warns of it at each use."""
    from vit.kernels.attention import flash_kernels
    from vit.kernels.gpu import triton_kernels

    launched: dict[str, dict] = {}

    class Launched:
        def __init__(self, name: str, kernel: Callable) -> None:
            self.name, self.kernel = name, kernel

        def __getitem__(self, grid: tuple) -> Callable:
            return lambda *args, **keywords: (
                launched.update({self.name: keywords}),
                self.kernel[grid](*args, **keywords),
            )

    for module in (triton_kernels, flash_kernels):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, Launched(name, getattr(module, name)))
    weight, bias, sums = layer(64, 96, DTYPES[0])
    back, other, _ = layer(96, 64, DTYPES[0])
    x = images(5, 96).to(DEVICE, DTYPES[0])
    fused.linear(x, weight, bias, sums)
    fused.mlp(x, weight, bias, sums, back, other, 1e-6, "erf")
    pixels, out = images(1, 3, 4, 4).to(DEVICE), torch.empty(1, 1, 64, dtype=DTYPES[0], device=DEVICE)
    fused.patches(pixels, images(64, 3, 4, 4).to(out), bias, images(1, 64).to(DEVICE), out, 0)
    q, added = (images(*shape).to(DEVICE).requires_grad_() for shape in [(1, 1, 5, 32), (5, 5)])
    vit.kernels.attention.flash.triton(q, q, q, bias=added).sum().backward()
    assert len(launched) == 3 + 5 and all(keywords["enable_fp_fusion"] for keywords in launched.values())


def test_tensors_of_two_dtypes_are_refused() -> None:
    x, (weight, bias, _) = images(4, 32).to(DEVICE, torch.float16), layer(64, 32, torch.float16)
    with pytest.raises(ValueError, match="one dtype on one device, not .* and torch.float64"):
        fused.linear(x, weight.double(), bias)


@pytest.mark.matrix
@interpreter_only
def test_the_kernels_compile_for_hopper(tmp_path: Path) -> None:
    """Every layout, with Hopper's own product where tiles are large enough, and within its shared memory."""
    file = tmp_path / "resources.json"
    command = [sys.executable, Path(__file__).parents[2] / "benchmarks" / "resources.py", "--json", file]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    subprocess.run(command, check=True, env=environment | {"TRITON_CACHE_DIR": str(tmp_path / "cache")})
    rows = json.loads(file.read_text())
    uses = {"linear": 4, "mlp": 1, "patches": 2}
    assert len(rows) == 3 + sum(uses[kernel] * len(layouts) for (kernel, _), layouts in tiles.TILES.items())
    for row in rows:
        assert row["fits"] > 0, row
        assert row["scratch"] == 0, row  # for which Triton would want an allocator
        assert (row["wgmma"] > 0) == (row["layout"]["R"] >= 64), row
    good = {row["kernel"] for row in rows if row["spilled"] <= 16 and row["fits"] >= row["layout"].get("each", 1)}
    assert {row["kernel"] for row in rows} - good <= {"mlp", "mlp, few rows"}  # which spills outside of its loop
