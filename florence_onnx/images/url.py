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


_BEGIN = r"[\s\x00-\x1f]*[a-z][a-z0-9+.-]+:[/\\]{1,2}"
_SCHEME = re.compile(_BEGIN, re.IGNORECASE)
"""How an address begins that was meant as a URL."""
_USER = re.compile(rf"\A({_BEGIN})(?:[^/?#\\]*@|[^/?#\\:\[]*:(?!\d*(?:[/?#\\]|$)).*@)", re.IGNORECASE | re.DOTALL)
"""User name and password of a URL, up to the last `@`: also of one with a slash, which had to be percent-encoded."""
_BASE64 = re.compile(r"(?:iVBORw0KGgo|/9j/|R0lGOD|UklGR|Qk[0-3]|SUkqA|TU0AK)[A-Za-z0-9+/_=\s-]*", re.ASCII)
"""Base64 of the first bytes of PNG, JPEG, GIF, WebP, BMP and TIFF."""


def shorten(address: str) -> str:
    """Shortens an address for messages: at most 100 characters, no user name or password, and no query with a signature."""
    plain = _USER.sub(r"\1…@", address).split("?", 1)[0] if _SCHEME.match(address) else address
    return plain if len(plain) <= 100 else plain[:97] + "…"


def has_user(address: str) -> bool:
    """Whether a URL has a user name or a password, which messages must not show."""
    return _USER.match(address) is not None


def explain(address: str) -> str | None:
    """What is wrong with a string that is nearly an address of an image, and what to pass; None for any other.

    It is for strings that are neither a URL nor a `data:` URI nor an existing file: base64 of a JPEG begins like a path.
    """
    stripped = address.strip()
    if stripped != address and (is_url(stripped) or is_data_uri(stripped)):
        return "there is white space around the address: remove it"
    if address[:5].lower() == "file:":
        return "a file: URL is not taken: pass the path itself"
    if len(address) > 40 and _BASE64.fullmatch(address):
        return 'it is base64 without a head: put "data:image/png;base64," before it (or jpeg, …), or pass the bytes'
    if _SCHEME.match(address):
        return "only http(s) URLs and data: URIs are taken"
    return None


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
    if not is_base64 and ";base64;" in head.lower():
        raise ImageDecodeError(
            f"{shorten(head)},… is not a data: URI: base64 must stand right before the comma, as in data:image/png;base64,…"
        )
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
