"""Results as plain values: JSON with all that they have, and one text; labels to compare."""

from __future__ import annotations

from typing import Any

from florence_onnx.answers.results import BoundingBoxes, OCRBoundingBox, PolygonOutput, to_dict


def answer_of(results: Any, *, with_scores: bool) -> Any:
    """Results as fal's JSON has them, and the four corners of each quad box."""
    answer = to_dict(results, with_scores=with_scores)
    if isinstance(results, OCRBoundingBox):
        for described, box in zip(answer["quad_boxes"], results.quad_boxes, strict=True):
            described["quad"] = to_dict(box.quad)
    return answer


def text_of(results: Any) -> str:
    """Results as one text."""
    if isinstance(results, str):
        return results
    if isinstance(results, OCRBoundingBox):
        return "\n".join(quad.label for quad in results.quad_boxes)
    return ", ".join(item.label for item in items_of(results) if item.label)


def items_of(results: Any) -> list[Any]:
    """The boxes, quads and outlines of results."""
    if isinstance(results, BoundingBoxes):
        return [*results.bboxes, *results.polygons]
    if isinstance(results, PolygonOutput):
        return list(results.polygons)
    return list(results.quad_boxes) if isinstance(results, OCRBoundingBox) else []


def normalized(label: str) -> str:
    """A label in lower case with single blanks, to compare it with others."""
    return " ".join(label.split()).casefold()
