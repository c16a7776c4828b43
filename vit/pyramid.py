"""Feature maps at four scales from a plain ViT, for detection and segmentation."""

from collections import OrderedDict
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .checks import require_int, unknown
from .inputs import POLICIES
from .model import ViT


class FeaturePyramid(nn.Module):
    """ViTDet's simple feature pyramid (arXiv:2203.16527, section 3): every scale from the last block's map alone.

    With patches of 16 pixels the strides are 4, 8, 16 and 32: two transposed convolutions, one, none, and 2x2 max
    pooling; then a 1x1 and a 3x3 convolution for each scale. The pyramid contains the model's `backbone`, which shares
    its weights, and trains with it.

    It is a backbone in torchvision's sense: it has `out_channels` and returns a dictionary of maps "0" to "3".
    `channels` and `strides` list the values per map, as segmentation decoders expect.
    """

    def __init__(self, model: ViT, out_channels: int = 256, ragged: str = "error") -> None:
        """
        Args:
            model: the model; its weights are shared, not copied.
            out_channels: of every map.
            ragged: for sides that are not multiples of the patch, as for `model`.

        Raises:
            ValueError: a patch size that is not a power of two: torchvision's detectors round strides to powers of two
                and would look in the wrong places. A width that is not a multiple of 4.
        """
        super().__init__()
        require_int("out_channels", out_channels, 1)
        if ragged not in POLICIES:
            raise ValueError(unknown("policy for ragged sides", ragged, POLICIES))
        D, p = model.config.embed_dim, model.config.patch_size
        if p & (p - 1):
            raise ValueError(
                f"detectors assume strides that are powers of two, which patches of {p} pixels do not give: "
                "load_pretrained(..., patch_size=16) resamples the patch projection"
            )
        if D % 4:
            raise ValueError(
                f"the finest map has a quarter of the model's width, so embed_dim must be a multiple of 4, not {D}"
            )
        self.model = model.backbone()
        self.register_load_state_dict_pre_hook(_drop_head)
        self.ragged = ragged
        self.out_channels = out_channels
        self.channels = [out_channels] * 4
        self.strides = [p / 4, p / 2, float(p), p * 2.0]  # pixels per cell
        four = nn.Sequential(_double(D, D // 2), ChannelNorm(D // 2, eps=1e-6), nn.GELU(), _double(D // 2, D // 4))
        scales = ((four, D // 4), (_double(D, D // 2), D // 2), (nn.Identity(), D), (nn.MaxPool2d(2), D))
        self.scales = nn.ModuleList(nn.Sequential(scale, _smooth(width, out_channels)) for scale, width in scales)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """[B, C, H, W] images, normalised -> "0" to "3": [B, out_channels, 4h, 4w], [2h, 2w], [h, w], [h//2, w//2].

        Raises:
            ValueError: images that the model refuses, or with a single patch along a side, which cannot be halved.
        """
        (x,) = self.model.forward_intermediates(images, blocks=[-1], norm=True, ragged=self.ragged)  # [B, D, h, w]
        if min(x.shape[2:]) < 2:
            raise ValueError(f"a pyramid halves its map, so it needs two patches a side; got {list(x.shape[2:])}")
        return OrderedDict((str(i), scale(x)) for i, scale in enumerate(self.scales))


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of [B, C, H, W]."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps).permute(
            0, 3, 1, 2
        )


def _drop_head(pyramid: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Earlier pyramids held the whole model: what they did not use of it is left out when their weights are loaded."""
    unused = tuple(f"{prefix}model.{part}." for part in ("head", "head_dist", "fc_norm"))
    for name in [name for name in state_dict if name.startswith(unused)]:
        del state_dict[name]


def _double(width: int, out: int) -> nn.Module:
    return nn.ConvTranspose2d(width, out, kernel_size=2, stride=2)  # [B, width, H, W] -> [B, out, 2H, 2W]


def _smooth(width: int, out: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(width, out, kernel_size=1, bias=False),
        ChannelNorm(out, eps=1e-6),
        nn.Conv2d(out, out, kernel_size=3, padding=1, bias=False),
        ChannelNorm(out, eps=1e-6),
    )
