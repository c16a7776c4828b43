"""`vit attention`: where a model looks, drawn over the photograph."""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from vit.draw import mosaic, overlay
from vit.image import create_transform, load_image
from vit.maps import attention_maps

from . import options

SIDE = 420  # pixels of a picture's long side in the result


def add_parser(commands: Any) -> None:
    """Declare the command and its options."""
    parser = commands.add_parser(
        "attention",
        help="draw where the class token looks",
        description="Draw where the class token looks, per head and on average, over the image.",
    )
    parser.add_argument("image", metavar="IMAGE")
    parser.add_argument("-o", "--output", type=Path, default=Path("attention.png"), help="default: %(default)s")
    parser.add_argument("--block", type=int, default=-1, help="which block; -1 is the last (%(default)s)")
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
    photo = load_image(args.image)
    model = load_pretrained(args.model, device=args.device, dtype=options.DTYPES[args.dtype], **options.reading(args))
    transform = create_transform(model, **sizing)
    x = transform(photo).to(model.class_token.device, model.class_token.dtype)[None]  # [1, C, H, W]
    (maps,) = attention_maps(model, x, blocks=[args.block])  # [1, A, 1, P + N]
    h, w = model.grid_of(x)
    weights = maps[0, :, 0, model.config.num_prefix_tokens :].unflatten(1, (h, w)).float().cpu().numpy()  # [A, h, w]
    args.output.parent.mkdir(parents=True, exist_ok=True)
    draw(transform.view(photo), weights).save(args.output)
    print(f"{h} x {w} patches, block {args.block}, {len(weights)} heads: {args.output.resolve()}")
    return 0


def draw(photo: Image.Image, weights: np.ndarray) -> Image.Image:
    """The photograph, the mean of [A, h, w] weights over it, and each head's."""
    scale = SIDE / max(photo.size)
    size = max(1, round(photo.width * scale)), max(1, round(photo.height * scale))
    maps = [weights.mean(axis=0), *weights]
    return mosaic([photo.convert("RGB").resize(size), *(overlay(photo, visible(one), size) for one in maps)], columns=4)


def visible(weights: np.ndarray) -> np.ndarray:
    """Weights -> 0..1, so that more than the few largest show: the root of their share of the 99th percentile."""
    return np.sqrt((weights / np.percentile(weights, 99)).clip(0, 1))
