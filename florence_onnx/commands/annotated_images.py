"""Annotated images as files."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import typer

from florence_onnx.errors import InputError
from florence_onnx.images import url
from florence_onnx.prediction import Prediction
from florence_onnx.tasks import Task


@dataclass
class Gallery:
    """A folder for annotated images, none of which replaces another of the same run."""

    folder: Path
    suffix: str
    _names: set[str] = field(default_factory=set)

    def add(self, image: str, prediction: Prediction[Any]) -> None:
        """Draws and writes one."""
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


def open_gallery(folder: Path | None, task: Task[Any]) -> Gallery | None:
    if folder is None:
        return None
    if not task.has_image:
        raise typer.BadParameter(f"{task.slug} answers with text: there is nothing to draw", param_hint="--draw")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise typer.BadParameter(f"cannot make the folder {folder}: {error.strerror}", param_hint="--draw") from None
    return Gallery(folder, task.slug)


def save(prediction: Prediction[Any], path: Path) -> None:
    try:
        prediction.draw().save(path)
    except (OSError, ValueError) as error:  # ValueError: a name whose ending is no image format
        raise InputError(f"cannot write {path}: {error}") from None
