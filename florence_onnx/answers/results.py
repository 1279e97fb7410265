"""Results of the tasks: frozen dataclasses with the field names and field order of `fal-ai/florence-2-large`.

Coordinates are pixels of the input image: origin top left, x to the right, y down. x and y are float32 values in Python
floats; w and h are differences of two of them in float64, so that x + w is the right edge again. Fields that fal's JSON
does not have are marked as extra: they can be read from the object and are left out by `to_dict`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

_EXTRA = {"extra": True}


def to_dict(value: Any) -> Any:
    """Converts a result to the JSON value that fal returns.

    Args:
        value: A result dataclass, a string, or a tuple of either.

    Returns:
        A dict in field order without extra fields for a dataclass, a list for a tuple, any other value unchanged.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        kept = (f.name for f in dataclasses.fields(value) if not f.metadata.get("extra"))
        return {name: to_dict(getattr(value, name)) for name in kept}
    if isinstance(value, tuple):
        return [to_dict(item) for item in value]
    return value


@dataclass(frozen=True)
class Point:
    """A point in pixels."""

    x: float
    """Distance from the left edge of the image."""
    y: float
    """Distance from the top edge of the image."""


@dataclass(frozen=True)
class BoundingBox:
    """An axis-aligned box in pixels."""

    x: float
    """X-coordinate of the top-left corner."""
    y: float
    """Y-coordinate of the top-left corner."""
    w: float
    """Width of the bounding box."""
    h: float
    """Height of the bounding box."""
    label: str
    """Label of the bounding box; empty for region proposals."""


@dataclass(frozen=True)
class OCRBoundingBoxSingle:
    """A line of text and the axis-aligned box around its quadrilateral, in pixels."""

    x: float
    """X-coordinate of the top-left corner."""
    y: float
    """Y-coordinate of the top-left corner."""
    w: float
    """Width of the bounding box."""
    h: float
    """Height of the bounding box."""
    label: str
    """The text."""
    quad: tuple[Point, ...] = field(default=(), metadata=_EXTRA)
    """Extra: the four corners in pixels as the model located them, clockwise from the top left of the text."""


@dataclass(frozen=True)
class Polygon:
    """A closed outline in pixels."""

    points: tuple[Point, ...]
    """List of points, in drawing order; the last is joined to the first."""
    label: str
    """Label of the polygon; empty for the segmentation tasks."""
    instance: int = field(default=0, compare=False, metadata=_EXTRA)
    """Extra: which object it outlines, counted from 0 within the answer; an object may have several outlines."""


@dataclass(frozen=True)
class BoundingBoxes:
    """Result of the detection, grounding and region tasks that return boxes."""

    bboxes: tuple[BoundingBox, ...]
    """List of bounding boxes."""
    polygons: tuple[Polygon, ...] = field(default=(), metadata=_EXTRA)
    """Extra: the outlines where an open-vocabulary answer has polygons instead of boxes (fal drops them)."""


@dataclass(frozen=True)
class OCRBoundingBox:
    """Result of OCR with regions."""

    quad_boxes: tuple[OCRBoundingBoxSingle, ...]
    """List of quadrilateral boxes."""


@dataclass(frozen=True)
class PolygonOutput:
    """Result of the segmentation tasks."""

    polygons: tuple[Polygon, ...]
    """List of polygons."""


@dataclass(frozen=True)
class Image:
    """An image file as fal describes it; here the annotated image of a prediction."""

    url: str
    """URL of the file; a `data:` URI where no server stores it."""
    content_type: str | None = None
    """MIME type."""
    file_name: str | None = None
    """Name of the file."""
    file_size: int | None = None
    """Size in bytes."""
    width: int | None = None
    """Width in pixels."""
    height: int | None = None
    """Height in pixels."""
