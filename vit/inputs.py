"""Images whose sides are no multiples of the patch: refused, resized, cropped or padded, as the caller says."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import nearest_multiple, unknown, warn

POLICIES = ("error", "resize", "crop", "pad")


def complete_patches(images: Tensor, p: int, ragged: str) -> Tensor:
    """Make both sides multiples of the patch; images whose sides are so already come back as they are.

    Args:
        images: [B, C, H, W], normalised.
        p: side of a patch, in pixels.
        ragged: "error" refuses; "resize" to the nearest multiples, bicubic with antialiasing, as Pillow does it; "crop"
            drops what lies beyond the last whole patch at the right and at the bottom, and a warning says how much;
            "pad" adds zeros there, just enough to complete the patch, as timm's `dynamic_img_pad`. Zeros are the mean
            colour, since the images are normalised.

    Returns:
        [B, C, H', W'], H' and W' multiples of p.

    Raises:
        ValueError: another policy; ragged sides under "error"; sides of less than half a patch under "resize", of less
            than a whole one under "crop".
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
            " (or say ragged='resize', 'crop' or 'pad')"
        )
    least = {"resize": (p + 1) // 2, "crop": p, "pad": 1}[ragged]
    if min(H, W) < least:
        raise ValueError(
            f"ragged={ragged!r} takes sides of at least {least} pixels, with patches of {p}; got {H} x {W}"
        )
    if ragged == "pad":
        return F.pad(images, (0, (p - W % p) % p, 0, (p - H % p) % p))  # right, bottom; inductor knows no -W % p
    if ragged == "crop":
        if not torch.compiler.is_compiling():
            warn(f"{H % p} rows of {H} and {W % p} columns of {W} were cropped")
        return images[..., : H - H % p, : W - W % p]
    size = (nearest_multiple(H, p), nearest_multiple(W, p))
    return F.interpolate(images.float(), size, mode="bicubic", antialias=True).to(images.dtype)
