"""Images with what was found in them, whatever the task."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal, Protocol

from florence_onnx.answers.locations import Size
from florence_onnx.answers.plain import answer_of, normalized, text_of
from florence_onnx.errors import InputError

Point = tuple[float, float]
Kind = Literal["box", "quad", "polygon"]
Unmapped = Literal["drop", "keep", "error"]
TEXT = "text"
"""Class of what holds text."""


@dataclass(frozen=True)
class Shape:
    """A box, quad or outline in pixels of the image."""

    label: str
    """Class; of what holds text `text`."""
    kind: Kind
    points: tuple[Point, ...]
    """Corners; a box has two, the top left and the bottom right one."""
    score: float | None = None
    text: str = ""
    """What it holds, where it is a line of text."""

    @property
    def bounds(self) -> tuple[float, float, float, float]:
        """`(x0, y0, x1, y1)`, x0 ≤ x1 and y0 ≤ y1."""
        xs, ys = [x for x, _ in self.points], [y for _, y in self.points]
        return min(xs), min(ys), max(xs), max(ys)

    @property
    def corners(self) -> tuple[Point, ...]:
        """All corners, clockwise from the top left one; of an outline its points."""
        if self.kind != "box":
            return self.points
        x0, y0, x1, y1 = self.bounds
        return (x0, y0), (x1, y0), (x1, y1), (x0, y1)

    @property
    def area(self) -> float:
        """Of the shape, in square pixels, by the shoelace formula."""
        corners = self.corners
        turns = zip(corners, (*corners[1:], corners[0]), strict=True)
        return abs(sum(a[0] * b[1] - b[0] * a[1] for a, b in turns)) / 2


@dataclass(frozen=True)
class LabelledImage:
    """An image, by name, and what was found in it."""

    source: str
    """Path or URL, as the batch job has it."""
    name: str
    """File name, of which each is there once: letters, digits and what file systems take."""
    width: int
    height: int
    task: str
    model: str
    shapes: tuple[Shape, ...] = ()
    text: str = ""
    """The answer as one text."""
    score: float | None = None
    error: str | None = None
    """Why there is no answer."""

    @property
    def stem(self) -> str:
        """The name without its extension."""
        return PurePosixPath(self.name).stem


class AnyRow(Protocol):
    """What is needed of a `batch.Row`."""

    @property
    def source(self) -> str: ...
    @property
    def task(self) -> str: ...
    @property
    def width(self) -> int | None: ...
    @property
    def height(self) -> int | None: ...
    @property
    def answer(self) -> Any: ...
    @property
    def text(self) -> str | None: ...
    @property
    def score(self) -> float | None: ...
    @property
    def error(self) -> str | None: ...
    @property
    def model(self) -> str: ...


def of_rows(rows: Iterable[AnyRow], task: str | None = None) -> Iterator[LabelledImage]:
    """The images of rows, one a row.

    Args:
        rows: Of one task, or of several of which `task` chooses one.
        task: Slug of the task; None where there is one only.

    Raises:
        InputError: There are rows of several tasks, and none was chosen; or none of the one that was.
    """
    names: Counter[str] = Counter()
    seen: set[str] = set()
    count = 0
    for row in rows:
        seen.add(row.task)
        if task is not None and row.task != task:
            continue
        if task is None and len(seen) > 1:
            raise InputError(f"there are rows of several tasks ({', '.join(sorted(seen))}): choose one with --task")
        count += 1
        yield LabelledImage(
            source=row.source,
            name=_unique(file_name(row.source), names),
            width=row.width or 0,
            height=row.height or 0,
            task=row.task,
            model=row.model,
            shapes=() if row.answer is None else shapes_of(row.answer, row.width or 0, row.height or 0),
            text=row.text or "",
            score=row.score,
            error=row.error,
        )
    if not count and task is not None and seen:
        raise InputError(f"there are no rows of {task}, only of {', '.join(sorted(seen))}")


def of_results(results: Any, size: Size, name: str, task: str) -> LabelledImage:
    """Results as the image that they are about.

    Args:
        results: A result dataclass, or a text.
        size: `(width, height)` of the image in pixels.
        name: Of the image.
        task: Slug of the task.
    """
    answer = answer_of(results, with_scores=True)
    return LabelledImage(name, file_name(name), *size, task, "florence-2", shapes_of(answer, *size), text_of(results))


def shapes_of(answer: Any, width: int, height: int) -> tuple[Shape, ...]:
    """The shapes of an answer in JSON, clipped to the image.

    Raises:
        InputError: The answer is of another form.
    """
    if isinstance(answer, str):
        return ()
    try:
        found = [
            *(_box(each) for each in answer.get("bboxes", ())),
            *(_quad(each) for each in answer.get("quad_boxes", ())),
            *(_polygon(each) for each in answer.get("polygons", ())),
        ]
    except (AttributeError, KeyError, TypeError) as error:
        raise InputError(f"an answer has another form than Florence-2's: {error!r}") from error
    return tuple(_clipped(each, width, height) for each in found if each.points)


def _box(box: Mapping[str, Any]) -> Shape:
    x, y, w, h = (float(box[name]) for name in ("x", "y", "w", "h"))
    points = (min(x, x + w), min(y, y + h)), (max(x, x + w), max(y, y + h))
    return Shape(str(box["label"]), "box", points, box.get("score"))


def _quad(box: Mapping[str, Any]) -> Shape:
    quad = box.get("quad")
    if not quad:
        return replace(_box(box), label=TEXT, text=str(box["label"]))
    points = tuple((float(point["x"]), float(point["y"])) for point in quad)
    return Shape(TEXT, "quad", points, box.get("score"), str(box["label"]))


def _polygon(polygon: Mapping[str, Any]) -> Shape:
    points = tuple((float(point["x"]), float(point["y"])) for point in polygon["points"])
    return Shape(str(polygon["label"]), "polygon", points, polygon.get("score"))


def _clipped(shape: Shape, width: int, height: int) -> Shape:
    if not width or not height:
        return shape
    points = tuple((min(max(x, 0.0), float(width)), min(max(y, 0.0), float(height))) for x, y in shape.points)
    return replace(shape, points=points)


# --------------------------------------------------------------------------------------------------------------- names

_FORBIDDEN = re.compile(r'[\x00-\x1f\x7f<>:"/\\|?*#]+')
"""What file systems, or the addresses of files in pages, do not take in a name."""
_MAX_NAME = 120


def file_name(source: str) -> str:
    """A file name for a source, which can lead to no other folder.

    `a/b.jpg` gives `b.jpg`, `shard.tar#7.jpg` gives `shard.tar-7.jpg`, `../..` gives `image`.
    """
    member = source.partition("#")
    last = PurePosixPath(member[0].replace("\\", "/")).name + (f"-{member[2]}" if member[2] else "")
    name = _FORBIDDEN.sub("_", last).strip(" .")
    stem, dot, suffix = name.rpartition(".")
    if len(name) > _MAX_NAME:
        name = f"{stem[: _MAX_NAME - len(suffix) - 1]}{dot}{suffix}" if stem and len(suffix) < 10 else name[:_MAX_NAME]
    return name or "image"


def _unique(name: str, taken: Counter[str]) -> str:
    """The name, with a number where another image has it: `car.jpg`, `car-2.jpg`; without regard to case, as some file systems."""
    while True:
        taken[name.casefold()] += 1
        number = taken[name.casefold()]
        if number == 1:
            return name
        stem, dot, suffix = name.rpartition(".")
        candidate = f"{stem}-{number}{dot}{suffix}" if stem else f"{name}-{number}"
        if candidate.casefold() not in taken:
            taken[candidate.casefold()] += 1
            return candidate


# ------------------------------------------------------------------------------------------------------------- classes


@dataclass(frozen=True)
class Classes:
    """The classes, in the order of their numbers."""

    names: tuple[str, ...]

    def index(self, label: str) -> int:
        """Place of a label's class, from 0."""
        return self.names.index(label)


def classify(
    images: Sequence[LabelledImage],
    names: Sequence[str] = (),
    mapping: Mapping[str, str] | None = None,
    unmapped: Unmapped = "keep",
    min_score: float | None = None,
) -> tuple[list[LabelledImage], Classes, Counter[str]]:
    """Gives shapes the names of their classes.

    Args:
        images: Images.
        names: Classes in their order; empty for the labels of the answers, by alphabet.
        mapping: Labels to classes: `{"a kitten": "cat"}`; compared without regard to case and white space.
        unmapped: Whether other labels are dropped, kept as further classes, or an error.
        min_score: Shapes of a lower score are dropped; those without a score stay.

    Returns:
        The images, their classes, and the labels that were dropped or added with their numbers.

    Raises:
        InputError: A label is no class, and `unmapped` is "error".
    """
    known = {normalized(name): name for name in names}
    known |= {normalized(label): name for label, name in (mapping or {}).items()}
    others: Counter[str] = Counter()
    fixed = bool(known)

    def renamed(shape: Shape) -> Shape | None:
        if min_score is not None and shape.score is not None and shape.score < min_score:
            return None
        found = known.get(normalized(shape.label))
        if found is not None:
            return replace(shape, label=found)
        if not fixed:
            return shape
        others[shape.label] += 1
        return shape if unmapped == "keep" else None

    changed = [replace(each, shapes=tuple(filter(None, map(renamed, each.shapes)))) for each in images]
    if others and unmapped == "error":
        raise InputError(
            f"labels that are no class: {', '.join(f'{name} ({n})' for name, n in others.most_common(10))}"
        )
    used = {shape.label for each in changed for shape in each.shapes}
    order = list(dict.fromkeys([*names, *(mapping or {}).values()]))
    return changed, Classes((*order, *sorted(used - set(order)))), others


def read_mapping(given: Sequence[str]) -> dict[str, str]:
    """Reads `label=class` pairs.

    Raises:
        InputError: One is malformed.
    """
    found = {}
    for each in given:
        label, equals, name = each.partition("=")
        if not equals or not label.strip() or not name.strip():
            raise InputError(f"a map must be LABEL=CLASS, such as kitten=cat; got {each!r}")
        found[label.strip()] = name.strip()
    return found


def find_image(image: LabelledImage, folder: Path | None) -> Path | None:
    """The file of an image: its source, or a file of that name in a folder; None where there is none."""
    path = Path(image.source)
    candidates = [path] if folder is None else [folder / image.source, folder / path.name, folder / image.name]
    try:
        return next((each for each in candidates if each.is_file()), None)
    except (OSError, ValueError):
        return None
