"""Converts images and arrays to RGB, with the colours of Pillow's `convert("RGB")`, a strip at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
from PIL import Image

from florence_onnx.errors import ImageError, ImageTooLargeError

_STRIP_PIXELS = 2**16
"""Pixels of a strip: its copies, eight bytes a pixel in float64, stay in the processor's cache."""

Converter = Callable[[Image.Image], Image.Image]
"""Converts a strip of an image to RGB."""


def to_rgb(image: Image.Image) -> Image.Image:
    """Converts an image to RGB; grey of more than 8 bits is scaled, where `convert("RGB")` would clip it.

    Returns:
        A new image, or `image` itself if it is RGB already.
    """
    if image.mode == "RGB":
        return image
    if not is_wide_grey(image):
        return _convert(image)
    grey, scale = Image.new("L", image.size), _make_scale(image)
    for top, strip in strips(image):
        grey.paste(scale(strip), (0, top))
    return grey.convert("RGB")


def make_converter(image: Image.Image) -> Converter:
    """Returns what converts the strips of an image to RGB, with the pixels of `to_rgb`."""
    if not is_wide_grey(image):
        return _convert
    scale = _make_scale(image)
    return lambda strip: scale(strip).convert("RGB")


def strips(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """Cuts an image into strips of its whole width, from top to bottom.

    Yields:
        The row at which a strip begins, and a copy of the strip.
    """
    width, height = image.size
    rows = max(1, _STRIP_PIXELS // width)
    if image.mode == "LAB":  # Pillow makes a colour transform for each strip, which takes longer than its pixels
        rows = max(rows, -(-height // 8))
    for top in range(0, height, rows):
        yield top, image.crop((0, top, width, min(top + rows, height)))


def is_wide_grey(image: Image.Image) -> bool:
    """Whether an image is grey of more than 8 bits: 16 bits, 32 bits or floats."""
    return image.mode == "F" or image.mode.startswith("I")


def from_array(array: npt.NDArray[np.uint8], max_pixels: int) -> Image.Image:
    """Copies an (H,W,3) uint8 array in RGB order into an image.

    Raises:
        ImageTooLargeError: It has more than `max_pixels` pixels.
        ImageError: It has another shape or dtype, or is empty.
    """
    needed = "an image array must be (H, W, 3) uint8 in RGB order"
    if array.ndim != 3 or array.shape[2] != 3:
        raise ImageError(f"{needed}, got shape {array.shape}")
    if array.dtype != np.uint8:
        raise ImageError(f"{needed}, got {array.dtype}; scale it to 0..255 and call .astype(np.uint8)")
    if not array.size:
        raise ImageError(f"{needed}, got an empty one of shape {array.shape}")
    height, width, _ = array.shape
    if height * width > max_pixels:
        raise ImageTooLargeError(
            f"the array has {width} x {height} pixels, allowed are {max_pixels:,}; raise max_pixels"
        )
    return Image.fromarray(np.ascontiguousarray(array))


def _convert(image: Image.Image) -> Image.Image:
    if image.mode == "La":  # premultiplied alpha, which Pillow does not convert to RGB directly
        image = image.convert("LA")
    if "transparency" in image.info:  # has no effect on RGB, but Pillow may warn about it
        image = image.copy()
        del image.info["transparency"]
    return image.convert("RGB")


def _make_scale(image: Image.Image) -> Converter:
    """Returns what scales strips of wide grey to mode L.

    The scale is documented in `decoding.load`; NaN and -inf become black, +inf becomes white.
    """
    if image.mode.startswith("I;16"):
        table = _scale(np.arange(2**16), 0.0, 65535.0)
        return lambda strip: Image.fromarray(table[np.asarray(strip)])
    low, high = _find_range(image)
    return lambda strip: Image.fromarray(_scale(np.asarray(strip), low, high))


def _find_range(image: Image.Image) -> tuple[float, float]:
    """Returns the values that become black and white."""
    ends = [_find_ends(np.asarray(strip)) for _, strip in strips(image)]
    low = min((end[0] for end in ends if end), default=0.0)
    high = max((end[1] for end in ends if end), default=0.0)
    if low < 0 or high > 65535:
        return low, high
    if image.mode == "F" and high <= 1:
        return 0.0, 1.0
    return 0.0, 255.0 if high <= 255 else 65535.0


def _find_ends(values: npt.NDArray[np.generic]) -> tuple[float, float] | None:
    if not _is_finite(values):
        values = values[np.isfinite(values)]
    return (float(values.min()), float(values.max())) if values.size else None


def _is_finite(values: npt.NDArray[np.generic]) -> bool:
    """Whether no value is infinite or NaN, each of which is the least or the greatest one."""
    return bool(np.isfinite(values.min()) and np.isfinite(values.max()))


def _scale(values: npt.NDArray[np.generic], low: float, high: float) -> npt.NDArray[np.uint8]:
    wide = values.astype(np.float64)
    if not _is_finite(values):
        np.nan_to_num(wide, copy=False, nan=low, posinf=high, neginf=low)
    wide -= low
    wide *= 255.0 / ((high - low) or 1.0)
    np.rint(wide, out=wide)
    np.clip(wide, 0, 255, out=wide)
    return wide.astype(np.uint8)
