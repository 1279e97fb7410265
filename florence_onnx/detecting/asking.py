"""A list of classes: the questions, and what is kept of the answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from PIL import Image as PILImage

from florence_onnx.answers.results import BoundingBox, BoundingBoxes
from florence_onnx.detecting import absence
from florence_onnx.detecting.absence import Absent, Answer
from florence_onnx.detecting.detections import ClassDetections, Detections
from florence_onnx.errors import InputError, TextInputError
from florence_onnx.generation.options import GenerationOptions, merge
from florence_onnx.generation.progress import first_reason
from florence_onnx.images.decoding import ImageInput
from florence_onnx.inference.ending import Seen, is_hopeless
from florence_onnx.limits import Limits
from florence_onnx.prediction import EncodedImage, Prediction
from florence_onnx.tasks import Task
from florence_onnx.tiling import merging
from florence_onnx.tiling.asking import SCORED, source_of
from florence_onnx.tiling.pieces import Piece, pieces_of
from florence_onnx.tiling.tiles import TileBox, Tiles


class Model(absence.Model, Protocol):
    """What is needed of `Florence2`."""

    @property
    def run_batch(self) -> Callable[..., Sequence[Prediction[Any]]]: ...


@dataclass(frozen=True)
class Selection:
    """Which boxes are kept; as the arguments of `Florence2.detect`.

    Raises:
        InputError: A value is out of range.
    """

    min_score: float = 0.0
    nms: float | None = 0.5
    absent: Absent = absence.DEFAULT_RULE
    threshold: float | None = None

    def __post_init__(self) -> None:
        _check_share("min_score", self.min_score)
        if self.nms is not None:
            _check_share("nms", self.nms)
        if self.absent not in absence.RULES:
            raise InputError(f"absent must be one of {', '.join(absence.RULES)}, got {self.absent!r}")
        if self.threshold is not None and not _is_number(self.threshold):
            raise InputError(f"threshold must be a number or None, got {self.threshold!r}")

    @property
    def least(self) -> float:
        """Least value of a box by the rule."""
        return absence.THRESHOLDS.get(self.absent, 0.0) if self.threshold is None else self.threshold


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value


def _check_share(name: str, value: object) -> None:
    if not _is_number(value) or not 0 <= value <= 1:  # type: ignore[operator]
        raise InputError(f"{name} must be a number from 0 to 1, got {value!r}")


def detect(
    model: Model,
    image: ImageInput | EncodedImage,
    classes: Sequence[str],
    task: Task[Any],
    selection: Selection,
    tiles: Tiles | None = None,
    options: GenerationOptions | None = None,
    limits: Limits | None = None,
) -> Detections:
    """Finds the objects of a list of classes; arguments and errors as for `Florence2.detect`."""
    names = class_names(classes)
    check_task(task)
    limits = limits or Limits()
    source = source_of(image)
    boxes, images = _views(image, source, tiles)
    if selection.absent == "likelihood" and not is_hopeless([limits.first_progress()]):
        # this rule asks about them again
        images = [each if isinstance(each, EncodedImage) else model.encode(each) for each in images]
    scored = SCORED if options is None else merge(options, SCORED)
    asked = [each for each in images for _ in names]
    predictions = model.run_batch(
        task, asked, text_inputs=names * len(images), options=scored, **limits.shared_arguments
    )
    answers = [
        Answer(name, each, prediction, _bboxes(prediction.results, name))
        for name, each, prediction in zip(names * len(images), asked, predictions, strict=True)
    ]
    is_ended = isinstance(
        first_reason(each.truncated for each in predictions), str
    )  # then there is no time for the rule's own questions
    rule = "off" if is_ended else selection.absent
    values = absence.values(model, rule, answers)
    found = []
    for index, name in enumerate(names):
        own = range(index, len(answers), len(names))
        kept = [_keep(answers[each], values[each], selection) for each in own]
        bboxes = _merge(kept, boxes, source.size, tiles, selection)
        best = [value for each in own for value in values[each]]
        presence = max(best) if best and rule != "off" else None
        found.append(ClassDetections(name, bboxes, presence, tuple(answers[each].prediction for each in own)))
    return Detections(tuple(found), source)


def class_names(classes: Sequence[str]) -> list[str]:
    """The names of classes without white space around them, each once.

    Raises:
        InputError: There is none, or `classes` is no list.
        TextInputError: A name is blank or no string.
    """
    if isinstance(classes, str) or not isinstance(classes, Sequence):
        raise InputError(f'classes must be a list of names, such as ["car", "a red kite"], got {classes!r}')
    if not classes:
        raise InputError("classes must have at least one name")
    for index, name in enumerate(classes):
        if not isinstance(name, str) or not name.strip():
            raise TextInputError(f"class {index + 1} of {len(classes)} must be a text that is not blank, got {name!r}")
    return list(dict.fromkeys(name.strip() for name in classes))


def check_task(task: Task[Any]) -> None:
    """Raises InputError for a task that cannot find a class."""
    if task.needs != "text" or not isinstance(task.parser("", (1, 1)), BoundingBoxes):
        raise InputError(
            f"{task.slug} cannot find a class: detect needs a task that takes text and answers with boxes, such as "
            "open-vocabulary-detection or caption-to-phrase-grounding"
        )


def _views(
    image: ImageInput | EncodedImage, source: PILImage.Image, tiles: Tiles | None
) -> tuple[list[TileBox], list[Seen]]:
    """What is shown to the model: the image, or its tiles."""
    full: TileBox = (0, 0, *source.size)
    whole = image if isinstance(image, EncodedImage) else source
    if tiles is not None and not isinstance(tiles, Tiles):
        raise InputError(f"tiles must be a florence_onnx.Tiles, such as Tiles(size=768), got {tiles!r}")
    if tiles is None or tiles.fits(source.size):
        return [full], [whole]
    boxes = tiles.boxes(source.size)
    images: list[Seen] = [source.crop(box) for box in boxes]
    return ([*boxes, full], [*images, whole]) if tiles.whole else (boxes, images)


def _bboxes(results: BoundingBoxes, name: str) -> tuple[BoundingBox, ...]:
    """The boxes of an answer, and those around its outlines, with w and h not negative."""
    found = []
    items: list[Any] = [*results.bboxes, *(polygon for polygon in results.polygons if polygon.points)]
    for item in items:
        xs, ys = _spans(item)
        found.append(
            BoundingBox(
                xs[0], ys[0], xs[1] - xs[0], ys[1] - ys[0], name, score=item.score, score_parts=item.score_parts
            )
        )
    return tuple(found)


def _spans(item: Any) -> tuple[tuple[float, float], tuple[float, float]]:
    if isinstance(item, BoundingBox):
        xs, ys = [item.x, item.x + item.w], [item.y, item.y + item.h]
    else:
        xs, ys = [point.x for point in item.points], [point.y for point in item.points]
    return (min(xs), max(xs)), (min(ys), max(ys))


def _keep(answer: Answer, values: Sequence[float], selection: Selection) -> BoundingBoxes:
    pairs = zip(answer.bboxes, values, strict=True)
    return BoundingBoxes(
        tuple(
            box
            for box, value in pairs
            if value >= selection.least and (box.score is None or box.score >= selection.min_score)
        )
    )


def _merge(
    kept: Sequence[BoundingBoxes],
    boxes: Sequence[TileBox],
    size: tuple[int, int],
    tiles: Tiles | None,
    selection: Selection,
) -> tuple[BoundingBox, ...]:
    """One class's boxes of all tiles, in pixels of the image, best first."""
    if len(boxes) == 1:
        pieces = pieces_of(kept[0], boxes[0], size)
    else:
        assert tiles is not None
        shown = zip(kept, boxes, strict=True)
        full = (0, 0, *size)
        pieces = merging.merge(
            [piece for each, box in shown for piece in pieces_of(each, box, size, is_whole=box == full)], tiles, size
        )
    return tuple(piece.items[0] for piece in _suppressed(pieces, selection.nms))


def _suppressed(pieces: Sequence[Piece], nms: float | None) -> list[Piece]:
    if nms is None:
        return sorted(pieces, key=lambda piece: -piece.score)
    return merging.suppress(pieces, nms)
