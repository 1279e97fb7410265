"""From what a model found to figures, and to a calibration."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from florence_onnx.answers.calibration import Calibration
from florence_onnx.evaluating import calibrating
from florence_onnx.evaluating.asking import Asked
from florence_onnx.evaluating.calibrating import Reliability, measure_reliability
from florence_onnx.evaluating.coco import Figures, GroundTruth


@dataclass(frozen=True)
class Fitted:
    """A calibration, and how reliable scores are without and with it on images that it was not fitted on."""

    calibration: Calibration
    before: Reliability
    after: Reliability


@dataclass(frozen=True)
class Evaluation:
    """What `florence-onnx evaluate` finds out."""

    figures: Figures
    by_class: dict[str, Figures]
    num_images: int
    """That were answered."""
    errors: dict[str, str]
    """File names of the images without an answer, and why there is none; they do not count."""
    other_labels: dict[str, int]
    """Labels that are no category, and their boxes, most frequent first; such boxes do not count."""
    reliability: Reliability
    fitted: Fitted | None = None

    def to_dict(self) -> dict[str, Any]:
        """The evaluation, ready for JSON."""
        return asdict(self)


def evaluate(
    truth: GroundTruth, asked: Iterable[Asked], task: str, model: str | None = None, *, calibrate: bool = False
) -> Evaluation:
    """Measures answers.

    Args:
        truth: What is in the images.
        asked: The answers.
        task: Slug of the task that was asked.
        model: Digest of the model.
        calibrate: Whether to fit a calibration: on every second image, and to judge it on the others.

    Raises:
        InputError: There are too few boxes for a calibration.
    """
    asked = list(asked)
    answered = [each for each in asked if each.error is None]
    found = [box for each in answered for box in each.found]
    figures, matched = truth.evaluate(found, [each.image_id for each in answered])
    whole = figures.pop(None)
    others = Counter(label for each in answered for label in each.others)
    fitted = None
    if calibrate:
        chosen = {each.image_id for each in answered[::2]}
        parts: list[list[Any]] = [[], []]
        for each in matched:
            parts[each.image_id not in chosen].append(each)
        fitted = _fit(parts[0], parts[1], task, model, len(chosen))
    return Evaluation(
        whole,
        {str(name): each for name, each in figures.items()},
        len(answered),
        {str(truth.images[each.image_id]["file_name"]): each.error for each in asked if each.error is not None},
        dict(others.most_common()),
        measure_reliability([each.score for each in matched], [each.is_right for each in matched]),
        fitted,
    )


def _fit(fitting: Sequence[Any], judging: Sequence[Any], task: str, model: str | None, num_images: int) -> Fitted:
    a, b, c = calibrating.fit([each.score for each in fitting], [each.is_right for each in fitting])
    calibration = Calibration(task, a, b, c, len(fitting), num_images, model)
    right = [each.is_right for each in judging]
    return Fitted(
        calibration,
        measure_reliability([each.score for each in judging], right),
        measure_reliability([calibration.apply(each.score) for each in judging], right),
    )
