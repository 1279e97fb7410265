"""What a tile's answer consists of, in pixels of the whole image, and where a tile's edge cut it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from florence_onnx.answers.matching import flatten_points, quad_to_box
from florence_onnx.answers.results import (
    BoundingBox,
    BoundingBoxes,
    OCRBoundingBox,
    OCRBoundingBoxSingle,
    Point,
    Polygon,
    PolygonOutput,
)
from florence_onnx.tiling.tiles import TileBox

Box = tuple[float, float, float, float]
EDGE = 0.015
"""How near to a tile's edge a box must end to count as cut, as a share of the tile's side."""
LEFT, TOP, RIGHT, BOTTOM = range(4)


@dataclass(frozen=True)
class Piece:
    """A box, a quad or the outlines of an object."""

    items: tuple[Any, ...]
    """One box or quad, or all outlines of one object."""
    box: Box
    """(x0, y0, x1, y1) around it."""
    tile: TileBox
    cut: frozenset[int] = frozenset()
    """Sides at which the tile ends and the image does not."""
    is_whole: bool = False
    """Whether it was found in the whole image."""

    @property
    def label(self) -> str:
        """Its label or text."""
        return str(self.items[0].label)

    @property
    def score(self) -> float:
        """Of its first item; 0 without scores."""
        return self.items[0].score or 0.0

    @property
    def area(self) -> float:
        """Of the box."""
        return (self.box[2] - self.box[0]) * (self.box[3] - self.box[1])


def pieces_of(results: object, tile: TileBox, size: tuple[int, int], *, is_whole: bool = False) -> list[Piece]:
    """The parts of a tile's answer, moved to where they are in the image.

    Args:
        results: Boxes, quads or outlines in pixels of the tile.
        tile: Where the tile is.
        size: (width, height) of the image.
        is_whole: Whether the tile is the whole image.
    """
    found = []
    for items in _groups(results):
        moved = tuple(_moved(item, tile[0], tile[1]) for item in items)
        box = _around(moved)
        found.append(Piece(moved, box, tile, _cut_sides(box, tile, size), is_whole))
    return found


def _groups(results: object) -> list[list[Any]]:
    if isinstance(results, OCRBoundingBox):
        return [[quad] for quad in results.quad_boxes]
    polygons = results.polygons if isinstance(results, BoundingBoxes | PolygonOutput) else ()
    boxes = results.bboxes if isinstance(results, BoundingBoxes) else ()
    objects = groupby((part for part in polygons if part.points), key=lambda part: part.instance)
    return [*([box] for box in boxes), *(list(parts) for _, parts in objects)]


def _moved(item: Any, dx: float, dy: float) -> Any:
    if isinstance(item, Polygon):
        return replace(item, points=_shifted(item.points, dx, dy))
    x1, x2 = sorted((item.x, item.x + item.w))
    y1, y2 = sorted((item.y, item.y + item.h))
    moved = replace(item, x=x1 + dx, y=y1 + dy, w=x2 - x1, h=y2 - y1)
    return replace(moved, quad=_shifted(item.quad, dx, dy)) if isinstance(item, OCRBoundingBoxSingle) else moved


def _shifted(points: Sequence[Point], dx: float, dy: float) -> tuple[Point, ...]:
    return tuple(Point(point.x + dx, point.y + dy) for point in points)


def _around(items: Sequence[BoundingBox | OCRBoundingBoxSingle | Polygon]) -> Box:
    if isinstance(items[0], Polygon):
        return quad_to_box(
            [value for item in items if isinstance(item, Polygon) for value in flatten_points(item.points)]
        )
    return (items[0].x, items[0].y, items[0].x + items[0].w, items[0].y + items[0].h)


def edges(tile: TileBox) -> tuple[float, float, float, float]:
    """How near to a side of a tile counts as at its edge, in pixels, by side."""
    width, height = (tile[2] - tile[0]) * EDGE, (tile[3] - tile[1]) * EDGE
    return (width, height, width, height)


def is_inner(tile: TileBox, side: int, size: tuple[int, int]) -> bool:
    """Whether the image goes on beyond a side of a tile."""
    return tile[side] > 0 if side in (LEFT, TOP) else tile[side] < size[side - RIGHT]


def _cut_sides(box: Box, tile: TileBox, size: tuple[int, int]) -> frozenset[int]:
    near = edges(tile)
    return frozenset(
        side for side in range(4) if is_inner(tile, side, size) and abs(box[side] - tile[side]) <= near[side]
    )


def intersection(a: Box, b: Box) -> float:
    """Area that two boxes share."""
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def common_share(a: Box, b: Box, axis: int) -> float:
    """Intersection over union of two boxes along one axis: 0 for x, 1 for y."""
    shared = min(a[axis + 2], b[axis + 2]) - max(a[axis], b[axis])
    spanned = max(a[axis + 2], b[axis + 2]) - min(a[axis], b[axis])
    return max(0.0, shared) / spanned if spanned > 0 else 1.0
