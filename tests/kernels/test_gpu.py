"""Models for a GPU: fused kernels against their plain twins in float64, and whole models against those before.

Where there is no CUDA the kernels run in Triton's interpreter, a tile at a time in numpy: in float32 and float16, since
the interpreter computes nonsense in bfloat16. What only a GPU can show is skipped there.
"""

import contextlib
import copy
import dataclasses
import gc
import importlib.util
import json
import os
import pickle
import subprocess
import sys
import time
import warnings
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from helpers import FLOAT32, difference, images, randomize
from torch import Tensor

import vit
from vit.kernels.gpu import blocks, fused, graphs, plain, tiles, tuning
from vit.kernels.gpu import model as gpu_model
from vit.kernels.gpu.model import CUDAViT
from vit.kernels.gpu.tiles import Tile

torch.backends.cudnn.allow_tf32 = False  # in the convolution of the models before
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DTYPES = [torch.float16, torch.bfloat16] if CUDA else [torch.float32, torch.float16]
NAMES = ["bfloat16", "float16"] if CUDA else ["float16"]
SMALL = {"img_size": 64, "embed_dim": 96, "num_heads": 3, "depth": 2, "num_classes": 10}
LOSS = 4e-3  # of float16, relative to the largest; bfloat16 has three bits less
ODD = [Tile(16, 16, 16, 1, 1), Tile(64, 32, 64, 4, 1)]  # besides the usual one

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),
]
needs_cuda = pytest.mark.skipif(not CUDA, reason="there is no CUDA device")
interpreter_only = pytest.mark.skipif(CUDA, reason="the kernels are compiled here, not interpreted")


def loss(dtype: torch.dtype | str) -> float:
    return {torch.float32: FLOAT32, torch.float16: LOSS, "float16": LOSS}.get(dtype, 8 * LOSS)


def model(**changes: object) -> vit.ViT:
    """A small one, with weights that matter."""
    made = vit.create_model("vit_small_patch16_224", **(SMALL | changes))
    return randomize(made).eval().to(DEVICE)


def layer(N: int, K: int, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    """A weight, bias and sums as `fold_norm` makes them."""
    weight, bias = 0.1 * images(N, K, seed=seed), images(N, seed=seed + 1)
    folded = fused.fold_norm(weight, bias, 1 + 0.2 * images(K, seed=seed + 2), images(K, seed=seed + 3), dtype)
    return [folded[name].to(DEVICE) for name in ("weight", "bias", "sums")]


def exact(fn: Callable[..., Tensor], *args: object, **keywords: object) -> Tensor:
    """The plain twin in float64."""
    wide = [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in args]
    return fn(*wide, **{key: x.double() if isinstance(x, Tensor) else x for key, x in keywords.items()})


# Kernels


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
        if dtype != torch.float32:  # rounding less often than the twin, it is nearer
            assert rms(ours, expected) <= rms(plain.linear(*args), expected)


def rms(ours: Tensor, theirs: Tensor) -> float:
    return (ours.double() - theirs).square().mean().sqrt().item()


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
    """Images that are not square and lie with gaps; rows before `first` are left alone, all others are written."""
    weight = (0.1 * images(72, 3, p, p)).to(DEVICE, dtype)
    bias, positions = images(72).to(DEVICE), images(15, 72, seed=3).to(DEVICE)
    given = (255 * torch.rand(3, 3, 3 * p, 6 * p)).to(DEVICE, pixels or dtype)[..., : 5 * p]
    if dtype != torch.float32 and pixels == torch.float32:
        given = given.round()  # such that rounding pixels, which the twin in float64 does not, changes nothing
    ours = torch.full((3, 17, 72), torch.nan, dtype=dtype, device=DEVICE)
    expected = ours.double()
    wide = given.double() / 256 if pixels == torch.uint8 else given.double()
    plain.patches(wide, weight.double(), bias.double(), positions.double(), expected, 2)
    fused.patches(given, weight, bias, positions, ours, 2, tile)
    assert ours[:, :2].isnan().all()
    assert difference(ours[:, 2:], expected[:, 2:]) <= loss(dtype)


def test_a_wrong_kernel_is_seen() -> None:
    """The tests above, with one thing wrong in what they compare with."""
    dtype = DTYPES[0]
    weight, bias, sums = layer(104, 96, dtype)
    x = (3 + images(2, 37, 96)).to(DEVICE, dtype)
    ours = fused.linear(x, weight, bias, sums, 1e-6)
    for args in [(weight, bias, None, 1e-6), (weight, 0 * bias, sums, 1e-6), (weight.flip(0), bias, sums, 1e-6)]:
        assert difference(ours, exact(plain.linear, x, *args)) > 10 * loss(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_small_things_are_seen(dtype: torch.dtype) -> None:
    """Which GELU, and the norm's eps, lie within what half precision may lose: the nearer one is the right one."""
    weight, bias, sums = layer(104, 96, dtype)
    x = (1e-3 * images(2, 37, 96)).to(DEVICE, dtype)  # whose variance is about eps
    ours = fused.linear(x, weight, bias, sums, 1e-6, "erf")
    near = rms(ours, exact(plain.linear, x, weight, bias, sums, 1e-6, "erf"))
    for eps, gelu in [(1e-6, "tanh"), (1e-7, "erf")]:
        assert rms(ours, exact(plain.linear, x, weight, bias, sums, eps, gelu)) > (1.1 if gelu == "tanh" else 10) * near


def test_bytes_are_no_smaller_than_other_weights() -> None:
    """Weights far below float16's smallest normal number, were they divided by 255."""
    weight, bias, positions = 1e-3 * images(72, 3, 4, 4), torch.zeros(72), torch.zeros(1, 72)
    pixels = torch.randint(256, (2, 3, 4, 4), dtype=torch.uint8)
    ours = torch.empty(2, 1, 72, dtype=torch.float16, device=DEVICE)
    fused.patches(*(x.to(DEVICE) for x in (pixels, weight.half(), bias, positions)), ours, 0)
    expected = (pixels.flatten(1).double() / 256) @ weight.half().double().flatten(1).T
    assert difference(ours[:, 0], expected.to(DEVICE)) <= 1e-3


@needs_cuda
@pytest.mark.parametrize("kernel", tiles.TILES)
def test_every_layout_gives_the_same(kernel: tuple[str, bool]) -> None:
    """As a ViT-S uses it, at a number of rows that no tile divides."""
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
    """Each program goes from tile to tile."""
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


def test_tensors_of_two_dtypes_are_refused() -> None:
    x, (weight, bias, _) = images(4, 32).to(DEVICE, torch.float16), layer(64, 32, torch.float16)
    with pytest.raises(ValueError, match="one dtype on one device, not .* and torch.float64"):
        fused.linear(x, weight.double(), bias)


# Models

RELATIVES = {
    "plain": {},
    "tanh and LayerScale": {"gelu": "tanh", "init_values": 0.5},
    "registers": {"reg_tokens": 4, "class_position": False},
    "distilled": {"dist_token": True, "global_pool": "dist"},
    "average": {"global_pool": "avg", "fc_norm": True},
    "both, no head": {"global_pool": "token_avg", "num_classes": 0},
    "no thirds, narrow heads": {"embed_dim": 64, "num_heads": 4, "depth": 1, "patch_size": 8},
}


@pytest.mark.parametrize("dtype", NAMES)
@pytest.mark.parametrize("relative", RELATIVES)
@torch.inference_mode()
def test_a_model_gives_the_same(relative: str, dtype: str) -> None:
    slow = model(**RELATIVES[relative])
    fast = vit.kernels.optimize(slow, dtype)
    assert isinstance(fast, CUDAViT)
    x = images(2, 3, 32, 80).to(DEVICE)
    for given in (x, x.to(fast.class_token.dtype)):
        assert difference(fast(given), slow(x)) <= loss(dtype)
    assert difference(fast.forward_features(x), slow.forward_features(x)) <= loss(dtype)
    (ours,), (theirs,) = (one.forward_intermediates(x, [0], norm=True) for one in (fast, slow))
    assert difference(ours, theirs) <= loss(dtype)
    mixed = [images(3, 32, 64).to(DEVICE), images(3, 48, 16).to(DEVICE)]
    half = [one.to(fast.class_token.dtype) for one in mixed]
    assert difference(fast.forward_packed(half), slow.forward_packed(mixed)) <= loss(dtype)


@torch.inference_mode()
def test_the_fused_kernels_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the last block computes only what the head reads."""
    fast, ran = vit.kernels.optimize(model(), NAMES[0], mode="throughput"), []
    for name in ("linear", "mlp", "patches"):
        real = getattr(fused, name)
        monkeypatch.setattr(fused, name, lambda *args, name=name, real=real: ran.append((name, args[0])) or real(*args))
    if CUDA:  # which would take what is faster there

        def first(kernel: str, what: str, x: Tensor, rows: int, call: Callable[[Tile | None], Tensor]) -> Tensor:
            return call(tiles.default(kernel, rows, x))

        for module in (blocks, gpu_model):
            monkeypatch.setattr(module, "fastest", first)
    x = images(2, 3, 64, 64).to(DEVICE)
    fast(x)
    assert [name for name, _ in ran] == ["patches", *["linear", "linear", "mlp"] * 2]
    assert [list(given.shape) for _, given in ran[-3:]] == [[2, 17, 96], [2, 1, 96], [2, 1, 96]]
    assert CUDA or {attend.name for attend in fast.attends} == {"triton"}


@torch.inference_mode()
def test_bytes_are_normalised() -> None:
    slow = model()
    fast = vit.kernels.optimize(slow, NAMES[0])
    pixels = torch.randint(256, (2, 3, 64, 48), dtype=torch.uint8, device=DEVICE)
    mean, std = (torch.tensor(x, device=DEVICE)[:, None, None] for x in
                 (slow.preprocessing.mean, slow.preprocessing.std))  # fmt: skip
    expected = slow((pixels / 255 - mean) / std)
    assert difference(fast(pixels), expected) <= loss(NAMES[0])
    fast.preprocessing = dataclasses.replace(fast.preprocessing, mean=(0.1, 0.2, 0.3), std=(0.2, 0.3, 0.4))
    mean, std = torch.tensor([[0.1, 0.2, 0.3], [0.2, 0.3, 0.4]], device=DEVICE)[..., None, None]
    assert difference(fast(pixels), slow((pixels / 255 - mean) / std)) <= loss(NAMES[0])
    with pytest.raises(ValueError, match="not made whole patches by 'pad'"):
        fast(pixels[..., :40], ragged="pad")
    with pytest.raises(ValueError, match="nearest"):
        fast(pixels[..., :40])
    x = images(2, 3, 64, 40).to(DEVICE)
    for ragged in ("pad", "resize"):
        assert difference(fast(x, ragged=ragged), slow(x, ragged=ragged)) <= loss(NAMES[0])


@torch.inference_mode()
def test_looking_inside() -> None:
    slow = model()
    fast = vit.kernels.optimize(slow, NAMES[0])
    x = images(2, 3, 32, 32).to(DEVICE)
    for names in (["blocks.1.attention.q", "blocks.1.attention.weights", "blocks.1.attention.out"],
                  ["blocks.0.attention.proj", "blocks.0.mlp.fc1", "blocks.0.mlp.fc2"], ["blocks.1.mlp", "blocks.1"],
                  ["norm"]):  # fmt: skip
        ours, theirs = (vit.record(one, x, names) for one in (fast, slow))
        if "blocks.0.mlp.fc1" in names:  # which ends in the GELU
            theirs["blocks.0.mlp.fc1"] = torch.nn.functional.gelu(theirs["blocks.0.mlp.fc1"])
        for name in names:
            assert difference(ours[name], theirs[name]) <= loss(NAMES[0]), name
    for name in ("blocks.1.attention.weights", "blocks.1.attention.out", "blocks.1.mlp", "blocks.0.mlp.fc2",
                 "blocks.0.attention.proj"):  # fmt: skip
        with vit.patch(fast, {name: torch.zeros_like}), vit.patch(slow, {name: torch.zeros_like}):
            assert difference(fast(x), slow(x)) <= loss(NAMES[0]), name
    maps, expected = (vit.attention_maps(one, x, blocks=[1]) for one in (fast, slow))
    assert difference(maps[0], expected[0]) <= 10 * loss(NAMES[0])


@torch.inference_mode()
def test_other_attention_is_kept() -> None:
    def mean(q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None = None) -> Tensor:
        return v.mean(2, keepdim=True).expand_as(v)

    slow = model()
    slow.set_attention(mean, [1])
    fast = vit.kernels.optimize(slow, NAMES[0])
    x = images(2, 3, 64, 64).to(DEVICE)
    assert difference(fast(x), slow(x)) <= loss(NAMES[0])
    for one in (slow, fast):
        one.set_attention("sdpa")
    assert difference(fast(x), slow(x)) <= loss(NAMES[0])
    fast.set_attention("sdpa", check=True)
    x[0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="block 0: attention 'sdpa' was given q with values that are not finite"):
        fast(x)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
@torch.inference_mode()
def test_copies(again: Callable[[CUDAViT], CUDAViT]) -> None:
    fast = vit.kernels.optimize(model(), NAMES[0])
    x = images(1, 3, 64, 64).to(DEVICE)
    expected = fast(x)
    assert torch.equal(again(fast)(x), expected)


@torch.inference_mode()
def test_memory_is_given_back_at_once() -> None:
    fast = vit.kernels.optimize(model(), NAMES[0])
    fast(images(1, 3, 64, 64).to(DEVICE))
    alive = weakref.ref(fast)
    gc.disable()
    try:
        del fast
        assert alive() is None
    finally:
        gc.enable()


@torch.inference_mode()
def test_saved_and_loaded(tmp_path: Path) -> None:
    slow = model(init_values=0.5)
    slow.categories = list("abcdefghij")
    fast = vit.kernels.optimize(slow, NAMES[0])
    loaded = vit.kernels.load(vit.kernels.save(fast, tmp_path / "fast.safetensors"))
    x = images(2, 3, 64, 64).to(DEVICE)
    assert isinstance(loaded, CUDAViT) and loaded.categories == slow.categories
    assert torch.equal(loaded(x), fast(x))


def test_models_that_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = vit.kernels.optimize(model(), NAMES[0])
    x = images(1, 3, 64, 64).to(DEVICE)
    for call, text in [
        (lambda: vit.kernels.optimize(model(), NAMES[0], images=x), "images are for calibrating int8"),
        (lambda: vit.kernels.optimize(fast, NAMES[0]), "already optimized, to"),
        (lambda: vit.kernels.optimize(model().half(), NAMES[0]), "made from a model in torch.float32, and its class"),
        (lambda: vit.kernels.optimize(model(embed_dim=100, num_heads=2), NAMES[0]), "multiple of 8 for|multiple of 8"),
        (
            lambda: vit.kernels.optimize(model(mlp_ratio=2.5, embed_dim=72), NAMES[0]),
            "whose mlp_dim is a multiple of 8, not 180",
        ),
        (lambda: vit.kernels.optimize(model(), "float8"), "unknown dtype 'float8'"),
        (lambda: fast(x.double()), "float64: cast one of them"),
        (lambda: fast(x.requires_grad_()), "no gradients"),
        (lambda: fast(images(3, 64, 64)), "3 dimensions"),
        (lambda: fast.to("meta"), "cannot be moved"),
        (lambda: fast.state_dict(), r"saved with vit\.kernels\.save"),
    ]:
        with pytest.raises(ValueError, match=text):
            call()
    with torch.autocast(DEVICE), pytest.raises(ValueError, match="autocast cannot change that"):
        fast(x.detach())


@interpreter_only
def test_bfloat16_is_refused_in_the_interpreter() -> None:
    with pytest.raises(ValueError, match="cannot run bfloat16: .*Triton's interpreter"):
        vit.kernels.optimize(model(), "bfloat16")


@interpreter_only
def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vit.kernels.attention.flash, "installed", lambda: False)
    with pytest.raises(ValueError, match="bfloat16 needs a model on cuda, and its class_token is on cpu"):
        vit.kernels.optimize(model(), "bfloat16")


# Choosing


def test_the_fastest_is_chosen_once_and_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tuning.remembered.cache_clear()
    monkeypatch.setattr(tuning, "name_of", lambda device: "a GPU")
    times = {"slow": 3.0, Tile(1, 2, 3, 4, 5): 1.0, None: 2.0}
    measured = []
    monkeypatch.setattr(tuning, "milliseconds", lambda call, device: measured.append(call()) or times[call()])
    calls = {choice: lambda choice=choice: choice for choice in times}
    x = torch.empty(0)
    try:
        assert tuning.choose("something", x, calls) == Tile(1, 2, 3, 4, 5) and len(measured) == 3
        assert tuning.choose("something", x, calls) == Tile(1, 2, 3, 4, 5) and len(measured) == 3
        times[None] = 0.5
        assert tuning.choose("another", x, calls) is None and len(measured) == 6
        tuning.remembered.cache_clear()  # as another process would begin
        assert tuning.choose("something", x, calls) == Tile(1, 2, 3, 4, 5) and len(measured) == 6
        known = json.loads(tuning.path().read_text())
        assert known["a GPU, torch.float32: something"] == [1, 2, 3, 4, 5, 1]
        tuning.path().write_text(json.dumps({"of another process": None}))
        fewer = {key: call for key, call in calls.items() if key is None}
        assert tuning.choose("something", x, fewer) is None and len(measured) == 7  # no such layout any more
        assert set(json.loads(tuning.path().read_text())) == {"of another process", "a GPU, torch.float32: something"}
        for text in ("{", "[1]", '{"a": [1, 2]}'):
            tuning.path().write_text(text)
            tuning.remembered.cache_clear()
            with pytest.warns(UserWarning, match="cannot be read, so kernels are measured again"):
                assert tuning.choose("something", x, calls) is None
    finally:
        tuning.remembered.cache_clear()


def test_what_does_not_run_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For good if the kernel is at fault; for this process if memory may have been lacking for once."""

    def broken(why: str) -> None:
        raise RuntimeError(why)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tuning, "remembered", lambda: known)
    monkeypatch.setattr(tuning, "name_of", lambda device: "a GPU")
    monkeypatch.setattr(tuning, "milliseconds", lambda call, device: call())
    tile, known = Tile(1, 2, 3, 4, 5), {}
    for what, why, kept in (("a", "CUDA out of memory", {}), ("b", "PassManager::run failed\nat length", {"b": None})):
        calls = {tile: lambda why=why: broken(why), None: lambda: 1.0}
        with pytest.warns(UserWarning, match=rf"Tile.* does not run here and is left out: {why.splitlines()[0]}$"):
            assert tuning.choose(what, torch.empty(0), calls) is None
        assert tuning.choose(what, torch.empty(0), calls) is None  # not measured again
        assert tuning.read() == {f"a GPU, torch.float32: {what}": choice for what, choice in kept.items()}
    with pytest.warns(UserWarning, match="plain PyTorch"), pytest.raises(RuntimeError, match="no layout"):
        tuning.measure({None: lambda: broken("")}, torch.device("cpu"))
    with pytest.raises(AttributeError):  # a mistake of ours
        tuning.measure({None: lambda: torch.no_such_thing}, torch.device("cpu"))


def test_threads_measure_once(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[object] = []

    def measure(calls: dict, device: torch.device) -> tuple[object, bool]:
        measured.append(device)
        time.sleep(0.05)
        return next(iter(calls)), False

    known: dict = {}
    monkeypatch.setattr(tuning, "measure", measure)
    monkeypatch.setattr(tuning, "remembered", lambda: known)
    monkeypatch.setattr(tuning, "name_of", lambda device: "a GPU")
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda i: tuning.choose("a", torch.empty(0), {None: print}), range(4)))
    assert found == [None] * 4 and len(measured) == 1


def test_batches_of_one_power_of_two_are_measured_once() -> None:
    found = {rows: tuning.bucket(rows) for rows in (1, 64, 65, 197, 256, 257, 50432, 10**6)}
    assert found == {1: 64, 64: 64, 65: 128, 197: 256, 256: 256, 257: 512, 50432: 65536, 10**6: 65536}


def test_when_graphs_are_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The third call of a shape; the one not used for longest is forgotten; a failure is told once. On any machine."""
    recorded, replayed, eager = [], [], []
    made = graphs.Graphs()
    monkeypatch.setattr(torch.cuda, "device_of", lambda x: contextlib.nullcontext())
    monkeypatch.setattr(made, "wait", lambda: None)
    monkeypatch.setattr(graphs, "SHAPES", 2)
    monkeypatch.setattr(made, "record", lambda fn, x, besides: recorded.append(len(x)))
    monkeypatch.setattr(made, "replay", lambda key, x: replayed.append(key[0]))

    def call(*sizes: int) -> None:
        for n in sizes:
            made(lambda x: eager.append(len(x)), torch.empty(n, 3), None, list)

    call(1, 1, 1, 2, 2, 2, 1)
    assert (recorded, replayed, eager) == ([1, 2], [1, 2, 1], [1, 1, 2, 2])
    call(3, 3, 3, 1)  # 2 was used before 1 when 3 needed a place
    assert recorded == [1, 2, 3] and replayed[3:] == [3, 1]
    call(*[2] * 6)  # and waits twice as long for one
    assert recorded == [1, 2, 3, 2] and replayed[5:] == [2] and eager[4:] == [3, 3, *[2] * 5]
    many = graphs.SHAPES + 1
    call(*list(range(11, 11 + many)) * 40)
    assert len(recorded) < 5 * many + 4  # more shapes in turn than have a place: hardly any is recorded
    made.forget()
    eager.clear()
    call(1)
    assert eager == [1]

    def broken(fn: object, x: Tensor, besides: object) -> None:
        try:
            raise failure
        finally:
            raise RuntimeError("failed due to a previous error")  # as torch.cuda.graph says of every error

    monkeypatch.setattr(made, "record", broken)
    failure = torch.OutOfMemoryError("CUDA out of memory")
    for calls in (2, 6, 12):  # tried again, after twice as many calls
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            call(*[1] * (calls - 1))
        with pytest.warns(UserWarning, match="launched one by one.* because: CUDA out of memory"):
            call(1)
    failure = RuntimeError("operation not permitted when stream is capturing")
    call(7, 7)
    with pytest.warns(UserWarning, match="launched one by one.* because: operation not permitted"):
        call(7)
    eager.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call(*[1] * 50, *[8] * 50)
    assert eager == [1] * 50 + [8] * 50


class Wrapped(torch.nn.Module):
    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Tensor | None) -> Tensor:
        return self.inner(*args)


@torch.inference_mode()
def test_graphs_of_parts_that_were_replaced_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """A head, a block or a weight: what was recorded has the old one. On any machine: a tensor is the graph."""
    if not CUDA:
        monkeypatch.setattr(torch.cuda, "device_of", lambda x: contextlib.nullcontext())
        monkeypatch.setattr(CUDAViT, "_is_recordable", lambda self, x: True)
        monkeypatch.setattr(graphs.Graphs, "record", lambda self, fn, x, besides: fn(x))
        monkeypatch.setattr(graphs.Graphs, "wait", lambda self: None)
        monkeypatch.setattr(graphs.Graphs, "replay", lambda self, key, x: self.kept[key].clone())
    fast = vit.kernels.optimize(model(), NAMES[0])
    x = images(2, 3, 64, 64).to(DEVICE)

    def called() -> Tensor:
        for _ in range(4):  # the last two by a graph
            found = fast(x)
        assert len(fast._graphs.kept) == 1
        return found

    before = called()
    fast.head = torch.nn.Identity()
    assert called().shape == (2, 96)
    fast.blocks = fast.blocks[:1]
    assert difference(called(), fast.forward_head(fast.forward_features(x))) <= loss(NAMES[0])
    assert not torch.equal(called(), before)
    fast.norm.weight = torch.nn.Parameter(torch.zeros_like(fast.norm.weight), requires_grad=False)
    assert torch.equal(called(), fast.norm.bias.expand(2, 96))
    seen = []
    fast.blocks[0].mlp = Wrapped(fast.blocks[0].mlp)
    fast.blocks[0].mlp.register_forward_hook(lambda module, given, out: seen.append(out.shape))
    fast(x)
    assert seen == [(2, 17, 96)]  # of all tokens, where somebody looks


@needs_cuda
@torch.inference_mode()
def test_graphs() -> None:
    """Recorded for each shape; what they read outlives its place in the cache; all of them in the same memory."""
    slow = model()
    fast = vit.kernels.optimize(slow, NAMES[0])
    reserved = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is launched one by one
        for size in [(64, 64), (32, 80), *[(16 * i, 32) for i in range(1, 20)], (64, 64)]:
            for seed in (1, 2, 3, 4):  # the last two by a graph
                x = images(2, 3, *size, seed=seed).to(DEVICE)
                assert difference(fast(x), slow(x)) <= loss(NAMES[0])
            reserved.append(torch.cuda.memory_reserved())
        assert len(fast._graphs.kept) == 16
        assert reserved[16] <= reserved[1] + 64 * 2**20
        for one in (slow, fast):
            one.set_attention("sdpa")
        assert not fast._graphs.kept
        for seed in (1, 2, 3, 4):
            x = images(2, 3, 64, 64, seed=seed).to(DEVICE)
            assert difference(fast(x), slow(x)) <= loss(NAMES[0])


@needs_cuda
@torch.inference_mode()
def test_graphs_of_two_models_on_two_streams() -> None:
    pairs = [(slow := model(num_classes=classes), vit.kernels.optimize(slow, NAMES[0])) for classes in (10, 8)]
    given = [images(8, 3, 64, 64, seed=seed).to(DEVICE) for seed in range(20)]
    expected = [[slow(x) for x in given] for slow, _ in pairs]
    streams = [torch.cuda.Stream() for _ in pairs]
    torch.cuda.synchronize()
    found: list[list[Tensor]] = [[], []]
    for x in given:
        for i, (_, fast) in enumerate(pairs):
            with torch.cuda.stream(streams[i]):
                found[i].append(fast(x))
    torch.cuda.synchronize()
    for ours, theirs in zip(found, expected, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert difference(a, b) <= loss(NAMES[0])


@needs_cuda
@torch.inference_mode()
def test_a_graph_keeps_its_memory() -> None:
    """Whatever is recorded, dropped and given back after it: cuBLAS's workspace is the graph's own."""
    slow = model()
    fast = vit.kernels.optimize(slow, NAMES[0])
    x = images(1, 3, 224, 224).to(DEVICE)
    for _ in range(4):
        fast(x)
    assert len(fast._graphs.kept) == 1
    device = torch.device("cuda", torch.cuda.current_device())
    for n in (64, 1024):  # recorded and dropped, as the tuner does it
        a = torch.randn(n, n, device=device, dtype=torch.bfloat16)
        tuning.milliseconds(lambda a=a: a @ a, device)
    torch.cuda.empty_cache()
    torch.full((2**28,), torch.nan, device=device)
    for seed in (1, 2, 3):
        x = images(1, 3, 224, 224, seed=seed).to(DEVICE)
        assert difference(fast(x), slow(x)) <= loss(NAMES[0])


class Asking(torch.nn.Module):
    """A head that asks the GPU for a number, which no graph can hold."""

    def forward(self, x: Tensor) -> Tensor:
        return x * x.sum().item()


@needs_cuda
@torch.inference_mode()
def test_what_cannot_be_recorded_leaves_nothing_behind() -> None:
    fast = vit.kernels.optimize(model(), NAMES[0])
    head, fast.head = fast.head, Asking()
    x, stream = images(1, 3, 64, 64).to(DEVICE), torch.cuda.current_stream()
    fast(x), fast(x)
    with pytest.warns(UserWarning, match="launched one by one"):
        fast(x)
    assert torch.cuda.current_stream() == stream and torch.rand(3, device=DEVICE).isfinite().all()
    fast.head = head
    for _ in range(4):
        fast(x)
    assert len(fast._graphs.kept) == 1


@needs_cuda
@torch.inference_mode()
def test_recorded_by_others() -> None:
    """In a graph of somebody else's there is none of ours, before or after one of ours was recorded."""
    for warm_ups in (2, 4):
        slow = model()
        fast = vit.kernels.optimize(slow, NAMES[0])
        given = images(1, 3, 64, 64).to(DEVICE)
        for _ in range(warm_ups):
            fast(given)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = fast(given)
        given.copy_(images(1, 3, 64, 64, seed=9))
        graph.replay()
        assert difference(found, slow(given)) <= loss(NAMES[0])


@torch.inference_mode()
def test_what_is_only_recorded_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Positions, and weights for bytes, that a graph of somebody else's is to compute. On any machine."""
    fast = vit.kernels.optimize(model(), NAMES[0])
    pixels = (128 + 40 * images(1, 3, 32, 64)).clamp(0, 255).to(DEVICE, torch.uint8)
    monkeypatch.setattr(gpu_model, "is_recording", lambda x: True)
    before = fast(pixels)
    assert not fast._positions and not fast._of_bytes
    monkeypatch.undo()
    assert torch.equal(fast(pixels), before) and fast._positions and fast._of_bytes


@torch.inference_mode()
def test_compiling_leaves_it_out() -> None:
    fast = vit.kernels.optimize(model(), NAMES[0])
    x = images(1, 3, 64, 64).to(DEVICE)
    for call in (lambda x: 2 * fast(x), lambda x: fast.forward_features(x)[0], lambda x: fast.forward_packed([*x])):
        torch._dynamo.reset()
        assert difference(torch.compile(call, backend="eager")(x), call(x)) <= loss(NAMES[0])
        torch._dynamo.reset()
        with pytest.raises(torch._dynamo.exc.Unsupported, match=blocks.OPAQUE):
            torch.compile(call, backend="eager", fullgraph=True)(x)


def test_optimizing_leaves_random_numbers_alone() -> None:
    plain = model()
    torch.manual_seed(3)
    expected = torch.rand(3), torch.rand(3, device=DEVICE)
    torch.manual_seed(3)
    vit.kernels.optimize(plain, NAMES[0])
    assert all(map(torch.equal, (torch.rand(3), torch.rand(3, device=DEVICE)), expected))


@needs_cuda
def test_a_kernel_is_timed() -> None:
    small, large = (torch.randn(n, n, device=DEVICE) for n in (128, 4096))
    device = small.device
    assert 0 < tuning.milliseconds(lambda: small @ small, device) < tuning.milliseconds(lambda: large @ large, device)


@pytest.mark.matrix
@interpreter_only
def test_the_kernels_compile_for_hopper(tmp_path: Path) -> None:
    """Every layout, with Hopper's own product where tiles are large enough, and within its shared memory."""
    file = tmp_path / "resources.json"
    command = [sys.executable, Path(__file__).parents[1] / "benchmarks" / "resources.py", "--json", file]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    subprocess.run(command, check=True, env=environment | {"TRITON_CACHE_DIR": str(tmp_path / "cache")})
    rows = json.loads(file.read_text())
    uses = {"linear": 4, "mlp": 1, "patches": 2}
    assert len(rows) == 1 + sum(uses[kernel] * len(layouts) for (kernel, _), layouts in tiles.TILES.items())
    for row in rows:
        assert row["fits"] > 0 or row["kernel"].startswith("mlp"), row
        assert (row["wgmma"] > 0) == (row["layout"]["R"] >= 64), row
    good = {row["kernel"] for row in rows if row["spilled"] <= 16 and row["fits"] >= row["layout"].get("each", 1)}
    assert {row["kernel"] for row in rows} - good <= {"mlp", "mlp, few rows"}  # which spills outside of its loop


def test_what_ended_a_recording():
    """Not what the caller was handling by then."""
    memory, invalid, others = torch.OutOfMemoryError("out of memory"), RuntimeError("invalid"), ValueError("others'")
    for raised, context, handled, lacks, text in [
        (memory, None, None, True, "out of memory"),
        (memory, others, others, True, "out of memory"),
        (invalid, memory, None, True, "out of memory"),
        (invalid, memory, memory, False, "invalid"),
        (memory, invalid, None, True, "out of memory"),
    ]:
        raised.__context__ = context
        assert graphs.cause(raised, handled) == (lacks, text)
        raised.__context__ = None
