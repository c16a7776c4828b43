"""Draw how a Vision Transformer sees an image at two sizes: pixels, patches, tokens.

    python examples/patches.py [IMAGE] -o patches.png

Takes two seconds. Without IMAGE it draws the astronaut that comes with scikit-image. The patches are cut from the
tensors that `vit.create_transform` makes for ViT-S/16, and the numbers above them come from the model.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

import vit

SIZES = [(224, 224), (288, 192)]  # (H, W): the trained size, and another one that is not square
GAP, MARGIN, TOKEN = 3, 24, 10
INK, CLASS = (30, 30, 30), (20, 90, 240)


def pixels(model: vit.ViT, image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The model's input at size (H, W) as a picture: the transform with its normalisation undone."""
    tensor = vit.create_transform(model, size)(image)  # [3, H, W]
    mean, std = (torch.tensor(values)[:, None, None] for values in (model.preprocessing.mean, model.preprocessing.std))
    return Image.fromarray(((tensor * std + mean) * 255).round().byte().permute(1, 2, 0).numpy())


def cut(seen: Image.Image, p: int) -> list[Image.Image]:
    """The patches of p x p pixels, in reading order."""
    return [seen.crop((x, y, x + p, y + p)) for y in range(0, seen.height, p) for x in range(0, seen.width, p)]


def spread(patches: list[Image.Image], columns: int, p: int) -> Image.Image:
    """The patches in their places, with gaps between them."""
    rows = len(patches) // columns
    sheet = Image.new("RGB", (columns * (p + GAP) - GAP, rows * (p + GAP) - GAP), "white")
    for i, patch in enumerate(patches):
        sheet.paste(patch, (i % columns * (p + GAP), i // columns * (p + GAP)))
    return sheet


def line_up(patches: list[Image.Image], width: int) -> Image.Image:
    """The encoder's input sequence: the class token, then each patch as a square of its mean colour."""
    columns = width // (TOKEN + 2)
    count = 1 + len(patches)
    sheet = Image.new("RGB", (width, -(-count // columns) * (TOKEN + 2)), "white")
    pen = ImageDraw.Draw(sheet)
    for i in range(count):
        x, y = i % columns * (TOKEN + 2), i // columns * (TOKEN + 2)
        colour = CLASS if i == 0 else patches[i - 1].resize((1, 1), Image.Resampling.BOX).getpixel((0, 0))
        pen.rectangle((x, y, x + TOKEN - 1, y + TOKEN - 1), fill=colour)
    return sheet


def draw(model: vit.ViT, image: Image.Image) -> Image.Image:
    """One row per size: the image, its patches, its tokens."""
    font = ImageFont.load_default(size=16)
    p, rows = model.config.patch_size, []
    for H, W in SIZES:
        seen = pixels(model, image, (H, W))
        patches = cut(seen, p)
        with torch.inference_mode():
            tokens = model.embed(vit.create_transform(model, (H, W))(image)[None])  # [1, T, D]
        _, T, D = tokens.shape
        titles = [
            f"{H} x {W} pixels",
            f"{H // p} x {W // p} patches of {p} x {p}",
            f"{T} tokens of {D} numbers: 1 class + {T - 1} patches",
        ]
        rows.append(list(zip((seen, spread(patches, W // p, p), line_up(patches, 400)), titles)))
    widths = [max(row[i][0].width for row in rows) for i in range(3)]
    heights = [max(picture.height for picture, _ in row) for row in rows]
    sheet = Image.new("RGB", (sum(widths) + 4 * MARGIN, sum(heights) + len(rows) * (MARGIN + 30) + MARGIN), "white")
    pen, y = ImageDraw.Draw(sheet), MARGIN
    for row, height in zip(rows, heights):
        x = MARGIN
        for (picture, title), width in zip(row, widths):
            pen.text((x, y), title, INK, font)
            sheet.paste(picture, (x, y + 26))
            x += width + MARGIN
        y += height + 30 + MARGIN
    return sheet


def main() -> None:
    """Read the image, draw, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("image", nargs="?", type=Path)
    parser.add_argument("-o", "--output", type=Path, default=Path("patches.png"))
    args = parser.parse_args()
    if args.image is None:
        from skimage.data import astronaut  # pip install -e ".[examples]", or name an image

        image = Image.fromarray(astronaut())
    else:
        image = vit.load_image(args.image)
    model = vit.create_model("vit_small_patch16_224").eval()
    draw(model, image).save(args.output, optimize=True)
    print(args.output.resolve())


if __name__ == "__main__":
    main()
