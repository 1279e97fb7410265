"""The questions on which models are compared: images, and a prompt of every task for each image."""

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
"""The middle of the image: the region input if the reference detects nothing."""
DEFAULT_TEXT = "a thing"
"""The text input if the reference detects nothing and its caption is empty."""
MAX_TEXT = 100
"""Most characters of a text input. The captions of a broken model can be longer than its prompts may be."""


@dataclass(frozen=True, eq=False)
class NamedImage:
    """A loaded image. Compared by identity, so that it can be the key of a cache."""

    name: str
    image: Image.Image = field(repr=False)
    """In mode RGB."""

    @property
    def size(self) -> tuple[int, int]:
        """`(width, height)` in pixels."""
        return self.image.size


@dataclass(frozen=True)
class Question:
    """One task on one image."""

    task: Task[Any]
    image: NamedImage
    text_input: str | None = None
    region: Region | None = None

    @property
    def prompt(self) -> str:
        """The prompt that the text encoder reads."""
        return self.task.format_prompt(text_input=self.text_input, region=self.region)


def find_images(folder: Path, limit: int | None = None) -> tuple[list[Path], list[Path]]:
    """Finds the images in a folder and its subfolders.

    Args:
        folder: Where to search.
        limit: Most images to return; None returns all.

    Returns:
        The image files, sorted by path, and the files that were tried and are not images.

    Raises:
        ImageNotFoundError: `folder` is not a folder, or holds no image.
    """
    if not folder.is_dir():
        raise ImageNotFoundError(f"{folder} is not a folder; give one with images")
    found: list[Path] = []
    others: list[Path] = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        if limit is not None and len(found) >= limit:
            break
        (found if _is_image(path) else others).append(path)
    if not found:
        raise ImageNotFoundError(f"{folder} has no readable image among its {len(others)} files")
    return found, others


def _is_image(path: Path) -> bool:
    try:
        decoding.load(path)
    except ImageError:
        return False
    return True


def load_images(paths: Sequence[Path]) -> Iterator[NamedImage]:
    """Loads images one by one, so that only one is in memory at a time."""
    for path in paths:
        yield NamedImage(path.name, decoding.load(path))


def make_questions(
    image: NamedImage, asked: Sequence[Task[Any]], ask: Callable[[Question], Answer]
) -> Iterator[Question]:
    """Makes one question per task; text and region inputs come from the reference's own answers about the image.

    The text input is the reference's caption for phrase grounding, and the label of its first detected object for other
    tasks. The region input is the box of that object.

    Args:
        image: The image.
        asked: The tasks.
        ask: Returns the reference's answer to a question.

    Yields:
        The questions, in the order of `asked`.
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
