"""From `image_url` to a decoded image, within limits, with fal's errors."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass

from PIL import Image as PILImage

from florence_onnx.errors import ImageDecodeError, ImageDownloadError, ImageError, ImageTooLargeError
from florence_onnx.fal import problems
from florence_onnx.fal.problems import RequestError, field_error
from florence_onnx.images import decoding, url

_log = logging.getLogger("florence_onnx")


@dataclass(frozen=True)
class ImageLimits:
    """What is accepted as an image."""

    max_bytes: int = decoding.MAX_BYTES
    """Of a download, a `data:` URI or an upload."""
    max_pixels: int = decoding.MAX_PIXELS
    """Width times height."""
    timeout: float = decoding.TIMEOUT
    """Seconds for a download."""
    public_only: bool = False
    """Whether addresses that are not public are refused: for servers that fetch what strangers name."""
    allowed_hosts: Collection[str] = ()
    """`host` or `host:port` exempt from that."""


class ImageReader:
    """Reads images for one service."""

    def __init__(self, limits: ImageLimits, find_own: Callable[[str], bytes | None] | None = None) -> None:
        """Args:
        limits: What is accepted.
        find_own: Gives the content of an address that we serve ourselves, or None; such an address is never fetched.
        """
        self._limits = limits
        self._find_own = find_own

    def read(self, image_url: str) -> bytes:
        """The encoded image.

        Raises:
            RequestError: 422, no image address, or it cannot be fetched, or there are too many bytes.
        """
        own = self._find_own(image_url) if self._find_own is not None else None
        if own is not None:
            return own
        try:
            return self._fetch(image_url)
        except ImageTooLargeError as error:
            raise self._too_many_bytes(error) from None
        except ImageDownloadError as error:
            raise _invalid(error, "file_download_error") from None
        except ImageDecodeError as error:
            raise _invalid(error, "image_load_error") from None

    def _fetch(self, image_url: str) -> bytes:
        limits = self._limits
        if url.is_data_uri(image_url):
            return url.decode_data_uri(image_url, max_bytes=limits.max_bytes)
        if not url.is_url(image_url):
            raise ImageDownloadError(
                f"{url.shorten(image_url)!r} is neither an http(s) URL nor a data: URI; send a local file as a data: URI "
                "(fal.encode_file) or upload it"
            )
        from florence_onnx.images import download

        return download.download(
            image_url,
            max_bytes=limits.max_bytes,
            timeout=limits.timeout,
            public_only=limits.public_only,
            allowed_hosts=limits.allowed_hosts,
        )

    def decode(self, content: bytes) -> PILImage.Image:
        """The image, upright and RGB.

        Raises:
            RequestError: 422, it is no image, damaged, or too large.
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
    _log.info("refused an image: %s", error)
    return problems.invalid([field_error(["image_url"], str(error), kind)])
