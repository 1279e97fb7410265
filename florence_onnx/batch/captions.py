"""Texts of answers in files beside their images, as tools for training read them."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

from florence_onnx.batch.items import Item
from florence_onnx.batch.rows import Row
from florence_onnx.errors import InputError
from florence_onnx.images import url


def caption_path(image: str, folder: Path | None) -> Path:
    """The file of an image's text: `car.txt` for `car.jpg`.

    Args:
        image: A path, a URL or a `data:` URI.
        folder: Where the file is; None for beside the image.

    Raises:
        InputError: The image is no file, and no folder was given.
    """
    is_remote = url.is_url(image) or url.is_data_uri(image)
    if folder is None and is_remote:
        raise InputError(f"{url.shorten(image)} is no file that a caption could lie beside: give --txt-dir")
    if folder is None:
        return Path(image).with_suffix(".txt")
    name = urlsplit(image).path if url.is_url(image) else "data" if is_remote else image
    return folder / f"{Path(name).stem or 'image'}.txt"


def write_caption(path: Path, text: str) -> None:
    """Writes a text and a newline, in UTF-8; the file appears when it is complete.

    Raises:
        InputError: The file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text(f"{text}\n", encoding="utf-8", errors="backslashreplace")
        temporary.replace(path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from None


class CaptionSidecars:
    """A text file for each answer of a job, beside another output, which says what is done."""

    def __init__(self, folder: Path | None) -> None:
        """Args: folder, where the files are written; None for beside the images."""
        self._folder = folder
        self._made: dict[Path, str] = {}

    def write(self, row: Row, item: Item) -> None:
        """Writes the text of an answer.

        Raises:
            InputError: Two images would have one file, an image is no file, or the disk refuses.
        """
        if row.text is None:
            return
        path = self._path(item)
        if self._made.setdefault(path, row.id) != row.id:
            raise InputError(f"the texts of {self._made[path]} and {row.id} would both be {path}: give --txt-dir apart")
        write_caption(path, row.text)

    def _path(self, item: Item) -> Path:
        if isinstance(item.image, str):
            return caption_path(item.image, self._folder)
        if self._folder is None:
            raise InputError(f"{item.source} is no file that a text could lie beside: give --txt-dir")
        name = Path(item.source.replace("#", "-")).name  # a member of an archive, a frame or a page
        return self._folder / f"{name.removesuffix(item.extension)}.txt"
