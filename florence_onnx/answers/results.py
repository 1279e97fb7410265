"""Results of the tasks: frozen dataclasses with the field names and field order of `fal-ai/florence-2-large`.

Coordinates are pixels of the input image: origin top left, x to the right, y down. x and y are float32 values in Python
floats; w and h are differences of two of them in float64, so that x + w is the right edge again. Fields that fal's JSON
does not have are marked as extra: they can be read from the object and are left out by `to_dict`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_EXTRA = {"extra": True}
_SCORE = {"extra": True, "score": True}


def to_dict(value: Any, *, with_scores: bool = False) -> Any:
    """Converts a result to the JSON value that fal returns.

    Args:
        value: A result dataclass, a string, or a tuple of either.
        with_scores: Whether to add `score` to each box, quad and outline.

    Returns:
        A dict in field order without extra fields for a dataclass, a list for a tuple, any other value unchanged.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        kept = (f.name for f in dataclasses.fields(value) if _is_kept(f.metadata, with_scores))
        return {name: to_dict(getattr(value, name), with_scores=with_scores) for name in kept}
    if isinstance(value, tuple):
        return [to_dict(item, with_scores=with_scores) for item in value]
    return value


def _is_kept(metadata: Mapping[str, Any], with_scores: bool) -> bool:
    return not metadata.get("extra") or (with_scores and bool(metadata.get("score")))


@dataclass(frozen=True)
class WordScore:
    """A word of an answer and how sure the model was of it."""

    text: str
    """The word, without the blank before it."""
    score: float
    """Probability: the geometric mean over its tokens."""


@dataclass(frozen=True)
class TextScore:
    """How sure the model was of a text."""

    mean: float
    """Geometric mean of the probabilities of its tokens."""
    least: float
    """Probability of the least probable token."""
    words: tuple[WordScore, ...]
    """Its words in order."""


@dataclass(frozen=True)
class ScoreParts:
    """What the score of a box, quad or outline was made of, and what else is known about it."""

    coordinates: tuple[float, ...]
    """Log-probability of each location token, in the order of the answer (x and y alternate)."""
    near: tuple[float, ...]
    """Probability of each coordinate within two bins (two thousandths of the width or height) on either side."""
    label: float | None = None
    """Log-probability of the label: the sum over its tokens. None where it has none."""
    text: TextScore | None = None
    """The label as a text. None where there is no label."""

    @property
    def score(self) -> float:
        """The score before any calibration: the geometric mean of the probabilities of the location tokens, as in the code of
        Microsoft's Florence-2-large."""
        return math.exp(sum(self.coordinates) / len(self.coordinates))


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
    score: float | None = field(default=None, compare=False, metadata=_SCORE)
    """Extra: exp of the mean log-probability of the location tokens (Microsoft's formula); None without the option `scores`."""
    score_parts: ScoreParts | None = field(default=None, compare=False, repr=False, metadata=_EXTRA)
    """Extra: what the score was made of."""


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
    score: float | None = field(default=None, compare=False, metadata=_SCORE)
    """Extra: exp of the mean log-probability of the location tokens (Microsoft's formula); None without the option `scores`."""
    score_parts: ScoreParts | None = field(default=None, compare=False, repr=False, metadata=_EXTRA)
    """Extra: what the score was made of."""


@dataclass(frozen=True)
class Polygon:
    """A closed outline in pixels."""

    points: tuple[Point, ...]
    """List of points, in drawing order; the last is joined to the first."""
    label: str
    """Label of the polygon; empty for the segmentation tasks."""
    instance: int = field(default=0, compare=False, metadata=_EXTRA)
    """Extra: which object it outlines, counted from 0 within the answer; an object may have several outlines."""
    score: float | None = field(default=None, compare=False, metadata=_SCORE)
    """Extra: exp of the mean log-probability of the location tokens (Microsoft's formula); None without the option `scores`."""
    score_parts: ScoreParts | None = field(default=None, compare=False, repr=False, metadata=_EXTRA)
    """Extra: what the score was made of."""


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
