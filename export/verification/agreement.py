"""Figures of how much two models agree: for each pair of answers, then aggregated. Pure functions, without models.

Coordinates are compared in location bins, 1000 to a side, so that the figures do not depend on the size of the images.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from rapidfuzz.distance import Levenshtein

from florence_onnx.answers.locations import NUM_BINS
from florence_onnx.answers.matching import (
    LabelledBox,
    draw_polygons,
    flatten_points,
    mask_iou,
    overlap,
    pair_boxes,
    quad_to_box,
)
from florence_onnx.answers.results import BoundingBoxes, OCRBoundingBox, Polygon, PolygonOutput

LOOSE_IOU = 0.5
"""IoU from which a box counts as found."""
TIGHT_IOU = 0.9
"""IoU from which a box counts as found in the same place."""

_MARKS = re.compile(r"(?:</?s>|<pad>|<loc_\d+>|</?poly>|<sep>)+")

Floats = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Answer:
    """The answer of one model to one question."""

    token_ids: tuple[int, ...]
    """All tokens, the decoder start token first."""
    text: str
    """The tokens decoded, special and location tokens included."""
    results: Any
    """The text parsed: a result of `florence_onnx.answers.results`, or a string."""
    size: tuple[int, int]
    """`(width, height)` of the image in pixels, in which the results are."""


@dataclass(frozen=True)
class BoxAgreement:
    """Boxes of an answer against those of the reference; polygons and quad boxes count as their bounding boxes."""

    num_reference: int
    """Boxes of the reference."""
    num_found: int
    """Boxes of the other model."""
    num_loose: int
    """Pairs with equal labels and an IoU of at least `LOOSE_IOU`."""
    num_tight: int
    """Pairs with equal labels and an IoU of at least `TIGHT_IOU`."""
    sum_shift: float
    """Mean absolute difference of the four coordinates, in bins, summed over the loose pairs."""


@dataclass(frozen=True)
class LogitAgreement:
    """Differences between the logits of two models along the same tokens."""

    num_positions: int
    max_abs: float
    """Largest absolute difference; infinite if any logit is not finite."""
    mean_abs: float
    """Mean absolute difference over positions and vocabulary."""
    kl: float
    """Mean Kullback-Leibler divergence KL(reference || other) of the next-token distributions, in nats."""
    top1: float
    """Share of positions where both have the same most likely token."""


@dataclass(frozen=True)
class Comparison:
    """The figures of one answer against the reference's answer. Tokens that no model chooses are left out."""

    num_equal_tokens: int
    """Tokens that are equal at the same position."""
    num_tokens: int
    """Tokens of the longer answer."""
    token_similarity: float
    """1 - edit distance of the tokens / length of the longer answer."""
    text_similarity: float | None
    """1 - edit distance of the texts without location tokens / length of the longer; None if both are empty."""
    is_exact: bool
    """Whether all tokens are equal."""
    boxes: BoxAgreement | None
    """None if the answers are text."""
    mask_iou: float | None
    """IoU of the areas inside all polygons; None if both are empty."""
    logits: LogitAgreement | None
    """None if logits were not compared."""


@dataclass(frozen=True)
class Figures:
    """Agreement over any number of answers; a figure is None if there was nothing to measure."""

    num_answers: int
    exact: float
    """Share of answers with all tokens equal."""
    token_agreement: float
    """Share of tokens that are equal at the same position. One inserted token shifts all tokens after it."""
    token_similarity: float
    """Mean of 1 - normalised edit distance of the tokens."""
    text_similarity: float | None
    """Mean of 1 - normalised edit distance of the texts without location tokens."""
    num_boxes: int
    """Boxes of the reference."""
    box_f1_50: float | None
    """F1 of boxes at IoU 0.5, labels equal."""
    box_f1_90: float | None
    """F1 of boxes at IoU 0.9, labels equal."""
    coordinate_shift: float | None
    """Mean absolute difference of the coordinates of pairs with an IoU of at least 0.5, in bins."""
    mask_iou: float | None
    """Mean IoU of the areas inside the polygons."""
    num_positions: int
    """Positions whose logits were compared."""
    logit_max_abs: float | None
    logit_mean_abs: float | None
    logit_kl: float | None
    """In nats."""
    logit_top1: float | None


def compare_answers(
    expected: Answer, answer: Answer, *, num_given: int = 1, logits: LogitAgreement | None = None
) -> Comparison:
    """Compares an answer with the reference's answer to the same question. The figures are symmetric.

    Args:
        expected: The reference's answer.
        answer: The other model's answer.
        num_given: Leading tokens that no model chooses: the decoder start token, and a forced one after it.
        logits: The logits' figures for the same question, to be passed on.
    """
    ours, theirs = answer.token_ids[num_given:], expected.token_ids[num_given:]
    return Comparison(
        num_equal_tokens=sum(a == b for a, b in zip(ours, theirs, strict=False)),
        num_tokens=max(len(ours), len(theirs)),
        token_similarity=Levenshtein.normalized_similarity(ours, theirs),
        text_similarity=compare_texts(words(expected.text), words(answer.text)),
        is_exact=ours == theirs,
        boxes=compare_boxes(expected, answer),
        mask_iou=compare_masks(expected, answer),
        logits=logits,
    )


def words(text: str) -> str:
    """Removes special and location tokens from generated text; each remaining piece becomes a line."""
    return "\n".join(part.strip() for part in _MARKS.split(text) if part.strip())


def compare_texts(expected: str, text: str) -> float | None:
    """Returns 1 - edit distance in characters / length of the longer text; None if both are empty."""
    return Levenshtein.normalized_similarity(expected, text) if expected or text else None


# ------------------------------------------------------------------------------------------------------------ geometry


def compare_boxes(expected: Answer, answer: Answer) -> BoxAgreement | None:
    """Compares boxes, quad boxes and polygons by their bounding boxes; None if an answer is text."""
    if isinstance(expected.results, str) or isinstance(answer.results, str):
        return None
    true, found = labelled_boxes(expected), labelled_boxes(answer)
    close = [pair for pair in pair_boxes(found, true, overlap) if pair.iou >= LOOSE_IOU]
    shifts = [np.abs(np.subtract(found[pair.found][1], true[pair.true][1])).mean() for pair in close]
    return BoxAgreement(
        num_reference=len(true),
        num_found=len(found),
        num_loose=len(close),
        num_tight=sum(pair.iou >= TIGHT_IOU for pair in close),
        sum_shift=float(sum(shifts)),
    )


def labelled_boxes(answer: Answer) -> list[LabelledBox]:
    """Returns label and bounding box `(x0, y0, x1, y1)`, in bins, of every box, quad box and polygon."""
    results = answer.results
    found: Sequence[Any] = ()
    if isinstance(results, BoundingBoxes):
        found = results.bboxes
    elif isinstance(results, OCRBoundingBox):
        found = results.quad_boxes
    corners = [(box.label, [box.x, box.y, box.x + box.w, box.y + box.h]) for box in found]
    outlines = [(polygon.label, flatten_points(polygon.points)) for polygon in _polygons(results) if polygon.points]
    return [(label, quad_to_box(_to_bins(points, answer.size))) for label, points in (*corners, *outlines)]


def compare_masks(expected: Answer, answer: Answer) -> float | None:
    """Returns the IoU of the areas inside the polygons of two answers; None if both areas are empty."""
    if not _polygons(expected.results) and not _polygons(answer.results):
        return None
    masks = [
        draw_polygons(
            [_to_bins(flatten_points(polygon.points), each.size) for polygon in _polygons(each.results)], _FRAME
        )
        for each in (expected, answer)
    ]
    return mask_iou(*masks) if any(mask.any() for mask in masks) else None


_FRAME = (NUM_BINS, NUM_BINS)


def _polygons(results: Any) -> tuple[Polygon, ...]:
    return results.polygons if isinstance(results, BoundingBoxes | PolygonOutput) else ()


def _to_bins(flat: Sequence[float], size: tuple[int, int]) -> list[float]:
    return [value / size[index % 2] * NUM_BINS for index, value in enumerate(flat)]


# -------------------------------------------------------------------------------------------------------------- logits


def compare_logits(expected: Floats, logits: Floats) -> LogitAgreement:
    """Compares the logits of two models along the same tokens.

    Args:
        expected: The reference's logits, `(T, V)`, T at least 1.
        logits: The other model's logits, `(T, V)`.

    Raises:
        ValueError: The shapes differ, or T is 0.
    """
    if expected.shape != logits.shape or not len(expected):
        raise ValueError(f"logits of shapes {expected.shape} and {logits.shape} cannot be compared")
    # Row by row: 1024 positions of 51289 logits take 210 MB, and the formulas need a dozen such temporaries.
    rows = [_compare_row(a, b) for a, b in zip(expected, logits, strict=True)]
    max_abs, mean_abs, kl, top1 = np.array(rows, dtype=np.float64).T
    return LogitAgreement(len(rows), max_abs.max(), float(mean_abs.mean()), float(kl.mean()), float(top1.mean()))


def _compare_row(expected: Floats, logits: Floats) -> tuple[float, float, float, bool]:
    if not (np.isfinite(expected).all() and np.isfinite(logits).all()):
        return np.inf, np.inf, np.inf, False
    error = np.abs(expected.astype(np.float64) - logits)
    p, q = _log_probabilities(expected), _log_probabilities(logits)
    kl = max(0.0, float((np.exp(p) * (p - q)).sum()))  # rounding can make it slightly negative
    return float(error.max()), float(error.mean()), kl, bool(expected.argmax() == logits.argmax())


def _log_probabilities(logits: Floats) -> npt.NDArray[np.float64]:
    shifted = logits.astype(np.float64) - float(logits.max())
    normalised: npt.NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum())
    return normalised


# ---------------------------------------------------------------------------------------------------------- aggregation


def summarise(comparisons: Sequence[Comparison]) -> Figures:
    """Aggregates comparisons.

    Token agreement, box and logit figures are over all tokens, boxes and positions; the others are means over the
    answers.

    Raises:
        ValueError: There is no comparison.
    """
    if not comparisons:
        raise ValueError("there is no comparison to aggregate")
    num_tokens = sum(each.num_tokens for each in comparisons)
    boxes = [each.boxes for each in comparisons if each.boxes is not None]
    logits = [each.logits for each in comparisons if each.logits is not None]
    num_loose = sum(each.num_loose for each in boxes)
    return Figures(
        num_answers=len(comparisons),
        exact=_mean(each.is_exact for each in comparisons) or 0.0,
        # 0 of 0 tokens: both answers are empty, and so equal.
        token_agreement=sum(each.num_equal_tokens for each in comparisons) / num_tokens if num_tokens else 1.0,
        token_similarity=_mean(each.token_similarity for each in comparisons) or 0.0,
        text_similarity=_mean(each.text_similarity for each in comparisons),
        num_boxes=sum(each.num_reference for each in boxes),
        box_f1_50=_f1(boxes, num_loose),
        box_f1_90=_f1(boxes, sum(each.num_tight for each in boxes)),
        coordinate_shift=sum(each.sum_shift for each in boxes) / num_loose if num_loose else None,
        mask_iou=_mean(each.mask_iou for each in comparisons),
        num_positions=sum(each.num_positions for each in logits),
        logit_max_abs=max((each.max_abs for each in logits), default=None),
        logit_mean_abs=_mean_of_positions(logits, lambda each: each.mean_abs),
        logit_kl=_mean_of_positions(logits, lambda each: each.kl),
        logit_top1=_mean_of_positions(logits, lambda each: each.top1),
    )


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _f1(boxes: Sequence[BoxAgreement], num_equal: int) -> float | None:
    total = sum(each.num_reference + each.num_found for each in boxes)
    return 2 * num_equal / total if total else None


def _mean_of_positions(logits: Sequence[LogitAgreement], figure: Callable[[LogitAgreement], float]) -> float | None:
    total = sum(each.num_positions for each in logits)
    return sum(figure(each) * each.num_positions for each in logits) / total if total else None
