"""URLs of images: which kind one is, how it is shortened for messages, and the content of `data:` URIs."""

from __future__ import annotations

import base64
import binascii
import re
import urllib.parse

from florence_onnx.errors import ImageDecodeError, ImageTooLargeError


def is_url(address: str) -> bool:
    """Whether `address` starts with `http://` or `https://`, in upper or lower case."""
    return address[:8].lower().startswith(("http://", "https://"))


def is_data_uri(address: str) -> bool:
    """Whether `address` starts with `data:`, in upper or lower case."""
    return address[:5].lower() == "data:"


def shorten(address: str) -> str:
    """Shortens an address for messages: at most 100 characters, and no query, which may contain a signature."""
    plain = address.split("?", 1)[0] if is_url(address) else address
    return plain if len(plain) <= 100 else plain[:97] + "…"


def decode_data_uri(uri: str, *, max_bytes: int) -> bytes:
    """Decodes the content of a `data:` URI, base64 or percent-encoded.

    Args:
        uri: `data:image/png;base64,…` or `data:image/png,…`; the media type is ignored.
        max_bytes: Most bytes of content to accept.

    Returns:
        The content.

    Raises:
        ImageDecodeError: The URI has no comma, or its base64 is malformed.
        ImageTooLargeError: The content has more than `max_bytes`.
    """
    head, comma, body = uri.partition(",")
    if not comma:
        raise ImageDecodeError(f"{shorten(uri)} is not a data: URI: it needs a comma before the content")
    is_base64 = head.rstrip().lower().endswith(";base64")
    # a lower bound of the length first, so that a huge URI is refused before it is decoded
    check_length(len(body) * 3 // 4 if is_base64 else body.count("%"), max_bytes, head)
    content = urllib.parse.unquote_to_bytes(body)
    if is_base64:
        content = _decode_base64(content, head)
    check_length(len(content), max_bytes, head)
    return content


def _decode_base64(encoded: bytes, head: str) -> bytes:
    # accept what browsers and other encoders produce: line breaks, the URL-safe alphabet, missing padding
    compact = re.sub(rb"\s+", b"", encoded).rstrip(b"=").translate(bytes.maketrans(b"-_", b"+/"))
    try:
        return base64.b64decode(compact + b"=" * (-len(compact) % 4), validate=True)
    except binascii.Error as error:
        raise ImageDecodeError(f"the base64 content of {shorten(head)},… is broken: {error}") from None


def check_length(num_bytes: int, max_bytes: int, address: str) -> None:
    """Raises ImageTooLargeError if the content of an address has more bytes than allowed."""
    if num_bytes > max_bytes:
        raise ImageTooLargeError(
            f"{shorten(address)} has at least {num_bytes:,} bytes, allowed are {max_bytes:,}; "
            "raise max_bytes to accept it"
        )
