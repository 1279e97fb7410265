"""Rules by which a box of a class that is not in the image is recognised.

Each gives a box a value, the greater the likelier is the class really there; `THRESHOLDS` has the values below which boxes
are dropped. These were fitted on drawn scenes (`benchmarks/results/answers.md` has the measurement and its command): for
images and a model of your own, measure `ClassDetections.presence` on images whose contents you know and call `fit_threshold`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

import numpy as np
from PIL import Image as PILImage

from florence_onnx import tasks
from florence_onnx.answers.locations import Region
from florence_onnx.answers.results import BoundingBox
from florence_onnx.errors import InputError
from florence_onnx.images.decoding import ImageInput
from florence_onnx.inference.ending import Seen
from florence_onnx.prediction import EncodedImage, Prediction

Absent = Literal["score", "area", "contrast", "likelihood", "off"]
RULES: tuple[Absent, ...] = get_args(Absent)
DEFAULT_RULE: Absent = "contrast"
"""The one with the best F1 at its threshold here, in `benchmarks/results/answers.md`; by AUROC three rules are close."""
THRESHOLDS: dict[str, float] = {"score": 0.057, "area": 0.18, "contrast": 1.9, "likelihood": 1e-4}
"""Least values of boxes that are kept, by rule. That of "area" is not fitted: others drop boxes of more than 82 % of the image."""
BLANK = (124, 116, 104)
"""Colour of the blank image: near the mean that preprocessing subtracts."""


class Model(Protocol):
    """What is needed of `Florence2`."""

    def encode(self, image: ImageInput) -> EncodedImage: ...

    @property
    def score_answers(self) -> Callable[..., list[Prediction[Any]]]: ...


@dataclass(frozen=True)
class Answer:
    """The answer to one prompt: a class, asked about an image or a tile of it."""

    name: str
    """The class."""
    image: Seen
    prediction: Prediction[Any]
    bboxes: tuple[BoundingBox, ...]
    """Its boxes with w and h not negative, in pixels of `image`."""


Values = list[list[float]]
"""For each answer the value of each of its boxes."""


def values(model: Model, rule: Absent, answers: Sequence[Answer]) -> Values:
    """The value of each box by a rule.

    Args:
        model: Whose answers these are.
        rule: "off" gives each box infinity.
        answers: With scores.
    """
    return _RULES[rule](model, answers)


def _off(model: Model, answers: Sequence[Answer]) -> Values:
    return [[math.inf] * len(answer.bboxes) for answer in answers]


def _score(model: Model, answers: Sequence[Answer]) -> Values:
    """The score without calibration: 0 to 1."""
    return [[box.score_parts.score if box.score_parts else 0.0 for box in answer.bboxes] for answer in answers]


def _area(model: Model, answers: Sequence[Answer]) -> Values:
    """The share of the image outside the box: 0 for one of the whole image."""
    return [[1 - box.w * box.h / math.prod(answer.image.size) for box in answer.bboxes] for answer in answers]


def _contrast(model: Model, answers: Sequence[Answer]) -> Values:
    """log P(box | image) - log P(box | blank image), over the location tokens; above 0 where the image speaks for the box."""
    asked = [answer for answer in answers if answer.bboxes]
    blank = model.encode(PILImage.new("RGB", (64, 64), BLANK)) if asked else None
    # a blank image of the tile's own size is not needed: locations are shares of width and height
    found = iter(
        model.score_answers(
            asked[0].prediction.task,
            [blank] * len(asked),
            [answer.prediction.token_ids for answer in asked],
            text_inputs=[answer.name for answer in asked],
        )
        if asked
        else []
    )
    return [_contrasts(answer, next(found)) if answer.bboxes else [] for answer in answers]


def _contrasts(answer: Answer, blank: Prediction[Any]) -> list[float]:
    with_image = [_log_prob(box) for box in (*answer.prediction.results.bboxes, *answer.prediction.results.polygons)]
    without = [_log_prob(box) for box in (*blank.results.bboxes, *blank.results.polygons)]
    return [own - other for own, other in zip(with_image, without, strict=True)][: len(answer.bboxes)]


def _log_prob(item: Any) -> float:
    return sum(item.score_parts.coordinates) if item.score_parts else 0.0


def _likelihood(model: Model, answers: Sequence[Answer]) -> Values:
    """Probability of the class as the answer of `<REGION_TO_CATEGORY>` for the box: geometric mean over its tokens, 0 to 1."""
    boxes = [(answer, box) for answer in answers for box in answer.bboxes]
    if not boxes:
        return [[] for _ in answers]
    found = model.score_answers(
        tasks.REGION_TO_CATEGORY,
        [answer.image for answer, _ in boxes],
        [answer.name for answer, _ in boxes],
        regions=[_region(box, answer.image.size) for answer, box in boxes],
    )
    probabilities = iter([prediction.text_score.mean if prediction.text_score else 0.0 for prediction in found])
    return [[next(probabilities) for _ in answer.bboxes] for answer in answers]


def _region(box: BoundingBox, size: tuple[int, int]) -> Region:
    width, height = size
    xs = [min(max(value, 0.0), width) for value in (box.x, box.x + box.w)]
    ys = [min(max(value, 0.0), height) for value in (box.y, box.y + box.h)]
    return Region.from_pixels(xs[0], ys[0], xs[1], ys[1], size)


_RULES: dict[str, Callable[[Model, Sequence[Answer]], Values]] = {
    "score": _score,
    "area": _area,
    "contrast": _contrast,
    "likelihood": _likelihood,
    "off": _off,
}


def fit_threshold(present: Sequence[float | None], absent: Sequence[float | None]) -> float:
    """The threshold with the best F1 for telling present classes from absent ones.

    Args:
        present: `ClassDetections.presence` of classes that are in their images; None, no box, counts as a miss.
        absent: Those of classes that are not; None counts as recognised.

    Returns:
        The middle between the least value that it keeps and the next lower one.

    Raises:
        InputError: No class that is present has a value.
    """
    yes = np.array([value for value in present if value is not None], dtype=np.float64)
    no = np.array([value for value in absent if value is not None], dtype=np.float64)
    if not len(yes):
        raise InputError('no present class has a value: detect some with another rule than "off"')
    candidates = np.unique(yes)
    kept, wrong = (np.array([(side >= each).sum() for each in candidates]) for side in (yes, no))
    best = candidates[int((2 * kept / (kept + wrong + len(present))).argmax())]
    lower = [value for value in (*yes, *no) if value < best]
    return float((best + max(lower)) / 2) if lower else float(best)
