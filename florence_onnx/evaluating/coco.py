"""COCO's files and figures, by pycocotools."""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from florence_onnx.answers.plain import normalized
from florence_onnx.answers.results import BoundingBox
from florence_onnx.errors import InputError, MissingExtraError

if TYPE_CHECKING:
    from pycocotools.coco import COCO

_IOU_50, _IOU_75 = 0, 5
"""Places of the thresholds 0.5 and 0.75 among COCO's ten."""


@dataclass(frozen=True)
class Found:
    """A box that was found in an image."""

    image_id: int
    category_id: int
    bbox: tuple[float, float, float, float]
    """`(x, y, w, h)` in pixels."""
    score: float


@dataclass(frozen=True)
class Figures:
    """COCO's figures of all classes or of one; None where there is no such object."""

    ap: float | None
    """Average precision, the mean over intersections over union of 0.5, 0.55, … 0.95."""
    ap50: float | None
    ap75: float | None
    ar: float | None
    """Average recall with at most 100 boxes an image."""
    num_objects: int


@dataclass(frozen=True)
class Matched:
    """A box, and whether it is right: of its class, with an intersection over union of at least 0.5, none better there."""

    image_id: int
    score: float
    is_right: bool


class GroundTruth:
    """Images whose objects are known."""

    def __init__(self, coco: COCO) -> None:
        self._coco = coco
        self.images: dict[int, Mapping[str, Any]] = {each: coco.imgs[each] for each in sorted(coco.imgs)}
        self.names: dict[int, str] = {each: coco.cats[each]["name"] for each in sorted(coco.cats)}
        self._ids = {normalized(name): each for each, name in self.names.items()}

    def category_id(self, label: str) -> int | None:
        """The category of a label, by its name without regard to case and white space; None for other labels."""
        return self._ids.get(normalized(label))

    def evaluate(
        self, found: Sequence[Found], image_ids: Iterable[int]
    ) -> tuple[dict[str | None, Figures], list[Matched]]:
        """COCO's figures of all classes (None) and of each by name, and for each box whether it is right.

        Args:
            found: Boxes.
            image_ids: Images that count.
        """
        from pycocotools.cocoeval import COCOeval

        with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does
            results = [{**vars(each), "bbox": list(each.bbox)} for each in found]
            judged = COCOeval(self._coco, self._coco.loadRes(results) if results else _nothing(), "bbox")
            judged.params.imgIds = sorted(image_ids)
            judged.evaluate()
            judged.accumulate()
        precision, recall = judged.eval["precision"][..., 0, -1], judged.eval["recall"][..., 0, -1]
        chosen = set(judged.params.imgIds)
        counts = dict.fromkeys(self.names, 0)
        for annotation in self._coco.anns.values():
            if annotation["image_id"] in chosen and not annotation.get("iscrowd"):
                counts[annotation["category_id"]] += 1
        figures: dict[str | None, Figures] = {None: _figures(precision, recall, sum(counts.values()))}
        for place, category_id in enumerate(judged.params.catIds):
            one = precision[:, :, place : place + 1], recall[:, place : place + 1]
            figures[self.names[category_id]] = _figures(*one, counts[category_id])
        return figures, _matched(judged)


def read_ground_truth(path: str | os.PathLike[str]) -> GroundTruth:
    """Reads COCO's ground truth for boxes.

    Raises:
        InputError: The file cannot be read, or is of another form.
        MissingExtraError: pycocotools is not installed.
    """
    try:
        from pycocotools.coco import COCO
    except ImportError as error:
        raise MissingExtraError("pycocotools", "evaluate") from error
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read as JSON: {error}") from error
    _check(path, content)
    coco = COCO()
    coco.dataset = content
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return GroundTruth(coco)


def _check(path: object, content: Any) -> None:
    wanted = {
        "images": ("id", "file_name"),
        "categories": ("id", "name"),
        "annotations": ("image_id", "category_id", "bbox"),
    }
    if not isinstance(content, dict) or not all(isinstance(content.get(name), list) for name in wanted):
        raise InputError(f"{path} must be COCO's ground truth, an object with the lists {', '.join(wanted)}")
    for name, keys in wanted.items():
        for place, entry in enumerate(content[name]):
            if not isinstance(entry, dict) or any(key not in entry for key in keys):
                raise InputError(f"{path}: {name}[{place}] must have {', '.join(keys)}")
    images, categories = ({each["id"] for each in content[name]} for name in ("images", "categories"))
    for place, entry in enumerate(content["annotations"]):
        box = entry["bbox"]
        if entry["image_id"] not in images or entry["category_id"] not in categories:
            raise InputError(f"{path}: annotations[{place}] is about an image or a category that is not listed")
        if not isinstance(box, list) or len(box) != 4 or not all(isinstance(each, int | float) for each in box):
            raise InputError(f"{path}: annotations[{place}] must have a bbox of four numbers [x, y, w, h]")
        # what some tools leave out, and pycocotools needs
        entry.setdefault("id", place + 1)
        entry.setdefault("area", box[2] * box[3])
        entry.setdefault("iscrowd", 0)
    if not images or not categories:
        raise InputError(f"{path} has no images or no categories")


def box_of(box: BoundingBox) -> tuple[float, float, float, float]:
    """A box as COCO has it, with w and h not negative."""
    return min(box.x, box.x + box.w), min(box.y, box.y + box.h), abs(box.w), abs(box.h)


def _nothing() -> COCO:
    from pycocotools.coco import COCO

    empty = COCO()
    empty.dataset = {"images": [], "categories": [], "annotations": []}
    empty.createIndex()
    return empty


def _figures(precision: Any, recall: Any, count: int) -> Figures:
    """Means of COCO's tables `(thresholds, recalls, classes)` and `(thresholds, classes)`, in which -1 stands for nothing."""
    return Figures(_mean(precision), _mean(precision[_IOU_50]), _mean(precision[_IOU_75]), _mean(recall), count)


def _mean(values: Any) -> float | None:
    known = values[values > -1]
    return float(np.mean(known)) if known.size else None


def _matched(judged: Any) -> list[Matched]:
    """Of the boxes of all sizes, those that lie in no crowd."""
    everything = judged.params.areaRng[0]
    return [
        Matched(image["image_id"], float(score), bool(match))
        for image in judged.evalImgs
        if image is not None and image["aRng"] == everything
        for score, match, is_ignored in zip(
            image["dtScores"], image["dtMatches"][_IOU_50], image["dtIgnore"][_IOU_50], strict=True
        )
        if not is_ignored
    ]
