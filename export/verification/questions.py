"""What is asked when two models are compared: images, and for each of them a question of every task."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from florence_onnx import tasks
from florence_onnx.answers.locations import Region
from florence_onnx.errors import ImageError, ImageNotFoundError
from florence_onnx.images import decoding
from florence_onnx.tasks import Task

from .agreement import Answer, labelled_boxes, words

DEFAULT_REGION = Region(250, 250, 749, 749)
"""Asked about where the reference detects nothing: the middle of the image."""
DEFAULT_TEXT = "a thing"
"""Asked about where the reference neither detects nor says anything."""
MAX_TEXT = 100
"""Characters of a text input: a model that babbles must not write prompts that are too long for it."""


@dataclass(frozen=True, eq=False)
class NamedImage:
    """A loaded image; equal only to itself."""

    name: str
    image: Image.Image = field(repr=False)
    """RGB."""

    @property
    def size(self) -> tuple[int, int]:
        """`(width, height)` in pixels."""
        return self.image.size


@dataclass(frozen=True)
class Question:
    """One task asked about one image."""

    task: Task[Any]
    image: NamedImage
    text_input: str | None = None
    region: Region | None = None

    @property
    def prompt(self) -> str:
        """What the model reads."""
        return self.task.format_prompt(text_input=self.text_input, region=self.region)


def find_images(folder: Path, limit: int | None = None) -> tuple[list[Path], list[Path]]:
    """Looks for images in a folder and all below it.

    Args:
        folder: Where to look.
        limit: Most images to take; None takes all.

    Returns:
        The files that are images, by name, and the files before the last of them that are not.

    Raises:
        ImageNotFoundError: It is no folder, or holds no image.
    """
    if not folder.is_dir():
        raise ImageNotFoundError(f"{folder} is no folder; give one that holds images")
    found: list[Path] = []
    others: list[Path] = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        if limit is not None and len(found) >= limit:
            break
        (found if _is_image(path) else others).append(path)
    if not found:
        raise ImageNotFoundError(f"{folder} holds no image that can be read, among {len(others)} files")
    return found, others


def _is_image(path: Path) -> bool:
    try:
        decoding.load(path)
    except ImageError:
        return False
    return True


def load_images(paths: Sequence[Path]) -> Iterator[NamedImage]:
    """Loads images one after the other, so that only one is in memory."""
    for path in paths:
        yield NamedImage(path.name, decoding.load(path))


def make_questions(
    image: NamedImage, asked: Sequence[Task[Any]], ask: Callable[[Question], Answer]
) -> Iterator[Question]:
    """One question per task, about what the reference itself sees in the image.

    Text is the reference's caption for phrase grounding and the label of its first detected object elsewhere; the region is that
    object's box.

    Args:
        image: What is asked about.
        asked: The tasks.
        ask: Asks the reference.

    Yields:
        The questions, in the order of the tasks.
    """
    for task in asked:
        if task.needs == "text":
            yield Question(task, image, text_input=_text_for(task, image, ask))
        elif task.needs == "region":
            yield Question(task, image, region=_region_for(image, ask))
        else:
            yield Question(task, image)


def _text_for(task: Task[Any], image: NamedImage, ask: Callable[[Question], Answer]) -> str:
    caption = words(ask(Question(tasks.CAPTION, image)).text)
    if task == tasks.CAPTION_TO_PHRASE_GROUNDING:
        return _shorten(caption) or DEFAULT_TEXT
    boxes = labelled_boxes(ask(Question(tasks.OBJECT_DETECTION, image)))
    labels = [label for label, _ in boxes if label]
    return _shorten(labels[0] if labels else caption) or DEFAULT_TEXT


def _shorten(text: str) -> str:
    return textwrap.shorten(text, MAX_TEXT, placeholder="") or text[:MAX_TEXT].strip()


def _region_for(image: NamedImage, ask: Callable[[Question], Answer]) -> Region:
    boxes = labelled_boxes(ask(Question(tasks.OBJECT_DETECTION, image)))
    if not boxes:
        return DEFAULT_REGION
    return Region(*(min(999, max(0, int(value))) for value in boxes[0][1]))
