"""Calibration of int8: the range of each activation, measured on images, and the weights quantized to match.

A few channels of a trained ViT's activations are far larger than the rest, and one scale for all would leave the others
few levels. After a LayerNorm, and for v, each channel is divided by a factor that the next weight is multiplied by,
which changes no result (SmoothQuant, arXiv:2211.10438, Eq. 4). Such factors cannot pass the GELU before the MLP's
second layer: there the widest channels get a scale of their own. Biases are corrected for what rounding the weights
does to the mean of a result (arXiv:1906.04721, Sec. 4.2).
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from vit.model import ViT

from ..base import float_tensors
from .int8 import LAYERS, wide_channels

MEASURED = ("attention.qkv", "attention.proj", "mlp.fc1", "mlp.fc2")
STRENGTH = 0.7  # SmoothQuant's alpha: weights, with a scale for each row, can take a larger range than activations
MARGIN = 1.15  # ranges are wider than what was seen by this factor, since other images exceed it
LEVELS = 255


@dataclass
class Seen:
    """The inputs of one layer, per channel, over all tokens of all images."""

    low: Tensor  # [K]
    high: Tensor  # [K]
    mean: Tensor  # [K]

    def of(self, channels: Tensor) -> Seen:
        """The same for some of the channels."""
        return Seen(self.low[channels], self.high[channels], self.mean[channels])


def int8_tensors(model: ViT, images: list[Tensor]) -> dict[str, Tensor]:
    """The tensors that an int8 model is made of, by name; `images` as `vit.kernels.cpu.images.batches` returns them."""
    tensors, seen = float_tensors(model), look(model, images)
    for i in range(model.config.depth):
        block = f"blocks.{i}."
        of_block = {layer: seen[block + layer] for layer in MEASURED}
        smoothed = ["attention.qkv", "mlp.fc1"]
        if model.attends[i].exact:  # other functions may mix the channels of v or be nonlinear in them
            smoothed.append("attention.proj")
        for layer in smoothed:
            of_block[layer] = smooth(tensors, block, layer, of_block[layer])
        set_wide_apart(tensors, block, of_block)
        for layer in LAYERS:
            quantize(tensors, block + layer, of_block[layer])
    return tensors


def look(model: ViT, images: list[Tensor]) -> dict[str, Seen]:
    """The inputs of each layer of the float model."""
    seen: dict[str, Seen] = {}
    total = sum(len(batch) for batch in images)

    def see(name: str, x: Tensor) -> None:
        part = len(x) / total
        x = x.flatten(0, -2)  # [tokens, K]
        low, high, mean = x.amin(0), x.amax(0), x.mean(0) * part
        if name in seen:
            before = seen[name]
            low, high, mean = torch.minimum(low, before.low), torch.maximum(high, before.high), mean + before.mean
        seen[name] = Seen(low, high, mean)

    with ExitStack() as stack:
        for name in [f"blocks.{i}.{layer}" for i in range(model.config.depth) for layer in MEASURED]:
            hook = model.get_submodule(name).register_forward_pre_hook(lambda _, x, name=name: see(name, x[0]))
            stack.callback(hook.remove)
        for batch in tqdm(images, "calibrating", unit="batch", leave=False, disable=None):
            model.forward_features(batch)
    for name, one in seen.items():
        if not (one.low.isfinite() & one.high.isfinite()).all():
            raise ValueError(f"the images to calibrate on give {name} values that are not finite: normalise them")
    return seen


def smooth(tensors: dict[str, Tensor], block: str, layer: str, seen: Seen) -> Seen:
    """Divide a layer's inputs by factors, multiply its weight by them, and return what the inputs then are."""
    weight = tensors[f"{block}{layer}.weight"]  # [N, K]
    largest = torch.maximum(seen.low.abs(), seen.high.abs()).clamp(min=1e-5)  # [K]
    factor = largest**STRENGTH / weight.abs().amax(0).clamp(min=1e-5) ** (1 - STRENGTH)  # [K]
    before = {"attention.qkv": "norm1", "attention.proj": "attention.qkv", "mlp.fc1": "norm2"}[layer]
    for part in ("weight", "bias"):  # of qkv the last third, which makes v: attention's result is a mean of v
        values = tensors[f"{block}{before}.{part}"]  # [K], [3K] or [3K, K]
        values[-len(factor) :] /= factor.view(-1, *[1] * (values.ndim - 1))
    weight *= factor
    return Seen(seen.low / factor, seen.high / factor, seen.mean / factor)


def set_wide_apart(tensors: dict[str, Tensor], block: str, seen: dict[str, Seen]) -> None:
    """Split the hidden channels: `wide1` and `wide2` get the widest, `fc1` and `fc2` keep the others."""
    order = seen["mlp.fc2"].high.argsort()
    others, widest = order.tensor_split([len(order) - wide_channels(len(order))])
    fc1, fc2 = f"{block}mlp.fc1", f"{block}mlp.fc2"
    for part in ("weight", "bias"):
        tensors[f"{block}mlp.wide1.{part}"] = tensors[f"{fc1}.{part}"][widest]
        tensors[f"{fc1}.{part}"] = tensors[f"{fc1}.{part}"][others]
    tensors[f"{block}mlp.wide2.weight"] = tensors[f"{fc2}.weight"][:, widest]
    tensors[f"{fc2}.weight"] = tensors[f"{fc2}.weight"][:, others]
    tensors[f"{block}mlp.wide2.bias"] = torch.zeros_like(tensors[f"{fc2}.bias"])
    seen["mlp.wide1"], seen["mlp.wide2"] = seen["mlp.fc1"], seen["mlp.fc2"].of(widest)
    seen["mlp.fc2"] = seen["mlp.fc2"].of(others)


def quantize(tensors: dict[str, Tensor], name: str, seen: Seen, limit: int = 127) -> None:
    """Quantize a layer: one scale and zero for its inputs, a scale for each row of the weight, in -limit to limit."""
    low, high = min(seen.low.min().item(), 0.0) * MARGIN, max(seen.high.max().item(), 0.0) * MARGIN
    scale = max(high - low, 1e-5) / LEVELS
    weight = tensors[f"{name}.weight"]  # [N, K]
    weight_scale = weight.abs().amax(1).clamp(min=1e-8) / limit  # [N]
    rounded = (weight / weight_scale[:, None]).round()
    tensors[f"{name}.bias"] += (weight - rounded * weight_scale[:, None]) @ seen.mean
    tensors[f"{name}.weight"] = rounded.to(torch.int8)
    tensors[f"{name}.weight_scale"] = weight_scale
    tensors[f"{name}.scale"] = torch.tensor(scale)
    tensors[f"{name}.zero"] = torch.tensor(round(-low / scale), dtype=torch.int32)
