"""A stream with parts of another stream: what is left of a file when chunks were taken out."""

from __future__ import annotations

import bisect
import io
import itertools
from collections.abc import Sequence
from typing import Any, BinaryIO


class _Parts(io.RawIOBase):
    def __init__(self, stream: BinaryIO, parts: Sequence[tuple[int, int]]) -> None:
        self._stream = stream
        self._parts = parts
        self._ends = list(itertools.accumulate(end - start for start, end in parts))
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._ends[-1] if self._ends else 0}
        self._position = max(0, origin[whence] + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        index = bisect.bisect_right(self._ends, self._position)
        if index == len(self._parts):
            return 0
        left = self._ends[index] - self._position
        self._stream.seek(self._parts[index][1] - left)
        content = self._stream.read(min(left, len(buffer)))
        buffer[: len(content)] = content
        self._position += len(content)
        return len(content)


def make_excerpt(stream: BinaryIO, parts: Sequence[tuple[int, int]]) -> BinaryIO:
    """Makes a stream of parts of a stream, without copying them.

    Args:
        stream: A stream that can seek; nothing else may read from it meanwhile.
        parts: Start and end of each part in bytes, in order; none is empty.
    """
    return io.BufferedReader(_Parts(stream, parts), 2**16)
