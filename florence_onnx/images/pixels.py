"""Decodes an opened image into a block of memory of four bytes a pixel, and makes it upright RGB in that block.

Pillow stores RGB as four bytes a pixel. Converting an image to it, or turning one, with Pillow's own methods takes a second
block; here both happen in place, so that an image of any mode takes hardly more memory than its result.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from florence_onnx.images.rgb import make_converter, strips

if TYPE_CHECKING:
    from PIL import ImageFile

BYTES = 4
"""Bytes of a pixel: red, green, blue and one that Pillow does not use."""
_OWN_PAGES = 2**22
"""Blocks of at least this many bytes have pages of their own, which go back to the system when the image is dropped."""
_TURN_ROWS = 16
"""Rows that are turned at a time, so that the columns they come from stay in the processor's cache."""
_IN_PLACE = ("RGB", "RGBA", "RGBX")
"""Modes with red, green and blue in the first three of four bytes."""

Plane = npt.NDArray[np.uint8]
TURNS: dict[int, Callable[[Plane], Plane]] = {
    2: lambda plane: plane[:, ::-1],
    3: lambda plane: plane[::-1, ::-1],
    4: lambda plane: plane[::-1],
    5: lambda plane: plane.T,
    6: lambda plane: plane[::-1].T,
    7: lambda plane: plane[::-1, ::-1].T,
    8: lambda plane: plane[:, ::-1].T,
}
"""What makes an (H,W) array upright, by the value of the EXIF orientation."""


class PixelBlock:
    """The memory of one image: four bytes a pixel, row by row, without gaps."""

    def __init__(self, size: tuple[int, int]) -> None:
        """Allocates the block; the system gives it memory as it is written.

        Args:
            size: `(width, height)` in pixels.
        """
        self.size = size
        self.num_bytes = size[0] * size[1] * BYTES
        self.memory = _allocate(self.num_bytes)

    @property
    def pixels(self) -> npt.NDArray[np.uint8]:
        """The block as (H,W,4) uint8."""
        return np.frombuffer(self.memory, np.uint8).reshape(self.size[1], self.size[0], BYTES)

    def map(self, mode: str) -> Any:
        """Returns Pillow's image memory of any mode, in this block; its rows begin where those of RGB would.

        `Image.frombuffer` makes such memory too, though for a few modes only.
        """
        core = Image.core  # type: ignore[attr-defined]
        return core.map_buffer(self.memory, self.size, "raw", 0, (mode, self.size[0] * BYTES, 1))

    def as_image(self) -> Image.Image:
        """Returns the block as an image of mode RGB, which keeps it alive."""
        return Image.Image()._new(self.map("RGB"))


_PLUGINS = ("PNG", "JPEG", "MPO", "GIF", "WEBP", "BMP", "TIFF", "AVIF")
"""Formats whose plugins decode into memory that they are given; others may take an image that has memory for decoded."""


def decode(opened: ImageFile.ImageFile, check: Callable[[tuple[int, int]], None]) -> PixelBlock:
    """Decodes an image and converts it to RGB with the pixels of `rgb.to_rgb`; EXIF orientation is not applied.

    Args:
        opened: An image that Pillow has opened and not decoded yet.
        check: Called with the size once more when the image is decoded; raises an error if it is too large.
    """
    # of a TIFF that is to be turned, Pillow's size is the one after that
    block = PixelBlock(getattr(opened, "_tile_size", opened.size))
    target = block.map(opened.mode)
    if opened.format in _PLUGINS:
        opened.im = target
        if opened.palette:
            opened.palette.dirty = 1  # the new memory has no palette yet
    opened.load()
    check(opened.im.size)
    decoded = opened._new(opened.im)  # of the size of its memory
    if opened.im is not target:  # the plugin made memory of its own, as that for GIF does
        del target, block
        block = PixelBlock(opened.im.size)
        _convert(decoded, block)
    elif opened.mode not in _IN_PLACE:
        _convert(decoded, block)
    return block


def turn(block: PixelBlock, orientation: int) -> None:
    """Makes the image of a block upright, one colour at a time.

    Args:
        block: The block; its size changes with the image.
        orientation: The value of the EXIF tag.
    """
    if orientation not in TURNS:
        return
    flat = np.frombuffer(block.memory, np.uint8)
    turned = TURNS[orientation](block.pixels[..., 0])
    plane = np.empty(turned.shape, np.uint8)
    for colour in range(3):
        turned = TURNS[orientation](block.pixels[..., colour])
        for top in range(0, len(turned), _TURN_ROWS):
            plane[top : top + _TURN_ROWS] = turned[top : top + _TURN_ROWS]
        flat[colour::BYTES] = plane.ravel()
    block.size = (turned.shape[1], turned.shape[0])


def _allocate(num_bytes: int) -> bytearray | mmap.mmap:
    if num_bytes < _OWN_PAGES:
        return bytearray(num_bytes)
    if not hasattr(mmap, "MAP_PRIVATE"):  # Windows, which has no processes that share it by accident
        return mmap.mmap(-1, num_bytes)
    return mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def _convert(image: Image.Image, block: PixelBlock) -> None:
    """Converts an image, which may lie in the block itself: every strip is read before it is written."""
    to_rgb, pixels = make_converter(image), block.pixels
    for top, strip in strips(image):
        levels = np.frombuffer(to_rgb(strip).tobytes("raw", "RGBX"), np.uint8)
        pixels[top : top + strip.height] = levels.reshape(strip.height, strip.width, BYTES)
