"""RGB images to the vision encoder's `pixel_values`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from florence_onnx.errors import ImageError
from florence_onnx.images.placement import Fit, Placement, Size
from florence_onnx.images.rgb import from_array, to_rgb

IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)
"""Those of ImageNet, as in the `preprocessor_config.json` of Florence-2."""


def preprocess(
    image: Image.Image | npt.NDArray[np.uint8],
    *,
    size: tuple[int, int] = (768, 768),
    mean: Sequence[float] = IMAGE_MEAN,
    std: Sequence[float] = IMAGE_STD,
    out: npt.NDArray[np.float32] | None = None,
    fit: Fit = "stretch",
) -> npt.NDArray[np.float32]:
    """Resizes and normalizes an image; the result is bitwise that of transformers' `CLIPImageProcessor` with Pillow.

    The image is stretched to `size`; its aspect ratio is not kept, unless `fit` says otherwise.

    Args:
        image: A PIL image (converted to RGB as by `load`, EXIF orientation not applied) or an (H,W,3) uint8 array.
        size: Input size of the vision encoder, (width, height) in pixels.
        mean: Mean of red, green and blue, on the scale 0 to 1.
        std: Standard deviation of red, green and blue, on the scale 0 to 1.
        out: C-contiguous (3,H,W) float32 array to write into, such as one image of a batch.
        fit: `"stretch"`, or `"pad"`: the aspect ratio is kept, and margins of the colour `mean` fill the rest; see
            `placement.Placement`. transformers has no such thing.

    Returns:
        (1,3,H,W) float32, C-contiguous: a view of `out` with a batch axis, or a new array.

    Raises:
        ImageError: `image` is of another type, or `out` has another shape, dtype or layout.
    """
    if isinstance(image, np.ndarray):
        image = from_array(image, max_pixels=image.size)
    elif not isinstance(image, Image.Image):
        raise ImageError(f"preprocess takes a PIL image or an array, got {type(image).__name__}; use load first")
    width, height = size
    pixels = np.empty((3, height, width), dtype=np.float32) if out is None else _check_out(out, (3, height, width))
    bands = _resize(to_rgb(image), Placement(image.size, (width, height), fit), mean).split()
    for plane, band, band_mean, band_std in zip(pixels, bands, mean, std, strict=True):
        # transformers multiplies by 1/255 in float64 and rounds to float32, then subtracts and divides in float32. One
        # float32 division rounds to the same value for each of the 256 levels (a test compares them all), so the
        # float64 copy of the image is not needed. Folding mean and std into one factor would round differently.
        np.divide(np.asarray(band), np.float32(255), out=plane, dtype=np.float32)
        plane -= np.float32(band_mean)
        plane /= np.float32(band_std)
    return pixels[np.newaxis]


def _resize(image: Image.Image, placement: Placement, mean: Sequence[float]) -> Image.Image:
    left, top, width, height = placement.box
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    if resized.size == placement.image_size:
        return resized
    red, green, blue = (round(255 * value) for value in mean)
    canvas = Image.new("RGB", placement.image_size, (red, green, blue))
    canvas.paste(resized, (left, top))
    return canvas


@dataclass(frozen=True)
class Preparation:
    """How images become `pixel_values`: at which size, and fitted how. The same for all images of a call."""

    image_size: Size
    """Input size of the vision encoder."""
    image_mean: tuple[float, float, float] = IMAGE_MEAN
    image_std: tuple[float, float, float] = IMAGE_STD
    fit: Fit = "stretch"

    def pixel_values(self, image: Image.Image) -> npt.NDArray[np.float32]:
        """The `pixel_values` of an RGB image, `(1, 3, H, W)` float32."""
        return preprocess(image, size=self.image_size, mean=self.image_mean, std=self.image_std, fit=self.fit)

    def placement(self, image: Image.Image) -> Placement:
        """Where an image lies within its `pixel_values`."""
        return Placement(image.size, self.image_size, self.fit)


def _check_out(out: npt.NDArray[np.float32], shape: tuple[int, int, int]) -> npt.NDArray[np.float32]:
    if out.shape != shape or out.dtype != np.float32 or not out.flags.c_contiguous:
        raise ImageError(
            f"out must be a C-contiguous float32 array of shape {shape}, got {out.dtype} of shape {out.shape}"
        )
    return out
