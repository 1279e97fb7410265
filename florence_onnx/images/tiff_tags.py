"""Reads the tags of a TIFF file, or of EXIF data, without what they point to.

Pillow copies what every tag points to. Thousands of tags that point to the same megabytes would make gigabytes of a small
file, and so would a tile, or a strip, larger than the image.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from florence_onnx.errors import ImageDecodeError, ImageTooLargeError

SIGNATURES = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+", b"MM*\0", b"II\0*")
"""How a TIFF begins; the last two are invalid, and Pillow reads them."""
MAX_CHUNKS = 100_000
"""Most strips or tiles: Pillow makes Python objects of each."""
MAX_TAGS = 4096
"""Most tags of a directory."""
_TILE_PIXELS = 2**22
"""Pixels that a tile may have in an image that is smaller."""
_SLACK = 2**16
_WIDTH, _HEIGHT, _COMPRESSION, _OFFSETS, _SAMPLES, _ROWS, _BITS = 256, 257, 259, 273, 277, 278, 258
_ORIENTATION, _TILE_WIDTH, _TILE_HEIGHT, _TILE_OFFSETS = 274, 322, 323, 324
_DIRECTORIES = (34665, 34853, 40965)
"""Tags that point to a further directory: EXIF, GPS and interoperability."""
_TYPE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
_INTEGERS = {1: "B", 3: "H", 4: "L", 6: "b", 8: "h", 9: "l", 13: "L", 16: "Q", 17: "q"}


class TooManyTagsError(Exception):
    """The tags point to more than there is."""


@dataclass(frozen=True)
class Tag:
    """One entry of a directory."""

    number: int
    count: int
    """Values that it has."""
    num_bytes: int
    """Bytes of its values, 0 where they lie outside the file."""
    first: int
    """Its first value, 0 if that is not an integer."""


@dataclass(frozen=True)
class Layout:
    """How the pixels of a TIFF are stored."""

    chunk_bytes: int
    """Bytes of the largest strip or tile, unpacked, 0 if the pixels are not compressed."""
    is_turned: bool
    """Whether Pillow turns the image when it decodes it."""


class _Reader:
    """Reads directories of a stream; counts what their tags point to."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._num_bytes = stream.seek(0, 2)
        self._left = self._num_bytes + _SLACK
        head = self._read(0, 16)
        self._order = ">" if head[:2] == b"MM" else "<"
        self._is_big = 43 in head[2:4]
        self.first = self._unpack("Q", head[8:16]) if self._is_big else self._unpack("L", head[4:8])

    def tags(self, position: int, depth: int = 0) -> Iterator[Tag]:
        count_format, entry, inline = ("Q", 20, 8) if self._is_big else ("H", 12, 4)
        size = struct.calcsize("=" + count_format)
        count = self._unpack(count_format, self._read(position, size))
        table = self._read(position + size, min(count, MAX_TAGS + 1) * entry)
        if len(table) > MAX_TAGS * entry:
            raise TooManyTagsError(f"has {count:,} tags, allowed are {MAX_TAGS:,}")
        for start in range(0, len(table) - entry + 1, entry):
            tag = self._tag(table[start : start + entry], inline)
            yield tag
            if tag.number in _DIRECTORIES and depth < 3:
                for _ in self.tags(tag.first, depth + 1):
                    pass

    def _tag(self, entry: bytes, inline: int) -> Tag:
        number, kind = self._unpack("H", entry[:2]), self._unpack("H", entry[2:4])
        count, value = self._unpack("Q" if inline == 8 else "L", entry[4:-inline]), entry[-inline:]
        num_bytes = count * _TYPE_BYTES.get(kind, 0)
        if num_bytes > inline:
            offset = self._unpack("Q" if inline == 8 else "L", value)
            if offset + num_bytes > self._num_bytes:
                num_bytes = 0
            self._left -= num_bytes
            if self._left < 0:
                raise TooManyTagsError("points to more than the file has: its tags share their values")
            value = self._read(offset, 8) if num_bytes else b""
        letter = _INTEGERS.get(kind)
        return Tag(number, count, num_bytes, self._unpack(letter, value) if letter else 0)

    def _read(self, position: int, num_bytes: int) -> bytes:
        if position > self._num_bytes:
            return b""
        self._stream.seek(position)
        return self._stream.read(num_bytes)

    def _unpack(self, letter: str, content: bytes) -> int:
        size = struct.calcsize("=" + letter)
        return int(struct.unpack(self._order + letter, content[:size].ljust(size, b"\0"))[0])


def check_tags(content: bytes) -> None:
    """Checks EXIF data, or another TIFF without pixels.

    Raises:
        TooManyTagsError: There are too many tags, or reading them would copy more than there is.
    """
    reader = _Reader(io.BytesIO(content))
    for _ in reader.tags(reader.first):
        pass


def read_layout(stream: BinaryIO, name: str) -> Layout:
    """Reads the first directory of a TIFF.

    Args:
        stream: A TIFF; it can seek.
        name: What messages call it.

    Raises:
        ImageTooLargeError: Its tiles are larger than the image, or too many.
        ImageDecodeError: It has too many tags, or reading them would copy more than the file has.
    """
    reader = _Reader(stream)
    try:
        listed = list(reader.tags(reader.first))
    except TooManyTagsError as error:
        raise ImageDecodeError(f"{name} is a TIFF that {error}") from None
    tags = {tag.number: tag for tag in listed}
    if len(tags) < len(listed):  # libtiff takes the first, Pillow the last
        raise ImageDecodeError(f"{name} is damaged: it has a tag twice")
    value = {number: tag.first for number, tag in tags.items()}
    width, height = value.get(_WIDTH, 0), value.get(_HEIGHT, 0)
    num_chunks = max((tags[number].count for number in (_OFFSETS, _TILE_OFFSETS) if number in tags), default=0)
    if num_chunks > MAX_CHUNKS:
        raise ImageTooLargeError(f"{name} has {num_chunks:,} strips or tiles, allowed are {MAX_CHUNKS:,}")
    chunk_width, chunk_height = width, min(value.get(_ROWS, height) or height, height)
    if _TILE_OFFSETS in tags or _TILE_WIDTH in tags:
        chunk_width, chunk_height = value.get(_TILE_WIDTH, 0), value.get(_TILE_HEIGHT, 0)
    if chunk_width * chunk_height > max(width * height, _TILE_PIXELS):
        raise ImageTooLargeError(
            f"{name} has tiles of {chunk_width} x {chunk_height} pixels in an image of {width} x {height}"
        )
    pixel_bytes = -(-max(1, value.get(_SAMPLES, 1)) * max(1, value.get(_BITS, 8)) // 8)
    is_packed = value.get(_COMPRESSION, 1) != 1
    chunk_bytes = chunk_width * chunk_height * pixel_bytes if is_packed else 0
    return Layout(chunk_bytes, value.get(_ORIENTATION, 1) > 1)
