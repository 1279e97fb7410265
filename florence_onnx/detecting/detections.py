"""The result of `Florence2.detect`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from PIL import Image as PILImage

from florence_onnx.answers.results import BoundingBox, BoundingBoxes, to_dict
from florence_onnx.generation.progress import Truncated, first_reason
from florence_onnx.prediction import Prediction

if TYPE_CHECKING:
    import supervision


@dataclass(frozen=True)
class ClassDetections:
    """What was found of one class."""

    name: str
    """The class, as it was asked for."""
    bboxes: tuple[BoundingBox, ...]
    """Boxes in pixels of the image, w and h not negative, best `score` first; their `label` is `name`. Empty where the class
    is absent."""
    presence: float | None
    """The greatest value that a box of the class has by the rule for absent classes, before anything was dropped: the greater,
    the likelier is the class in the image. None where the model answered without any box, the rule is "off", or the call ended
    before it was applied."""
    answers: tuple[Prediction[Any], ...] = field(default=(), repr=False, compare=False)
    """The model's answer; with tiles those about all tiles, in pixels of each tile."""


@dataclass(frozen=True)
class Detections:
    """Boxes by class."""

    classes: tuple[ClassDetections, ...]
    """One for each class, in the order in which they were asked for."""
    source_image: PILImage.Image = field(repr=False, compare=False)
    """The image, RGB."""

    @property
    def truncated(self) -> Truncated:
        """What has cut an answer off: the deadline or the caller, which leave the rule for absent classes out, or the limit."""
        return first_reason(answer.truncated for each in self.classes for answer in each.answers)

    @property
    def by_class(self) -> Mapping[str, tuple[BoundingBox, ...]]:
        """The boxes of each class, also of those that are absent."""
        return {each.name: each.bboxes for each in self.classes}

    def __getitem__(self, name: str) -> tuple[BoundingBox, ...]:
        """The boxes of a class; KeyError for a name that was not asked for."""
        return self.by_class[name]

    @property
    def present(self) -> tuple[str, ...]:
        """Names of the classes that have boxes."""
        return tuple(each.name for each in self.classes if each.bboxes)

    @property
    def bboxes(self) -> tuple[BoundingBox, ...]:
        """All boxes, class by class."""
        return tuple(box for each in self.classes for box in each.bboxes)

    def to_dict(self) -> dict[str, Any]:
        """The detections, ready for JSON: `{"results": {class: [{x, y, w, h, label, score}]}, "presence": {class: value}}`."""
        return {
            "results": {each.name: to_dict(each.bboxes, with_scores=True) for each in self.classes},
            "presence": {each.name: each.presence for each in self.classes},
        }

    def to_supervision(self) -> supervision.Detections:
        """The detections as `supervision.Detections`; needs the extra `supervision`.

        Returns:
            `xyxy` `(n, 4)` float32 in pixels; `class_id` `(n,)`, the place of the class in the list; `confidence` `(n,)`
            float32, the scores; `data["class_name"]`.

        Raises:
            MissingExtraError: supervision is not installed.
        """
        import numpy as np

        from florence_onnx.answers.supervision_detections import to_detections

        names = [each.name for each in self.classes]
        found = to_detections(BoundingBoxes(self.bboxes), self.source_image.size, names)
        found.confidence = np.array([box.score for box in self.bboxes], dtype=np.float32)
        return found

    def draw(self) -> PILImage.Image:
        """The image with all boxes drawn on it."""
        from florence_onnx.answers import draw  # fonts and drawing take time to import

        return draw.draw(self.source_image, BoundingBoxes(self.bboxes))
