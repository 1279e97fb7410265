"""Results as the dict that transformers' `post_process_generation` returns, for code that was written around it."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from florence_onnx.answers.results import BoundingBox, BoundingBoxes, OCRBoundingBox, Point, Polygon, PolygonOutput

Number = int | float


def reference_dict(results: object, *, with_polygons: bool, integers: bool, with_scores: bool = False) -> Any:
    """The value under the task token in `post_process_generation`'s dict.

    Labels of boxes lose their characters beyond ASCII, as in the reference.

    Args:
        results: An answer of any task.
        with_polygons: Whether the answer may be either boxes or polygons, which has keys of its own
            (`<OPEN_VOCABULARY_DETECTION>`).
        with_scores: Whether boxes come with `scores`, as in Microsoft's code for large (`<OD>`, `<DENSE_REGION_CAPTION>`); left
            out where a box has none.
        integers: Whether coordinates are truncated, as transformers (4.57 to 5.24) does; Microsoft's code does not.

    Returns:
        A string, or `bboxes` `[[x1, y1, x2, y2]]`, `quad_boxes` `[[x1, y1, … x4, y4]]` or `polygons` (a list of parts
        `[x1, y1, x2, y2, …]` for each instance), in pixels, with `labels`.
    """
    if isinstance(results, OCRBoundingBox):
        quads = [_flat(quad.quad, integers) for quad in results.quad_boxes]
        return {"quad_boxes": quads, "labels": [quad.label for quad in results.quad_boxes]}
    if isinstance(results, PolygonOutput):
        return _polygons(results.polygons, "labels", integers)
    if isinstance(results, BoundingBoxes):
        boxes = [_corners(box, integers) for box in results.bboxes]
        labels = [_ascii(box.label) for box in results.bboxes]
        if not with_polygons:
            # not `score`, which a calibration may have changed
            scores = [box.score_parts.score if box.score_parts else box.score for box in results.bboxes]
            kept = {"scores": scores} if with_scores and None not in scores else {}
            return {"bboxes": boxes, "labels": labels, **kept}
        return {"bboxes": boxes, "bboxes_labels": labels, **_polygons(results.polygons, "polygons_labels", integers)}
    return results


def _polygons(polygons: tuple[Polygon, ...], labels: str, integers: bool) -> dict[str, Any]:
    instances = [list(parts) for _, parts in groupby(polygons, key=lambda polygon: polygon.instance)]
    return {
        "polygons": [[_flat(part.points, integers) for part in parts] for parts in instances],
        labels: [parts[0].label for parts in instances],
    }


def _corners(box: BoundingBox, integers: bool) -> list[Number]:
    return [_number(value, integers) for value in (box.x, box.y, box.x + box.w, box.y + box.h)]


def _flat(points: tuple[Point, ...], integers: bool) -> list[Number]:
    return [_number(value, integers) for point in points for value in (point.x, point.y)]


def _number(value: float, integers: bool) -> Number:
    return int(value) if integers else value


def _ascii(label: str) -> str:
    return label.encode("ascii", "ignore").decode("ascii")
