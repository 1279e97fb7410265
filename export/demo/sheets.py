"""Large drawn sheets with many shapes and words, each in a cell of its own, for tiling. Needs no torch."""

import math
import random
from dataclasses import dataclass

from PIL import Image, ImageDraw

from .scenes import COLOURS, FONTS, SHAPE_KINDS, WORDS, draw_shape, load_font
from .scenes import Shape as NormalisedShape

PixelBox = tuple[float, float, float, float]
SHORT_WORDS = tuple(word for word in WORDS if len(word) <= 4)
INKED = (20, 20, 20)
PAPER = (228, 228, 228)


@dataclass(frozen=True)
class Sheet:
    """A sheet and what is drawn on it."""

    image: Image.Image
    """RGB."""
    shapes: tuple[tuple[str, PixelBox], ...]
    """Names such as `"red circle"`, and (x0, y0, x1, y1) in pixels."""
    words: tuple[tuple[str, PixelBox], ...]
    """Texts, and boxes tight around their ink."""


def make_sheet(rng: random.Random, size: int = 3000, num_shapes: int = 40, num_words: int = 40) -> Sheet:
    """Makes a square sheet; the same state of `rng` gives the same sheet.

    Args:
        rng: Source of all randomness.
        size: Side in pixels.
        num_shapes: Shapes, of 24 to 36 % of a cell's side.
        num_words: Words of three or four letters, about half a cell wide.

    Returns:
        The sheet; things never touch.
    """
    columns = math.ceil(math.sqrt(num_shapes + num_words))
    cell = size / columns
    cells = rng.sample([(row, column) for row in range(columns) for column in range(columns)], num_shapes + num_words)
    image = Image.new("RGB", (size, size), PAPER)
    shapes = tuple(_shape(rng, image, column * cell, row * cell, cell) for row, column in cells[:num_shapes])
    words = tuple(_word(rng, image, column * cell, row * cell, cell) for row, column in cells[num_shapes:])
    return Sheet(image, shapes, words)


def _shape(rng: random.Random, image: Image.Image, left: float, top: float, cell: float) -> tuple[str, PixelBox]:
    kind, colour = rng.choice(SHAPE_KINDS), rng.choice(list(COLOURS))
    side = rng.uniform(0.24, 0.36) * cell
    x, y = (start + rng.uniform(0.1, 0.9) * (cell - side) for start in (left, top))
    box = (x, y, x + side, y + side)
    width, height = image.size
    placed = NormalisedShape(kind, colour, "small", (box[0] / width, box[1] / height, box[2] / width, box[3] / height))
    draw_shape(ImageDraw.Draw(image), placed, width, height, (*COLOURS[colour], 255))
    return f"{colour} {kind}", box


def _word(rng: random.Random, image: Image.Image, left: float, top: float, cell: float) -> tuple[str, PixelBox]:
    text = rng.choice(SHORT_WORDS)
    font = load_font(rng.choice(FONTS), round(rng.uniform(0.17, 0.2) * cell))
    x0, y0, x1, y1 = font.getbbox(text)
    width, height = x1 - x0, y1 - y0
    x, y = (
        round(start + rng.uniform(0.05, 0.95) * (cell - extent)) for start, extent in ((left, width), (top, height))
    )
    ImageDraw.Draw(image).text((x - x0, y - y0), text, font=font, fill=INKED)
    return text, (x, y, x + width, y + height)
