"""Takes comments and other extensions out of a GIF, up to its first frame, the only one that is decoded."""

from __future__ import annotations

from typing import BinaryIO

from florence_onnx.errors import ImageDecodeError
from florence_onnx.images.excerpt import make_excerpt

SIGNATURES = (b"GIF87a", b"GIF89a")
MAX_BLOCKS = 65_536
"""Most blocks before the first frame, each of at most 255 bytes: both this module and Pillow read them in Python code."""
_EXTENSION, _CONTROL = 0x21, 0xF9
_ENDS = (b"", b",", b";")
"""What follows the extensions: nothing, a frame, or the end of the file."""
_HEAD = 13


def strip(stream: BinaryIO, name: str) -> BinaryIO:
    """Returns the GIF without what is between its head and its first frame, graphic control extensions excepted.

    Args:
        stream: A GIF; it can seek.
        name: What messages call it.

    Raises:
        ImageDecodeError: There are too many blocks before the first frame.
    """
    stream.seek(0)
    head = stream.read(_HEAD)
    flags = head[10] if len(head) == _HEAD else 0
    position = _HEAD + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
    parts, num_blocks = [(0, position)], 0
    while num_blocks < MAX_BLOCKS:
        stream.seek(position)
        head = stream.read(2)
        if head[:1] in _ENDS or len(head) < 2:
            parts.append((position, stream.seek(0, 2)))
            return make_excerpt(stream, [part for part in parts if part[0] < part[1]])
        num_blocks += 1
        start, position = position, position + 1
        if head[0] == _EXTENSION:
            position, blocks = _skip_blocks(stream, start + 2, MAX_BLOCKS - num_blocks)
            num_blocks += blocks
            if head[1] == _CONTROL:
                parts.append((start, position))
    raise ImageDecodeError(f"{name} has more than {MAX_BLOCKS:,} blocks before its first frame; save it again without")


def _skip_blocks(stream: BinaryIO, position: int, most: int) -> tuple[int, int]:
    """Returns the position after a sequence of blocks, and their number."""
    for count in range(most):
        stream.seek(position)
        length = stream.read(1)
        position += 1 + (length[0] if length else 0)
        if not length or not length[0]:
            return position, count
    return position, most
