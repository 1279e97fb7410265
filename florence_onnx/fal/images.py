"""Reads `image_url`: download or decode within limits, and report failures as fal's errors."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from PIL import Image as PILImage

from florence_onnx.errors import ImageDecodeError, ImageDownloadError, ImageError, ImageTooLargeError
from florence_onnx.fal import problems
from florence_onnx.fal.problems import RequestError, field_error
from florence_onnx.images import decoding, url
from florence_onnx.images.transfer import Transfer

_log = logging.getLogger("florence_onnx")


@dataclass(frozen=True)
class ImageLimits:
    """Limits for images."""

    max_bytes: int = decoding.MAX_BYTES
    """Most bytes of a download, a `data:` URI or an upload."""
    max_pixels: int = decoding.MAX_PIXELS
    """Most pixels: width times height."""
    timeout: float = decoding.TIMEOUT
    """Seconds for a download, redirects included."""
    public_only: bool = False
    """Whether to refuse addresses that are not public: for servers that fetch URLs of untrusted callers."""
    allowed_hosts: Collection[str] = ()
    """Exceptions to `public_only`: `host`, or `host:port`."""
    least_rate: float = 0.0
    """Least bytes a second of a download, see `florence_onnx.images.download.download`; 0 for no limit."""


class ImageReader:
    """Reads images for one service."""

    def __init__(self, limits: ImageLimits, find_stored: Callable[[str], Path | None] | None = None) -> None:
        """Reads nothing yet.

        Args:
            limits: Limits for images.
            find_stored: Returns the file behind a URL of this server's own file store, or None for any other URL. The
                server must not fetch from itself: with `public_only` it could not, and it might wait for itself.
        """
        self._limits = limits
        self._find_stored = find_stored

    def needs_download(self, image_url: str) -> bool:
        """Whether the image is to be fetched from another server."""
        return url.is_url(image_url) and (self._find_stored is None or self._find_stored(image_url) is None)

    def read(self, image_url: str, transfer: Transfer | None = None) -> bytes:
        """Returns the bytes of an image file.

        Args:
            image_url: fal's argument.
            transfer: For a download: counts its bytes and can end it.

        Raises:
            RequestError: 422, `image_url` is not a URL, cannot be fetched, or leads to too many bytes.
        """
        stored = self._find_stored(image_url) if self._find_stored is not None else None
        if stored is not None:
            with contextlib.suppress(FileNotFoundError):  # deleted in this very moment: the URL leads nowhere now
                return stored.read_bytes()
        try:
            return self._fetch(image_url, transfer)
        except ImageTooLargeError as error:
            raise self._too_many_bytes(error) from None
        except ImageDownloadError as error:
            raise _invalid(error, "file_download_error") from None
        except ImageDecodeError as error:
            raise _invalid(error, "image_load_error") from None

    def _fetch(self, image_url: str, transfer: Transfer | None) -> bytes:
        limits = self._limits
        if url.is_data_uri(image_url):
            return url.decode_data_uri(image_url, max_bytes=limits.max_bytes)
        if not url.is_url(image_url):
            hint = url.explain(image_url) or "send a local file as a data: URI (fal.encode_file) or upload it"
            raise ImageDownloadError(f"{url.shorten(image_url)!r} is neither an http(s) URL nor a data: URI; {hint}")
        from florence_onnx.images import download

        return download.download(
            image_url,
            max_bytes=limits.max_bytes,
            timeout=limits.timeout,
            public_only=limits.public_only,
            allowed_hosts=limits.allowed_hosts,
            least_rate=limits.least_rate,
            transfer=transfer,
        )

    def decode(self, content: bytes) -> PILImage.Image:
        """Decodes an image file to RGB, its EXIF orientation applied.

        Raises:
            RequestError: 422, the bytes are not an image, are damaged, or hold too many pixels.
        """
        try:
            return decoding.load(content, max_pixels=self._limits.max_pixels)
        except ImageTooLargeError as error:
            context = {"max_pixels": self._limits.max_pixels}
            raise problems.invalid([field_error(["image_url"], str(error), "image_too_large", context)]) from None
        except ImageError as error:
            raise _invalid(error, "image_load_error") from None

    def _too_many_bytes(self, error: ImageTooLargeError) -> RequestError:
        context = {"max_size": self._limits.max_bytes}
        return problems.invalid([field_error(["image_url"], str(error), "file_too_large", context)])


def _invalid(error: ImageError, kind: str) -> RequestError:
    _log.info("image rejected: %s", error)
    return problems.invalid([field_error(["image_url"], str(error), kind)])
