"""The patch projection for patches of another side (FlexiViT, arXiv:2212.08013, Sec. 3.4) or other channels.

Resizing the weights like a picture does not keep the tokens: a patch twice as high and wide has four times the pixels,
so its token would be about four times as large. The right weights give a resized patch the token of the original one.
"""

import math

import torch
from torch import Tensor

from vit.position import bicubic_antialiased


def resample_patch_projection(weight: Tensor, size: int) -> Tensor:
    """The weights w' for which the products <B x, w'> are closest to <x, w> over all patches x of white noise.

    B is the bicubic antialiased resize from p x p to size x size. If it enlarges, the products are equal; if it
    shrinks, they are as close as the lost pixels allow. The solution is w' = pinv(B^T) w. B applies R to the rows and
    to the columns, and so does its pseudo-inverse: w' = P w P^T per channel with P = pinv(R^T).

    Args:
        weight: [D, C, p, p], floating, of a convolution with stride p.
        size: p', the side of the new patches in pixels.

    Returns:
        [D, C, p', p'] in `weight`'s dtype, computed in float64; `weight` itself if p' is p.
    """
    p = weight.shape[-1]
    if size == p:
        return weight
    # on the CPU: this happens once per model, and not every device has float64 or a decomposition
    resize = bicubic_antialiased(p, size, torch.device("cpu")).double()  # R, [p', p]
    inverse = torch.linalg.pinv(resize.T)  # P, [p', p]
    resized = inverse @ weight.cpu().double() @ inverse.T  # [D, C, p', p']
    return resized.to(weight.device, weight.dtype)


def adapt_channels(weight: Tensor, channels: int) -> Tensor:
    """A patch projection [D, 3, p, p] for another number of channels, as timm adapts it: [D, channels, p, p].

    One channel gets the sum over the three, so that grey images give the same as in RGB. More channels repeat the
    three in turn, scaled so that the sum keeps its size.
    """
    if weight.shape[1] != 3:
        raise ValueError(f"in_chans={channels}: only 3 channels can be adapted, the checkpoint has {weight.shape[1]}")
    if channels == 1:
        return weight.float().sum(dim=1, keepdim=True).to(weight.dtype)
    repeated = weight.float().repeat(1, math.ceil(channels / 3), 1, 1)[:, :channels]
    return (repeated * (3 / channels)).to(weight.dtype)
