"""What tasks answer: frozen dataclasses with the field names and order of `fal-ai/florence-2-large`.

Coordinates are pixels of the image that was given (origin top left, x right, y down). x and y are float32 values; w and
h are the exact differences of two, so that x + w is again the right edge that the model meant. What fal's JSON does not
have is kept in fields marked as extra: readable on the object, never in `to_dict`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

_EXTRA = {"extra": True}


def to_dict(value: Any) -> Any:
    """Turns a result into the JSON-ready value that fal returns.

    Args:
        value: A result dataclass, a string, or a tuple of either.

    Returns:
        Dicts in field order without extra fields, lists for tuples, everything else as it is.
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
    """From the left edge."""
    y: float
    """From the top edge."""


@dataclass(frozen=True)
class BoundingBox:
    """An upright box in pixels."""

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
    """A line of text and the upright box that encloses its quadrilateral."""

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
    """Extra: the four corners as the model gave them, clockwise from the text's top left."""


@dataclass(frozen=True)
class Polygon:
    """One closed outline."""

    points: tuple[Point, ...]
    """List of points, in drawing order; the last joins the first."""
    label: str
    """Label of the polygon; empty for the segmentation tasks."""


@dataclass(frozen=True)
class BoundingBoxes:
    """Answer of the detection tasks."""

    bboxes: tuple[BoundingBox, ...]
    """List of bounding boxes."""
    polygons: tuple[Polygon, ...] = field(default=(), metadata=_EXTRA)
    """Extra: outlines of an open-vocabulary answer that came as polygons (fal drops them)."""


@dataclass(frozen=True)
class OCRBoundingBox:
    """Answer of OCR with regions."""

    quad_boxes: tuple[OCRBoundingBoxSingle, ...]
    """List of quadrilateral boxes."""


@dataclass(frozen=True)
class PolygonOutput:
    """Answer of the segmentation tasks."""

    polygons: tuple[Polygon, ...]
    """List of polygons."""


@dataclass(frozen=True)
class Image:
    """fal's description of an image file (the annotated preview of an answer)."""

    url: str
    """Where the file can be fetched; a `data:` URI when there is no server."""
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
