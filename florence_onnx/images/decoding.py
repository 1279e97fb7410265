"""Loads images from all supported sources, as upright RGB.

No global setting of Pillow or of `warnings` is changed, so all of this may run in several threads at once.
"""

from __future__ import annotations

import io
import os
from collections.abc import Collection
from pathlib import Path
from typing import BinaryIO, TypeAlias, Union

import numpy as np
import numpy.typing as npt
from PIL import Image

from florence_onnx import forks
from florence_onnx.errors import (
    ImageDecodeError,
    ImageDownloadError,
    ImageError,
    ImageNotFoundError,
    ImageTooLargeError,
    InputError,
)
from florence_onnx.images import url
from florence_onnx.images.opening import (
    DAMAGED,
    FORMATS,
    MAX_PIXELS,
    MAX_SIDE,
    DecodeLimits,
    check_formats,
    get_orientation,
    open_image,
)
from florence_onnx.images.rgb import from_array, to_rgb

ImageInput: TypeAlias = Union[str, "os.PathLike[str]", bytes, BinaryIO, Image.Image, npt.NDArray[np.uint8]]
"""Path, `http(s)` URL or `data:` URI, encoded bytes, binary file object, PIL image, or (H,W,3) uint8 array."""

MAX_BYTES = 50 * 2**20
"""Default limit of downloads and `data:` URIs: 50 MiB, as at fal."""
TIMEOUT = 30.0
"""Default time limit of a download in seconds."""

_TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# A PIL image is decoded at its first use, and Pillow has no lock for that: two threads that share an image of a caller
# would both read from its file.
_CALLERS_IMAGE_LOCK = forks.Lock()


def load(
    image: ImageInput,
    *,
    apply_exif: bool = True,
    max_pixels: int = MAX_PIXELS,
    max_side: int = MAX_SIDE,
    max_bytes: int = MAX_BYTES,
    timeout: float = TIMEOUT,
    public_only: bool = False,
    allowed_hosts: Collection[str] = (),
    formats: Collection[str] = FORMATS,
    copy: bool = False,
) -> Image.Image:
    """Loads an image.

    Colours are those of Pillow's `convert("RGB")`: transparency is dropped, not blended. Grey values that it would clip
    (16 and 32 bits, floats) are scaled: 16 bits by 1/257; 32 bits and floats are kept if all are within 0..255, scaled
    if all are within 0..65535 or (floats) 0..1, and otherwise stretched from the smallest to the largest.

    Args:
        image: A path, an `http(s)` URL, a `data:` URI, encoded bytes, a binary file object (read from its current
            position), a PIL image, or an (H,W,3) uint8 array in RGB order.
        apply_exif: Whether to apply the EXIF orientation. transformers does not: pass False to match it.
        max_pixels: Most pixels (width times height) to accept; checked before any pixel is decoded, and after.
        max_side: Most pixels of width and of height to accept.
        max_bytes: Most bytes of a download or a `data:` URI.
        timeout: Seconds for a download, redirects included.
        public_only: For strings from untrusted callers: a string must be a URL and not a path, and must lead to the
            public internet, redirects included; proxies of the environment are not used.
        allowed_hosts: Exceptions to `public_only`: `HOST:PORT`, or `HOST` for its ports 80 and 443.
        formats: Formats to decode, by Pillow's names. Those beyond the default, such as `["ICO"]`, have no limits but
            pixels and sides: for files that you trust, not together with `public_only`.
        copy: Whether to copy a PIL image that is RGB and upright already, so that the caller may change theirs.

    Returns:
        The image in mode RGB, decoded. Without `copy`, a PIL image that is RGB and upright is returned itself.

    Raises:
        ImageNotFoundError: There is no such file.
        ImageDecodeError: The data is not an image, is empty or is truncated.
        ImageTooLargeError: There are more pixels or bytes than allowed, or Pillow takes it for a decompression bomb.
        ImageDownloadError: The URL was refused, could not be fetched, or returned no image.
        InputError: `allowed_hosts` is malformed.
        ImageError: The image is a directory, an unreadable file, or of an unsupported type, shape or dtype.
    """
    limits = DecodeLimits(max_pixels, max_side, formats)
    if public_only and check_formats(formats):
        raise InputError(f"formats beyond {', '.join(FORMATS)} are not for untrusted callers: omit public_only")
    if isinstance(image, Image.Image):
        with _CALLERS_IMAGE_LOCK:
            _decode_callers_image(image, limits)
            rgb = _to_upright_rgb(image, apply_exif)
            return rgb.copy() if copy and rgb is image else rgb
    if isinstance(image, np.ndarray):
        return from_array(image, max_pixels)
    if isinstance(image, str) and url.is_url(image):
        from florence_onnx.images import download

        content = download.download(
            image, max_bytes=max_bytes, timeout=timeout, public_only=public_only, allowed_hosts=allowed_hosts
        )
        return _decode_download(content, url.shorten(image), apply_exif, limits)
    if isinstance(image, str) and url.is_data_uri(image):
        content = url.decode_data_uri(image, max_bytes=max_bytes)
        return _decode(io.BytesIO(content), "the data: URI", apply_exif, limits)
    if isinstance(image, str) and public_only:
        hint = url.explain(image)
        raise ImageDownloadError(
            f"cannot download {url.shorten(image)!r}: it is neither an http(s) URL nor a data: URI"
            f"{f'; {hint}' if hint else ''}"
        )
    if isinstance(image, (bytes, bytearray, memoryview)):
        return _decode(io.BytesIO(image), f"{len(image)} bytes of data", apply_exif, limits)
    if isinstance(image, (str, os.PathLike)):
        return _load_file(image, apply_exif, limits)
    if hasattr(image, "read"):
        return _decode(io.BytesIO(_read_stream(image)), f"the file object {image!r}", apply_exif, limits)
    raise ImageError(
        f"cannot read an image from {type(image).__name__}: pass a path, http(s) URL, data: URI, bytes, binary file "
        "object, PIL image or (H, W, 3) uint8 array"
    )


def _decode_download(content: bytes, name: str, apply_exif: bool, limits: DecodeLimits) -> Image.Image:
    try:
        return _decode(io.BytesIO(content), name, apply_exif, limits)
    except ImageDecodeError as error:
        beginning = content[:40].decode("latin-1")
        raise ImageDownloadError(f"the URL gave no image: {error} (it begins with {beginning!r})") from error


def _load_file(path: str | os.PathLike[str], apply_exif: bool, limits: DecodeLimits) -> Image.Image:
    name = url.shorten(os.fspath(path))
    if not name:
        raise ImageNotFoundError("the path of the image is empty")
    try:
        with Path(path).open("rb") as stream:
            return _decode(stream, name, apply_exif, limits)
    except ImageError:  # several of ours are an OSError or ValueError too
        raise
    except FileNotFoundError:
        raise ImageNotFoundError(_explain_missing(os.fspath(path), name)) from None
    except IsADirectoryError:
        raise ImageError(f"{name} is a directory; pass the images in it one by one") from None
    except OSError as error:
        if hint := url.explain(os.fspath(path)):  # base64 is too long for a file name
            raise ImageError(f"{name!r} is no image file: {hint}") from None
        raise ImageError(f"cannot open {name}: {error.strerror or error}") from None
    except ValueError as error:  # the path contains NUL
        raise ImageError(f"cannot open {name!r}: {error}") from None


def _explain_missing(path: str, name: str) -> str:
    hint = url.explain(path)
    if hint is not None:
        return f"{name!r} is neither an http(s) URL nor a data: URI nor an image file: {hint}"
    return f"no such image file: {name} (working directory {Path.cwd()})"


def _read_stream(stream: BinaryIO) -> bytes:
    try:
        content = stream.read()
    except (OSError, ValueError) as error:  # ValueError: a closed file, or text that does not decode
        raise ImageError(f"cannot read from the file object {stream!r}: {error}") from None
    if not isinstance(content, (bytes, bytearray)):
        raise ImageError(f"the file object {stream!r} gave {type(content).__name__}; open it in binary mode ('rb')")
    return content


def _decode(stream: BinaryIO, name: str, apply_exif: bool, limits: DecodeLimits) -> Image.Image:
    return open_image(stream, name, limits).decode(apply_exif=apply_exif).as_image()


def _decode_callers_image(image: Image.Image, limits: DecodeLimits) -> None:
    name = "the PIL image"
    limits.check(image.size, name)
    try:
        image.load()
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageTooLargeError(f"{name} is too large: {error}") from None
    except DAMAGED as error:
        raise ImageDecodeError(f"{name} is truncated or damaged: {error}") from None
    limits.check(image.size, name)


def _to_upright_rgb(image: Image.Image, apply_exif: bool) -> Image.Image:
    transposition = _TRANSPOSITIONS.get(get_orientation(image)) if apply_exif else None
    rgb = to_rgb(image)
    return rgb if transposition is None else rgb.transpose(transposition)
