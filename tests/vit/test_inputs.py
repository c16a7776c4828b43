"""The images that a model accepts, and ragged sides."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    FLOAT32,
    GRADIENT,
    MINI,
    difference,
    images,
    ours_from,
    pixels,
    randomize,
    refused_in_one_line,
    timm_twin,
)

import vit
from vit.inputs import complete_patches


@pytest.fixture
def small() -> vit.ViT:
    return randomize(vit.ViT(MINI)).eval()


BAD_IMAGES = {
    "3 dimensions": (lambda: images(3, 32, 32), r"\[B, 3, H, W\].*got 3 dimensions: \[3, 32, 32\]"),
    "5 dimensions": (lambda: images(1, 1, 3, 32, 32), "got 5 dimensions"),
    "channels last": (lambda: images(2, 32, 32, 3), r"32 in place of 3 channels: \[2, 32, 32, 3\]; move the channels"),
    "one channel": (lambda: images(2, 1, 32, 32), "got 1 in place of 3 channels"),
    "integers": (lambda: torch.zeros(1, 3, 32, 32, dtype=torch.uint8), "got torch.uint8: scale and normalise"),
    "empty batch": (lambda: images(0, 3, 32, 32), r"empty batch: \[0, 3, 32, 32\]"),
    "ragged height": (lambda: images(1, 3, 30, 32), "got 30 x 32, the nearest size that works is 32 x 32"),
    "ragged width": (lambda: images(1, 3, 32, 33), "got 32 x 33, the nearest size that works is 32 x 32"),
    "no height": (lambda: images(1, 3, 0, 32), r"got no pixels: \[1, 3, 0, 32\]"),
    "no width": (lambda: images(1, 3, 32, 0), "got no pixels"),
    "below a patch": (lambda: images(1, 3, 1, 3), "got 1 x 3, the nearest size that works is 4 x 4"),
    "another dtype": (lambda: images(1, 3, 32, 32).double(), "torch.float32; got torch.float64: use images.to"),
}


@pytest.mark.parametrize("case", BAD_IMAGES)
def test_bad_images_are_refused(small, case):
    make, message = BAD_IMAGES[case]
    with pytest.raises(ValueError, match=message):
        small(make())


NONSENSE = {
    "no height": (lambda m: m(images(1, 3, 0, 56)), r"got no pixels: \[1, 3, 0, 56\]"),
    "no width": (lambda m: m(images(1, 3, 56, 0), ragged="pad"), r"got no pixels: \[1, 3, 56, 0\]"),
    "no pixels": (lambda m: m.forward_intermediates(images(1, 3, 0, 0)), r"got no pixels: \[1, 3, 0, 0\]"),
    "one row": (lambda m: m(images(1, 3, 1, 56)), "got 1 x 56, the nearest size that works is 4 x 56"),
    "one pixel": (lambda m: m(images(1, 3, 1, 1)), "got 1 x 1, the nearest size that works is 4 x 4"),
    "a strip": (lambda m: m(images(1, 3, 1, 10000)), "got 1 x 10000, the nearest size that works is 4 x 10000"),
    "a column": (lambda m: m(images(1, 3, 9999, 2)), "got 9999 x 2, the nearest size that works is 10000 x 4"),
    "says how": (lambda m: m(images(1, 3, 30, 57)), "32 x 56 .or pass ragged='resize', 'crop' or 'pad'"),
    "crop below a patch": (lambda m: m(images(1, 3, 3, 56), "crop"), "'crop' .* at least 4 .* 4; got 3 x 56"),
    "crop a strip": (lambda m: m(images(1, 3, 1, 10000), "crop"), "'crop' .* at least 4 .*; got 1 x 10000"),
    "resize below half": (lambda m: m(images(1, 3, 56, 1), "resize"), "'resize' .* at least 2 .* 4; got 56 x 1"),
    "resize a strip": (lambda m: m(images(1, 3, 1, 10000), "resize"), "'resize' .* at least 2 .*; got 1 x 10000"),
    "policy": (lambda m: m(pixels((2, 2)), ragged="rezise"), "sides 'rezise'. Did you mean 'resize'"),
    "another policy": (lambda m: m(images(1, 3, 30, 30), ragged=None), "sides None. Known: error, resize, crop, pad"),
    "a flag": (lambda m: m.forward_features(pixels((2, 2)), ragged=True), "ragged sides True. Known: error"),
}


@pytest.mark.parametrize("case", NONSENSE)
def test_nonsense_is_refused_in_one_line(small, case):
    refused_in_one_line(lambda: NONSENSE[case][0](small), NONSENSE[case][1])


@torch.no_grad()
def test_the_thinnest_valid_images_are_accepted(small):
    for size in ((4, 4), (4, 9992), (1, 10000)):
        assert small(images(1, 3, *size), ragged="pad").isfinite().all()
    for size in ((2, 2), (2, 57)):
        assert small(images(1, 3, *size), ragged="resize").isfinite().all()


# Sides that are not multiples of the patch


def cropped(x: torch.Tensor, p: int) -> torch.Tensor:
    return x[:, :, : x.shape[2] // p * p, : x.shape[3] // p * p]


def padded(x: torch.Tensor, p: int) -> torch.Tensor:
    whole = x.new_zeros(*x.shape[:2], *((side + p - 1) // p * p for side in x.shape[2:]))
    whole[:, :, : x.shape[2], : x.shape[3]] = x
    return whole


def resized(x: torch.Tensor, p: int) -> torch.Tensor:
    sides = [max(p, (2 * side + p) // (2 * p) * p) for side in x.shape[2:]]
    return F.interpolate(x, size=sides, mode="bicubic", antialias=True)


BY_HAND = {"crop": cropped, "pad": padded, "resize": resized}

RAGGED = [(30, 33), (57, 56), (56, 59), (5, 50), (55, 9), (41, 62)]


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.*were cropped")
@pytest.mark.parametrize("policy", BY_HAND)
@pytest.mark.parametrize("size", RAGGED)
def test_ragged_sides_are_completed_as_by_hand(small, policy, size):
    x = images(2, 3, *size)
    whole = BY_HAND[policy](x, 4)
    assert whole.shape[2] % 4 == whole.shape[3] % 4 == 0 and whole.shape != x.shape
    assert torch.equal(complete_patches(x, 4, policy), whole)
    assert torch.equal(small(x, ragged=policy), small(whole))
    assert torch.equal(small.forward_features(x, ragged=policy), small.forward_features(whole))
    for one, other in zip(small.forward_intermediates(x, ragged=policy), small.forward_intermediates(whole)):
        assert torch.equal(one, other)
    assert difference(small.forward_packed(list(x), ragged=policy), small(whole)) <= FLOAT32
    for one, other in zip(
        vit.attention_maps(small, x, ragged=policy, queries="all"), vit.attention_maps(small, whole, queries="all")
    ):
        assert torch.equal(one, other)
    for another in BY_HAND.keys() - {policy}:
        completed = BY_HAND[another](x, 4)
        assert completed.shape != whole.shape or difference(small(completed), small(whole)) > 100 * FLOAT32


@torch.no_grad()
def test_pad_equals_timms_dynamic_img_pad():
    twin = timm_twin(MINI)
    model = ours_from(twin, MINI)
    twin.patch_embed.dynamic_img_pad = True
    for size in (*RAGGED, (1, 1), (1, 97), (56, 56), (64, 20)):
        x = images(2, 3, *size)
        assert difference(model.forward_features(x, ragged="pad"), twin.forward_features(x)) <= FLOAT32, size
        assert difference(model(x, ragged="pad"), twin(x)) <= FLOAT32, size
    at_the_left = F.pad(images(2, 3, 30, 33), (3, 0, 0, 2))
    assert difference(model(at_the_left), twin(images(2, 3, 30, 33))) > 100 * FLOAT32


def test_only_crop_warns_and_says_how_much(small):
    with pytest.warns(UserWarning, match="^2 rows of 30 and 1 columns of 33 were cropped$"):
        small(images(1, 3, 30, 33), ragged="crop")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for policy in ("pad", "resize"):
            small(images(1, 3, 30, 33), ragged=policy)
        small(images(1, 3, 32, 32), ragged="crop")


@pytest.mark.parametrize("policy", ["error", "resize", "crop", "pad"])
def test_whole_sides_come_back_as_they_are(policy):
    x = images(1, 3, 32, 44)
    assert complete_patches(x, 4, policy) is x


@pytest.mark.filterwarnings("ignore:.*were cropped")
@pytest.mark.parametrize("policy", BY_HAND)
def test_gradients_reach_ragged_images(small, policy):
    gradients = []
    for forward in (lambda x: small(x, ragged=policy), lambda x: small(BY_HAND[policy](x, 4))):
        x = images(2, 3, 30, 33).requires_grad_()
        forward(x).square().sum().backward()
        gradients.append(x.grad)
    assert difference(*gradients) <= GRADIENT
    reached = gradients[0].abs().amax(dim=(0, 1)) > 0
    assert reached.all() if policy != "crop" else (reached[:28, :32].all() and reached.sum() == 28 * 32)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.*were cropped")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("policy", BY_HAND)
def test_ragged_sides_in_other_dtypes(small, policy, dtype):
    x = images(1, 3, 30, 33)
    expected = small(x, ragged=policy)
    actual = small.to(dtype)(x.to(dtype), ragged=policy)
    assert actual.dtype == dtype
    assert difference(actual.float(), expected) < (FLOAT32 if dtype == torch.float64 else 0.05)


# Each image is accepted once


RUNS = {
    "forward": lambda m, x: m(x),
    "forward_features": lambda m, x: m.forward_features(x),
    "forward_intermediates": lambda m, x: m.forward_intermediates(x, [0, -1]),
    "attention_maps": lambda m, x: vit.attention_maps(m, x, blocks=[0, 1]),
    "record": lambda m, x: vit.record(m, x, ["blocks.0", "blocks.1.attention.weights"]),
}
PACKED = ("forward_packed", "forward_features_packed", "forward_intermediates_packed")


@pytest.fixture
def accepted(monkeypatch) -> list[list[int]]:
    """The shape of everything that `vit.inputs.accept` is called with."""
    shapes = []
    plain = vit.inputs.accept
    monkeypatch.setattr(vit.inputs, "accept", lambda x, *a, **k: (shapes.append(list(x.shape)), plain(x, *a, **k))[1])
    return shapes


@pytest.mark.parametrize("optimized", [False, True])
@pytest.mark.parametrize("run", [*RUNS, *PACKED])
@torch.no_grad()
def test_images_are_accepted_once(small, accepted, run, optimized):
    model = vit.kernels.optimize(small) if optimized else small
    accepted.clear()
    x = pixels((5, 9), count=2)
    if run in RUNS:
        RUNS[run](model, x)
        assert accepted == [[2, 3, 20, 36]]
    else:
        getattr(model, run)([*x, pixels((3, 2))[0]], budget=50)  # two passes
        assert accepted == [[1, 3, 20, 36], [1, 3, 20, 36], [1, 3, 12, 8]]
