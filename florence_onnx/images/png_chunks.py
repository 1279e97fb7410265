"""Takes the chunks out of a PNG that have no effect on its pixels.

Image generators keep their whole workflow in a PNG's text, and profiles of printers have megabytes; Pillow refuses such
files, as it unpacks both and limits their size.
"""

from __future__ import annotations

import zlib
from typing import BinaryIO

from florence_onnx.errors import ImageDecodeError
from florence_onnx.images.excerpt import make_excerpt

SIGNATURE = b"\x89PNG\r\n\x1a\n"
MAX_CHUNKS = 65_536
"""Most chunks of a file: Pillow reads each in Python code."""
_KEPT = (b"IHDR", b"PLTE", b"IDAT", b"IEND", b"eXIf")
"""The pixels, and the EXIF orientation. Without transparency, which RGB has none of, and without the further frames of an
animation, whose first one `IDAT` is, if it has a part in the animation at all."""
_TEXTS = {b"iTXt": b"XML:com.adobe.xmp\0", b"tEXt": b"Raw profile type exif\0", b"zTXt": b"Raw profile type exif\0"}
"""Texts in which Pillow finds an EXIF orientation, by their keyword."""
_MAX_TEXT = 2**16
"""Most bytes of such a text, as stored; longer ones are taken out."""
_MAX_UNPACKED_TEXT = 2**20
"""Most bytes of such a text, unpacked: Pillow's limit."""
_MAX_TEXTS = 8
_BLOCK = 2**20


def strip(stream: BinaryIO, name: str) -> BinaryIO:
    """Returns the PNG with those chunks only that its RGB pixels and its orientation depend on.

    The checksums of chunks that are taken out are checked here, the other ones by Pillow. A file that ends early is left
    to Pillow, which says so.

    Args:
        stream: A PNG; it can seek.
        name: What messages call it.

    Raises:
        ImageDecodeError: There are too many chunks, or one that is taken out is damaged.
    """
    parts: list[tuple[int, int]] = [(0, len(SIGNATURE))]
    end, num_texts = len(SIGNATURE), 0
    for _ in range(MAX_CHUNKS):
        start = stream.seek(end)
        head = stream.read(8)
        if len(head) < 8:
            return make_excerpt(stream, parts)
        kind, end = head[4:], start + 12 + int.from_bytes(head[:4], "big")
        is_kept = kind in _KEPT
        if not is_kept and num_texts < _MAX_TEXTS and _is_orientation_text(stream, kind, end - start - 12):
            is_kept, num_texts = True, num_texts + 1
        if is_kept:
            start = parts.pop()[0] if parts[-1][1] == start else start
            parts.append((start, end))
        else:
            _check(stream, start + 4, end, name)
        if kind == b"IEND":
            return make_excerpt(stream, parts)
    raise ImageDecodeError(f"{name} has more than {MAX_CHUNKS:,} chunks; save it again with fewer")


def _is_orientation_text(stream: BinaryIO, kind: bytes, length: int) -> bool:
    keyword = _TEXTS.get(kind)
    if keyword is None or length > _MAX_TEXT:
        return False
    text = stream.read(length)
    return text.startswith(keyword) and _is_short(kind, text[len(keyword) :])


def _is_short(kind: bytes, rest: bytes) -> bool:
    """Whether a text is not too long when it is unpacked."""
    if kind == b"zTXt":
        packed = rest[1:]
    elif kind == b"iTXt" and rest[:1] == b"\1":
        packed = rest[2:].split(b"\0", 2)[-1]
    else:
        return True
    unpacking = zlib.decompressobj()
    try:
        unpacking.decompress(packed, _MAX_UNPACKED_TEXT)
    except zlib.error:
        return False
    return not unpacking.unconsumed_tail


def _check(stream: BinaryIO, start: int, end: int, name: str) -> None:
    """Checks the checksum of a chunk, given the start of its kind and the end of the checksum."""
    position, checksum = stream.seek(start), 0
    while position < end - 4:
        block = stream.read(min(_BLOCK, end - 4 - position))
        if not block:
            raise ImageDecodeError(f"{name} is truncated: it ends inside a chunk")
        checksum, position = zlib.crc32(block, checksum), position + len(block)
    if stream.read(4) != checksum.to_bytes(4, "big"):
        raise ImageDecodeError(f"{name} is damaged: the checksum of a chunk is wrong")
