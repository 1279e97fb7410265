"""How an image is divided into tiles."""

from __future__ import annotations

import math
from dataclasses import dataclass

from florence_onnx.errors import InputError

TileBox = tuple[int, int, int, int]
"""(x0, y0, x1, y1) in whole pixels of the image."""
MIN_SIZE = 32
MAX_OVERLAP = 0.75
MAX_TILES = 1024


@dataclass(frozen=True)
class Tiles:
    """Equal square tiles that overlap.

    Anything that is no wider and no higher than the overlap lies completely in at least one tile.

    Raises:
        InputError: A value is out of range.
    """

    size: int = 768
    """Side of a tile in pixels of the image, at least 32. The size that the model reads loses no detail."""
    overlap: float = 0.15
    """Least share of a tile that the next one shows again, 0 to 0.75."""
    whole: bool = True
    """Whether the whole image is asked too: for things that are larger than the overlap of two tiles."""

    def __post_init__(self) -> None:
        if isinstance(self.size, bool) or not isinstance(self.size, int) or self.size < MIN_SIZE:
            raise InputError(f"Tiles size must be a whole number of pixels, at least {MIN_SIZE}, got {self.size!r}")
        if isinstance(self.overlap, bool) or not isinstance(self.overlap, int | float):
            raise InputError(f"Tiles overlap must be a number from 0 to {MAX_OVERLAP}, got {self.overlap!r}")
        if not 0 <= self.overlap <= MAX_OVERLAP:
            raise InputError(f"Tiles overlap must be from 0 to {MAX_OVERLAP}, got {self.overlap!r}")
        if not isinstance(self.whole, bool):
            raise InputError(f"Tiles whole must be True or False, got {self.whole!r}")

    @property
    def shared(self) -> int:
        """Least pixels that two neighbours share."""
        return math.ceil(self.size * self.overlap)

    def fits(self, size: tuple[int, int]) -> bool:
        """Whether an image of (width, height) pixels is a single tile."""
        return max(size) <= self.size

    def boxes(self, size: tuple[int, int]) -> list[TileBox]:
        """The tiles of an image of (width, height) pixels, row by row.

        Raises:
            InputError: There would be more than 1024.
        """
        lefts, tops = self._starts(size[0]), self._starts(size[1])
        if len(lefts) * len(tops) > MAX_TILES:
            raise InputError(
                f"an image of {size[0]} x {size[1]} pixels has {len(lefts) * len(tops)} tiles of {self.size} pixels; at most "
                f"{MAX_TILES} are allowed: use larger tiles"
            )
        width, height = min(self.size, size[0]), min(self.size, size[1])
        return [(left, top, left + width, top + height) for top in tops for left in lefts]

    def _starts(self, length: int) -> list[int]:
        """Where the tiles of one axis begin: evenly, so that no narrow tile is left at the end."""
        room = length - self.size
        if room <= 0:
            return [0]
        count = 1 + math.ceil(room / (self.size - self.shared))
        return [round(index * room / (count - 1)) for index in range(count)]
