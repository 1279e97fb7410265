"""Texts of answers in files beside their images."""

from __future__ import annotations

from pathlib import Path

from florence_onnx.batch.items import Item
from florence_onnx.batch.rows import Row
from florence_onnx.errors import InputError


class CaptionSidecars:
    """`car.txt` beside `car.jpg`, or in a folder, for each answer; beside another output, which says what is done."""

    def __init__(self, folder: Path | None) -> None:
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
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(path.name + ".tmp")
            temporary.write_text(f"{row.text}\n", encoding="utf-8", errors="backslashreplace")
            temporary.replace(path)
        except OSError as error:
            raise InputError(f"cannot write {path}: {error.strerror or error}") from error

    def _path(self, item: Item) -> Path:
        name = item.source.replace("#", "-") if "#" in item.source else item.source
        if self._folder is None:
            if not isinstance(item.image, str) or not Path(item.image).is_file():
                raise InputError(f"{item.source} is no file that a text could lie beside: give --txt-dir")
            return Path(item.image).with_suffix(".txt")
        stem = Path(name).stem if Path(name).suffix.lower() == item.extension and item.extension else Path(name).name
        return self._folder / f"{stem or 'image'}.txt"
