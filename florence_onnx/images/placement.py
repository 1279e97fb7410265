"""Where a source image lies within the pixels that the vision encoder reads, and coordinates from one to the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from florence_onnx.errors import InputError

Size: TypeAlias = tuple[int, int]
"""(width, height) in pixels."""

Fit: TypeAlias = Literal["stretch", "pad"]
"""How an image of another aspect ratio becomes one of the model's: stretched, as by transformers, or with margins."""


def check_fit(fit: object) -> Fit:
    """Returns `fit`.

    Raises:
        InputError: It is neither `"stretch"` nor `"pad"`.
    """
    if fit == "stretch":
        return "stretch"
    if fit == "pad":
        return "pad"
    raise InputError(f"fit must be {' or '.join(map(repr, get_args(Fit)))}, got {fit!r}")


@dataclass(frozen=True)
class Placement:
    """How an image was fitted into the vision encoder's input."""

    source_size: Size
    """Size of the source image."""
    image_size: Size
    """Size of the input."""
    fit: Fit = "stretch"

    @property
    def box(self) -> tuple[int, int, int, int]:
        """`(left, top, width, height)` of the source image within the input, in pixels of the input.

        `"pad"` scales both axes by the same factor, up to rounding to whole pixels, and centres the image.
        """
        if self.fit == "stretch":
            return 0, 0, *self.image_size
        scale = min(side / source for side, source in zip(self.image_size, self.source_size, strict=True))
        width, height = (max(1, round(source * scale)) for source in self.source_size)
        return (self.image_size[0] - width) // 2, (self.image_size[1] - height) // 2, width, height

    def to_source(self, coordinate: float, axis: int) -> float:
        """A coordinate of the input as one of the source image; what lies in a margin is moved to the image's edge.

        Args:
            coordinate: In pixels of the input.
            axis: 0 for x, 1 for y.
        """
        start, length = self._span(axis)
        source = self.source_size[axis]
        return min(max((coordinate - start) * source / length, 0.0), float(source))

    def to_input(self, coordinate: float, axis: int) -> float:
        """A coordinate of the source image as one of the input.

        Args:
            coordinate: In pixels of the source image.
            axis: 0 for x, 1 for y.
        """
        start, length = self._span(axis)
        return start + coordinate * length / self.source_size[axis]

    def _span(self, axis: int) -> tuple[int, int]:
        box: Sequence[int] = self.box
        return box[axis], box[axis + 2]
