"""Writing annotated images to files."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import typer

from florence_onnx.detecting.detections import Detections
from florence_onnx.errors import InputError
from florence_onnx.images import url
from florence_onnx.prediction import Prediction
from florence_onnx.tasks import Task


@dataclass
class ImageFolder:
    """A folder of annotated images; no image overwrites another one of the same run."""

    folder: Path
    suffix: str
    """Slug of the task, the second part of a file name: `car.object-detection.png`."""
    _names: set[str] = field(default_factory=set)

    def add(self, image: str, prediction: Prediction[Any] | Detections) -> None:
        """Draws a prediction and writes it to a file.

        Args:
            image: Path, URL or `data:` URI of the image, from which the file name is derived.
            prediction: With geometry.
        """
        name = f"{self._find_stem(image)}.{self.suffix}.png"
        self._names.add(name)
        save(prediction, self.folder / name)

    def _find_stem(self, image: str) -> str:
        path = urlsplit(image).path if url.is_url(image) else image
        stem = "data" if url.is_data_uri(image) else Path(path).stem or "image"
        number, candidate = 1, stem
        while f"{candidate}.{self.suffix}.png" in self._names:
            number += 1
            candidate = f"{stem}-{number}"
        return candidate


def open_folder(folder: Path | None, task: Task[Any]) -> ImageFolder | None:
    """Creates the folder of `--draw`; returns None if the option was not given.

    Raises:
        typer.BadParameter: The task returns text only, or the folder cannot be created.
    """
    if folder is None:
        return None
    if not task.has_image:
        raise typer.BadParameter(f"{task.slug} returns text: there is nothing to draw", param_hint="--draw")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise typer.BadParameter(f"cannot create the folder {folder}: {error.strerror}", param_hint="--draw") from None
    return ImageFolder(folder, task.slug)


def save(prediction: Prediction[Any] | Detections, path: Path) -> None:
    """Draws a prediction and writes it to a file.

    Raises:
        InputError: The file cannot be written, or its suffix is not an image format.
    """
    try:
        prediction.draw().save(path)
    except (OSError, ValueError) as error:  # ValueError: the suffix is not an image format
        raise InputError(f"cannot write {path}: {error}") from None
