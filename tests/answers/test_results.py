"""The result dataclasses: fal's fields in fal's order, and JSON without the extras."""

from __future__ import annotations

import dataclasses
import json

import pytest

from florence_onnx.answers import results
from florence_onnx.answers.results import (
    BoundingBox,
    BoundingBoxes,
    OCRBoundingBox,
    OCRBoundingBoxSingle,
    Point,
    Polygon,
    PolygonOutput,
    to_dict,
)

POINTS = (Point(1.0, 2.0), Point(3.0, 4.0), Point(5.0, 6.5))

FAL_FIELDS = {
    "BoundingBox": ["x", "y", "w", "h", "label"],
    "BoundingBoxes": ["bboxes"],
    "OCRBoundingBoxSingle": ["x", "y", "w", "h", "label"],
    "OCRBoundingBox": ["quad_boxes"],
    "Polygon": ["points", "label"],
    "PolygonOutput": ["polygons"],
    "Image": ["url", "content_type", "file_name", "file_size", "width", "height"],
}


@pytest.mark.parametrize("name", FAL_FIELDS)
def test_fields_are_those_of_fal_in_its_order(name: str) -> None:
    fields = dataclasses.fields(getattr(results, name))
    assert [field.name for field in fields if not field.metadata.get("extra")] == FAL_FIELDS[name]
    assert all(field.default in ((), 0, None) for field in fields if field.metadata.get("extra"))


def test_boxes_become_fals_json() -> None:
    answer = BoundingBoxes((BoundingBox(1.5, 2.0, 3.0, 4.0, "car"),), polygons=(Polygon(POINTS, "roof"),))
    assert json.dumps(to_dict(answer)) == '{"bboxes": [{"x": 1.5, "y": 2.0, "w": 3.0, "h": 4.0, "label": "car"}]}'


def test_quad_boxes_become_fals_json_without_corners() -> None:
    answer = OCRBoundingBox((OCRBoundingBoxSingle(1.0, 2.0, 4.0, 4.5, "STOP", quad=POINTS),))
    assert to_dict(answer) == {"quad_boxes": [{"x": 1.0, "y": 2.0, "w": 4.0, "h": 4.5, "label": "STOP"}]}


def test_polygons_become_fals_json() -> None:
    points = [{"x": 1.0, "y": 2.0}, {"x": 3.0, "y": 4.0}, {"x": 5.0, "y": 6.5}]
    assert to_dict(PolygonOutput((Polygon(POINTS, ""),))) == {"polygons": [{"points": points, "label": ""}]}


def test_text_and_empty_results_become_fals_json() -> None:
    assert to_dict("a dog") == "a dog"
    assert to_dict(BoundingBoxes(())) == {"bboxes": []}


def test_results_are_frozen_hashable_and_comparable() -> None:
    box = BoundingBox(1.0, 2.0, 3.0, 4.0, "car")
    assert box == BoundingBox(1.0, 2.0, 3.0, 4.0, "car")
    assert len({box, BoundingBox(1.0, 2.0, 3.0, 4.0, "car")}) == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        box.label = "bus"  # type: ignore[misc]
