"""Feature maps at four scales: their sizes and numbers, and a detector on top of them."""

import pytest
import torch
import torch.nn.functional as F
from helpers import FLOAT32, GRADIENT, difference, images, randomize
from torch import Tensor, nn

import vit
from vit.config import ViTConfig

TINY = ViTConfig(img_size=64, patch_size=16, embed_dim=48, depth=1, num_heads=3, num_classes=0)
RELATIVES = {
    "plain": TINY,
    "registers": TINY.override(reg_tokens=3, class_position=False),
    "patches of 8": TINY.override(img_size=40, patch_size=8),
    "layer scale, two blocks": TINY.override(depth=2, init_values=0.5),
    "distillation token": TINY.override(dist_token=True),
    "another width": TINY.override(embed_dim=36, in_chans=1),
}


def make(config: ViTConfig, **options) -> vit.FeaturePyramid:
    torch.manual_seed(0)
    return randomize(vit.FeaturePyramid(vit.ViT(config), **options)).eval()


@torch.no_grad()
@pytest.mark.parametrize("name", RELATIVES)
@pytest.mark.parametrize("out_channels", [256, 5])
def test_four_scales_at_any_grid(name, out_channels):
    config = RELATIVES[name]
    pyramid = make(config, out_channels=out_channels)
    p = config.patch_size
    assert pyramid.out_channels == out_channels and pyramid.channels == [out_channels] * 4
    assert pyramid.strides == [p / 4, p / 2, p, 2 * p]
    for h, w in [(4, 4), (2, 2), (3, 5), (7, 3), (2, 11), (7, 7)]:
        maps = pyramid(images(2, config.in_chans, h * p, w * p))
        assert list(maps) == ["0", "1", "2", "3"]
        sizes = [(4 * h, 4 * w), (2 * h, 2 * w), (h, w), (h // 2, w // 2)]
        for found, size in zip(maps.values(), sizes, strict=True):
            assert found.shape == (2, out_channels, *size)


def channel_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Mean 0 and variance 1 over the channels of every cell, with ViTDet's epsilon."""
    centred = x - x.mean(dim=1, keepdim=True)
    normed = centred / (centred.square().mean(dim=1, keepdim=True) + 1e-6).sqrt()
    return normed * weight[:, None, None] + bias[:, None, None]


def double(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A transposed convolution of stride 2 and width 2: every cell becomes four, each with a matrix of its own."""
    B, _, h, w = x.shape
    four = torch.einsum("bihw,ioyx->bohywx", x, weight)
    return four.reshape(B, -1, 2 * h, 2 * w) + bias[:, None, None]


def by_the_paper(pyramid: vit.FeaturePyramid, x: Tensor) -> list[Tensor]:
    """Section 3 of arXiv:2203.16527, from the parameters in the order in which they are applied."""
    model = pyramid.model
    tokens = model.forward_features(x)[:, model.config.num_prefix_tokens :]
    h, w = (side // model.config.patch_size for side in x.shape[2:])
    last = tokens.reshape(x.shape[0], h, w, -1).permute(0, 3, 1, 2)
    maps = []
    for scale, count in zip(pyramid.scales, (6, 2, 0, 0)):
        weights = list(scale.parameters())
        up, (one, weight1, bias1, three, weight2, bias2) = weights[:count], weights[count:]
        y = last
        if len(maps) == 3:
            y = y[:, :, : h // 2 * 2, : w // 2 * 2].unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).amax(dim=(3, 5))
        if up:
            y = double(y, *up[:2])
        if len(up) == 6:
            y = double(F.gelu(channel_norm(y, *up[2:4])), *up[4:])
        y = channel_norm(torch.einsum("bihw,oixy->bohw", y, one), weight1, bias1)
        maps.append(channel_norm(F.conv2d(y, three, padding=1), weight2, bias2))
    return maps


@torch.no_grad()
@pytest.mark.parametrize("name", RELATIVES)
def test_equals_the_papers_description(name):
    config = RELATIVES[name]
    pyramid = make(config, out_channels=8).double()  # so that even an epsilon matters
    p = config.patch_size
    for h, w in ((4, 4), (3, 5), (2, 9)):
        x = images(2, config.in_chans, h * p, w * p).double()
        for found, expected in zip(pyramid(x).values(), by_the_paper(pyramid, x), strict=True):
            assert difference(found, expected) <= 1e-9
            assert difference(found, expected.flip(3)) > 1e-3


def test_every_weight_is_trained():
    for name, config in RELATIVES.items():
        pyramid = make(config, out_channels=8).train()
        x = images(2, config.in_chans, 3 * config.patch_size, 4 * config.patch_size).requires_grad_()
        sum((found * images(*found.shape, seed=3)).sum() for found in pyramid(x).values()).backward()
        for parameter_name, parameter in pyramid.named_parameters():
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, (name, parameter_name)
        assert x.grad.abs().amax(dim=(0, 1)).min() > 0


def test_every_scale_alone_trains_the_model():
    pyramid = make(TINY, out_channels=8)
    found = []
    for scale in "0123":
        pyramid.zero_grad(set_to_none=True)
        pyramid(images(1, 3, 48, 64))[scale].square().sum().backward()
        found.append(pyramid.model.patch_embed.proj.weight.grad.clone())
        untouched = [i for i, one in enumerate(pyramid.scales) if all(p.grad is None for p in one.parameters())]
        assert untouched == [i for i in range(4) if i != int(scale)]
    assert all(gradient.abs().max() > 0 for gradient in found)
    assert all(difference(one, found[0]) > GRADIENT for one in found[1:])


def test_the_model_is_shared():
    model = randomize(vit.ViT(TINY)).eval()
    pyramid = vit.FeaturePyramid(model)
    assert {id(p) for p in model.parameters()} < {id(p) for p in pyramid.parameters()}
    before = pyramid(images(1, 3, 64, 64))["2"].detach()
    with torch.no_grad():
        model.patch_embed.proj.weight.mul_(1.5)
    assert difference(pyramid(images(1, 3, 64, 64))["2"].detach(), before) > 100 * FLOAT32


HEADED = {
    "head": TINY.override(num_classes=5),
    "two heads": TINY.override(num_classes=5, dist_token=True, global_pool="dist"),
    "norm after pooling": TINY.override(num_classes=5, global_pool="avg", fc_norm=True),
    "wide head": TINY.override(num_classes=5, global_pool="token_avg", depth=2),
}


@pytest.mark.parametrize("name", HEADED)
def test_it_owns_what_it_uses(name):
    model = randomize(vit.ViT(HEADED[name])).eval()
    before, x = model(images(1, 3, 64, 64)), images(2, 3, 48, 64)
    pyramid = vit.FeaturePyramid(model, out_channels=8)
    sum(found.square().sum() for found in pyramid(x).values()).backward()
    assert [name for name, p in pyramid.named_parameters() if p.grad is None] == []
    assert torch.equal(model(images(1, 3, 64, 64)), before) and model.config == HEADED[name]  # the caller's model


@torch.no_grad()
@pytest.mark.parametrize("name", HEADED)
def test_weights_of_a_pyramid_that_held_a_head_load(name):
    source = vit.FeaturePyramid(model := randomize(vit.ViT(HEADED[name])).eval(), out_channels=8).eval()
    written = {**{f"model.{key}": x for key, x in model.state_dict().items()}, **source.state_dict()}
    assert any("head" in key for key in written)
    pyramid = vit.FeaturePyramid(randomize(vit.ViT(HEADED[name]), seed=1), out_channels=8).eval()
    detector = nn.ModuleDict({"backbone": pyramid})
    detector.load_state_dict({f"backbone.{key}": x for key, x in written.items()})
    x = images(1, 3, 48, 64)
    assert torch.equal(pyramid(x)["0"], source(x)["0"])
    for extra in ("model.heads.weight", "head.weight", "model.blocks.0.head.weight"):  # nothing else is left out
        with pytest.raises(RuntimeError, match="Unexpected key"):
            pyramid.load_state_dict({**written, extra: torch.zeros(1)})


@pytest.mark.parametrize(("size", "grid"), [((16, 64), r"\[1, 4\]"), ((64, 16), r"\[4, 1\]"), ((16, 16), r"\[1, 1\]")])
def test_a_single_patch_cannot_be_halved(size, grid):
    with pytest.raises(ValueError, match=f"two patches a side; got {grid}"):
        make(TINY)(images(1, 3, *size))


def test_refusals():
    for wrong in (0, -1, 2.5, True, None):
        with pytest.raises(ValueError, match=f"out_channels must be a whole number of at least 1, not {wrong}"):
            vit.FeaturePyramid(vit.ViT(TINY), out_channels=wrong)
    for x, message in ((images(1, 1, 64, 64), "1 in place of 3"), (images(1, 3, 63, 64), "nearest size .* 64 x 64")):
        with pytest.raises(ValueError, match=message):
            make(TINY)(x)
    with pytest.raises(ValueError, match="unknown policy for ragged sides 'padd'. Did you mean 'pad'"):
        make(TINY, ragged="padd")(images(1, 3, 63, 64))


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.*were cropped")
@pytest.mark.parametrize(("policy", "whole"), [("pad", (80, 64)), ("crop", (64, 48)), ("resize", (64, 64))])
def test_ragged_sides_are_completed(policy, whole):
    pyramid = make(TINY, out_channels=8, ragged=policy)
    x = images(1, 3, 71, 58)
    completed = vit.inputs.complete_patches(x, 16, policy)
    assert tuple(completed.shape[2:]) == whole
    for found, expected in zip(pyramid(x).values(), pyramid(completed).values(), strict=True):
        assert torch.equal(found, expected)


def detector(config: ViTConfig, ragged: str) -> nn.Module:
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.rpn import AnchorGenerator
    from torchvision.ops import MultiScaleRoIAlign

    pyramid = vit.FeaturePyramid(randomize(vit.ViT(config)), out_channels=16, ragged=ragged)
    return FasterRCNN(
        pyramid, num_classes=3, min_size=64, max_size=96,
        rpn_anchor_generator=AnchorGenerator(tuple((side,) for side in (8, 16, 32, 64)), ((0.5, 1.0, 2.0),) * 4),
        box_roi_pool=MultiScaleRoIAlign(["0", "1", "2", "3"], output_size=7, sampling_ratio=2),
        rpn_pre_nms_top_n_train=100, rpn_post_nms_top_n_train=50, rpn_pre_nms_top_n_test=100,
        rpn_post_nms_top_n_test=50, box_detections_per_img=7, box_score_thresh=0.0,
    )  # fmt: skip


@pytest.mark.parametrize(("name", "ragged"), [("plain", "error"), ("registers", "error"), ("patches of 8", "pad")])
def test_a_detector_trains_and_detects_with_it(name, ragged):
    torch.manual_seed(0)
    model = detector(RELATIVES[name], ragged)
    x = [images(1, 3, 70, 50)[0], images(1, 3, 45, 90, seed=2)[0]]
    targets = [
        {"boxes": torch.tensor([[5.0, 8.0, 40.0, 60.0], [10.0, 10.0, 25.0, 30.0]]), "labels": torch.tensor([1, 2])},
        {"boxes": torch.tensor([[30.0, 3.0, 80.0, 40.0]]), "labels": torch.tensor([2])},
    ]
    losses = model.train()(x, targets)
    assert set(losses) == {"loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg"}
    assert all(loss.isfinite() and loss > 0 for loss in losses.values())
    sum(losses.values()).backward()
    for parameter_name, parameter in model.backbone.named_parameters():
        gradient = parameter.grad
        assert gradient is not None and gradient.isfinite().all() and gradient.abs().max() > 0, parameter_name

    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    history = []
    for step in range(8):
        torch.manual_seed(step)
        optimizer.zero_grad()
        loss = sum(model(x, targets).values())
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    assert sum(history[-3:]) < 0.8 * sum(history[:3])

    with torch.no_grad():
        found = model.eval()(x)
    assert len(found) == 2
    for one, image in zip(found, x):
        boxes, height, width = one["boxes"], *image.shape[1:]
        assert 1 <= len(boxes) <= 7 and len(one["labels"]) == len(one["scores"]) == len(boxes)
        assert boxes.isfinite().all() and boxes.min() >= 0
        assert boxes[:, 2].max() <= width and boxes[:, 3].max() <= height


def test_what_detectors_would_misread_is_refused():
    """torchvision rounds the ratio of sides to a power of two: with patches of 14, boxes would be an eighth off."""
    with pytest.raises(ValueError, match=r"powers of two, which patches of 14 pixels do not give: .*patch_size=16"):
        vit.FeaturePyramid(vit.ViT(TINY.override(img_size=70, patch_size=14)))
    with pytest.raises(ValueError, match="must be a multiple of 4, not 6"):
        vit.FeaturePyramid(vit.ViT(TINY.override(embed_dim=6)))
