"""The agreement of two raw answers to the same question.

Both answers are normalised first, because fal's are known to contain `</s>` before the first OCR label, `<loc_…>`
tokens at the end of region answers, and stray white space. Only `results` is compared; `image`, whose size differs, is
ignored.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from rapidfuzz.distance import Levenshtein

from florence_onnx.answers.matching import LabelledBox, draw_polygons, mask_iou, overlap, pair_boxes, quad_to_box

THRESHOLDS = (0.5, 0.75, 0.9)
"""IoU thresholds at which a pair of boxes counts as a match."""
NORMALISATION = (
    "Both answers are normalised before they are compared: special tokens (`</s>`, `<s>`, `<pad>`) and location "
    "tokens (`<loc_…>`) are removed from texts and labels, and each run of white space becomes one space."
)
_SPECIAL_TOKENS = re.compile(r"</?s>|<pad>|<loc_\d+>")
_MASK_SIZE = 1000
"""Longer side in pixels of the masks that outlines are drawn into to compare them."""


@dataclass(frozen=True)
class Answer:
    """The normalised answer of any task."""

    text: str
    """The text, or all labels, one per line."""
    boxes: tuple[LabelledBox, ...] = ()
    """Labels and `(x0, y0, x1, y1)` in pixels of the image; for outlines, their bounding boxes."""
    outlines: tuple[tuple[float, ...], ...] = ()
    """Polygons as flat `(x, y, x, y, …)` in pixels of the image."""
    is_text: bool = True
    """Whether the answer is text only."""


@dataclass(frozen=True)
class Comparison:
    """One answer compared with that of the reference."""

    num_reference: int
    """Boxes in the answer of the reference."""
    num_found: int
    """Boxes in the other answer."""
    num_matched: tuple[int, ...]
    """One-to-one matches with equal labels, for each of `THRESHOLDS`."""
    num_matched_blind: tuple[int, ...]
    """One-to-one matches with any labels (class-agnostic), for each of `THRESHOLDS`."""
    mask_iou: float | None
    """IoU of the unions of all outlines; None if neither answer has an area."""
    text_similarity: float | None
    """1 - (edit distance in characters) / (length of the longer text); None if both are empty."""
    is_equal: bool
    """Whether text, boxes and outlines are exactly equal."""


@dataclass(frozen=True)
class Agreement:
    """Comparisons summed up; None where there is nothing to measure."""

    num_answers: int
    num_reference: int
    num_found: int
    f1: dict[str, float | None] = field(default_factory=dict)
    """By threshold: F1 over all boxes, with equal labels."""
    f1_blind: dict[str, float | None] = field(default_factory=dict)
    """By threshold: class-agnostic F1 over all boxes."""
    mask_iou: float | None = None
    """Mean over answers."""
    text_similarity: float | None = None
    """Mean over answers."""
    equal: float | None = None
    """Share of answers that are exactly equal, 0 to 1."""


def normalise(text: str) -> str:
    """Removes special tokens and location tokens from a text, and reduces white space to single spaces."""
    return " ".join(_SPECIAL_TOKENS.sub(" ", text).split())


def read_answer(raw: Any) -> Answer | None:
    """Parses fal's JSON of any task; returns None if it has another form."""
    try:
        results = raw["results"]
        if isinstance(results, str):
            return Answer(normalise(results))
        (kind,) = results.keys() & {"bboxes", "quad_boxes", "polygons"}
        if kind == "polygons":
            return _read_polygons(results[kind])
        boxes = tuple((normalise(box["label"]), _corners(box)) for box in results[kind])
        return Answer("\n".join(label for label, _ in boxes), boxes, is_text=False)
    except (AttributeError, KeyError, TypeError, ValueError):
        return None


def _corners(box: Any) -> tuple[float, ...]:
    x, y, w, h = (float(box[name]) for name in "xywh")
    return x, y, x + w, y + h


def _read_polygons(polygons: Iterable[Any]) -> Answer:
    labels, outlines = [], []
    for polygon in polygons:
        points = [(float(point["x"]), float(point["y"])) for point in polygon["points"]]
        if points:
            labels.append(normalise(polygon["label"]))
            outlines.append(tuple(value for point in points for value in point))
    boxes = tuple((label, quad_to_box(outline)) for label, outline in zip(labels, outlines, strict=True))
    return Answer("\n".join(labels), boxes, tuple(outlines), is_text=False)


def compare(reference: Answer, answer: Answer) -> Comparison:
    """Compares one answer with that of the reference; symmetric except for the two box counts."""
    has_text = reference.text.strip() or answer.text.strip()
    return Comparison(
        num_reference=len(reference.boxes),
        num_found=len(answer.boxes),
        num_matched=_count_pairs(answer.boxes, reference.boxes),
        num_matched_blind=_count_pairs(_unlabelled(answer.boxes), _unlabelled(reference.boxes)),
        mask_iou=_compare_outlines(reference.outlines, answer.outlines),
        text_similarity=Levenshtein.normalized_similarity(reference.text, answer.text) if has_text else None,
        is_equal=reference == answer,
    )


def _count_pairs(found: Sequence[LabelledBox], true: Sequence[LabelledBox]) -> tuple[int, ...]:
    overlaps = [pair.iou for pair in pair_boxes(found, true, overlap)]
    return tuple(sum(iou >= threshold for iou in overlaps) for threshold in THRESHOLDS)


def _unlabelled(boxes: Sequence[LabelledBox]) -> list[LabelledBox]:
    return [("", box) for _, box in boxes]


def _compare_outlines(a: Sequence[Sequence[float]], b: Sequence[Sequence[float]]) -> float | None:
    """Returns the IoU of two unions of outlines, drawn into their common bounding box: the image size is unknown."""
    flat = [value for outline in (*a, *b) for value in outline]
    if not flat:
        return None
    x0, y0, x1, y1 = quad_to_box(flat)
    # the lower bound is for outlines that are a single point
    scale = _MASK_SIZE / max(x1 - x0, y1 - y0, 1e-6)
    size = (int((x1 - x0) * scale) + 1, int((y1 - y0) * scale) + 1)
    origin = (x0, y0)
    masks = [
        draw_polygons([[(v - origin[i % 2]) * scale for i, v in enumerate(outline)] for outline in outlines], size)
        for outlines in (a, b)
    ]
    return mask_iou(*masks) if any(mask.any() for mask in masks) else None


def summarise(comparisons: Sequence[Comparison]) -> Agreement:
    """Sums up comparisons: F1 over all boxes of all answers, everything else as a mean over answers."""
    num_reference = sum(each.num_reference for each in comparisons)
    num_found = sum(each.num_found for each in comparisons)
    total = num_reference + num_found

    def f1(counts: Iterable[tuple[int, ...]]) -> dict[str, float | None]:
        sums = [sum(column) for column in zip(*counts, strict=True)] or [0] * len(THRESHOLDS)
        return {str(t): 2 * num / total if total else None for t, num in zip(THRESHOLDS, sums, strict=True)}

    return Agreement(
        num_answers=len(comparisons),
        num_reference=num_reference,
        num_found=num_found,
        f1=f1(each.num_matched for each in comparisons),
        f1_blind=f1(each.num_matched_blind for each in comparisons),
        mask_iou=_mean(each.mask_iou for each in comparisons),
        text_similarity=_mean(each.text_similarity for each in comparisons),
        equal=_mean(float(each.is_equal) for each in comparisons),
    )


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
