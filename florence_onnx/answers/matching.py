"""Comparison of two answers about one image: IoU of boxes and masks, and the matching of boxes.

Boxes are `(x0, y0, x1, y1)`, origin top left, in any unit that both answers share.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from florence_onnx.answers.results import Point

LabelledBox = tuple[str, Sequence[float]]
"""Label and `(x0, y0, x1, y1)`."""
Mask = npt.NDArray[np.bool_]
"""(H, W), True inside."""


@dataclass(frozen=True)
class Pair:
    """Two boxes with the same label, one of each answer."""

    iou: float
    """Intersection over union, 0 to 1; 0 where only the labels match."""
    found: int
    """Index in the first answer."""
    true: int
    """Index in the second answer."""


def box_iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of two `(x0, y0, x1, y1)` boxes; 0 where neither has an area."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    intersection = max(0.0, width) * max(0.0, height)
    areas = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1])
    return intersection / (areas - intersection) if areas > intersection else 0.0


def overlap(a: Sequence[float], b: Sequence[float]) -> float:
    """`box_iou`, but 1 for two equal boxes without an area."""
    return 1.0 if tuple(a) == tuple(b) else box_iou(a, b)


def pair_boxes(
    found: Sequence[LabelledBox],
    true: Sequence[LabelledBox],
    iou: Callable[[Sequence[float], Sequence[float]], float] = box_iou,
) -> list[Pair]:
    """Matches boxes with the same label one to one, greedily by overlap.

    Args:
        found: Labels and boxes of the first answer, usually the predicted ones.
        true: Those of the second, usually the ground truth.
        iou: Overlap of two boxes.

    Returns:
        The pairs, best overlap first.
    """
    candidates = [
        Pair(iou(found_box, true_box), i, j)
        for i, (found_label, found_box) in enumerate(found)
        for j, (true_label, true_box) in enumerate(true)
        if found_label == true_label
    ]
    # ties are broken by the positions in the answers, symmetrically, so that swapping the answers gives the same pairs
    candidates.sort(key=lambda pair: (-pair.iou, pair.found + pair.true, abs(pair.found - pair.true)))
    used_found: set[int] = set()
    used_true: set[int] = set()
    pairs = []
    for pair in candidates:
        if pair.found not in used_found and pair.true not in used_true:
            used_found.add(pair.found)
            used_true.add(pair.true)
            pairs.append(pair)
    return pairs


def draw_polygons(polygons: Iterable[Sequence[float]], size: tuple[int, int]) -> Mask:
    """Rasterizes the union of polygons.

    Args:
        polygons: Flat lists `[x, y, x, y, …]` in pixels; those with fewer than three points are ignored.
        size: (width, height) in pixels.

    Returns:
        Bool array (H, W), True inside.
    """
    mask = Image.new("1", size)
    pen = ImageDraw.Draw(mask)
    for polygon in polygons:
        points = list(zip(polygon[0::2], polygon[1::2], strict=False))
        if len(points) >= 3:
            pen.polygon(points, fill=1)
    return np.asarray(mask)


def mask_iou(a: Mask, b: Mask) -> float:
    """Intersection over union of two masks (H, W); 0 where both are empty."""
    union = np.logical_or(a, b).sum()
    return float(np.logical_and(a, b).sum() / union) if union else 0.0


def flatten_points(points: Iterable[Point]) -> list[float]:
    """Coordinates of points as a flat list `[x, y, x, y, …]`."""
    return [value for point in points for value in (point.x, point.y)]


def quad_to_box(quad: Sequence[float]) -> tuple[float, float, float, float]:
    """The axis-aligned box `(x0, y0, x1, y1)` around a quad box or polygon, a flat list `[x, y, x, y, …]`."""
    xs, ys = quad[0::2], quad[1::2]
    return min(xs), min(ys), max(xs), max(ys)
