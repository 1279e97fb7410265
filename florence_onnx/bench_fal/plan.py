"""The calls of a comparison: images x tasks x repeats, with ids by which a resumed comparison recognises them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from florence_onnx import tasks
from florence_onnx.answers.locations import Region
from florence_onnx.errors import ImageNotFoundError, InputError
from florence_onnx.fal.contract import APP
from florence_onnx.images import decoding, url

NOT_AT_FAL = frozenset({tasks.REGION_TO_OCR.slug})
"""Slugs of the tasks for which fal has no endpoint."""
ANY = "*"
"""Key in a file of inputs that matches every image or every task."""
_INPUT_NAMES = ("text_input", "region")


@dataclass(frozen=True)
class Image:
    """An image in the form that all targets get."""

    name: str
    """File name or shortened URL, for messages and reports."""
    address: str = field(repr=False)
    """`image_url` of the calls: the file as a `data:` URI, or the given URL."""
    digest: str
    """SHA-256 of the file or of the URL, hexadecimal."""


@dataclass(frozen=True)
class Call:
    """One repeat of one question (image, task, text and region), made to every target."""

    image: Image
    task: tasks.Task[Any]
    text_input: str | None
    region: Region | None
    repeat: int
    """Number of the repeat, from 0."""

    @property
    def question(self) -> str:
        """Id of the question, the same for all repeats and all processes."""
        region = None if self.region is None else list(_corners(self.region).values())
        parts = json.dumps([self.task.slug, self.image.digest, self.text_input, region])
        return f"{self.task.slug}/{hashlib.sha256(parts.encode()).hexdigest()[:16]}"

    @property
    def id(self) -> str:
        """Id of the call, the same for all processes."""
        return f"{self.question}/{self.repeat}"

    @property
    def application(self) -> str:
        """fal's endpoint id."""
        return f"{APP}/{self.task.slug}"

    @property
    def arguments(self) -> dict[str, Any]:
        """fal's arguments."""
        arguments: dict[str, Any] = {"image_url": self.image.address}
        if self.text_input is not None:
            arguments["text_input"] = self.text_input
        if self.region is not None:
            arguments["region"] = _corners(self.region)
        return arguments


@dataclass(frozen=True)
class Inputs:
    """Texts and regions for the tasks that need one."""

    text: str | None = None
    """Text for all images and tasks without one in `by_image`."""
    region: Region | None = None
    """Region for all images and tasks without one in `by_image`."""
    by_image: Mapping[str, Mapping[str, Mapping[str, Any]]] = field(default_factory=dict)
    """Image (as given, its file name, or `*`) to task slug (or `*`) to `{"text_input": …}` or `{"region": …}`."""

    def text_for(self, image: str, task: tasks.Task[Any]) -> str | None:
        """Returns the text for a task that needs one; None for other tasks, or if there is none."""
        if task.needs != "text":
            return None
        found = self._find(image, task.slug, "text_input")
        return self.text if found is None else str(found)

    def region_for(self, image: str, task: tasks.Task[Any]) -> Region | None:
        """Returns the region for a task that needs one; None for other tasks, or if there is none."""
        if task.needs != "region":
            return None
        found = self._find(image, task.slug, "region")
        return self.region if found is None else _region(found)

    def _find(self, image: str, slug: str, name: str) -> Any:
        for key in (image, Path(image).name, ANY):
            for task in (slug, ANY):
                found = self.by_image.get(key, {}).get(task, {}).get(name)
                if found is not None:
                    return found
        return None


def read_inputs(path: Path) -> Mapping[str, Mapping[str, Mapping[str, Any]]]:
    """Reads `Inputs.by_image` from a JSON file.

    Raises:
        InputError: The file cannot be read, or has another structure.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read the inputs {path}: {error}") from None
    expected = f'{path} must be {{"IMAGE or *": {{"TASK or *": {{"text_input": "…" or "region": [x1, y1, x2, y2]}}}}}}'
    try:
        entries = [(task, entry) for by_task in content.values() for task, entry in by_task.items()]
        names = {name for _, entry in entries for name in entry}
        is_wrong = any(not isinstance(entry, dict) for _, entry in entries)
    except (AttributeError, TypeError):
        raise InputError(expected) from None
    if is_wrong or not names <= set(_INPUT_NAMES):
        raise InputError(f"{expected}; got the names {', '.join(sorted(map(str, names)))}")
    for task, _ in entries:
        if task != ANY:
            tasks.get(task)
    found: Mapping[str, Mapping[str, Mapping[str, Any]]] = content
    return found


def make_plan(images: Sequence[str], slugs: Sequence[str], inputs: Inputs, num_repeats: int) -> list[Call]:
    """Lists the calls, repeat by repeat, so that a limit below the plan still covers every question.

    Args:
        images: Paths, `http(s)` URLs or `data:` URIs.
        slugs: Tasks by slug or token.
        inputs: Texts and regions.
        num_repeats: Calls per question, at least 1.

    Returns:
        The calls, in the order in which they are made.

    Raises:
        InputError: An image cannot be read, a task is unknown, or its text or region is missing.
    """
    if num_repeats < 1:
        raise InputError(f"repeats must be at least 1, got {num_repeats}")
    loaded = [read_image(each) for each in images]
    asked = [tasks.get(slug) for slug in slugs]
    if not loaded or not asked:
        raise InputError("a comparison needs at least one image and one task")
    first = []
    for given, image in zip(images, loaded, strict=True):
        for task in asked:
            call = Call(image, task, inputs.text_for(given, task), inputs.region_for(given, task), 0)
            task.format_prompt(call.text_input, call.region)
            first.append(call)
    if len({call.id for call in first}) < len(first):
        raise InputError("the same image or task was given twice; use --repeats to repeat calls")
    return [Call(c.image, c.task, c.text_input, c.region, repeat) for repeat in range(num_repeats) for c in first]


def read_image(address: str) -> Image:
    """Encodes a local image as a `data:` URI; keeps URLs and `data:` URIs unchanged.

    Raises:
        ImageError: The file is missing or not an image.
    """
    if url.is_url(address) or url.is_data_uri(address):
        return Image(url.shorten(address), address, hashlib.sha256(address.encode()).hexdigest())
    from fal_client import encode_file

    decoding.load(address)  # fails now rather than at every target
    path = Path(address)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ImageNotFoundError(f"cannot read {path}: {error.strerror}") from None
    return Image(path.name, encode_file(path), hashlib.sha256(content).hexdigest())


def _corners(region: Region) -> dict[str, int]:
    return {"x1": region.x1, "y1": region.y1, "x2": region.x2, "y2": region.y2}


def _region(value: Any) -> Region:
    corners = [value.get(name) for name in ("x1", "y1", "x2", "y2")] if isinstance(value, dict) else value
    if not isinstance(corners, list) or len(corners) != 4:
        raise InputError(f'a region in the inputs is [x1, y1, x2, y2] or {{"x1": …}} in bins 0 to 999, got {value!r}')
    return Region(*corners)
