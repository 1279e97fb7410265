"""Reads `image_url`: download or decode within limits, and report failures as fal's errors."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Callable, Collection, Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image as PILImage

from florence_onnx.errors import ImageDecodeError, ImageDownloadError, ImageError, ImageTooLargeError
from florence_onnx.fal import problems
from florence_onnx.fal.problems import RequestError, field_error
from florence_onnx.images import decoding, opening, url
from florence_onnx.images.opening import DecodeLimits, open_image
from florence_onnx.images.transfer import Transfer

if TYPE_CHECKING:
    from florence_onnx.images.decoder_processes import Admit, DecoderProcesses

_log = logging.getLogger("florence_onnx")


@dataclass(frozen=True)
class ImageLimits:
    """Limits for images."""

    max_bytes: int = decoding.MAX_BYTES
    """Most bytes of a download, a `data:` URI or an upload."""
    max_pixels: int = opening.MAX_PIXELS
    """Most pixels: width times height."""
    max_side: int = opening.MAX_SIDE
    """Most pixels of width and of height."""
    num_processes: int = 0
    """Processes that decode images; each ends if an image takes more than `decode_seconds`. 0 decodes in threads of this
    process, without a time limit."""
    decode_seconds: float = 10.0
    """Seconds for decoding an image in a process."""
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
        self._processes = _start(limits) if limits.num_processes else None

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

    def decode(self, content: bytes, *, key: Hashable = None, admit: Admit | None = None) -> PILImage.Image:
        """Decodes an image file to RGB, its EXIF orientation applied.

        Args:
            content: The image file.
            key: By which `end` finds this call.
            admit: Called with the bytes that decoding will take and those of its result, once the header was read. It
                returns when there is room, or raises.

        Raises:
            RequestError: 422, the bytes are not an image, are damaged, hold too many pixels, or take too long to decode.
            DecodingEndedError: `end` was called.
        """
        try:
            if self._processes is not None:
                return self._processes.decode(content, key=key, admit=admit)
            return self._decode_here(content, admit)
        except ImageTooLargeError as error:
            context = {"max_pixels": self._limits.max_pixels}
            raise problems.invalid([field_error(["image_url"], str(error), "image_too_large", context)]) from None
        except ImageError as error:
            raise _invalid(error, "image_load_error") from None

    def end(self, key: Hashable) -> None:
        """Ends a call of `decode`, if one with this key is running in a process of its own."""
        if self._processes is not None:
            self._processes.end(key)

    def close(self) -> None:
        """Ends the processes."""
        if self._processes is not None:
            self._processes.close()

    def _decode_here(self, content: bytes, admit: Admit | None) -> PILImage.Image:
        limits = DecodeLimits(self._limits.max_pixels, self._limits.max_side)
        opened = open_image(io.BytesIO(content), f"{len(content)} bytes of data", limits)
        if admit is not None:
            admit(opened.peak_bytes, opened.result_bytes)
        return opened.decode().as_image()

    def _too_many_bytes(self, error: ImageTooLargeError) -> RequestError:
        context = {"max_size": self._limits.max_bytes}
        return problems.invalid([field_error(["image_url"], str(error), "file_too_large", context)])


def _start(limits: ImageLimits) -> DecoderProcesses:
    from florence_onnx.images.decoder_processes import DecoderProcesses

    return DecoderProcesses(
        limits.num_processes, max_pixels=limits.max_pixels, max_side=limits.max_side, seconds=limits.decode_seconds
    )


def _invalid(error: ImageError, kind: str) -> RequestError:
    _log.info("image rejected: %s", error)
    return problems.invalid([field_error(["image_url"], str(error), kind)])
