"""The gate: an exported file is run in its own runtime and held against the model before it gets its name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import cosine_similarity, interpolate

from vit.image import create_transform
from vit.maps import attention_maps
from vit.model import ViT
from vit.resources import DATA

from .graph import Graph
from .read import ExportedModel

BARS = {"float32": 1e-5, "float16": 2e-3}  # of the largest value of an output; the first is what "equal" means here
RESIZED = 2e-3  # the same for files that resize pictures: a few pixels are rounded to the next grey level
PHOTOGRAPH = "the photograph"
COSINE = 0.998  # of int8: the least similarity with the model's output, of any image that was held out


class ParityError(ValueError):
    """An exported file that does not compute what its model computes."""


@torch.inference_mode()
def compare(
    model: ViT, exported: ExportedModel, held_out: Sequence[Tensor] = (), twin: ViT | None = None
) -> list[dict[str, Any]]:
    """Run both on inputs of several sizes, and on a photograph that each prepares as its own preprocessing says.

    Args:
        held_out: for int8, images [C, H, W] that it was not calibrated on. Others run on noise.
        twin: for int8, the same in PyTorch (`vit.exporting.int8.quantized`). At other sizes than the model's own, where
            the calibration fits less, the file is held against this one: it shows that the graph is right. There the
            cosine is the images' mean, since numbers that lie between two levels are rounded either way.

    Returns:
        One row for each input and output: "input" in words, "output", and how alike they are: "measure", "value" and
        the "bar". The measure is "error", the largest difference over the largest value of the model's output, which
        must not exceed the bar; or "cosine" of int8, the least of all images, which must reach it.
    """
    rows = []
    own = exported.preprocessing.size
    for name, ours, theirs in inputs(model, exported, held_out):
        found = exported.run(theirs)
        if held_out and name.startswith(PHOTOGRAPH):  # of int8, one that was not held out shows only the preprocessing
            wanted = exported.run(given(model, exported, ours)[1])
        else:
            wanted = reference(model, ours, exported.metadata.outputs)
        same = twin is not None and tuple(ours.shape[2:]) != own
        if same:
            graph = Graph(cast(ViT, twin), exported.metadata.outputs)
            name, wanted = f"{name}, against the same in PyTorch", dict(zip(graph.names, graph(ours)))
        for output in exported.metadata.outputs:
            row = {"input": name, "output": output}
            pair = centred(output, found[output]), centred(output, wanted[output])
            resized = exported.metadata.input == "image"
            rows.append(row | measure(*pair, exported.metadata.precision, mean=same, resized=resized))
        if held_out and "logits" in found:
            check_labels(name, found["logits"], wanted["logits"])
    return rows


def centred(output: str, values: Tensor) -> Tensor:
    """[B, ...] of an output; logits without their mean, which changes no answer and would hide what does."""
    return values - values.mean(dim=1, keepdim=True) if output == "logits" and values.shape[1] > 1 else values


def measure(found: Tensor, wanted: Tensor, precision: str, mean: bool, resized: bool = False) -> dict[str, Any]:
    """How alike two outputs are, and how alike they must be."""
    same = torch.equal(found, wanted)  # both may be zeros
    if precision == "int8":
        alike = cosine_similarity(found.flatten(1), wanted.flatten(1))  # [B]
        least = 1.0 if same else (alike.mean() if mean else alike.min()).item()
        return {"measure": "cosine", "value": least, "bar": COSINE}
    error = 0.0 if same else ((found - wanted).abs().max() / wanted.abs().max()).item()
    bar = BARS[precision]
    return {"measure": "error", "value": error, "bar": max(bar, RESIZED) if resized else bar}


def check_labels(name: str, found: Tensor, wanted: Tensor) -> None:
    """ParityError if a label differs although the model was sure: by more than twice the usual error of a logit."""
    usual = (found - wanted).abs().amax(1).median()
    first, second = wanted.topk(min(2, wanted.shape[1])).values.T[[0, -1]]
    wrong = (found.argmax(1) != wanted.argmax(1)) & (first - second > 2 * usual)
    if wrong.any():
        raise ParityError(
            f"on {name} the exported file gives {int(wrong.sum())} of {len(wrong)} another label, where the model is"
            " sure: nothing was written"
        )


def judge(rows: list[dict[str, Any]]) -> None:
    """ParityError for the first row beyond its bar; a value that is not a number is."""
    for row in rows:
        value, bar = row["value"], row["bar"]
        if row["measure"] == "error" and not value <= bar:
            raise ParityError(
                f"on {row['input']} the exported file's {row['output']} differ from the model's by {value:.1e} of the"
                f" largest, more than {bar:.0e}: nothing was written"
            )
        if row["measure"] == "cosine" and not value >= bar:
            raise ParityError(
                f"on {row['input']} the cosine of the exported file's {row['output']} with the model's is {value:.4f},"
                f" less than {bar}: nothing was written"
            )


def inputs(model: ViT, exported: ExportedModel, held_out: Sequence[Tensor]) -> list[tuple[str, Tensor, Tensor]]:
    """What to run: a name, images for the model and images for the exported file."""
    found = []
    int8, whole = exported.metadata.precision == "int8", exported.metadata.input == "image"
    for batch, size in shapes(exported):
        if int8:  # noise is not what it was calibrated on
            x = torch.stack([resized(image, size) for image in held_out])
            name = f"{len(x)} images held out,"
        else:
            x = torch.randn(batch, model.config.in_chans, *size, generator=torch.Generator().manual_seed(batch))
            name = f"noise {batch} x"
        found.append((f"{name} {size[0]} x {size[1]}", *given(model, exported, x)))
    if model.config.in_chans in (1, 3) and not (int8 and whole):
        file = DATA / "photographs" / "coffee.jpg"
        with Image.open(file) as photograph:
            size = exported.preprocessing.size
            ours, theirs = (create_transform(one, size)(photograph)[None] for one in (model, exported))
        found.append((f"{PHOTOGRAPH} {file.stem}", ours, theirs))
    return found


def given(model: ViT, exported: ExportedModel, x: Tensor) -> tuple[Tensor, Tensor]:
    """The same images, from normalised ones [B, C, H, W], as the model takes them and as the exported file does."""
    if exported.metadata.input == "float32":
        return x, x
    settings = model.preprocessing
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (settings.mean, settings.std))
    pixels = ((x * std + mean) * 255).round().clamp(0, 255)  # [B, C, H, W]
    theirs = pixels.byte().permute(0, 2, 3, 1).contiguous()  # [B, H, W, C]
    if exported.metadata.input == "uint8":
        return (pixels / 255 - mean) / std, theirs
    transform = create_transform(model, exported.preprocessing.size)
    pictures = [Image.fromarray(picture.squeeze(2).numpy()) for picture in theirs]
    return torch.stack([transform(picture) for picture in pictures]), theirs


def resized(image: Tensor, size: tuple[int, int]) -> Tensor:
    """[C, H, W] -> [C, *size]."""
    if tuple(image.shape[1:]) == size:
        return image
    return interpolate(image[None], size, mode="bicubic", antialias=True)[0]


def shapes(exported: ExportedModel) -> list[tuple[int, tuple[int, int]]]:
    """(images, (H, W)) to run: the one shape that a file takes; else its own size, one patch, wide and high ones."""
    fixed, p = exported.metadata.size, exported.config.patch_size
    if exported.metadata.input == "image":  # none so high that Pillow 13 resizes its columns first
        h, w = exported.preprocessing.size
        if exported.metadata.precision == "int8":
            return [(1, (h, w)), (1, (h * 3 // 2 + 1, max(w * 3 // 2 + 2, h * 3 // 4 + 1)))]
        n = exported.metadata.batch or 3
        return [
            (n, (h, w)),
            (1, (p, p)),
            (2, (h // 2 + 1, 2 * w + 3)),
            (1, (h + w + 1, h + 2 * w + 1)),
            (1, (h, w // 2)),
        ]
    if fixed is not None:
        return [(exported.metadata.batch or 3, fixed)]
    h, w = (side // p for side in exported.preprocessing.size)
    if exported.metadata.precision == "int8":  # which knows images of about its own size
        return [(1, (h * p, w * p)), (1, ((h + (h + 3) // 4) * p, w * p))]
    grids = [(3, (h, w)), (1, (1, 1)), (2, ((h + 1) // 2, 2 * w)), (1, (h + 3, (w + 2) // 3))]
    return [(batch, (rows * p, columns * p)) for batch, (rows, columns) in grids]


def reference(model: ViT, images: Tensor, outputs: tuple[str, ...]) -> dict[str, Tensor]:
    """What the model itself gives, by its public functions rather than by the graph that was exported."""
    weights = model.class_token
    images = images.to(weights.device, weights.dtype)
    tokens = model.forward_features(images)
    found = {"logits": model.forward_head(tokens), "features": model.forward_head(tokens, pre_logits=True)}
    found["logits" if model.config.num_classes else "features"] = model(images)  # whatever its own forward does
    if "attention" in outputs:
        maps = attention_maps(model, images)[0][:, :, 0, model.config.num_prefix_tokens :]  # [B, A, N]
        found["attention"] = maps.unflatten(2, model.grid_of(images))
    return {name: value.float().cpu() for name, value in found.items()}
