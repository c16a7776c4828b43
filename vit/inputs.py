"""The images that a model accepts, and what becomes of sides that are not multiples of the patch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checks import nearest_multiple, unknown, warn
from .config import ViTConfig

POLICIES = ("error", "resize", "crop", "pad")


def accept(images: Tensor, config: ViTConfig, like: Tensor | None, ragged: str) -> Tensor:
    """Check a batch of images and make its sides multiples of the patch.

    Args:
        images: [B, in_chans, H, W], floating point.
        config: of the model.
        like: the weight whose dtype and device the images must share; None leaves that check to the layer.
        ragged: see `complete_patches`.

    Returns:
        [B, in_chans, h*p, w*p].

    Raises:
        ValueError: images of another kind; the error says what was expected and what was given.
    """
    p, chans = config.patch_size, config.in_chans
    expected = f"expected [B, {chans}, H, W] floating-point images, H and W multiples of {p}"
    if isinstance(images, torch.fx.Proxy):
        raise ValueError(
            "torch.fx cannot trace checks of the images' size, nor can torchvision's create_feature_extractor: use"
            " model.forward_intermediates for maps, vit.record and vit.patch for activations, torch.export for a graph"
        )
    if not isinstance(images, Tensor):
        raise ValueError(f"{expected}; got {type(images).__name__}, not a tensor: vit.create_transform makes one")
    if images.ndim != 4:
        hint = "; for one image use images[None]" if images.ndim == 3 else ""
        raise ValueError(f"{expected}; got {images.ndim} dimensions: {list(images.shape)}{hint}")
    if images.shape[1] != chans:
        hint = "; move the channels with images.permute(0, 3, 1, 2)" if images.shape[3] == chans else ""
        raise ValueError(f"{expected}; got {images.shape[1]} in place of {chans} channels: {list(images.shape)}{hint}")
    if not images.is_floating_point():
        raise ValueError(f"{expected}; got {images.dtype}: scale and normalise as model.preprocessing says")
    if like is not None and images.device != like.device:
        raise ValueError(f"{expected} on the model's {like.device}; got {images.device}: move one of them")
    device = images.device.type
    autocast = device != "meta" and torch.is_autocast_enabled(device)  # there is none for meta tensors
    casts = autocast and images.dtype != torch.float64  # which autocast leaves alone
    if like is not None and images.dtype != like.dtype and not casts:
        raise ValueError(f"{expected} in the model's {like.dtype}; got {images.dtype}: use images.to({like.dtype})")
    if 0 in images.shape:
        raise ValueError(f"{expected}; got {'no pixels' if len(images) else 'an empty batch'}: {list(images.shape)}")
    return complete_patches(images, p, ragged)


def weight_to_match(patch_embed: nn.Module) -> Tensor | None:
    """The weight that images meet first; None if what it will be then cannot be told before the layer is called.

    Sharded and offloaded layers gather or move their weights when they are called, some cast their inputs, adapters
    and quantised layers replace the convolution: wrappers, subclasses of modules and tensors, or hooks show that.
    """
    proj = patch_embed._modules.get("proj")  # none of a wrapper's own
    if type(proj) is not nn.Conv2d:
        return None
    weight = proj._parameters.get("weight")
    if weight is None or type(weight) not in (nn.Parameter, Tensor):  # a plain tensor comes from functional_call
        return None
    changed = any(layer._forward_pre_hooks or "forward" in layer.__dict__ for layer in (patch_embed, proj))
    return None if changed else weight


def check_list(images: object) -> None:
    """ValueError unless `images` is a list of at least one [C, H, W] tensor, all of one dtype and on one device."""
    if not isinstance(images, (list, tuple)):
        raise ValueError(f"expected a list of [C, H, W] images, not {type(images).__name__}")
    if not images:
        raise ValueError("expected at least one [C, H, W] image, got an empty list")
    for i, image in enumerate(images):
        if not isinstance(image, Tensor) or image.ndim != 3:
            found = list(image.shape) if isinstance(image, Tensor) else type(image).__name__
            raise ValueError(f"image {i} of the list: expected a tensor [C, H, W], got {found}")
        for what in ("dtype", "device"):
            one, other = getattr(images[0], what), getattr(image, what)
            if one != other:
                raise ValueError(f"images of one list must share their {what}: image 0 has {one}, image {i} {other}")


def complete_patches(images: Tensor, p: int, ragged: str) -> Tensor:
    """Make both sides multiples of the patch. Images whose sides already are come back unchanged.

    Args:
        images: [B, C, H, W], normalised.
        p: side of a patch, in pixels.
        ragged: "error" refuses them; "resize" resizes to the nearest multiples, bicubic with antialiasing as in Pillow;
            "crop" drops the pixels beyond the last whole patch on the right and at the bottom, and warns; "pad" adds
            zeros there to complete the patch, as timm's `dynamic_img_pad` does (zero is the mean colour of normalised
            images).

    Returns:
        [B, C, H', W'], H' and W' multiples of p.

    Raises:
        ValueError: an unknown policy; ragged sides with "error"; sides shorter than half a patch with "resize", or than
            a whole one with "crop".
    """
    if ragged not in POLICIES:
        raise ValueError(unknown("policy for ragged sides", ragged, POLICIES))
    H, W = images.shape[-2:]
    if H % p == 0 and W % p == 0:
        return images
    if ragged == "error":
        nearest = " x ".join(str(nearest_multiple(side, p)) for side in (H, W))
        raise ValueError(
            f"expected H and W multiples of {p}; got {H} x {W}, the nearest size that works is {nearest}"
            " (or pass ragged='resize', 'crop' or 'pad')"
        )
    least = {"resize": (p + 1) // 2, "crop": p, "pad": 1}[ragged]
    if min(H, W) < least:
        raise ValueError(f"ragged={ragged!r} needs sides of at least {least} pixels with patches of {p}; got {H} x {W}")
    if ragged == "pad":
        return F.pad(images, (0, (p - W % p) % p, 0, (p - H % p) % p))  # right, bottom; inductor knows no -W % p
    if ragged == "crop":
        if not torch.compiler.is_compiling():
            warn(f"{H % p} rows of {H} and {W % p} columns of {W} were cropped")
        return images[..., : H - H % p, : W - W % p]
    size = (nearest_multiple(H, p), nearest_multiple(W, p))
    return F.interpolate(images.float(), size, mode="bicubic", antialias=True).to(images.dtype)
