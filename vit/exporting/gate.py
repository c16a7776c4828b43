"""The gate: an exported file is run in its own runtime and held against the model before it gets its name."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image
from torch import Tensor

from vit.image import create_transform
from vit.maps import attention_maps
from vit.model import ViT
from vit.resources import DATA

from .read import ExportedModel

BARS = {"float32": 1e-5, "float16": 2e-3}  # of the largest value of an output; the first is what "equal" means here


class ParityError(ValueError):
    """An exported file that does not compute what its model computes."""


@torch.inference_mode()
def compare(model: ViT, exported: ExportedModel) -> list[dict[str, Any]]:
    """Run both on noise of several sizes, and on a photograph that each prepares as its own preprocessing says.

    Returns:
        One row for each input and output: "input" in words, "output", "error" (the largest difference, over the largest
        value of the model's output) and the "bar" that it must not exceed.
    """
    rows = []
    for name, ours, theirs in inputs(model, exported):
        found, wanted = exported.run(theirs), reference(model, ours, exported.metadata.outputs)
        for output in exported.metadata.outputs:
            error = ((found[output] - wanted[output]).abs().max() / wanted[output].abs().max()).item()
            rows.append({"input": name, "output": output, "error": error, "bar": BARS[exported.metadata.precision]})
    return rows


def judge(rows: list[dict[str, Any]]) -> None:
    """ParityError for the first row beyond its bar; a difference that is not a number is."""
    for row in rows:
        if not row["error"] <= row["bar"]:
            raise ParityError(
                f"on {row['input']} the exported file's {row['output']} differ from the model's by {row['error']:.1e}"
                f" of the largest, more than {row['bar']:.0e}: nothing was written"
            )


def inputs(model: ViT, exported: ExportedModel) -> list[tuple[str, Tensor, Tensor]]:
    """What to run: a name, images for the model and images for the exported file."""
    found = []
    for batch, size in shapes(exported):
        generator = torch.Generator().manual_seed(batch)
        x = torch.randn(batch, model.config.in_chans, *size, generator=generator)
        found.append((f"noise {batch} x {size[0]} x {size[1]}", x, x))
    if model.config.in_chans in (1, 3):
        file = sorted((DATA / "photographs").glob("*.jpg"))[0]
        with Image.open(file) as photograph:
            size = exported.preprocessing.size
            ours, theirs = (create_transform(one, size)(photograph)[None] for one in (model, exported))
        found.append((f"the photograph {file.stem}", ours, theirs))
    return found


def shapes(exported: ExportedModel) -> list[tuple[int, tuple[int, int]]]:
    """(images, (H, W)) to run: the one shape that a file takes; else its own size, one patch, wide and high ones."""
    fixed, p = exported.metadata.size, exported.config.patch_size
    if fixed is not None:
        return [(exported.metadata.batch or 3, fixed)]
    h, w = (side // p for side in exported.preprocessing.size)
    grids = [(3, (h, w)), (1, (1, 1)), (2, ((h + 1) // 2, 2 * w)), (1, (h + 3, (w + 2) // 3))]
    return [(batch, (rows * p, columns * p)) for batch, (rows, columns) in grids]


def reference(model: ViT, images: Tensor, outputs: tuple[str, ...]) -> dict[str, Tensor]:
    """What the model itself gives, by its public functions rather than by the graph that was exported."""
    weights = model.class_token
    images = images.to(weights.device, weights.dtype)
    tokens = model.forward_features(images)
    found = {"logits": model.forward_head(tokens), "features": model.forward_head(tokens, pre_logits=True)}
    if "attention" in outputs:
        maps = attention_maps(model, images)[0][:, :, 0, model.config.num_prefix_tokens :]  # [B, A, N]
        found["attention"] = maps.unflatten(2, model.grid_of(images))
    return {name: value.float().cpu() for name, value in found.items()}
