"""webdataset's shards: `.tar` files in which the files of a sample have one name and several extensions."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from pathlib import Path

from florence_onnx.batch.items import Item, failed
from florence_onnx.batch.sources.files import SUFFIXES
from florence_onnx.errors import ImageError

MAX_MEMBER = 256 * 2**20
"""Larger files in a shard are not read."""


class Shard:
    """The samples of one shard; a sample's text is its `.txt`, or a field of its `.json`."""

    def __init__(self, path: Path, text_column: str | None) -> None:
        """Args: path; text_column, a field of each sample's `.json` with the text for the task, or `txt` for its `.txt`."""
        self._path = path
        self._text_column = text_column

    @property
    def total(self) -> int | None:
        return None  # only known once the whole shard is read

    def __iter__(self) -> Iterator[Item]:
        key = last = ""
        files: dict[str, bytes | ImageError] = {}
        try:
            with tarfile.open(self._path) as archive:
                for member in archive:
                    if not member.isfile():
                        continue
                    found, extension = _split(member.name)
                    if found != key and files:
                        yield self._item(key, files)
                        files = {}
                    key, last = found, member.name
                    files[extension] = _read(archive, member)
            if files:
                yield self._item(key, files)
        except (tarfile.TarError, OSError, EOFError) as error:
            if files:  # the last sample may be whole; its image says
                yield self._item(key, files)
            name = f"{self._path}#after {last}" if last else str(self._path)
            yield failed(name, name, error)

    def _item(self, key: str, files: dict[str, bytes | ImageError]) -> Item:
        source = f"{self._path}#{key}"
        name = next((each for each in files if _last(each) in SUFFIXES), None)
        if name is None:
            return failed(source, source, ImageError(f"{source} has no image, only {', '.join(files)}"))
        try:
            text = self._text(files)
        except ValueError as error:
            return failed(source, source, ImageError(f"{source} has no readable text: {error}"))
        return Item(source, f"{source}{name}", files[name], text, extension=_last(name))

    def _text(self, files: dict[str, bytes | ImageError]) -> str | None:
        if self._text_column is None:
            return None
        found = files.get(".txt" if self._text_column == "txt" else ".json", b"{}")
        if isinstance(found, ImageError):
            raise ValueError(str(found))
        if self._text_column == "txt":
            return found.decode("utf-8").strip()
        content = json.loads(found)
        value = content.get(self._text_column) if isinstance(content, dict) else None
        if not isinstance(value, str):
            raise ValueError(f"its .json has no text {self._text_column!r}")
        return value


def _split(name: str) -> tuple[str, str]:
    """Key and extension, as webdataset has them: the extension begins at the first dot of the file's name."""
    folder, slash, file = name.rpartition("/")
    stem, dot, extension = file.partition(".")
    return f"{folder}{slash}{stem}", f"{dot}{extension}".lower()


def _last(extension: str) -> str:
    """The last part of an extension, `.jpg` of `.input.jpg`."""
    return f".{extension.rpartition('.')[2]}"


def _read(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes | ImageError:
    if member.size > MAX_MEMBER:
        return ImageError(f"{member.name} has {member.size:,} bytes, more than {MAX_MEMBER:,}")
    file = archive.extractfile(member)
    assert file is not None, "a file"
    return file.read()
