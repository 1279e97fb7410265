"""Synthetic scenes with exact ground truth: coloured shapes and at most one upper-case word.

A scene has 1-4 shapes of distinct colours. No two objects share a cell of the 3x3 grid, and no centre is near a grid
line, so the raster order of the cells is an unambiguous order of the objects. Boxes are normalised `(x0, y0, x1, y1)`
in 0..1 with the origin at the top left. This module needs no torch.
"""

import math
import random
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Box = tuple[float, float, float, float]
Point = tuple[float, float]
Rgb = tuple[int, int, int]

SHAPE_KINDS = ("circle", "square", "triangle", "star", "diamond")
COLOURS: dict[str, Rgb] = {
    "red": (214, 34, 34),
    "green": (34, 160, 52),
    "blue": (36, 70, 220),
    "yellow": (242, 218, 30),
    "orange": (246, 134, 16),
    "purple": (132, 40, 170),
    "cyan": (30, 200, 214),
    "pink": (250, 130, 190),
}
DIAMETERS = {"small": (0.15, 0.20), "large": (0.27, 0.35)}  # fractions of the shorter side
BACKGROUNDS = {"dark": (10, 55), "gray": (112, 146), "light": (205, 250)}  # range of the base level, 0..255
INKS = {"dark": ("white",), "gray": ("white", "black"), "light": ("black",)}
FONTS = ("DejaVuSans-Bold.ttf", "DejaVuSans.ttf", "DejaVuSansMono-Bold.ttf")
WORD_HEIGHTS = (0.14, 0.19)  # font size as a fraction of the shorter side
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
WORDS = tuple(
    "CAT DOG SUN MAP KEY BOX CUP HAT JAM ZOO OPEN STOP EXIT CODE PARK FISH BIRD TREE MOON STAR JAZZ QUIZ WOLF LAMP "  # noqa: SIM905
    "DESK HOUSE TABLE RIVER PLANT MUSIC LIGHT WATER BREAD CHAIR CLOCK PIZZA ROBOT ZEBRA QUEEN HELLO WORLD MARKET "
    "GARDEN SUMMER WINTER SCHOOL BRIDGE PLANET ROCKET CAMERA COFFEE ORANGE YELLOW".split()
)
GRID_CLEARANCE = 0.03
MARGIN = 0.02


@dataclass(frozen=True)
class Shape:
    """One drawn shape."""

    kind: str  # "circle"
    colour: str  # "red"
    size: str  # "small"
    box: Box  # (0.1, 0.2, 0.3, 0.4), normalised

    @property
    def cell(self) -> int:
        """Index of the 3x3 cell that holds the centre, 0 (top left) to 8 (bottom right)."""
        return cell_of(self.box)

    def outline(self) -> tuple[Point, ...]:
        """Normalised vertices, clockwise from the top (or top left); 12 of them stand for a circle."""
        x0, y0, x1, y1 = self.box
        return tuple((x0 + (x1 - x0) * u, y0 + (y1 - y0) * v) for u, v in unit_outline(self.kind))


@dataclass(frozen=True)
class Word:
    """One drawn word."""

    text: str  # "PIZZA"
    box: Box  # (0.1, 0.2, 0.6, 0.3), normalised, tight around the ink
    ink: str  # "black"
    font: str  # "DejaVuSans.ttf"
    font_px: int  # 41
    letter_centres: tuple[float, ...]  # (0.15, 0.25, 0.35, 0.45, 0.55), normalised x

    @property
    def cell(self) -> int:
        """Index of the 3x3 cell that holds the centre, 0 (top left) to 8 (bottom right)."""
        return cell_of(self.box)


@dataclass(frozen=True)
class Scene:
    """An image and its ground truth."""

    size: tuple[int, int]  # (256, 256), (width, height) in pixels
    background: str  # "dark"
    shapes: tuple[Shape, ...]  # in raster order of their cells
    word: Word | None
    image: Image.Image  # RGB

    def things(self) -> list[Shape | Word]:
        """Returns shapes and word in raster order of their cells."""
        things: list[Shape | Word] = list(self.shapes)
        if self.word:
            things.append(self.word)
        return sorted(things, key=lambda thing: thing.cell)


def make_scene(
    rng: random.Random,
    size: int = 256,
    *,
    word_probability: float = 0.7,
    repeat_probability: float = 0.45,
    num_shapes: int | None = None,
) -> Scene:
    """Makes one scene; the same state of `rng` gives the same scene.

    Args:
        rng: Source of all randomness.
        size: Longer side of the canvas in pixels; the aspect ratio varies from 3:4 to 4:3.
        word_probability: Probability that the scene has a word.
        repeat_probability: Probability that all shapes are of one or two kinds, so that kinds repeat.
        num_shapes: 1 to 4; random if None.

    Returns:
        The scene with its image.
    """
    with_word = rng.random() < word_probability
    count = num_shapes or rng.choice((1, 2, 2, 3) if with_word else (1, 2, 2, 3, 3, 4))
    while True:
        background = rng.choice(list(BACKGROUNDS))
        canvas = _canvas_size(rng, size)
        word = _place_word(rng, canvas, background) if with_word else None
        if with_word and word is None:
            continue
        shapes = _place_shapes(rng, canvas, word, _kinds(rng, count, repeat_probability))
        if shapes:
            image = _draw(rng, canvas, background, shapes, word)
            return Scene(canvas, background, shapes, word, image)


def cell_of(box: Box) -> int:
    """Returns the index of the 3x3 cell that holds the centre of a normalised box, in raster order."""
    cx, cy = _centre(box)
    return int(cy * 3) * 3 + int(cx * 3)


@cache
def unit_outline(kind: str) -> tuple[Point, ...]:
    """Returns the vertices of a shape that fills the unit square, clockwise in an image (y points down)."""
    if kind == "circle":
        angles = [2 * math.pi * k / 12 for k in range(12)]
        return tuple((0.5 + 0.5 * math.sin(a), 0.5 - 0.5 * math.cos(a)) for a in angles)
    if kind == "star":
        return _star_outline()
    corners: dict[str, tuple[Point, ...]] = {
        "square": ((0, 0), (1, 0), (1, 1), (0, 1)),
        "triangle": ((0.5, 0), (1, 1), (0, 1)),
        "diamond": ((0.5, 0), (1, 0.5), (0.5, 1), (0, 0.5)),
    }
    return corners[kind]


def draw_mask(shape: Shape, size: tuple[int, int]) -> np.ndarray:
    """Draws the true mask of a shape.

    Args:
        shape: The shape.
        size: (width, height) in pixels.

    Returns:
        A bool array (H, W).
    """
    width, height = size
    mask = Image.new("1", size)
    draw_shape(ImageDraw.Draw(mask), shape, width, height, 1)
    return np.asarray(mask)


def _star_outline() -> tuple[Point, ...]:
    radii = [1.0 if k % 2 == 0 else 0.42 for k in range(10)]
    xs = [r * math.sin(math.pi * k / 5) for k, r in enumerate(radii)]
    ys = [-r * math.cos(math.pi * k / 5) for k, r in enumerate(radii)]
    width, height = max(xs) - min(xs), max(ys) - min(ys)
    return tuple(((x - min(xs)) / width, (y - min(ys)) / height) for x, y in zip(xs, ys, strict=True))


@cache
def load_font(name: str, px: int) -> ImageFont.FreeTypeFont:
    """Loads one of `FONTS` at a size in pixels."""
    import matplotlib  # its bundled DejaVu faces are the same on every machine

    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name
    return ImageFont.truetype(str(path), px, layout_engine=ImageFont.Layout.BASIC)


def _canvas_size(rng: random.Random, size: int) -> tuple[int, int]:
    if rng.random() >= 0.3:
        return size, size
    aspect = rng.uniform(0.75, 1.333)
    return (size, int(size * aspect)) if aspect < 1 else (int(size / aspect), size)


def _kinds(rng: random.Random, count: int, repeat_probability: float) -> list[str]:
    pool: Iterable[str] = SHAPE_KINDS
    if rng.random() < repeat_probability:
        pool = rng.sample(SHAPE_KINDS, rng.choice((1, 2)))
    kinds = list(pool)
    return [rng.choice(kinds) for _ in range(count)]


def _centre(box: Box) -> Point:
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2


def _is_near_grid_line(box: Box) -> bool:
    return any(min(abs(v - 1 / 3), abs(v - 2 / 3)) < GRID_CLEARANCE for v in _centre(box))


def _overlaps(a: Box, b: Box) -> bool:
    return a[0] < b[2] + MARGIN and b[0] < a[2] + MARGIN and a[1] < b[3] + MARGIN and b[1] < a[3] + MARGIN


def _random_text(rng: random.Random) -> str:
    if rng.random() < 0.35:
        return rng.choice(WORDS)
    return "".join(rng.choice(LETTERS) for _ in range(rng.randint(3, 6)))


def _place_word(rng: random.Random, canvas: tuple[int, int], background: str) -> Word | None:
    """Places a random word on the canvas; returns None if it does not fit, and the caller tries again."""
    width, height = canvas
    text, font_name = _random_text(rng), rng.choice(FONTS)
    font_px = max(8, round(rng.uniform(*WORD_HEIGHTS) * min(canvas)))
    font = load_font(font_name, font_px)
    left, top, right, bottom = font.getbbox(text)
    w, h = int(right - left), int(bottom - top)
    if w > 0.94 * width:
        return None
    px, py = rng.randint(2, width - w - 2), rng.randint(2, height - h - 2)
    box = (px / width, py / height, (px + w) / width, (py + h) / height)
    if _is_near_grid_line(box):
        return None
    edges = [font.getlength(text[:k]) for k in range(len(text) + 1)]
    centres = tuple((px - left + (a + b) / 2) / width for a, b in pairwise(edges))
    return Word(text, box, rng.choice(INKS[background]), font_name, font_px, centres)


def _place_shapes(
    rng: random.Random, canvas: tuple[int, int], word: Word | None, kinds: list[str]
) -> tuple[Shape, ...] | None:
    """Places shapes of distinct colours in distinct free cells, in raster order; returns None if they do not fit."""
    placed: list[Shape] = []
    taken = [word.box] if word else []
    for kind, colour in zip(kinds, rng.sample(list(COLOURS), len(kinds)), strict=True):
        shape = _place_shape(rng, canvas, kind, colour, taken)
        if shape is None:
            return None
        placed.append(shape)
        taken.append(shape.box)
    return tuple(sorted(placed, key=lambda shape: shape.cell))


def _place_shape(rng: random.Random, canvas: tuple[int, int], kind: str, colour: str, taken: list[Box]) -> Shape | None:
    cells = {cell_of(box) for box in taken}
    for _ in range(30):
        size = rng.choice(list(DIAMETERS))
        diameter = rng.uniform(*DIAMETERS[size]) * min(canvas)
        w, h = diameter / canvas[0], diameter / canvas[1]
        x, y = rng.uniform(0.01, 0.99 - w), rng.uniform(0.01, 0.99 - h)
        box = (x, y, x + w, y + h)
        if not (_is_near_grid_line(box) or cell_of(box) in cells or any(_overlaps(box, other) for other in taken)):
            return Shape(kind, colour, size, box)
    return None


def _draw(
    rng: random.Random, canvas: tuple[int, int], background: str, shapes: tuple[Shape, ...], word: Word | None
) -> Image.Image:
    image = _draw_background(rng, canvas, background)
    _paste_shapes(rng, image, shapes)
    if word:
        _draw_word(rng, image, word)
    return _add_noise(rng, image)


def _draw_background(rng: random.Random, canvas: tuple[int, int], background: str) -> Image.Image:
    """Draws a bilinear gradient between four similar corner colours."""
    low, high = BACKGROUNDS[background]
    base = rng.uniform(low, high)
    corners = np.empty((4, 3), np.float32)
    for corner in range(4):
        level = min(high, max(low, base + rng.uniform(-22, 22)))
        corners[corner] = [level + rng.uniform(-9, 9) for _ in range(3)]
    pixels = corners.reshape(2, 2, 3).clip(0, 255).astype(np.uint8)
    return Image.fromarray(pixels).resize(canvas, Image.Resampling.BILINEAR)


def _paste_shapes(rng: random.Random, image: Image.Image, shapes: tuple[Shape, ...]) -> None:
    scale = 2 if max(image.size) > 350 else 1  # antialiasing; smaller canvases get it from the resize to 128 px
    width, height = image.width * scale, image.height * scale
    layer = Image.new("RGBA", (width, height))
    pen = ImageDraw.Draw(layer)
    for shape in shapes:
        red, green, blue = (int(min(255, max(0, v + rng.uniform(-18, 18)))) for v in COLOURS[shape.colour])
        draw_shape(pen, shape, width, height, (red, green, blue, 255))
    if scale > 1:
        layer = layer.reduce(scale)
    image.paste(layer, (0, 0), layer)


def draw_shape(
    pen: ImageDraw.ImageDraw, shape: Shape, width: int, height: int, fill: int | tuple[int, int, int, int]
) -> None:
    """Draws a shape on an image of (width, height) pixels."""
    x0, y0, x1, y1 = shape.box
    if shape.kind == "circle":
        pen.ellipse((x0 * width, y0 * height, x1 * width, y1 * height), fill=fill)
    else:
        pen.polygon([(x * width, y * height) for x, y in shape.outline()], fill=fill)


def _draw_word(rng: random.Random, image: Image.Image, word: Word) -> None:
    level = rng.randint(0, 30)
    level = 255 - level if word.ink == "white" else level
    font = load_font(word.font, word.font_px)
    left, top, _, _ = font.getbbox(word.text)
    corner = (round(word.box[0] * image.width) - left, round(word.box[1] * image.height) - top)
    ImageDraw.Draw(image).text(corner, word.text, font=font, fill=(level, level, level))


def _add_noise(rng: random.Random, image: Image.Image) -> Image.Image:
    sigma = rng.choice((0, 0, 3, 6))
    if not sigma:
        return image
    noise = np.random.default_rng(rng.getrandbits(32)).normal(0, sigma, (image.height, image.width, 1))
    pixels = np.asarray(image, np.float32) + noise.astype(np.float32)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
