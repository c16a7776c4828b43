"""Small pictures, drawn with Pillow and numpy."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

BACKGROUND, INK = (255, 255, 255), (30, 30, 30)
GAP = 8  # pixels between pictures
LINE = 22  # pixels of a line of text

# The colour map: 16 equidistant colours of matplotlib's "magma" (N. Smith and S. van der Walt, CC0). It is perceptually
# uniform, and its luminance rises all the way, so a map reads the same in grey.
MAGMA = np.array(
    [
        (0, 0, 4), (11, 9, 36), (32, 17, 75), (59, 15, 112), (87, 21, 126), (114, 31, 129), (140, 41, 129),
        (168, 50, 125), (196, 60, 117), (222, 73, 104), (241, 96, 93), (250, 127, 94), (254, 159, 109), (254, 191, 132),
        (253, 222, 160), (252, 253, 191),
    ]
)  # fmt: skip
PHOTOGRAPH = 0.3  # the photograph's share of an overlay's luminance; the colour map has the rest


def colours(strength: np.ndarray) -> np.ndarray:
    """Numbers in 0..1, of any shape [...] -> [..., 3] float32 in 0..1, the colour map interpolated linearly."""
    places = np.linspace(0, 1, len(MAGMA))
    return np.stack([np.interp(strength, places, channel / 255) for channel in MAGMA.T], axis=-1).astype(np.float32)


def overlay(image: Image.Image, weights: np.ndarray, size: tuple[int, int]) -> Image.Image:
    """A map of weights in colour, over `image` in dark grey.

    Args:
        image: any size.
        weights: [h, w], an array or tensor, not negative; shown relative to their largest.
        size: (width, height) of the result, in pixels.
    """
    grey = np.asarray(image.convert("L").resize(size, Image.Resampling.BICUBIC), dtype=np.float32) / 255
    weights = np.asarray(weights, dtype=np.float32)
    heat = Image.fromarray(weights / max(float(weights.max()), 1e-12))  # mode "F"
    strength = np.asarray(heat.resize(size, Image.Resampling.BICUBIC)).clip(0, 1)
    return _blend(strength, grey)


def _blend(strength: np.ndarray, grey: np.ndarray) -> Image.Image:
    """[H, W] weights and [H, W] grey, both in 0..1, as one picture."""
    mixed = PHOTOGRAPH * grey[..., None] + (1 - PHOTOGRAPH) * colours(strength)
    return Image.fromarray((255 * mixed).round().astype(np.uint8))


def fit(size: tuple[int, int], side: int) -> tuple[int, int]:
    """(width, height) in the same proportions, the longer of them `side` pixels."""
    width, height = (max(1, round(one * side / max(size))) for one in size)
    return width, height


def scale(width: int, numbers: Sequence[str]) -> Image.Image:
    """A colour bar from 0 to the largest weight, as `overlay` colours mid-grey pixels, over evenly spaced numbers."""
    bar = _blend(np.linspace(0, 1, width)[None].repeat(12, axis=0), np.full((12, width), 0.5))
    sheet = Image.new("RGB", (width, bar.height + LINE), BACKGROUND)
    sheet.paste(bar, (0, 0))
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=13)
    for i, number in enumerate(numbers):
        anchor = "l" if i == 0 else "r" if i == len(numbers) - 1 else "m"
        pen.text((i * width / (len(numbers) - 1), bar.height + LINE / 2), number, INK, font, anchor=f"{anchor}m")
    return sheet


def caption(text: str, width: int) -> Image.Image:
    """A line of text, at least `width` pixels wide."""
    font = ImageFont.load_default(size=15)
    sheet = Image.new("RGB", (max(width, round(font.getlength(text))), LINE), BACKGROUND)
    ImageDraw.Draw(sheet).text((0, LINE / 2), text, INK, font, anchor="lm")
    return sheet


def mosaic(pictures: Sequence[Image.Image], columns: int, gap: int = GAP) -> Image.Image:
    """Pictures in rows of `columns`, `gap` pixels apart; each row is as high as its highest picture."""
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
    left = 150
    columns = max(len(row) for row in rows)
    heights = [max([LINE + 2] + [entry.height + GAP for entry in row if not isinstance(entry, str)]) for row in rows]
    sheet = Image.new("RGB", (left + columns * (cell + GAP) + GAP, sum(heights) + 2 * GAP), BACKGROUND)
    pen = ImageDraw.Draw(sheet)
    y = GAP
    for row, title, height in zip(rows, titles, heights):
        pen.text((GAP, y + height / 2), title, INK, font, anchor="lm")
        for column, entry in enumerate(row):
            x = left + column * (cell + GAP) + cell // 2
            if isinstance(entry, str):
                pen.text((x, y + height / 2), entry, INK, font, anchor="mm")
            else:
                sheet.paste(entry, (x - entry.width // 2, y + (height - entry.height) // 2))
        y += height
    return sheet
