"""Pieces of all tiles to one answer, in four steps:

1. A piece that a tile's edge cuts is dropped where another tile shows the same place and more of what is beyond the edge.
2. Of what was found in the whole image, only things are kept that need not lie completely in any tile.
3. Cut pieces that no tile shows completely are joined across the seam: boxes are united, outlines become one object's, and
   texts are joined where they overlap.
4. Of two pieces that lie on each other, the one with the higher score is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from florence_onnx.answers.matching import box_iou
from florence_onnx.answers.results import OCRBoundingBoxSingle, Polygon
from florence_onnx.tiling.pieces import (
    BOTTOM,
    LEFT,
    RIGHT,
    TOP,
    Box,
    Piece,
    common_share,
    edges,
    intersection,
    is_inner,
)
from florence_onnx.tiling.tiles import TileBox, Tiles

IOU = 0.5
"""Intersection over union above which two pieces are the same thing."""
SAME_PLACE = 0.7
"""As `IOU`, for pieces of different tiles with different labels."""
COVERED = 0.6
"""Share of a cut piece's area above which it is part of a complete one."""
ALIGNED = 0.5
"""Intersection over union along a seam above which two cut pieces are halves of one thing."""


def merge(pieces: Sequence[Piece], tiles: Tiles, size: tuple[int, int]) -> list[Piece]:
    """Merges the pieces of all tiles of an image.

    Args:
        pieces: In pixels of the image.
        tiles: How it was divided.
        size: (width, height) of the image.

    Returns:
        The pieces of the whole, best score first.
    """
    boxes = tiles.boxes(size)
    shown = [piece for piece in pieces if not (is_shown_better(piece, boxes, size) or _is_small(piece, tiles))]
    complete = [piece for piece in shown if not piece.cut]
    parts = [piece for piece in shown if piece.cut and not any(_is_part_of(piece, other) for other in complete)]
    return suppress([*complete, *_joined(parts)])


def is_shown_better(piece: Piece, tiles: Sequence[TileBox], size: tuple[int, int]) -> bool:
    """Whether another tile shows the place of a cut piece, and beyond the edge that cuts it."""
    return bool(piece.cut) and any(tile != piece.tile and _shows(tile, piece, size) for tile in tiles)


def _shows(tile: TileBox, piece: Piece, size: tuple[int, int]) -> bool:
    near = edges(tile)
    for side in range(4):
        inside = (piece.box[side] - tile[side]) * (1 if side in (LEFT, TOP) else -1)
        if is_inner(tile, side, size) and inside <= near[side]:
            return False
    return True


def _is_small(piece: Piece, tiles: Tiles) -> bool:
    """Whether a piece of the whole image lies completely in a tile in any case, where it is seen larger."""
    width, height = piece.box[2] - piece.box[0], piece.box[3] - piece.box[1]
    return piece.is_whole and max(width, height) <= tiles.shared


def _is_text(piece: Piece) -> bool:
    return isinstance(piece.items[0], OCRBoundingBoxSingle)


def _is_same(piece: Piece, other: Piece) -> bool:
    """Whether labels allow two pieces to be one thing: half a word is read as another word."""
    return _is_text(piece) or piece.label == other.label


def _is_part_of(piece: Piece, other: Piece) -> bool:
    """Whether a cut piece shows what a complete one shows too. Lines of text never contain one another."""
    area = min(piece.area, other.area) if _is_text(piece) else piece.area
    return _is_same(piece, other) and intersection(piece.box, other.box) > COVERED * area


def _joined(parts: Sequence[Piece]) -> list[Piece]:
    """Joins cut pieces until no two are halves of one thing."""
    left = list(parts)
    while True:
        pair = next(((a, b) for i, a in enumerate(left) for b in left[i + 1 :] if _are_halves(a, b)), None)
        if pair is None:
            return left
        left = [piece for piece in left if piece is not pair[0] and piece is not pair[1]] + [_join(*pair)]


def _are_halves(a: Piece, b: Piece) -> bool:
    if a.tile == b.tile or not _is_same(a, b):
        return False
    sides = ((RIGHT, LEFT),) if _is_text(a) else ((RIGHT, LEFT), (BOTTOM, TOP))
    return any(_meet(a, b, *pair) or _meet(b, a, *pair) for pair in sides)


def _meet(first: Piece, second: Piece, end: int, start: int) -> bool:
    """Whether the end of the first piece and the start of the second are cut and lie on one another."""
    axis = start
    if end not in first.cut or start not in second.cut or first.box[axis] > second.box[axis]:
        return False
    gap = second.box[axis] - first.box[axis + 2]
    return gap <= edges(first.tile)[start] and common_share(first.box, second.box, 1 - axis) > ALIGNED


def _join(a: Piece, b: Piece) -> Piece:
    is_side_by_side = _meet(a, b, RIGHT, LEFT) or _meet(b, a, RIGHT, LEFT)
    first, second = sorted((a, b), key=lambda piece: piece.box[0 if is_side_by_side else 1])
    sides = (RIGHT, LEFT) if is_side_by_side else (BOTTOM, TOP)
    box = _union(first.box, second.box)
    cut = (first.cut - {sides[0]}) | (second.cut - {sides[1]})
    tile = tuple(map(int, _union(first.tile, second.tile)))
    return Piece(_join_items(first, second, box), box, tile, frozenset(cut), is_whole=False)  # type: ignore[arg-type]


def _union(a: Sequence[float], b: Sequence[float]) -> Box:
    return min(a[0], b[0]), min(a[1], b[1]), max(a[2], b[2]), max(a[3], b[3])


def _join_items(first: Piece, second: Piece, box: Box) -> tuple[object, ...]:
    score = None if first.items[0].score is None else min(first.score, second.score)
    if isinstance(first.items[0], Polygon):
        return tuple(replace(item, score=score) for item in (*first.items, *second.items))
    joined = replace(
        first.items[0], x=box[0], y=box[1], w=box[2] - box[0], h=box[3] - box[1], score=score, score_parts=None
    )
    if not isinstance(joined, OCRBoundingBoxSingle):
        return (joined,)
    start, end = first.items[0].quad, second.items[0].quad
    quad = (start[0], end[1], end[2], start[3]) if len(start) == len(end) == 4 else ()
    return (replace(joined, quad=quad, label=join_text(first, second)),)


def join_text(first: Piece, second: Piece) -> str:
    """The text of a line of which two tiles show a half each.

    The end of the one and the beginning of the other are the same words where the tiles overlap: the longest such text is
    taken once, as long as it is no longer than the overlap allows. Without any, the texts are put side by side.
    """
    left, right = first.label, second.label
    shared = max(0.0, first.box[2] - second.box[0])
    width = max(first.box[2] - first.box[0], second.box[2] - second.box[0], 1.0)
    most = min(len(left), len(right), round(max(len(left), len(right)) * shared / width) + 2)
    length = next((n for n in range(most, 0, -1) if left.endswith(right[:n])), 0)
    return left + right[length:]


def suppress(pieces: Sequence[Piece], iou: float = IOU) -> list[Piece]:
    """Non-maximum suppression: of pieces that are the same thing the first is kept, by completeness and score.

    Pieces of the whole image come after those of tiles, which are seen in more detail, and cut ones last.
    """
    kept: list[Piece] = []
    for piece in sorted(pieces, key=lambda each: (bool(each.cut), each.is_whole, -each.score)):
        if not any(_is_on(piece, other, iou) for other in kept):
            kept.append(piece)
    return sorted(kept, key=lambda each: -each.score)


def _is_on(piece: Piece, other: Piece, iou: float) -> bool:
    """Whether two pieces are the same thing."""
    share = box_iou(piece.box, other.box)
    # two tiles may name a thing differently; a single tile that gives a place two names means both
    if piece.tile != other.tile and share > (iou if piece.cut else SAME_PLACE):
        return True
    is_part = (piece.cut or piece.is_whole or _is_text(piece)) and _is_part_of(piece, other)
    return _is_same(piece, other) and (is_part or share > iou)


def in_reading_order(pieces: Sequence[Piece]) -> list[Piece]:
    """Row by row from the top, each from the left; pieces whose middles lie within half a height are in one row."""
    rows: list[list[Piece]] = []
    for piece in sorted(pieces, key=lambda each: _middle(each)):
        height = piece.box[3] - piece.box[1]
        if rows and _middle(piece) - _middle(rows[-1][0]) <= min(height, rows[-1][0].box[3] - rows[-1][0].box[1]) / 2:
            rows[-1].append(piece)
        else:
            rows.append([piece])
    return [piece for row in rows for piece in sorted(row, key=lambda each: each.box[0])]


def _middle(piece: Piece) -> float:
    return (piece.box[1] + piece.box[3]) / 2
