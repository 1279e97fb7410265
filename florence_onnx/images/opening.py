"""Opens an encoded image within limits, before any of its pixels are decoded.

A file is recognised by how it begins, and the one plugin of Pillow for that format sees it. What would cost that plugin
more than the image is worth is taken out of the file or refused first: by `png_chunks`, `gif_blocks`, `jpeg_scans` and
`tiff_tags`.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import struct
import zlib
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO

from PIL import Image, UnidentifiedImageError

from florence_onnx.errors import ImageDecodeError, ImageError, ImageTooLargeError, InputError
from florence_onnx.images import gif_blocks, jpeg_scans, pixels, png_chunks, tiff_tags

if TYPE_CHECKING:
    from PIL import ImageFile

FORMATS = ("PNG", "JPEG", "MPO", "GIF", "WEBP", "BMP", "TIFF", "AVIF")
"""The formats that are decoded, by Pillow's names, unless the caller allows more."""
MAX_PIXELS = 178_956_970
"""Default limit of width times height: where Pillow itself refuses to decode (it warns from half of that on)."""
MAX_SIDE = 65_535
"""Default limit of width and of height in pixels: the largest of a JPEG, whose resizing takes little memory."""
_MAX_RUN_LENGTH_PIXELS = 2_000_000
"""Most pixels of a run-length encoded BMP, which Pillow decodes in Python code."""
_REFUSED = {
    "EPS": "decoding one would run Ghostscript",
    "IPTC": "what it holds may be of any format, which would run Ghostscript for an EPS",
}
"""Formats that no caller can allow."""
_OTHERS = {
    b"%!PS": "EPS",
    b"\xc5\xd0\xd3\xc6": "EPS",
    b"\0\0\1\0": "ICO",
    b"8BPS": "PSD",
    b"icns": "ICNS",
    b"\xff\x4f\xff\x51": "JPEG2000",
    b"\0\0\0\x0cjP": "JPEG2000",
    b"DDS ": "DDS",
    b"P4": "PPM",
    b"P5": "PPM",
    b"P6": "PPM",
    b"\x1c\1": "IPTC",
    b"\x1c\2": "IPTC",
    b"\x1c\3": "IPTC",
}
"""Further formats that people have, by how they begin; for messages only."""
# Pillow's decoders raise all of these on damaged data (found by decoding damaged files of every format).
DAMAGED = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    EOFError,
    LookupError,
    ArithmeticError,
    AttributeError,
    RuntimeError,
    struct.error,
    zlib.error,
    Warning,  # where the caller turns warnings into errors
)
_PIXEL_BYTES = {"WEBP": 20, "AVIF": 16}
"""Bytes that decoding takes for each pixel where it is more than 6, as measured by `benchmarks.serving.image_costs`: the
decoders of these formats keep several copies of an image."""
_BOMBS = (Image.DecompressionBombError, Image.DecompressionBombWarning)
_ORIENTATION_TAG = 0x0112


class DecodingEndedError(Exception):
    """Decoding was ended by who asked for it."""


@dataclass(frozen=True)
class DecodeLimits:
    """Limits of an encoded image."""

    max_pixels: int = MAX_PIXELS
    """Most pixels: width times height."""
    max_side: int = MAX_SIDE
    """Most pixels of width and of height."""
    formats: Collection[str] = FORMATS
    """Formats to decode, by Pillow's names."""

    def check(self, size: tuple[int, int], name: str) -> None:
        """Checks the size of an image.

        Args:
            size: `(width, height)` in pixels.
            name: What messages call the image.

        Raises:
            ImageTooLargeError: It has too many pixels, or a side is too long.
            ImageDecodeError: It has none.
        """
        width, height = size
        if width * height > self.max_pixels:
            raise ImageTooLargeError(
                f"{name} has {width} x {height} = {width * height:,} pixels, allowed are {self.max_pixels:,}; raise "
                "max_pixels to accept it"
            )
        if max(width, height) > self.max_side:
            raise ImageTooLargeError(
                f"{name} has {width} x {height} pixels, allowed are {self.max_side:,} a side; raise max_side to accept it"
            )
        if width <= 0 or height <= 0:
            raise ImageDecodeError(f"{name} has no pixels: it is {width} x {height}")


class OpenedImage:
    """An image whose header was read, and whose pixels were not decoded."""

    def __init__(self, opened: ImageFile.ImageFile, name: str, limits: DecodeLimits, extra_bytes: int) -> None:
        self._opened = opened
        self._name = name
        self._limits = limits
        self.size = opened.size
        """`(width, height)` in pixels, as stored."""
        num_pixels = self.size[0] * self.size[1]
        self.peak_bytes = _PIXEL_BYTES.get(str(opened.format), 6) * num_pixels + extra_bytes
        """Bytes of memory that decoding takes at most, those of the result among them."""
        self.result_bytes = pixels.BYTES * num_pixels
        """Bytes of the result."""

    def decode(self, *, apply_exif: bool = True) -> pixels.PixelBlock:
        """Decodes the pixels to upright RGB.

        Args:
            apply_exif: Whether to apply the EXIF orientation.

        Raises:
            ImageDecodeError: The data is truncated or damaged.
            ImageTooLargeError: The image turns out to be larger than its header says, and too large.
        """
        # Pillow turns a TIFF by itself, whatever the caller wants, and would need a second block for that
        orientation = _take_orientation(self._opened) if self._opened.format == "TIFF" else 1
        try:
            block = pixels.decode(self._opened, lambda size: self._limits.check(size, self._name))
        except ImageError:
            raise
        except _BOMBS as error:
            raise ImageTooLargeError(f"{self._name} is too large: {error}") from None
        except DAMAGED as error:
            raise ImageDecodeError(f"{self._name} is truncated or damaged: {error}") from None
        if apply_exif and self._opened.format != "TIFF":
            orientation = get_orientation(self._opened)
        pixels.turn(block, orientation)
        return block


def open_image(stream: BinaryIO, name: str, limits: DecodeLimits) -> OpenedImage:
    """Reads the header of an image.

    Args:
        stream: The encoded image; it can seek.
        name: What messages call the image.
        limits: Its limits.

    Raises:
        ImageDecodeError: It is not an image of an allowed format, is empty, or is damaged.
        ImageTooLargeError: It is larger than allowed, or would cost more than an image of its size.
        InputError: `limits.formats` names a format that does not exist or that cannot be allowed.
    """
    stream.seek(0)
    head = stream.read(32)
    further, known = check_formats(limits.formats), _recognise(head)
    formats = [known] if known in map(str.upper, limits.formats) else further
    extra_bytes = 0
    if formats == ["PNG"]:
        stream = png_chunks.strip(stream, name)
    elif formats == ["GIF"]:
        stream = gif_blocks.strip(stream, name)
    elif formats == ["JPEG"]:
        stream.seek(0)
        content = stream.read()
        stream, extra_bytes = io.BytesIO(content), jpeg_scans.read_scans(content, name).coefficient_bytes
    elif formats == ["TIFF"]:
        layout = tiff_tags.read_layout(stream, name)
        extra_bytes = layout.chunk_bytes
    elif formats == ["WEBP"]:
        limits.check(_webp_size(head), name)  # Pillow allocates its canvas when it opens the file
    opened = _open(stream, head, name, formats)
    limits.check(opened.size, name)
    _check_run_lengths(opened, stream, name)
    return OpenedImage(opened, name, limits, extra_bytes)


def check_formats(formats: Collection[str]) -> list[str]:
    """Loads Pillow's plugins of formats beyond `FORMATS`.

    Returns:
        The formats beyond `FORMATS`, in upper case.

    Raises:
        InputError: One does not exist, or cannot be allowed.
    """
    if isinstance(formats, str):
        raise InputError(f"formats must be a list of Pillow's names of formats, got the string {formats!r}")
    further = [each.upper() for each in formats if each.upper() not in FORMATS]
    if any(each not in Image.OPEN for each in further):
        Image.init()
    for each in further:
        if each in _REFUSED:
            raise InputError(f"{each} cannot be allowed: {_REFUSED[each]}; convert such files to PNG")
        if each not in Image.OPEN:
            raise InputError(f"Pillow knows no format {each!r}; it knows {', '.join(sorted(Image.OPEN))}")
    return further


def get_orientation(image: Image.Image) -> int:
    """Returns the EXIF orientation of an image, 1 if it has none or its EXIF data is damaged."""
    try:
        tiff_tags.check_tags(_exif_of(image))
        orientation = image.getexif().get(_ORIENTATION_TAG)
    except (*DAMAGED, tiff_tags.TooManyTagsError):  # an image with damaged EXIF is still usable
        return 1
    return orientation if isinstance(orientation, int) else 1


def _take_orientation(image: Image.Image) -> int:
    """Returns the EXIF orientation of an image, and makes Pillow take it for upright."""
    orientation = get_orientation(image)
    with contextlib.suppress(*DAMAGED):
        image.getexif()[_ORIENTATION_TAG] = 1
    return orientation


def _exif_of(image: Image.Image) -> bytes:
    exif = image.info.get("exif", b"")
    return exif.removeprefix(b"Exif\0\0") if isinstance(exif, bytes) else b""


def _recognise(head: bytes) -> str:
    """Returns the format of `FORMATS` that a file begins like, or an empty string."""
    if head.startswith(png_chunks.SIGNATURE):
        return "PNG"
    if head.startswith(jpeg_scans.SIGNATURE):
        return "JPEG"
    if head.startswith(gif_blocks.SIGNATURES):
        return "GIF"
    if head.startswith(tiff_tags.SIGNATURES):
        return "TIFF"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    if head[4:12] in (b"ftypavif", b"ftypavis") or (head[4:12] in (b"ftypmif1", b"ftypmsf1") and b"avif" in head):
        return "AVIF"
    return "BMP" if head[:2] == b"BM" else ""


def _webp_size(head: bytes) -> tuple[int, int]:
    """Reads the size of a WebP from its first 30 bytes; (1, 1) where it cannot be read, which Pillow then reports."""
    kind = head[12:16]
    if kind == b"VP8X":
        return 1 + int.from_bytes(head[24:27], "little"), 1 + int.from_bytes(head[27:30], "little")
    if kind == b"VP8L":
        both = int.from_bytes(head[21:25], "little")
        return 1 + (both & 0x3FFF), 1 + (both >> 14 & 0x3FFF)
    if kind == b"VP8 ":
        width, height = int.from_bytes(head[26:28], "little"), int.from_bytes(head[28:30], "little")
        return max(1, width & 0x3FFF), max(1, height & 0x3FFF)
    return 1, 1


def _open(stream: BinaryIO, head: bytes, name: str, formats: list[str]) -> ImageFile.ImageFile:
    try:
        for each in formats:
            if each in FORMATS and each not in Image.OPEN:
                importlib.import_module(f"PIL.{_PLUGINS[each]}ImagePlugin")
        return Image.open(stream, formats=[each for each in formats if each in Image.OPEN])
    except ImageError:
        raise
    except _BOMBS as error:
        raise ImageTooLargeError(f"{name} is too large: {error}") from None
    except (*DAMAGED, ImportError) as error:
        raise ImageDecodeError(_explain(head, name, formats, error)) from None


_PLUGINS = {"PNG": "Png", "JPEG": "Jpeg", "GIF": "Gif", "WEBP": "WebP", "BMP": "Bmp", "TIFF": "Tiff", "AVIF": "Avif"}


def _explain(head: bytes, name: str, formats: list[str], error: BaseException) -> str:
    if not head:
        return f"{name} is empty (0 bytes)"
    if not isinstance(error, (UnidentifiedImageError, ImportError)):
        return f"{name} is a damaged image: {error}"
    if formats and formats[0] in FORMATS:
        if formats[0] not in Image.OPEN:
            return f"{name} is of format {formats[0]}, which this Pillow cannot read; install a newer one"
        return f"{name} is truncated or damaged: it begins as {formats[0]} and goes on as something else"
    other = next((other for start, other in _OTHERS.items() if head.startswith(start)), "")
    if other in _REFUSED:
        return f"{name} is of format {other}: {_REFUSED[other]}; convert it to PNG first"
    if other and other not in formats:
        return (
            f"{name} is of format {other}, which has to be allowed: convert it to PNG, or pass formats=[{other!r}] if you "
            "trust the file"
        )
    if head[4:8] == b"ftyp" and "HEIF" not in formats:
        hint = "; for HEIC, install pillow-heif, call pillow_heif.register_heif_opener() and pass formats=['HEIF']"
    else:
        hint = "; if it is of another format that Pillow knows, convert it to PNG, or pass formats=[…] if you trust the file"
    return f"{name} is not an image that Pillow can read as {', '.join((*FORMATS, *formats))}{hint}"


def _check_run_lengths(opened: ImageFile.ImageFile, stream: BinaryIO, name: str) -> None:
    if not opened.tile or opened.tile[0][0] != "bmp_rle":
        return
    num_pixels, num_bytes = opened.size[0] * opened.size[1], stream.seek(0, 2)
    if num_pixels > _MAX_RUN_LENGTH_PIXELS or num_bytes > 4 * num_pixels + 2**16:
        raise ImageTooLargeError(
            f"{name} is a run-length encoded BMP of {num_pixels:,} pixels in {num_bytes:,} bytes, allowed are "
            f"{_MAX_RUN_LENGTH_PIXELS:,} pixels and 4 bytes for each; save it as PNG"
        )
