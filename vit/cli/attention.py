"""`vit attention`: where each head of a block looks, drawn over the photographs."""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from vit.draw import BACKGROUND, GAP, caption, fit, mosaic, overlay, scale
from vit.image import create_transform, load_image
from vit.maps import attention_maps

from . import options
from .images import find_images

SIDE = 420  # pixels of a picture's long side in the result
NARROWEST = 280  # pixels that the numbers of a scale need


def add_parser(commands: Any) -> None:
    """Declare the command and its options."""
    parser = commands.add_parser(
        "attention",
        help="draw where the class token looks",
        description="Draw where the class token looks, per head and averaged over the heads, over each image. All "
        "images go into one picture, one below the other.",
    )
    options.add_images(parser)
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("attention.png"), metavar="FILE", help="picture; default: %(default)s"
    )
    parser.add_argument("--block", type=int, default=-1, help="which block; -1 is the last; default: %(default)s")
    options.add_model(parser)
    options.add_reading(parser)
    options.add_size(parser, default="native")
    options.add_device(parser)
    parser.set_defaults(run=run)


@torch.inference_mode()
def run(args: argparse.Namespace) -> int:
    """Load, look, draw."""
    from vit.weights import load_pretrained

    options.check_picture(args.output)
    sizing = options.sizing(args)
    photos = {path: load_image(path) for path in find_images(args.images)}
    model = load_pretrained(args.model, device=args.device, dtype=options.DTYPES[args.dtype], **options.reading(args))
    transform = create_transform(model, **sizing)
    (block,) = model.block_numbers([args.block])
    groups = []
    for path, photo in photos.items():
        x = transform(photo).to(model.class_token.device, model.class_token.dtype)[None]  # [1, C, H, W]
        (maps,) = attention_maps(model, x, blocks=[block])  # [1, A, 1, P + N]
        h, w = model.grid_of(x)
        weights = maps[0, :, 0, model.config.num_prefix_tokens :].unflatten(1, (h, w)).float().cpu().numpy()
        title = f"{path.name}: {h} x {w} patches; attention of the class token in block {block}, per patch"
        groups.append(draw(transform.view(photo), weights, title))
        print(f"{path}: {h} x {w} patches, block {block}, {len(weights)} heads")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    ImageOps.expand(mosaic(groups, columns=1, gap=3 * GAP), GAP, BACKGROUND).save(args.output)
    print(args.output.resolve())
    return 0


def draw(photo: Image.Image, weights: np.ndarray, title: str) -> Image.Image:
    """A title over the photograph, the mean of [A, h, w] weights over the heads, and each head's weights.

    Heads differ a lot in how sharply they look, so each map has its own scale, which ends at its 99th percentile.
    """
    size = fit(photo.size, SIDE)
    maps = {"mean of the heads": weights.mean(axis=0)} | {f"head {i}": one for i, one in enumerate(weights)}
    cells = [under("photograph", photo.convert("RGB").resize(size))]
    for name, one in maps.items():
        top = max(float(np.percentile(one, 99)), 1e-12)
        strength = np.sqrt((one / top).clip(0, 1))  # the root, so that small weights show, too
        numbers = ["0", percent(top / 4), f"{percent(top)} or more"]
        cells.append(under(name, overlay(photo, strength, size), scale(max(size[0], NARROWEST), numbers)))
    sheet = mosaic(cells, columns=4)
    return mosaic([caption(title, sheet.width), sheet], columns=1)


def under(name: str, *pictures: Image.Image) -> Image.Image:
    """Pictures one below the other, under a name."""
    return mosaic([caption(name, NARROWEST), *pictures], columns=1, gap=2)


def percent(share: float) -> str:
    """0.01234 -> "1.2 %"."""
    return f"{100 * share:.2g} %"
