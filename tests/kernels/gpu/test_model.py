"""Models for a GPU against the models that they are made from."""

import copy
import dataclasses
import gc
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from gpu_cases import CUDA, DEVICE, MARKS, NAMES, interpreter_only, loss, model
from helpers import difference, images
from torch import Tensor

import vit
from vit.kernels.gpu import blocks, fused, tiles
from vit.kernels.gpu import model as gpu_model
from vit.kernels.gpu.model import CUDAViT
from vit.kernels.gpu.tiles import Tile

pytestmark = MARKS
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
    if CUDA:  # which would take whatever is faster

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
        if "blocks.0.mlp.fc1" in names:  # which includes the GELU
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
        (lambda: fast(x.double()), "float64: use images.to"),
        (lambda: fast(x.requires_grad_()), "no gradients"),
        (lambda: fast(images(3, 64, 64)), "3 dimensions"),
        (lambda: fast.to("meta"), "cannot be moved"),
        (lambda: fast.state_dict(), r"no state dict: save it with vit\.kernels\.save"),
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


@torch.inference_mode()
def test_what_is_only_recorded_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Position embeddings, and weights for bytes, while the caller records a graph. On any machine."""
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
