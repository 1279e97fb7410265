"""Draws results on their image: boxes, quad boxes and translucent polygons, each with a tag that shows its label."""

from __future__ import annotations

import colorsys
import contextlib
import math
import os
import textwrap
import unicodedata
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from PIL import Image, ImageDraw, ImageFont

from florence_onnx.answers.results import (
    BoundingBox,
    BoundingBoxes,
    OCRBoundingBox,
    OCRBoundingBoxSingle,
    Point,
    PolygonOutput,
)
from florence_onnx.errors import ImageNotFoundError, InputError

Colour: TypeAlias = tuple[int, int, int]
_Font: TypeAlias = "ImageFont.FreeTypeFont | ImageFont.ImageFont"
_Corners: TypeAlias = tuple[tuple[float, float], ...]
_Box: TypeAlias = tuple[int, int, int, int]
"""Left, top, right, bottom in pixels; right and bottom are exclusive."""

_NUM_HUES = 24
_LIGHTNESSES = (0.46, 0.62)
_GOLDEN_ANGLE = 0.381966  # of a full turn: consecutive hues stay far apart however many there are
_FILL_OPACITY = 0.38
_MAX_LINES = 3
# Tried in this order for non-ASCII labels, which Pillow's own font cannot draw; fonts with many scripts come first.
_SYSTEM_FONTS = (
    "NotoSansCJK-Regular.ttc",
    "NotoSansCJKsc-Regular.otf",
    "PingFang.ttc",
    "Arial Unicode.ttf",
    "msyh.ttc",
    "NotoSans-Regular.ttf",
    "DejaVuSans.ttf",
    "arial.ttf",
)
# Pillow does not antialias: shapes are drawn this many times larger and reduced. For masks above a megapixel a smaller
# factor saves time and memory.
_SUPERSAMPLING = 3
_SUPERSAMPLING_ABOVE_MEGAPIXEL = 2
_MEGAPIXEL = 1 << 20


@dataclass(frozen=True)
class _Shape:
    """An outline in pixels of the image."""

    corners: _Corners
    label: str
    colour: Colour
    is_filled: bool

    @property
    def bounds(self) -> tuple[float, float, float, float]:
        """Left, top, right, bottom."""
        xs, ys = zip(*self.corners, strict=True)
        return min(xs), min(ys), max(xs), max(ys)

    @property
    def is_axis_aligned(self) -> bool:
        """Whether the outline is an unfilled axis-aligned box, whose edges need no antialiasing."""
        left, top, right, bottom = self.bounds
        return self.corners == ((left, top), (right, top), (right, bottom), (left, bottom)) and not self.is_filled


def draw(
    image: Image.Image,
    results: object,
    *,
    line_width: int | None = None,
    font_size: int | None = None,
    font: str | os.PathLike[str] | None = None,
) -> Image.Image:
    """Draws a result on a copy of its image.

    A label has the same colour in every image. Shapes without a label are coloured in turn.

    Args:
        image: The image that the results refer to.
        results: BoundingBoxes, OCRBoundingBox or PolygonOutput, in pixels of `image`.
        line_width: Width of outlines in pixels; None for 1/250 of the shorter side, at least 2.
        font_size: Font size in pixels; None for 1/32 of the shorter side, at least 11.
        font: A TrueType or OpenType file for the labels. None takes Pillow's own font, which has ASCII only, and for
            other labels a common font of the system. If none is installed, accents are dropped and letters of other
            scripts are drawn as empty boxes: pass a font that has them.

    Returns:
        A new RGB image of the same size.

    Raises:
        InputError: `results` has no geometry, such as a caption.
        ImageNotFoundError: The font file cannot be opened.
    """
    canvas = image.convert("RGB")
    side = min(canvas.size)
    width = line_width or max(2, round(side / 250))
    # coordinates far outside the image (a model can generate any number) would overflow Pillow's integers
    shapes = [_clip(shape, canvas.size, margin=4 * width) for shape in _make_shapes(results)]
    for shape in sorted(shapes, key=_area, reverse=True):  # small ones last, so that they are not covered
        _draw_shape(canvas, shape, width)
    labels = "".join(shape.label for shape in shapes)
    loaded_font, is_ascii_only = _load_font(font, font_size or max(11, round(side / 32)), labels)
    _Tags(canvas, loaded_font, width, is_ascii_only).draw(shapes)
    return canvas


def colour_of(label: str) -> Colour:
    """The colour (red, green, blue) of a label, 0 to 255 each; the same in every process."""
    # crc32 and not `hash`, which is seeded anew in each process
    number = zlib.crc32(label.encode("utf-8", "replace"))
    return _to_rgb(number % _NUM_HUES / _NUM_HUES, _LIGHTNESSES[number // _NUM_HUES % len(_LIGHTNESSES)])


def _colour_of_index(index: int) -> Colour:
    """The colour of the shape at an index, far in hue from those of its neighbours."""
    return _to_rgb(index * _GOLDEN_ANGLE % 1, _LIGHTNESSES[0])


def _to_rgb(hue: float, lightness: float) -> Colour:
    red, green, blue = colorsys.hls_to_rgb(hue, lightness, 0.85)
    return round(red * 255), round(green * 255), round(blue * 255)


def _make_shapes(results: object) -> list[_Shape]:
    if isinstance(results, BoundingBoxes):
        outlines = [(_box_corners(box), box.label, False) for box in results.bboxes]
        outlines += [(_corners(polygon.points), polygon.label, True) for polygon in results.polygons]
    elif isinstance(results, OCRBoundingBox):
        outlines = [(_corners(box.quad) or _box_corners(box), box.label, False) for box in results.quad_boxes]
    elif isinstance(results, PolygonOutput):
        outlines = [(_corners(polygon.points), polygon.label, True) for polygon in results.polygons]
    else:
        raise InputError(f"{type(results).__name__} has nothing to draw: only boxes, quad boxes and polygons have")
    return [
        _Shape(corners, label, colour_of(label) if label else _colour_of_index(index), is_filled)
        for index, (corners, label, is_filled) in enumerate(outlines)
        if corners
    ]


def _box_corners(box: BoundingBox | OCRBoundingBoxSingle) -> _Corners:
    right, bottom = box.x + box.w, box.y + box.h
    return (box.x, box.y), (right, box.y), (right, bottom), (box.x, bottom)


def _corners(points: tuple[Point, ...]) -> _Corners:
    return tuple((point.x, point.y) for point in points)


def _clip(shape: _Shape, size: tuple[int, int], margin: int) -> _Shape:
    """Moves corners that are more than `margin` pixels outside the image to that distance."""
    width, height = size
    clipped = tuple(
        (min(max(x, -margin), width + margin), min(max(y, -margin), height + margin)) for x, y in shape.corners
    )
    return replace(shape, corners=clipped)


def _area(shape: _Shape) -> float:
    left, top, right, bottom = shape.bounds
    return (right - left) * (bottom - top)


def _draw_shape(canvas: Image.Image, shape: _Shape, line_width: int) -> None:
    if shape.is_axis_aligned:
        _draw_box(canvas, shape, line_width)
        return
    area = _bounds_on_canvas(shape, canvas.size, line_width)
    if area[0] >= area[2] or area[1] >= area[3]:
        return
    if shape.is_filled and len(shape.corners) > 2:
        fill = _mask(shape, area, outline_width=0).point(lambda level: round(level * _FILL_OPACITY))
        canvas.paste(shape.colour, area, fill)
    canvas.paste(shape.colour, area, _mask(shape, area, outline_width=line_width))


def _draw_box(canvas: Image.Image, shape: _Shape, line_width: int) -> None:
    left, top, right, bottom = (round(edge) for edge in shape.bounds)
    if left >= canvas.width or top >= canvas.height or right < 0 or bottom < 0:
        return
    # edges beyond the border are drawn on it, so that the box stays closed
    left, top = max(left, 0), max(top, 0)
    right, bottom = max(left, min(right, canvas.width) - 1), max(top, min(bottom, canvas.height) - 1)
    ImageDraw.Draw(canvas).rectangle((left, top, right, bottom), outline=shape.colour, width=line_width)


def _bounds_on_canvas(shape: _Shape, size: tuple[int, int], line_width: int) -> _Box:
    """The part of the image that a shape with its outline can cover; empty if it is outside."""
    left, top, right, bottom = shape.bounds
    width, height = size
    return (
        max(0, math.floor(left) - line_width),
        max(0, math.floor(top) - line_width),
        min(width, math.ceil(right) + line_width + 1),
        min(height, math.ceil(bottom) + line_width + 1),
    )


def _mask(shape: _Shape, area: _Box, outline_width: int) -> Image.Image:
    """Coverage of each pixel in `area`, 0 to 255 (mode L): by the outline, or by the inside if `outline_width` is 0."""
    width, height = area[2] - area[0], area[3] - area[1]
    scale = _SUPERSAMPLING if width * height <= _MEGAPIXEL else _SUPERSAMPLING_ABOVE_MEGAPIXEL
    mask = Image.new("L", (width * scale, height * scale))
    pen = ImageDraw.Draw(mask)
    # the model's coordinate 0 is the edge of the first pixel, Pillow's is its middle
    points = [((x - area[0]) * scale - 0.5, (y - area[1]) * scale - 0.5) for x, y in shape.corners]
    if outline_width and len(points) > 1:
        pen.line([*points, *points[:2]], fill=255, width=outline_width * scale, joint="curve")
    elif outline_width:
        _draw_dot(pen, points[0], outline_width * scale)
    else:
        pen.polygon(points, fill=255)
    return mask.reduce(scale)


def _draw_dot(pen: ImageDraw.ImageDraw, centre: tuple[float, float], radius: int) -> None:
    x, y = centre
    pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)


def _load_font(font: str | os.PathLike[str] | None, size: int, labels: str) -> tuple[_Font, bool]:
    """The font, and whether it has ASCII only."""
    if font is not None:
        try:
            return ImageFont.truetype(os.fspath(font), size), False
        except OSError as error:
            raise ImageNotFoundError(f"cannot open the font {os.fspath(font)}: {error}") from None
    for name in () if labels.isascii() else _SYSTEM_FONTS:
        with contextlib.suppress(OSError):
            return ImageFont.truetype(name, size), False
    return ImageFont.load_default(size), True


def _drop_accents(text: str) -> str:
    return "".join(
        character for character in unicodedata.normalize("NFKD", text) if not unicodedata.combining(character)
    )


class _Tags:
    """Draws labels on an image, each next to its shape and, where possible, not on top of another."""

    def __init__(self, canvas: Image.Image, font: _Font, line_width: int, is_ascii_only: bool) -> None:
        self._canvas = canvas
        self._pen = ImageDraw.Draw(canvas)
        self._font = font
        self._line_width = line_width
        self._is_ascii_only = is_ascii_only
        _, _, self._character_width, bottom = self._pen.textbbox((0, 0), "x", font=font)
        self._padding = max(2, round(bottom / 4))
        self._taken: list[_Box] = []

    def draw(self, shapes: Sequence[_Shape]) -> None:
        """Draws the tag of every shape that has a label."""
        for shape in sorted(shapes, key=_area):  # small shapes first: they have the fewest places for a tag
            if shape.label:
                self._draw_tag(shape)

    def _draw_tag(self, shape: _Shape) -> None:
        text = self._wrap(shape.label)
        left, top, right, bottom = self._pen.multiline_textbbox((0, 0), text, font=self._font)
        width, height = math.ceil(right - left) + 2 * self._padding, math.ceil(bottom - top) + 2 * self._padding
        tag = self._place(shape, width, height)
        self._pen.rounded_rectangle(tag, radius=self._padding, fill=shape.colour)
        origin = tag[0] + self._padding - left, tag[1] + self._padding - top
        self._pen.multiline_text(origin, text, font=self._font, fill=_text_colour(shape.colour))
        self._taken.append(tag)

    def _wrap(self, label: str) -> str:
        """A label in at most three lines of at most 60 % of the image's width; control characters become spaces."""
        spelled = _drop_accents(label) if self._is_ascii_only else label
        printable = "".join(character if character.isprintable() else " " for character in spelled)
        num_characters = max(8, int(self._canvas.width * 0.6 / max(1, self._character_width)))
        return "\n".join(textwrap.wrap(printable, num_characters, max_lines=_MAX_LINES, placeholder="…")) or " "

    def _place(self, shape: _Shape, width: int, height: int) -> _Box:
        """Chooses the first place for a tag that no other tag covers, or the first of all if there is none."""
        left, top, right, bottom = (round(edge) for edge in shape.bounds)
        line = self._line_width
        corners = (
            (left, top - height),
            (left + line, top + line),
            (left, bottom + 1),
            (left + line, bottom - line - height),
            (right - width, top - height),
            (right - width, bottom + 1),
        )
        tags = [self._pull_inside(x, y, width, height) for x, y in corners]
        free = (tag for tag in tags if not any(_overlap(tag, other) for other in self._taken))
        return next(free, tags[0])

    def _pull_inside(self, x: int, y: int, width: int, height: int) -> _Box:
        x = max(0, min(x, self._canvas.width - width))
        y = max(0, min(y, self._canvas.height - height))
        return x, y, x + width, y + height


def _overlap(first: _Box, second: _Box) -> bool:
    return first[0] < second[2] and second[0] < first[2] and first[1] < second[3] and second[1] < first[3]


def _text_colour(background: Colour) -> Colour:
    """Black or white, whichever has more contrast; by the luma of Rec. 601."""
    red, green, blue = background
    return (0, 0, 0) if 0.299 * red + 0.587 * green + 0.114 * blue > 130 else (255, 255, 255)
