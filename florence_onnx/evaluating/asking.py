"""Asks a model about the images of a ground truth."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from florence_onnx.answers.results import BoundingBox, BoundingBoxes
from florence_onnx.detecting.detections import Detections
from florence_onnx.errors import FlorenceError, ImageError, InputError
from florence_onnx.evaluating.coco import Found, GroundTruth, box_of
from florence_onnx.generation.options import GenerationOptions, merge
from florence_onnx.prediction import Prediction
from florence_onnx.tasks import Task

SCORED = GenerationOptions(scores=True, num_return_sequences=1)
BATCH_SIZE = 8
"""Images that are read at once; the model divides them further."""


class Model(Protocol):
    """What is needed of `Florence2`."""

    @property
    def run_each(self) -> Callable[..., Iterator[Prediction[Any] | FlorenceError]]: ...

    @property
    def detect(self) -> Callable[..., Detections]: ...


@dataclass(frozen=True)
class Asked:
    """What a model found in an image."""

    image_id: int
    found: tuple[Found, ...] = ()
    others: tuple[str, ...] = ()
    """Labels of boxes that are no category of the ground truth; such boxes do not count."""
    error: str | None = None
    """Why there is no answer."""


def check(task: Task[Any], *, each_class: bool) -> None:
    """Raises InputError for a task that cannot be asked so."""
    if not isinstance(_empty(task), BoundingBoxes) or task.takes_region or (task.takes_text and not each_class):
        raise InputError(
            f"{task.slug} cannot be evaluated: choose a task that answers with boxes, such as object-detection; one that "
            "takes text, such as open-vocabulary-detection, with each class as its text (--each-class)"
        )
    if each_class and not task.takes_text:
        raise InputError(f"{task.slug} takes no text, so that it cannot be asked for each class by itself")


def _empty(task: Task[Any]) -> object:
    return task.parser("", (1, 1))


def ask(
    model: Model,
    truth: GroundTruth,
    folder: Path,
    image_ids: Sequence[int],
    task: Task[Any],
    *,
    each_class: bool = False,
    options: GenerationOptions | None = None,
) -> Iterator[Asked]:
    """Asks for the boxes of images, one after another.

    Args:
        model: Whom to ask.
        truth: Has the images' file names, and the categories.
        folder: Where the files are.
        image_ids: Of the images, in the order of the answers.
        task: See `check`.
        each_class: Whether `Florence2.detect` is asked for the categories by name, so that absent ones are recognised; else
            the labels of the answers are taken for names of categories.
        options: Generation options.

    Raises:
        InputError: As `check`, or the options are wrong.
        ProviderError: The device failed.
    """
    check(task, each_class=each_class)
    scored = SCORED if options is None else merge(options, SCORED)
    paths = [folder / str(truth.images[each]["file_name"]) for each in image_ids]
    if each_class:
        for image_id, path in zip(image_ids, paths, strict=True):
            try:
                detections = model.detect(path, list(truth.names.values()), task=task, options=scored)
                yield _read(truth, image_id, detections.bboxes)
            except ImageError as error:
                yield Asked(image_id, error=str(error))
        return
    for image_id, answer in zip(
        image_ids, model.run_each(task, paths, options=scored, batch_size=BATCH_SIZE, on_error="return"), strict=True
    ):
        if isinstance(answer, FlorenceError):
            yield Asked(image_id, error=str(answer))
        else:
            yield _read(truth, image_id, answer.results.bboxes)


def _read(truth: GroundTruth, image_id: int, boxes: Sequence[BoundingBox]) -> Asked:
    found, others = [], []
    for box in boxes:
        category_id = truth.category_id(box.label)
        if category_id is None:
            others.append(box.label)
        else:
            found.append(Found(image_id, category_id, box_of(box), box.score or 0.0))
    return Asked(image_id, tuple(found), tuple(others))
