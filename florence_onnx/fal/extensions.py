"""Fields of a request that fal's API does not have: `deadline`, `scores`, `min_score`, `classes`, `nms`, `absent` and `tiles`.

A request without them is answered as fal answers it, byte for byte. They are accepted by every server, since none lets a
request cost more than some of the ordinary ones would: the numbers of classes and of tiles are bounded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from florence_onnx.answers.results import BoundingBoxes
from florence_onnx.detecting import absence
from florence_onnx.detecting.detections import Detections
from florence_onnx.errors import InputError, TextInputError
from florence_onnx.fal.problems import field_error
from florence_onnx.generation.options import GenerationOptions, merge
from florence_onnx.generation.progress import Cancel, Deadline
from florence_onnx.inference.ending import Seen
from florence_onnx.model import Florence2
from florence_onnx.prediction import Prediction
from florence_onnx.tasks import OCR, Task
from florence_onnx.tiling.tiles import Tiles

MAX_SECONDS = 3600.0
"""Longest `deadline`."""
MAX_CLASSES = 32
"""Most `classes` of a request."""
MAX_TILES = 64
"""Most tiles of an image."""
MAX_PROMPTS = 256
"""Most questions of a request: classes times tiles."""
RULES = tuple(rule for rule in absence.RULES if rule != "likelihood")
"""Rules for absent classes that a request may name. "likelihood" asks a further question for every box, however many there are."""
Errors = list[dict[str, Any]]
CheckBytes = Callable[[int], None]


@dataclass(frozen=True)
class Extensions:
    """The validated fields of a request."""

    deadline: Deadline | None = None
    """Counts from when the request was accepted."""
    scores: bool = False
    min_score: float | None = None
    classes: tuple[str, ...] = ()
    """What to look for, instead of a text."""
    nms: float | None = 0.5
    absent: absence.Absent = absence.DEFAULT_RULE
    tiles: Tiles | None = None

    @property
    def is_alone(self) -> bool:
        """Whether the request is a batch of its own, of classes or tiles."""
        return bool(self.classes) or self.tiles is not None

    @property
    def has_ended(self) -> bool:
        """Whether there is no time left."""
        return self.deadline is not None and self.deadline.seconds_left <= 0

    def tile_bytes(self, image_bytes: int) -> int:
        """Most bytes of all tiles of an image: neighbours share pixels."""
        return 0 if self.tiles is None else math.ceil(image_bytes / (1 - self.tiles.overlap) ** 2)

    @property
    def num_bytes(self) -> int:
        """Bytes of its texts."""
        return sum(len(name.encode()) for name in self.classes)

    def add_options(self, options: GenerationOptions) -> GenerationOptions:
        """Generation options with those that the fields need."""
        is_scored = self.scores or self.min_score is not None
        return merge(options, GenerationOptions(scores=True)) if is_scored else options


NOTHING = Extensions()


def ask(
    model: Florence2,
    task: Task[Any],
    image: Seen,
    given: Extensions,
    text_input: str | None,
    options: GenerationOptions,
    cancel: Cancel,
) -> Prediction[Any]:
    """Answers a request that is a batch of its own; errors as for `Florence2.run` and `detect`."""
    if given.classes:
        found = model.detect(
            image,
            given.classes,
            task=task,
            min_score=given.min_score or 0.0,
            nms=given.nms,
            absent=given.absent,
            tiles=given.tiles,
            options=options,
            deadline=given.deadline,
            cancel=cancel,
        )
        return ClassPrediction.of(found, task)
    return model.run(
        task, image, text_input=text_input, tiles=given.tiles, options=options, deadline=given.deadline, cancel=cancel
    )


@dataclass(frozen=True)
class ClassPrediction(Prediction[BoundingBoxes]):
    """Boxes of a list of classes, as the answer of the task that was asked for each."""

    presence: tuple[tuple[str, float | None], ...] = ()
    """Each class with `ClassDetections.presence`."""

    @classmethod
    def of(cls, found: Detections, task: Task[Any]) -> ClassPrediction:
        """Makes one of detections."""
        answers = [answer for each in found.classes for answer in each.answers]
        return cls(
            BoundingBoxes(found.bboxes),
            task,
            "\n".join(answer.text for answer in answers),
            tuple(token for answer in answers for token in answer.token_ids),
            found.truncated,
            found.source_image,
            token_logprobs=tuple(value for answer in answers for value in answer.token_logprobs or ()),
            presence=tuple((each.name, each.presence) for each in found.classes),
        )


# ------------------------------------------------------------------------------------------------------------- reading


def read(task: Task[Any], given: Mapping[str, Any], errors: Errors, check_text_bytes: CheckBytes | None) -> Extensions:
    """Validates the fields of a request.

    Args:
        task: The task of the endpoint.
        given: All fields of the request.
        errors: Gets an entry for each invalid one.
        check_text_bytes: Raises TextInputError if no prompt can hold a text of that many UTF-8 bytes.
    """
    seconds = _number(given, "deadline", errors, MAX_SECONDS)
    found = Extensions(
        deadline=None if seconds is None else Deadline(seconds),
        scores=_flag(given, "scores", errors),
        min_score=_number(given, "min_score", errors),
        classes=_classes(task, given, errors, check_text_bytes),
        tiles=_tiles(task, given, errors),
    )
    if found.min_score is not None and not task.has_image:
        errors.append(field_error(["min_score"], "Only boxes, quads and outlines have scores to cut by", "value_error"))
    if given.get("nms") is not None:
        found = replace(found, nms=_number(given, "nms", errors))
    if given.get("absent") is not None:
        found = replace(found, absent=_absent(given, errors))
    return found


def check_num_tiles(given: Extensions, size: tuple[int, int]) -> str | None:
    """What is wrong with the number of tiles of an image of `(width, height)` pixels, None for nothing."""
    tiles = given.tiles
    if tiles is None or tiles.fits(size):
        return None
    try:
        number = len(tiles.boxes(size)) + tiles.whole
    except InputError as error:
        return str(error)
    most = min(MAX_TILES, MAX_PROMPTS // max(1, len(given.classes)))
    if number <= most:
        return None
    what = f"An image of {size[0]} x {size[1]} pixels has {number} such tiles"
    with_classes = f" with {len(given.classes)} classes" if given.classes else ""
    return f"{what}; at most {most} are allowed{with_classes}: make them larger"


def _number(given: Mapping[str, Any], name: str, errors: Errors, most: float = 1.0) -> float | None:
    value = given.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        errors.append(field_error([name], "Input should be a valid number", "float_type"))
    elif not 0 <= value <= most:  # which NaN is not
        errors.append(field_error([name], f"Input should be from 0 to {most:g}", "value_error"))
    else:
        return float(value)
    return None


def _flag(given: Mapping[str, Any], name: str, errors: Errors) -> bool:
    value = given.get(name)
    if isinstance(value, bool) or value is None:
        return bool(value)
    errors.append(field_error([name], "Input should be a valid boolean", "bool_type"))
    return False


def _absent(given: Mapping[str, Any], errors: Errors) -> absence.Absent:
    value = given["absent"]
    for rule in RULES:
        if rule == value:
            return rule
    errors.append(field_error(["absent"], f"Input should be one of {', '.join(RULES)}", "literal_error"))
    return absence.DEFAULT_RULE


def _classes(
    task: Task[Any], given: Mapping[str, Any], errors: Errors, check_bytes: CheckBytes | None
) -> tuple[str, ...]:
    classes = given.get("classes")
    if classes is None:
        return ()
    problem = _problem_of_classes(task, classes, check_bytes)
    if problem is not None:
        errors.append(field_error(["classes"], problem, "value_error"))
        return ()
    return tuple(classes)


def _problem_of_classes(task: Task[Any], classes: object, check_bytes: CheckBytes | None) -> str | None:
    from florence_onnx.detecting.asking import check_task, class_names

    if not isinstance(classes, list) or not 1 <= len(classes) <= MAX_CLASSES:
        return f"Input should be a list of 1 to {MAX_CLASSES} names"
    if not all(isinstance(each, str) for each in classes):
        return "Every name should be a valid string that is not too long"
    try:
        check_task(task)
        class_names(classes)
        for each in classes:
            if check_bytes is not None:
                check_bytes(len(each.encode("utf-8", "surrogatepass")))
            task.format_prompt(each)
    except (InputError, TextInputError) as error:
        return str(error)
    return None


def _tiles(task: Task[Any], given: Mapping[str, Any], errors: Errors) -> Tiles | None:
    value = given.get("tiles")
    if value is None:
        return None
    try:
        if not isinstance(value, Mapping) or not value.keys() <= {"size", "overlap", "whole"}:
            raise InputError("Input should be an object with size, and overlap and whole if they are not the default")
        if not isinstance(value.get("whole", True), bool):
            raise InputError("whole should be a valid boolean")
        if not task.has_image and task != OCR:
            raise InputError(
                f"{task.slug} answers with a text about the whole image, which cannot be put together from tiles"
            )
        if task.takes_region:
            raise InputError(f"{task.slug} is about a region: send the part of the image instead")
        return Tiles(**value)
    except (InputError, TypeError) as error:
        errors.append(field_error(["tiles"], str(error), "value_error"))
        return None
