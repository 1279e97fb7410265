"""Results as `supervision.Detections`, for annotators, trackers, filters and data sets of that library."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from florence_onnx.answers.results import BoundingBoxes, OCRBoundingBox, Polygon, PolygonOutput
from florence_onnx.errors import InputError, MissingExtraError

if TYPE_CHECKING:
    from supervision import Detections

UNLISTED = -1
"""Class id of a label that is not among the given classes."""


def to_detections(results: object, size: tuple[int, int], classes: Sequence[str] | None = None) -> Detections:
    """Boxes, quads or polygons as detections.

    Args:
        results: An answer with geometry.
        size: (width, height) of the image in pixels.
        classes: Labels in the order of their class ids; None numbers the labels of this answer alphabetically.

    Returns:
        `xyxy` `(n, 4)` float32 in pixels; `class_id` `(n,)`; `data["class_name"]`; for quads also `data["xyxyxyxy"]`
        `(n, 4, 2)`; for polygons `mask` `(n, H, W)`, one an object, whose outlines are united. `confidence` `(n,)` are the
        scores (of an object of several outlines their mean); None without the option `scores`.

    Raises:
        InputError: The answer is text.
        MissingExtraError: supervision is not installed.
    """
    try:
        from supervision import Detections, polygon_to_mask
    except ImportError:
        raise MissingExtraError("supervision", "supervision") from None

    data: dict[str, npt.NDArray[Any]] = {}
    mask = None
    if isinstance(results, OCRBoundingBox):
        boxes = [[quad.x, quad.y, quad.x + quad.w, quad.y + quad.h] for quad in results.quad_boxes]
        labels = [quad.label for quad in results.quad_boxes]
        scores = [quad.score for quad in results.quad_boxes]
        corners = [[(point.x, point.y) for point in quad.quad] for quad in results.quad_boxes]
        data["xyxyxyxy"] = np.array(corners, dtype=np.float32).reshape(-1, 4, 2)
    elif isinstance(results, BoundingBoxes) and not results.polygons:
        boxes = [[box.x, box.y, box.x + box.w, box.y + box.h] for box in results.bboxes]
        labels = [box.label for box in results.bboxes]
        scores = [box.score for box in results.bboxes]
    elif isinstance(results, BoundingBoxes | PolygonOutput):
        objects = _objects(results.polygons)
        boxes = [_bounds(parts) for parts in objects]
        labels = [parts[0].label for parts in objects]
        scores = [_mean_score(parts) for parts in objects]
        masks = [np.any([polygon_to_mask(_vertices(part), size) for part in parts], axis=0) for parts in objects]
        mask = np.array(masks, dtype=bool).reshape(-1, size[1], size[0])
    else:
        raise InputError("the answer is text: only tasks with geometry become detections")
    data["class_name"] = np.array(labels, dtype=str)
    ids = {label: number for number, label in enumerate(sorted(set(labels)) if classes is None else classes)}
    return Detections(
        xyxy=np.array(boxes, dtype=np.float32).reshape(-1, 4),
        mask=mask,
        confidence=_confidence(scores),
        class_id=np.array([ids.get(label, UNLISTED) for label in labels], dtype=int),
        data=data,
    )


def _mean_score(parts: Sequence[Polygon]) -> float | None:
    scores = [part.score for part in parts if part.score is not None]
    return sum(scores) / len(scores) if scores else None


def _confidence(scores: Sequence[float | None]) -> npt.NDArray[np.float32] | None:
    known = [score for score in scores if score is not None]
    return np.array(known, dtype=np.float32) if known and len(known) == len(scores) else None


def _objects(polygons: Sequence[Polygon]) -> list[list[Polygon]]:
    """The outlines of each object; outlines without points name no place."""
    found = [part for part in polygons if part.points]
    return [list(parts) for _, parts in groupby(found, key=lambda part: part.instance)]


def _bounds(parts: Sequence[Polygon]) -> list[float]:
    points = [point for part in parts for point in part.points]
    xs, ys = [point.x for point in points], [point.y for point in points]
    return [min(xs), min(ys), max(xs), max(ys)]


def _vertices(part: Polygon) -> npt.NDArray[np.int32]:
    return np.array([[round(point.x), round(point.y)] for point in part.points], dtype=np.int32).reshape(-1, 2)
