"""The graph behind a page in the browser: the bytes of a picture and a target size to all that the page shows."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from vit.model import Block, ViT
from vit.packed import Packing

from .converting import converting
from .graph import at_size, class_attention
from .metadata import Metadata
from .pixels import resize
from .to_onnx import tidy

if TYPE_CHECKING:
    from onnx import ModelProto

OPSET = 20
INPUTS = ("images", "grid", "cover")


def output_names(model: ViT) -> tuple[str, ...]:
    """What the page of a model shows, in order."""
    return (*(("logits",) if model.config.num_classes else ("features", "patches")), "attention", "pixels")


class PageGraph(nn.Module):
    """A model from one picture and a target size to what a page shows.

        images     [1, H, W, 3] uint8, a picture of any size in RGB
        grid       [h, w] uint8, whose values are not read: its shape is the number of patches to resize to
        cover      the same for the pixels to cover before the crop, `vit.image.to_cover`

        logits     [1, num_classes]; or of a model without a head:
        features   [1, D], or [1, 2D] with global_pool "token_avg"
        patches    [1, N, D], the patch tokens after the final norm
        attention  [1, A, h, w], how much each head of the last block lets the class token look at each patch
        pixels     [1, h*p, w*p, C] uint8, what the model sees

    Sizes are shapes of inputs since those that are values cannot be traced through the reshapes behind.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: ViT) -> None:
        super().__init__()
        self.model, self.names, self.settings = model, output_names(model), model.preprocessing
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(getattr(self.settings, name)).view(1, -1, 1, 1))

    def forward(self, images: Tensor, grid: Tensor, cover: Tensor) -> tuple[Tensor, ...]:
        model, p = self.model, self.model.config.patch_size
        h, w = grid.shape
        if model.config.in_chans == 1:
            images = grey(images)
        height, width = cover.shape
        pixels = resize(images, self.settings, (h * p, w * p), p, (height, width))  # [1, C, h*p, w*p]
        x = (pixels / 255 - self.mean) / self.std
        last, before = len(model.blocks) - 1, len(model.blocks) - 2
        keep = {before: lambda x: x, last: lambda x: x}
        _, kept = model.encode(model.tokens(model.accept(x)), Packing((h, w)), keep)  # each [1, T, D]
        tokens = model.norm(kept[last])
        weights = class_attention(cast(Block, model.blocks[-1]), kept[before])  # [1, A, T]
        n = model.config.num_prefix_tokens
        found = {
            "logits": model.forward_head(tokens),
            "features": model.forward_head(tokens, pre_logits=True),
            "patches": tokens[:, n:],
            "attention": weights[:, :, n:].reshape(1, -1, h, w),
            "pixels": pixels.permute(0, 2, 3, 1).to(torch.uint8),
        }
        return tuple(found[name] for name in self.names)


def grey(images: Tensor) -> Tensor:
    """[1, H, W, 3] uint8 -> [1, H, W, 1] uint8, as Pillow does it; the numbers are below 2^24, hence exact."""
    weights = torch.tensor([19595.0, 38470.0, 7471.0])  # 0.299, 0.587 and 0.114 times 2^16
    return ((images.float() @ weights + 2**15) / 2**16).floor().to(torch.uint8)[..., None]


def convert(model: ViT, metadata: Metadata) -> ModelProto:
    """A model, in float32 or quantized, as the ONNX graph of a page. ValueError if PyTorch cannot export it."""
    graph = PageGraph(at_size(model, None, torch.float32)).eval()
    square = model.preprocessing.size[0] == model.preprocessing.size[1]  # and so at every step of the slider
    shapes = (1, 70, 91, 3), (5, 5 if square else 3), (90, 90 if square else 60)
    example = tuple(torch.zeros(shape, dtype=torch.uint8) for shape in shapes)
    H, W, h, w, y, x = (torch.export.Dim(name, min=1) for name in ("height", "width", "rows", "columns", "y", "x"))
    w, x = (h, y) if square else (w, x)
    with converting(model, "PyTorch cannot export"):
        program = torch.onnx.export(
            graph, example, dynamo=True, dynamic_shapes=({1: H, 2: W}, {0: h, 1: w}, {0: y, 1: x}), opset_version=OPSET,
            input_names=list(INPUTS), output_names=list(graph.names), verbose=False,
        )  # fmt: skip
    assert program is not None
    return tidy(program.model_proto, metadata)
