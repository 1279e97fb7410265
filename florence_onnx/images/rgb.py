"""Converts images and arrays to RGB, with the colours of Pillow's `convert("RGB")`."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from PIL import Image

from florence_onnx.errors import ImageError, ImageTooLargeError


def to_rgb(image: Image.Image) -> Image.Image:
    """Converts an image to RGB; grey of more than 8 bits is scaled, where `convert("RGB")` would clip it.

    Returns:
        A new image, or `image` itself if it is RGB already.
    """
    if image.mode == "RGB":
        return image
    if image.mode == "F" or image.mode.startswith("I"):
        return _to_grey(np.asarray(image)).convert("RGB")
    if image.mode == "La":  # premultiplied alpha, which Pillow does not convert to RGB directly
        image = image.convert("LA")
    if "transparency" in image.info:  # has no effect on RGB, but Pillow may warn about it
        image = image.copy()
        del image.info["transparency"]
    return image.convert("RGB")


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


def _to_grey(values: npt.NDArray[np.generic]) -> Image.Image:
    """Scales grey values of more than 8 bits to 8 bits.

    Args:
        values: (H,W) uint16, int32 or float32. The scale is documented in `decoding.load`; NaN and -inf become black,
            +inf becomes white.

    Returns:
        An image of mode L.
    """
    wide = values.astype(np.float64)
    finite = wide[np.isfinite(wide)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    if values.dtype.kind == "u":
        low, high = 0.0, 65535.0
    elif low >= 0 and high <= 65535:
        low, high = 0.0, 1.0 if high <= 1 and values.dtype == np.float32 else 255.0 if high <= 255 else 65535.0
    scaled = (np.nan_to_num(wide, nan=low, posinf=high, neginf=low) - low) * (255.0 / ((high - low) or 1.0))
    return Image.fromarray(np.clip(np.rint(scaled), 0, 255).astype(np.uint8))
