"""Pixels to Florence-2's 1000 location bins and back, and the tokens `<loc_0>` to `<loc_999>` for the bins.

Each axis of the image is divided into 1000 bins of equal width. A coordinate is quantized to the bin that contains it
and dequantized to the middle of that bin. All arithmetic is float32, as in the reference (Microsoft's
`processing_florence2.py`): in float64 a coordinate at the edge of a bin can fall into its neighbour, and truncated
pixels differ for some image sizes.

Flat coordinate lists alternate x and y (`x1, y1, x2, y2, …`), origin top left; `size` is always `(width, height)`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from florence_onnx.answers.results import Point
from florence_onnx.errors import InputError, RegionError

NUM_BINS = 1000
"""Number of bins along each axis."""

Size: TypeAlias = tuple[int, int]
"""(width, height) of an image in pixels."""

_LOCATION = re.compile(r"<loc_(\d+)>")
_REGION = re.compile(r"(?:<loc_\d+>){4}")
_BIN_TOKEN = re.compile(r"<loc_(0|[1-9]\d{0,2})>", re.ASCII)
# Generated text may contain any number. Beyond 18 digits it saturates at 10**18, which is outside every image and still
# an int64; and `int` raises ValueError for more than 4300 digits.
_MAX_DIGITS = 18
_SATURATED_BIN = 10**_MAX_DIGITS


def quantize(coordinates: npt.ArrayLike, size: Size) -> npt.NDArray[np.int64]:
    """Quantizes pixels to bins, as the reference does.

    Args:
        coordinates: (..., 2k) pixels, x and y alternating. Values outside the image are clipped to the outermost bin.
        size: (width, height) of the image in pixels.

    Returns:
        (..., 2k) int64 bins, 0 to 999.

    Raises:
        RegionError: A coordinate is NaN, or the last axis is not even.
        InputError: `size` is not two positive integers.
    """
    with np.errstate(over="ignore"):  # beyond float32 is infinity, which is clipped below
        pixels = np.asarray(coordinates, dtype=np.float64).astype(np.float32)
        bins = np.floor(pixels / _pixels_per_bin(size, pixels.shape))
    if np.isnan(bins).any():
        raise RegionError(f"coordinates must be numbers of pixels, got NaN in {coordinates!r}")
    clipped: npt.NDArray[np.int64] = np.clip(bins, 0, NUM_BINS - 1).astype(np.int64)
    return clipped


def dequantize(bins: npt.ArrayLike, size: Size) -> npt.NDArray[np.float32]:
    """Dequantizes bins to the pixels of their middles, bitwise as Microsoft's code does.

    Args:
        bins: (..., 2k) integers, x and y alternating. Bins above 999 give coordinates beyond the image.
        size: (width, height) of the image in pixels.

    Returns:
        (..., 2k) float32 pixels, neither rounded nor clamped.

    Raises:
        RegionError: The last axis is not even.
        InputError: `size` is not two positive integers.
    """
    numbers: npt.NDArray[np.float32] = np.asarray(bins, dtype=np.int64).astype(np.float32)
    pixels: npt.NDArray[np.float32] = (numbers + np.float32(0.5)) * _pixels_per_bin(size, numbers.shape)
    return pixels


def _pixels_per_bin(size: Size, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """Width and height of a bin, float32, alternating along the last axis of `shape`."""
    if not shape or shape[-1] % 2:
        raise RegionError(f"coordinates come in x, y pairs, got an array of shape {shape}")
    width, height = check_size(size)
    return np.tile(np.array([width / NUM_BINS, height / NUM_BINS], dtype=np.float32), shape[-1] // 2)


def check_size(size: Size) -> Size:
    """Checks an image size and converts it to Python integers.

    Args:
        size: (width, height) in pixels; numpy integers are accepted.

    Returns:
        The same size.

    Raises:
        InputError: It is not two positive integers.
    """
    try:
        width, height = size
    except (TypeError, ValueError):
        raise InputError(f"size must be (width, height) in pixels, got {size!r}") from None
    for value in (width, height):
        if not _is_integer(value) or value < 1:
            raise InputError(f"size must be (width, height) in whole pixels, both at least 1, got {size!r}")
    return int(width), int(height)


def to_tokens(bins: Iterable[int]) -> str:
    """Formats bins as location tokens: `[52, 332]` becomes `<loc_52><loc_332>`."""
    return "".join(f"<loc_{int(value)}>" for value in bins)


def from_tokens(run: str) -> list[int]:
    """Parses all location tokens in `run`, in order.

    Args:
        run: Any text; everything else in it is ignored.

    Returns:
        The numbers, which may exceed 999; numbers of more than 18 digits saturate at 10**18.
    """
    return [_to_bin(digits) for digits in _LOCATION.findall(run)]


def _to_bin(digits: str) -> int:
    significant = digits.lstrip("0") or "0"
    return int(significant) if len(significant) <= _MAX_DIGITS else _SATURATED_BIN


def to_boxes(bins: Sequence[int], size: Size) -> list[tuple[float, float, float, float]]:
    """Dequantizes bins to boxes, four bins per box; an incomplete last box is dropped.

    Args:
        bins: x1, y1, x2, y2 of the first box, then of the next.
        size: (width, height) of the image in pixels.

    Returns:
        (x1, y1, x2, y2) of each box in pixels. x1 <= x2 and y1 <= y2 are not guaranteed.
    """
    whole = len(bins) // 4 * 4
    pixels = dequantize(np.array(bins[:whole], dtype=np.int64).reshape(-1, 4), size)
    return [(x1, y1, x2, y2) for x1, y1, x2, y2 in pixels.tolist()]


def to_points(bins: Sequence[int], size: Size) -> tuple[Point, ...]:
    """Dequantizes bins to the corners of a quad box or a polygon; a last x without a y is dropped.

    Args:
        bins: x and y of each corner, in drawing order.
        size: (width, height) of the image in pixels.

    Returns:
        The corners in pixels.
    """
    whole = len(bins) // 2 * 2
    pixels = dequantize(np.array(bins[:whole], dtype=np.int64).reshape(-1, 2), size)
    return tuple(Point(x, y) for x, y in pixels.tolist())


@dataclass(frozen=True)
class Region:
    """A box of an image in location bins; for pixels see `from_pixels`.

    Raises:
        RegionError: A bin is not an integer from 0 to 999, or x1 > x2 or y1 > y2.
    """

    x1: int
    """Left edge, 0 to 999."""
    y1: int
    """Top edge, 0 to 999."""
    x2: int
    """Right edge, 0 to 999, at least x1."""
    y2: int
    """Bottom edge, 0 to 999, at least y1."""

    def __post_init__(self) -> None:
        for name in ("x1", "y1", "x2", "y2"):
            # numpy integers are converted, because they hash and serialize to JSON differently
            object.__setattr__(self, name, _check_bin(name, getattr(self, name)))
        _check_order(self.x1, self.y1, self.x2, self.y2)

    @classmethod
    def from_pixels(cls, x1: float, y1: float, x2: float, y2: float, size: Size) -> Region:
        """Converts a box in pixels to a region.

        Args:
            x1: Left edge in pixels.
            y1: Top edge in pixels.
            x2: Right edge in pixels.
            y2: Bottom edge in pixels.
            size: (width, height) of the image in pixels.

        Returns:
            The region, clipped to the image.

        Raises:
            RegionError: A coordinate is not a number, x1 > x2, y1 > y2, or the box is completely outside the image.
            InputError: `size` is not two positive integers.
        """
        width, height = check_size(size)
        box = [
            _check_pixel(name, value) for name, value in zip(("x1", "y1", "x2", "y2"), (x1, y1, x2, y2), strict=True)
        ]
        _check_order(*box)
        if box[0] > width or box[1] > height or box[2] < 0 or box[3] < 0:
            raise RegionError(f"box {(x1, y1, x2, y2)} lies outside the image of {width} x {height} pixels")
        return cls(*quantize(box, (width, height)).tolist())

    @staticmethod
    def is_text(text: str) -> bool:
        """Whether a text is meant as a region: four location tokens and nothing else. Their numbers are not checked."""
        return _REGION.fullmatch(text.strip()) is not None

    @classmethod
    def from_text(cls, text: str) -> Region:
        """Reads a region as it stands in a prompt. Bins are taken as they are: nothing is rounded.

        Args:
            text: `<loc_x1><loc_y1><loc_x2><loc_y2>`; white space around it is ignored.

        Raises:
            RegionError: It is not four location tokens from `<loc_0>` to `<loc_999>`, or x1 > x2 or y1 > y2.
        """
        tokens = text.strip()
        bins = [int(digits) for digits in _BIN_TOKEN.findall(tokens)] if cls.is_text(tokens) else []
        if len(bins) != 4:
            raise RegionError(
                "a region as text is four location tokens from <loc_0> to <loc_999>, such as "
                f'"<loc_52><loc_332><loc_932><loc_774>"; got {text[:100]!r}'
            )
        return cls(*bins)

    @property
    def location_tokens(self) -> str:
        """The region as it stands in a prompt: `<loc_x1><loc_y1><loc_x2><loc_y2>`."""
        return to_tokens((self.x1, self.y1, self.x2, self.y2))


def _is_integer(value: object) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _check_bin(name: str, value: object) -> int:
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool):
        raise RegionError(
            f"Region {name} must be an integer location bin from 0 to {NUM_BINS - 1}, got {value!r}; "
            "for pixels use Region.from_pixels(x1, y1, x2, y2, size)"
        )
    if not 0 <= value < NUM_BINS:
        raise RegionError(
            f"Region {name} = {value} is out of range: bins go from 0 to {NUM_BINS - 1}; "
            "for pixels use Region.from_pixels(x1, y1, x2, y2, size)"
        )
    return int(value)


def _check_pixel(name: str, value: object) -> float:
    if not isinstance(value, (int, float, np.integer, np.floating)) or isinstance(value, bool):
        raise RegionError(f"{name} must be a number of pixels, got {value!r}")
    if math.isnan(value):
        raise RegionError(f"{name} must be a number of pixels, got NaN")
    return float(value)


def _check_order(x1: float, y1: float, x2: float, y2: float) -> None:
    if x1 > x2 or y1 > y2:
        raise RegionError(
            f"the first corner ({x1}, {y1}) must be left of and above the second ({x2}, {y2}): "
            "regions are x1, y1, x2, y2, not x, y, width, height"
        )
