"""The images that `run` is given: paths, URLs, and folders of images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import typer

from florence_onnx.batch.sources.files import images_in
from florence_onnx.errors import ImageNotFoundError
from florence_onnx.images import url


def expand(given: Sequence[str], *, recursive: bool) -> list[str]:
    """Replaces each folder by its images, sorted by path, and says on standard error how many other files it has.

    Args:
        given: Paths, `http(s)` URLs, `data:` URIs.
        recursive: Whether folders inside a folder are searched too.

    Raises:
        ImageNotFoundError: A folder has no images.
    """
    return [image for each in given for image in _images_of(each, recursive)]


def _images_of(given: str, recursive: bool) -> Iterator[str]:
    if url.is_url(given) or url.is_data_uri(given) or not _is_folder(given):
        yield given
        return
    try:
        images, num_others = images_in(Path(given), recursive=recursive)
    except ImageNotFoundError as error:
        raise ImageNotFoundError(
            f"{error}{'' if recursive else '; --recursive also searches the folders in it'}"
        ) from None
    typer.echo(f"{given}: {len(images)} images, {num_others} other files ignored", err=True)
    yield from images


def _is_folder(given: str) -> bool:
    try:
        return Path(given).is_dir()
    except (OSError, ValueError):  # a name that is too long, or has NUL
        return False
