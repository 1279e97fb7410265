"""How much two raw answers to the same question agree.

Before anything is compared, both sides are normalised in the same way, for what fal is known to add: `</s>` in front of
the first label of OCR, `<loc_…>` tails of region answers, white space. What is compared is `results` only; `image`, a
preview of another size, is not looked at.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from rapidfuzz.distance import Levenshtein

from florence_onnx.answers.matching import LabelledBox, draw_polygons, mask_iou, overlap, pair_boxes, quad_to_box

THRESHOLDS = (0.5, 0.75, 0.9)
"""From these overlaps (IoU) on a box counts as found."""
NORMALISATION = (
    "Both sides are normalised alike before they are compared: special tokens (`</s>`, `<s>`, `<pad>`) and location "
    "tokens (`<loc_…>`) are removed from texts and labels, and runs of white space become one space."
)
_MARKS = re.compile(r"</?s>|<pad>|<loc_\d+>")
_FRAME = 1000
"""Longer side of the frame in which outlines are compared, in pixels."""


@dataclass(frozen=True)
class Answer:
    """An answer of any task, normalised."""

    text: str
    """The text, or all labels, one a line."""
    boxes: tuple[LabelledBox, ...] = ()
    """Labels and `(x0, y0, x1, y1)` in the image's pixels; outlines by the box around them."""
    outlines: tuple[tuple[float, ...], ...] = ()
    """Flat `(x, y, x, y, …)` in the image's pixels."""
    is_text: bool = True
    """Whether the task answers with text alone."""


@dataclass(frozen=True)
class Comparison:
    """One answer against the reference's."""

    num_reference: int
    """Boxes of the reference."""
    num_found: int
    """Boxes of the other."""
    num_matched: tuple[int, ...]
    """Pairs one to one with equal labels, for each of `THRESHOLDS`."""
    num_matched_blind: tuple[int, ...]
    """The same whatever the labels are."""
    mask_iou: float | None
    """Of the union of all outlines; None where neither drew an area."""
    text_similarity: float | None
    """1 - edit distance in characters / length of the longer; None where neither says anything."""
    is_equal: bool
    """Whether text and boxes are exactly equal."""


@dataclass(frozen=True)
class Agreement:
    """Comparisons summed up; None where there was nothing to measure."""

    num_answers: int
    num_reference: int
    num_found: int
    f1: dict[str, float | None] = field(default_factory=dict)
    """By threshold: F1 of all boxes, labels equal."""
    f1_blind: dict[str, float | None] = field(default_factory=dict)
    """The same whatever the labels are."""
    mask_iou: float | None = None
    """Mean over answers."""
    text_similarity: float | None = None
    """Mean over answers."""
    equal: float | None = None
    """Share of answers that are exactly equal."""


def normalise(text: str) -> str:
    """A text without special tokens, location tokens and superfluous white space."""
    return " ".join(_MARKS.sub(" ", text).split())


def read_answer(raw: Any) -> Answer | None:
    """Reads fal's JSON of any task; None where it is something else."""
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
    """Measures one answer against the reference's; the same with both exchanged, but for the names."""
    spoken = reference.text.strip() or answer.text.strip()
    return Comparison(
        num_reference=len(reference.boxes),
        num_found=len(answer.boxes),
        num_matched=_count_pairs(answer.boxes, reference.boxes),
        num_matched_blind=_count_pairs(_unlabelled(answer.boxes), _unlabelled(reference.boxes)),
        mask_iou=_compare_outlines(reference.outlines, answer.outlines),
        text_similarity=Levenshtein.normalized_similarity(reference.text, answer.text) if spoken else None,
        is_equal=reference == answer,
    )


def _count_pairs(found: Sequence[LabelledBox], true: Sequence[LabelledBox]) -> tuple[int, ...]:
    overlaps = [pair.iou for pair in pair_boxes(found, true, overlap)]
    return tuple(sum(iou >= threshold for iou in overlaps) for threshold in THRESHOLDS)


def _unlabelled(boxes: Sequence[LabelledBox]) -> list[LabelledBox]:
    return [("", box) for _, box in boxes]


def _compare_outlines(a: Sequence[Sequence[float]], b: Sequence[Sequence[float]]) -> float | None:
    """IoU of two unions, drawn into the box around both: the image's size need not be known."""
    flat = [value for outline in (*a, *b) for value in outline]
    if not flat:
        return None
    x0, y0, x1, y1 = quad_to_box(flat)
    scale = _FRAME / max(x1 - x0, y1 - y0, 1e-6)
    size = (int((x1 - x0) * scale) + 1, int((y1 - y0) * scale) + 1)
    origin = (x0, y0)
    masks = [
        draw_polygons([[(v - origin[i % 2]) * scale for i, v in enumerate(outline)] for outline in outlines], size)
        for outlines in (a, b)
    ]
    return mask_iou(*masks) if any(mask.any() for mask in masks) else None


def summarise(comparisons: Sequence[Comparison]) -> Agreement:
    """Sums up: every box weighs equally, other figures are means over answers."""
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
