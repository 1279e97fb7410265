"""Captions in text files beside their images, as tools for training read them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer

from florence_onnx.batch.captions import caption_path, write_caption
from florence_onnx.errors import InputError
from florence_onnx.images import url
from florence_onnx.prediction import Prediction
from florence_onnx.tasks import Task


class CaptionFiles:
    """A text file for each image: `car.txt` for `car.jpg`."""

    def __init__(self, folder: Path | None, images: Sequence[str]) -> None:
        """Args:
        folder: Where the files are written; None for beside the images.
        images: Paths, URLs and `data:` URIs.

        Raises:
            InputError: Two images would have the same file, or one is no file and `folder` is None.
        """
        self._folder = folder
        self._images: dict[Path, str] = {}
        for image in dict.fromkeys(images):
            path = self.path(image)
            if path in self._images:
                raise InputError(
                    f"the captions of {url.shorten(self._images[path])} and {url.shorten(image)} would both be {path}: run "
                    "them apart, with another --txt-dir"
                )
            self._images[path] = image

    def path(self, image: str) -> Path:
        """The file of an image's caption; errors as for `caption_path`."""
        return caption_path(image, self._folder)

    def missing(self, images: Sequence[str]) -> list[str]:
        """The images that have no file yet; says on standard error how many have one."""
        missing = [image for image in images if not self.path(image).exists()]
        if len(missing) < len(images):
            typer.echo(
                f"{len(images) - len(missing)} of {len(images)} images have a caption file already and are skipped; "
                "--overwrite replaces the files",
                err=True,
            )
        return missing

    def write(self, image: str, prediction: Prediction[Any]) -> None:
        """Writes the caption of an image, and a newline, in UTF-8.

        Raises:
            InputError: The file cannot be written.
        """
        write_caption(self.path(image), str(prediction.results))


def check_options(task: Task[Any], *, txt: bool, folder: Path | None, overwrite: bool) -> None:
    """Checks the options of caption files against each other.

    Raises:
        typer.BadParameter: The task does not answer with text, or an option lacks `--txt`.
    """
    if txt and task.has_image:
        raise typer.BadParameter(
            f"{task.slug} does not answer with text; use --json for its results", param_hint="--txt"
        )
    for is_given, name in ((folder is not None, "--txt-dir"), (overwrite, "--overwrite")):
        if is_given and not txt:
            raise typer.BadParameter("needs --txt", param_hint=name)
