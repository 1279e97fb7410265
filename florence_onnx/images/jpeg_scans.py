"""Reads what decoding a JPEG will cost from its markers, without decoding it.

A file may repeat a scan without end, each of which is decoded over the whole image, and a file of several scans keeps all
coefficients in memory, two bytes each.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from florence_onnx.errors import ImageDecodeError, ImageTooLargeError
from florence_onnx.images.tiff_tags import TooManyTagsError, check_tags

SIGNATURE = b"\xff\xd8\xff"
MAX_SCANS = 32
"""Most scans of an image; encoders write 1 to about 12."""
MAX_SEGMENTS = 4096
"""Most segments before the first scan, and most bytes of filling between them: Pillow reads each in Python code."""
_MARKER = re.compile(rb"\xff+([\x01-\xcf\xd8-\xfe])")
"""A marker other than the restart markers in the data of a scan."""
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_PROGRESSIVE = (0xC2, 0xC6, 0xCA, 0xCE)
_START, _END, _SCAN = 0xD8, 0xD9, 0xDA
_TAGS = (b"Exif\0\0", b"MPF\0")
"""How segments begin that hold TIFF tags."""


@dataclass
class Scans:
    """What the markers of a JPEG tell."""

    num_scans: int = 0
    """Scans of the image."""
    num_blocks: int = 0
    """Blocks of 8 by 8 coefficients, of all its components."""
    is_buffered: bool = False
    """Whether all coefficients are kept until the last scan is read."""

    @property
    def coefficient_bytes(self) -> int:
        """Bytes that the decoder needs for coefficients."""
        return self.num_blocks * 64 * 2 if self.is_buffered else 0


def read_scans(content: bytes, name: str) -> Scans:
    """Reads the markers of the first image in a JPEG file.

    Args:
        content: The file.
        name: What messages call it.

    Raises:
        ImageTooLargeError: There are more than `MAX_SCANS` scans.
        ImageDecodeError: There are more than `MAX_SEGMENTS` segments before the first scan, or the EXIF data would be read
            many times over.
    """
    found, position, num_segments, num_components, exif = Scans(), 2, 0, 0, b""
    while (marker := _MARKER.search(content, position)) is not None:
        kind = marker[1][0]
        if not found.num_scans:
            num_segments += 1 + marker.start(1) - position
            if num_segments > MAX_SEGMENTS:
                raise ImageDecodeError(f"{name} has more than {MAX_SEGMENTS:,} segments before its pixels")
        position = marker.end()
        if kind == _END:
            break
        if kind in (_START, 0x01):
            continue
        end = position + int.from_bytes(content[position : position + 2], "big")
        body, position = content[position + 2 : end], max(end, position + 2)
        if kind in _FRAMES:
            num_components = _read_frame(found, kind, body)
        elif kind == _SCAN:
            found.num_scans += 1
            found.is_buffered |= bool(body) and body[0] < num_components
            if found.num_scans > MAX_SCANS:
                raise ImageTooLargeError(
                    f"{name} is a JPEG of more than {MAX_SCANS} scans, each of which takes as long as an image; save it as "
                    "a baseline JPEG"
                )
        elif body.startswith(_TAGS[0]):
            exif += body[len(_TAGS[0]) :]  # Pillow joins the segments
        elif body.startswith(_TAGS[1]):
            _check_tags(body[len(_TAGS[1]) :], name)
    _check_tags(exif, name)
    return found


def _read_frame(found: Scans, kind: int, body: bytes) -> int:
    """Reads a frame header; returns the number of components."""
    height, width = int.from_bytes(body[1:3], "big"), int.from_bytes(body[3:5], "big")
    factors = [(factor >> 4, factor & 15) for factor in body[7::3]]
    most_across, most_down = max((x for x, _ in factors), default=1) or 1, max((y for _, y in factors), default=1) or 1
    across, down = -(-width // (8 * most_across)), -(-height // (8 * most_down))
    found.num_blocks = sum(across * x * down * y for x, y in factors)
    found.is_buffered |= kind in _PROGRESSIVE
    return len(factors)


def _check_tags(content: bytes, name: str) -> None:
    try:
        check_tags(content)
    except TooManyTagsError as error:
        raise ImageDecodeError(f"{name} has EXIF data that {error}") from None
