"""Weights for patches of another side: the patch projection resized as FlexiViT does (arXiv:2212.08013, Sec. 3.4).

Resizing the weights like a picture does not keep the tokens: a patch twice as high and as wide has four times the
pixels, and its token would be about four times as long. The weights asked for are those that give a resized patch the
token of the original one.
"""

import math

import torch
from torch import Tensor

from vit.checks import require_int
from vit.position import bicubic_antialiased


def resample_patch_projection(weight: Tensor, size: int) -> Tensor:
    """The weights w' for which the products <B x, w'> are nearest to <x, w> over all patches x of white noise.

    B is the bicubic antialiased resize from p x p to size x size. When enlarging the products are equal; when
    shrinking they are as near as the lost pixels let them be. The solution is w' = pinv(B^T) w, and because B is R for
    the rows and R for the columns, so is its pseudo-inverse: w' = P w P^T per channel with P = pinv(R^T).

    Args:
        weight: [D, C, p, p], floating, of a projection or convolution whose stride is p.
        size: p', the side of the patches to come.

    Returns:
        [D, C, p', p'] in `weight`'s dtype, computed in float64; `weight` itself where p' is p.

    Raises:
        ValueError: a weight of another shape or dtype, or a size that is no whole number above 0.
    """
    require_int("size", size, least=1)
    if weight.ndim != 4 or weight.shape[2] != weight.shape[3] or not weight.is_floating_point():
        raise ValueError(f"expected [D, C, p, p] floating weights; got {list(weight.shape)}, {weight.dtype}")
    p = weight.shape[-1]
    if size == p:
        return weight
    # On the CPU: this happens once per model, and not every device has float64 or a decomposition.
    resize = bicubic_antialiased(p, size, torch.device("cpu")).double()  # R, [p', p]
    inverse = torch.linalg.pinv(resize.T)  # P, [p', p]
    resized = inverse @ weight.cpu().double() @ inverse.T  # [D, C, p', p']
    return resized.to(weight.device, weight.dtype)


def adapt_channels(weight: Tensor, channels: int) -> Tensor:
    """A patch projection [D, 3, p, p] for another number of channels, as timm adapts it: [D, channels, p, p].

    One channel gets the sum over the three, so that grey images give what they gave as RGB; more channels repeat
    the three in turn, scaled so that the sum keeps its size.
    """
    if weight.shape[1] != 3:
        raise ValueError(f"in_chans={channels}: only 3 channels can be adapted, the checkpoint has {weight.shape[1]}")
    if channels == 1:
        return weight.float().sum(dim=1, keepdim=True).to(weight.dtype)
    repeated = weight.float().repeat(1, math.ceil(channels / 3), 1, 1)[:, :channels]
    return (repeated * (3 / channels)).to(weight.dtype)
