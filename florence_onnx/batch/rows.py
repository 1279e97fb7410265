"""A row of the output: one task about one image."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from florence_onnx.answers.results import BoundingBoxes, OCRBoundingBox, PolygonOutput, to_dict
from florence_onnx.errors import FlorenceError, InputError
from florence_onnx.prediction import Prediction
from florence_onnx.tasks import Task

Key = tuple[str, str]
"""Id and task, of which each pair is there once."""


@dataclass(frozen=True)
class Row:
    """An answer or an error, ready for JSON."""

    id: str
    source: str
    task: str
    """The task's slug."""
    prompt: str | None
    """Text or location tokens that the task was given."""
    width: int | None
    """Of the image in pixels, after its EXIF orientation; None where it could not be read."""
    height: int | None
    answer: Any
    """The results as JSON: a string, or an object with `bboxes`, `quad_boxes` or `polygons`; None for an error."""
    text: str | None
    """The answer as one text: the text itself, the lines of OCR, or the labels with commas between them."""
    score: float | None
    """Where scores are asked for: of a text the mean probability of its tokens, else the mean score of what was found."""
    truncated: bool | str
    """Whether the token limit, or the deadline, has cut the answer off."""
    error: str | None
    error_type: str | None
    """Name of the error's class."""
    milliseconds: float
    """Share of the time in which its batch was answered, without reading the image."""
    model: str

    @property
    def key(self) -> Key:
        """See `Key`."""
        return self.id, self.task

    def to_json(self) -> str:
        """One line, without its newline."""
        return json.dumps(asdict(self), ensure_ascii=False)


NAMES = tuple(field.name for field in fields(Row))


def from_dict(content: Mapping[str, Any]) -> Row:
    """Reads a row from JSON or a table.

    Raises:
        InputError: It is something else.
    """
    if not isinstance(content, Mapping) or not isinstance(content.get("id"), str):
        raise InputError(f"a row must have {', '.join(NAMES)}, got {str(content)[:80]}")
    try:
        return Row(**{name: content[name] for name in NAMES})
    except KeyError as error:
        raise InputError(
            f"row {content['id']!r} is incomplete ({error}); its keys must be {', '.join(NAMES)}"
        ) from error


def of_prediction(
    item_id: str, source: str, prompt: str | None, prediction: Prediction[Any], milliseconds: float, model: str
) -> Row:
    """The row of an answer."""
    with_scores = prediction.token_logprobs is not None
    width, height = prediction.source_image.size
    return Row(
        id=item_id,
        source=source,
        task=prediction.task.slug,
        prompt=prompt,
        width=width,
        height=height,
        answer=to_dict(prediction.results, with_scores=with_scores),
        text=text_of(prediction.results),
        score=_score(prediction) if with_scores else None,
        truncated=prediction.truncated,
        error=None,
        error_type=None,
        milliseconds=round(milliseconds, 3),
        model=model,
    )


def of_error(item_id: str, source: str, task: Task[Any], prompt: str | None, error: FlorenceError, model: str) -> Row:
    """The row of an error."""
    return Row(
        id=item_id,
        source=source,
        task=task.slug,
        prompt=prompt,
        width=None,
        height=None,
        answer=None,
        text=None,
        score=None,
        truncated=False,
        error=str(error),
        error_type=type(error).__name__,
        milliseconds=0.0,
        model=model,
    )


def text_of(results: Any) -> str:
    """Results as one text."""
    if isinstance(results, str):
        return results
    if isinstance(results, OCRBoundingBox):
        return "\n".join(quad.label for quad in results.quad_boxes)
    return ", ".join(item.label for item in _items(results) if item.label)


def _items(results: Any) -> list[Any]:
    if isinstance(results, BoundingBoxes):
        return [*results.bboxes, *results.polygons]
    if isinstance(results, PolygonOutput):
        return list(results.polygons)
    return list(results.quad_boxes) if isinstance(results, OCRBoundingBox) else []


def _score(prediction: Prediction[Any]) -> float | None:
    if isinstance(prediction.results, str):
        return None if prediction.text_score is None else prediction.text_score.mean
    scores = [item.score for item in _items(prediction.results) if item.score is not None]
    return sum(scores) / len(scores) if scores else None
