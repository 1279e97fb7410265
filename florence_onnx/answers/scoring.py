"""Scores of parsed answers, from the probabilities of their tokens.

Which tokens a box was made of is not known to the parsers, which read text. So the text is parsed a second time with its
location tokens numbered in order: the coordinates of that second answer are the numbers of the tokens that the first
answer's coordinates came from. This works for every parser that treats all location tokens alike, also those of others.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from florence_onnx.answers.calibration import Calibration
from florence_onnx.answers.locations import Size
from florence_onnx.answers.results import (
    BoundingBoxes,
    OCRBoundingBox,
    Point,
    PolygonOutput,
    ScoreParts,
    TextScore,
    WordScore,
)
from florence_onnx.errors import InputError

_LOCATION = re.compile(r"<loc_\d+>")
_MARK = re.compile(r"<[^<>\s]+>")
Decode = Callable[[Sequence[int]], str]
_UNIT: Size = (1000, 1000)
"""Image size at which a bin is a pixel: the middle of bin k is k + 0.5."""


@dataclass(frozen=True)
class ScoredToken:
    """A generated token with what it decodes to and how sure the model was of it."""

    id: int
    text: str
    """What it decodes to by itself; of a character that takes several tokens, each is a replacement character."""
    log_prob: float
    near: float
    """See `florence_onnx.generation.token_scores.TokenScores`."""
    is_location: bool
    """Whether it is one of `<loc_0>` to `<loc_999>`."""
    is_given: bool = False
    """Whether it was not the model's choice: the start token, and a forced first token."""


def score_results(
    results: Any,
    parser: Callable[[str, Size], Any],
    text: str,
    tokens: Sequence[ScoredToken],
    decode: Decode,
    calibration: Calibration | None = None,
) -> Any:
    """Adds scores to an answer.

    Args:
        results: What `parser` returned for `text`.
        parser: Of the task.
        text: The generated text.
        tokens: Its tokens.
        decode: Turns token ids into text.
        calibration: Of the scores; None for none.

    Returns:
        The same results with `score` and `score_parts` in each box, quad and outline that has location tokens; other
        results unchanged.
    """
    if not isinstance(results, BoundingBoxes | OCRBoundingBox | PolygonOutput):
        return results
    order = _order(tokens)
    numbers = iter(range(len(text)))
    numbered = parser(_LOCATION.sub(lambda _: f"<loc_{next(numbers)}>", text), _UNIT)
    if isinstance(results, OCRBoundingBox):
        return OCRBoundingBox(_scored(results.quad_boxes, numbered.quad_boxes, tokens, order, decode, calibration))
    polygons = _scored(results.polygons, numbered.polygons, tokens, order, decode, calibration)
    if isinstance(results, PolygonOutput):
        return PolygonOutput(polygons)
    return BoundingBoxes(_scored(results.bboxes, numbered.bboxes, tokens, order, decode, calibration), polygons)


def score_text(tokens: Sequence[ScoredToken], decode: Decode) -> TextScore | None:
    """The score of an answer that is text; None where it has no tokens that the model chose."""
    chosen = [token for token in tokens if not token.is_given]
    return _text_score(chosen, decode) if chosen else None


def keep_above(results: Any, min_score: float) -> Any:
    """The boxes, quads and outlines whose score is at least `min_score`.

    Raises:
        InputError: The results are text, or have no scores.
    """
    if not isinstance(results, BoundingBoxes | OCRBoundingBox | PolygonOutput):
        raise InputError("the answer is text: only boxes, quads and outlines can be dropped by their score")
    return type(results)(*(_above(getattr(results, field.name), min_score) for field in fields(results)))


def _above(items: Sequence[Any], min_score: float) -> tuple[Any, ...]:
    if any(item.score is None for item in items):
        raise InputError("this answer has no scores: ask with GenerationOptions(scores=True)")
    return tuple(item for item in items if item.score >= min_score)


def _order(tokens: Sequence[ScoredToken]) -> list[int | None]:
    """For each `<loc_…>` of the text the index of its token; None where ordinary tokens spell one."""
    order: list[int | None] = []
    piece = ""
    for index, token in enumerate(tokens):
        if token.is_location:
            order += [None] * len(_LOCATION.findall(piece)) + [index]
            piece = ""
        else:
            piece += token.text
    return order + [None] * len(_LOCATION.findall(piece))


def _scored(
    items: Sequence[Any],
    numbered: Sequence[Any],
    tokens: Sequence[ScoredToken],
    order: Sequence[int | None],
    decode: Decode,
    calibration: Calibration | None,
) -> tuple[Any, ...]:
    if len(items) != len(numbered):  # a parser that reads the numbers themselves
        return tuple(items)
    return tuple(
        _with_score(item, _parts(_coordinates(same), tokens, order, decode), calibration)
        for item, same in zip(items, numbered, strict=True)
    )


def _with_score(item: Any, parts: ScoreParts | None, calibration: Calibration | None) -> Any:
    if parts is None:
        return item
    score = parts.score if calibration is None else calibration.apply(parts.score)
    return replace(item, score=score, score_parts=parts if item.label else replace(parts, label=None, text=None))


def _coordinates(item: Any) -> list[float]:
    """Coordinates of a box, quad or outline in the order of the text."""
    points: Sequence[Point] = getattr(item, "quad", ()) or getattr(item, "points", ())
    if points or not hasattr(item, "w"):
        return [value for point in points for value in (point.x, point.y)]
    return [item.x, item.y, item.x + item.w, item.y + item.h]


def _parts(
    coordinates: Sequence[float], tokens: Sequence[ScoredToken], order: Sequence[int | None], decode: Decode
) -> ScoreParts | None:
    indices = [order[int(value)] for value in coordinates if int(value) < len(order)]
    found = [index for index in indices if index is not None]
    if not found or len(found) < len(coordinates):
        return None
    label = _label_tokens(tokens, found[0])
    return ScoreParts(
        coordinates=tuple(tokens[index].log_prob for index in found),
        near=tuple(tokens[index].near for index in found),
        label=sum(token.log_prob for token in label) if label else None,
        text=_text_score(label, decode) if label else None,
    )


def _label_tokens(tokens: Sequence[ScoredToken], first: int) -> list[ScoredToken]:
    """The text in front of the run of locations and marks (`<poly>`, `<sep>`) that a location is in."""
    end = first
    while end > 0 and (tokens[end - 1].is_location or _MARK.fullmatch(tokens[end - 1].text)):
        end -= 1
    start = end
    while start > 0 and _is_label(tokens[start - 1]):
        start -= 1
    return list(tokens[start:end])


def _is_label(token: ScoredToken) -> bool:
    return not (token.is_location or token.is_given or not token.text or _MARK.fullmatch(token.text))


def _text_score(tokens: Sequence[ScoredToken], decode: Decode) -> TextScore:
    log_probs = [token.log_prob for token in tokens]
    mean = math.exp(sum(log_probs) / len(log_probs))
    return TextScore(mean, math.exp(min(log_probs)), _words(tokens, decode))


def _words(tokens: Sequence[ScoredToken], decode: Decode) -> tuple[WordScore, ...]:
    """Words begin at white space, as the tokens of byte-level BPE do, and end at locations and marks."""
    words: list[list[ScoredToken]] = []
    is_new = True
    for token in tokens:
        is_word = _is_label(token)
        if is_word and (is_new or token.text[0].isspace()):
            words.append([])
        if is_word:
            words[-1].append(token)
        is_new = not is_word
    return tuple(
        WordScore(text, math.exp(sum(token.log_prob for token in word) / len(word)))
        for word in words
        if (text := decode([token.id for token in word]).strip())
    )
