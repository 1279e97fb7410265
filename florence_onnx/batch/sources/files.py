"""Images in files: single ones, folders, globs, lists of names and standard input."""

from __future__ import annotations

import glob
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from florence_onnx.batch.items import Item
from florence_onnx.errors import ImageNotFoundError, InputError
from florence_onnx.images import url

SUFFIXES = frozenset(
    [
        *(".avif", ".bmp", ".gif", ".heic", ".heif", ".jfif", ".jp2", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".ppm"),
        *(".tga", ".tif", ".tiff", ".webp"),
    ]
)
"""What the name of an image ends with, in lower case; only files in folders are chosen by it."""


class Files:
    """A known list of names."""

    def __init__(self, names: list[str]) -> None:
        self._names = names

    @property
    def total(self) -> int | None:
        return len(self._names)

    def __iter__(self) -> Iterator[Item]:
        return map(of_name, self._names)


class Lines:
    """Names, one a line: those of a text file, or of standard input as they come."""

    def __init__(self, path: Path | None) -> None:
        """Args: path, of the file, in UTF-8; None for standard input."""
        self._path = path

    @property
    def total(self) -> int | None:
        if self._path is None:
            return None
        return sum(1 for _ in self._names())

    def __iter__(self) -> Iterator[Item]:
        return map(of_name, self._names())

    def _names(self) -> Iterator[str]:
        if self._path is None:
            yield from _stripped(sys.stdin)
            return
        try:
            with self._path.open(encoding="utf-8-sig") as lines:
                yield from _stripped(lines)
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{self._path} cannot be read as a list of images, one a line: {error}") from error


def _stripped(lines: Iterable[str]) -> Iterator[str]:
    return (name for line in lines if (name := line.strip()) and not name.startswith("#"))


def of_name(name: str) -> Item:
    """The item of a path or a URL."""
    if url.is_data_uri(name):
        return Item(url.shorten(name), url.shorten(name), name)
    path = urlsplit(name).path if url.is_url(name) else name
    return Item(name, name, name, extension=PurePosixPath(path).suffix.lower())


def images_in(folder: Path, *, recursive: bool) -> tuple[list[str], int]:
    """The images in a folder, sorted by path, and how many other files there are.

    Args:
        folder: The folder.
        recursive: Whether the folders in it are searched too.

    Raises:
        ImageNotFoundError: There are no images; the message ends with the number of other files.
    """
    found = sorted(path for path in (folder.rglob("*") if recursive else folder.iterdir()) if path.is_file())
    images = [path for path in found if path.suffix.lower() in SUFFIXES and not path.name.startswith(".")]
    if not images:
        raise ImageNotFoundError(f"{folder} has no images ({len(found)} other files)")
    return list(map(str, images)), len(found) - len(images)


def matching(pattern: str) -> list[str]:
    """The files that a glob matches, sorted; `**` matches folders in folders.

    Raises:
        ImageNotFoundError: There are none.
    """
    found = sorted(each for each in glob.glob(pattern, recursive=True) if Path(each).is_file())  # noqa: PTH207 - of any folder
    if not found:
        raise ImageNotFoundError(f"{pattern} matches no file")
    return found
