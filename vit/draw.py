"""Small pictures, drawn with Pillow and numpy."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

BACKGROUND, INK = (255, 255, 255), (30, 30, 30)


def overlay(image: Image.Image, weights: np.ndarray, size: tuple[int, int]) -> Image.Image:
    """`image` in grey with a map of weights over it as heat.

    Args:
        image: any size.
        weights: [h, w], an array or tensor, not negative; shown relative to their largest.
        size: (width, height) of the result, in pixels.
    """
    grey = np.asarray(image.convert("L").resize(size, Image.Resampling.BICUBIC), dtype=np.float32)[..., None] / 255
    weights = np.asarray(weights, dtype=np.float32)
    heat = Image.fromarray((255 * weights / max(float(weights.max()), 1e-12)).astype(np.uint8))
    strength = np.asarray(heat.resize(size, Image.Resampling.BICUBIC), dtype=np.float32)[..., None] / 255
    colour = np.concatenate([0.6 + 0.4 * strength, 0.9 * (1 - strength), 0.2 * (1 - strength)], axis=-1)
    mixed = (1 - 0.65 * strength) * 0.85 * grey + 0.65 * strength * colour
    return Image.fromarray((255 * mixed.clip(0, 1)).astype(np.uint8))


def mosaic(pictures: Sequence[Image.Image], columns: int, gap: int = 8) -> Image.Image:
    """Pictures in rows of so many, a gap of so many pixels between them; each row is as high as its highest."""
    rows = [pictures[start : start + columns] for start in range(0, len(pictures), columns)]
    width = max(picture.width for picture in pictures)
    heights = [max(picture.height for picture in row) for row in rows]
    size = (len(rows[0]) * (width + gap) - gap, sum(heights) + gap * (len(rows) - 1))
    sheet = Image.new("RGB", size, BACKGROUND)
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            sheet.paste(picture, (x * (width + gap), sum(heights[:y]) + y * gap))
    return sheet


def table(rows: Sequence[Sequence[Image.Image | str]], titles: Sequence[str], cell: int = 96) -> Image.Image:
    """Pictures and texts in rows of cells, with a title before each row. Pictures keep their sizes, centred."""
    font = ImageFont.load_default(size=15)
    left, gap = 150, 8
    columns = max(len(row) for row in rows)
    heights = [max([24] + [entry.height + gap for entry in row if not isinstance(entry, str)]) for row in rows]
    sheet = Image.new("RGB", (left + columns * (cell + gap) + gap, sum(heights) + 2 * gap), BACKGROUND)
    pen = ImageDraw.Draw(sheet)
    y = gap
    for row, title, height in zip(rows, titles, heights):
        pen.text((gap, y + height / 2), title, INK, font, anchor="lm")
        for column, entry in enumerate(row):
            x = left + column * (cell + gap) + cell // 2
            if isinstance(entry, str):
                pen.text((x, y + height / 2), entry, INK, font, anchor="mm")
            else:
                sheet.paste(entry, (x - entry.width // 2, y + (height - entry.height) // 2))
        y += height
    return sheet
