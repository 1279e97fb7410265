"""What a source yields: images that are not read yet."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeAlias

from PIL import Image

from florence_onnx.answers.locations import Region
from florence_onnx.errors import FlorenceError, ImageError

ImageSource: TypeAlias = "str | bytes | Image.Image"


@dataclass(frozen=True)
class Item:
    """An image to ask about."""

    id: str
    """Unique in a job; by default the source."""
    source: str
    """Where it comes from: a path, a URL, `shard.tar#member`, `video.mp4#t=1.500`, `file.pdf#page=3`, `data.parquet#row=17`."""
    image: ImageSource | ImageError
    """Path or URL, encoded bytes, a decoded frame or page, or why there is none."""
    text: str | None = None
    """Text for tasks that take one, instead of the job's."""
    region: Region | None = None
    """Region for tasks that take one, instead of the job's."""
    extension: str = ""
    """What the name of an image file would end with, such as `.jpg`; empty for frames and pages."""

    def __post_init__(self) -> None:
        # a file's name may hold bytes that are no UTF-8, which no output could write; `image` keeps them
        for name in ("id", "source"):
            written = getattr(self, name).encode("utf-8", "backslashreplace").decode()
            object.__setattr__(self, name, written)

    @property
    def encoded(self) -> bytes | None:
        """The image file, if there is one that can be read; None for frames, pages and URLs."""
        if isinstance(self.image, bytes):
            return self.image
        if isinstance(self.image, str) and self.extension and Path(self.image).is_file():
            return Path(self.image).read_bytes()
        return None


class Source(Protocol):
    """Where items come from."""

    @property
    def total(self) -> int | None:
        """How many items there are, if that is known without reading them."""

    def __iter__(self) -> Iterator[Item]: ...


def in_shard(item_id: str, shard: tuple[int, int]) -> bool:
    """Whether an item belongs to shard i of n, counted from 1. By its id, so that it stays there when others come or go."""
    number, count = shard
    return zlib.crc32(item_id.encode("utf-8", "surrogatepass")) % count == number - 1


def failed(item_id: str, source: str, error: FlorenceError | Exception) -> Item:
    """An item whose image cannot be read."""
    found = error if isinstance(error, ImageError) else ImageError(f"{source} cannot be read: {error}")
    return Item(item_id, source, found)
