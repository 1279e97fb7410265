"""URLs of images: which kind one is, how it is shortened for messages, and the content of `data:` URIs."""

from __future__ import annotations

import base64
import binascii
import contextlib
import io
import re
import threading
from collections.abc import Iterator

import numpy as np

from florence_onnx.errors import ImageDecodeError, ImageTooLargeError

_SLICE = 1 << 17
"""Characters that are decoded at a time: a step takes at most a few milliseconds, after which other threads may run."""
_LARGE = 1 << 20
"""Characters of a URI above which one is decoded at a time."""
# Several at once would take as long, since each step holds the interpreter's lock, and keep other threads waiting longer.
_LARGE_LOCK = threading.Lock()
_BLANKS = " \t\n\r\f\v"
_HEX_VALUES = bytes(int(chr(code), 16) if chr(code) in "0123456789abcdefABCDEF" else 255 for code in range(256))
"""Value of a hexadecimal digit by its ASCII code; 255 for everything else."""


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

    Takes time in proportion to the length, and memory for the content and a slice of the URI.

    Args:
        uri: `data:image/png;base64,…` or `data:image/png,…`; the media type is ignored.
        max_bytes: Most bytes of content to accept.

    Returns:
        The content.

    Raises:
        ImageDecodeError: The URI has no comma, or its base64 is malformed.
        ImageTooLargeError: The content has more than `max_bytes`; usually found by counting, before decoding.
    """
    comma = uri.find(",")
    if comma < 0:
        raise ImageDecodeError(f"{shorten(uri)} is not a data: URI: it needs a comma before the content")
    head = uri[: min(comma, 200)]
    is_base64 = uri[max(0, comma - 100) : comma].rstrip().lower().endswith(";base64")
    if not is_base64 and ";base64;" in head.lower():
        raise ImageDecodeError(
            f"{shorten(head)},… is not a data: URI: base64 must stand right before the comma, as in data:image/png;base64,…"
        )
    if (len(uri) - comma) * 3 // 4 > max_bytes:
        check_length(_min_content_bytes(uri, comma + 1, is_base64=is_base64), max_bytes, head)
    decoded = _unquoted(uri, comma + 1)
    parts = _base64_decoded(decoded, head) if is_base64 else decoded
    with _LARGE_LOCK if len(uri) > _LARGE else contextlib.nullcontext():
        return _gather(parts, max_bytes, head)


def _gather(parts: Iterator[bytes], max_bytes: int, head: str) -> bytes:
    content = io.BytesIO()  # its getvalue does not copy
    for part in parts:
        check_length(content.tell() + len(part), max_bytes, head)
        content.write(part)
    return content.getvalue()


def _min_content_bytes(uri: str, begin: int, *, is_base64: bool) -> int:
    """A lower bound of the bytes that a URI's content has, by counting what encodes none."""
    ignored = _BLANKS + "=" if is_base64 else ""
    useful = 0
    for start in range(begin, len(uri), _SLICE):
        end = min(start + _SLICE, len(uri))
        useful += end - start - 2 * uri.count("%", start, end) - sum(uri.count(each, start, end) for each in ignored)
    return max(0, useful * 3 // 4 if is_base64 else useful)


def _unquoted(uri: str, begin: int) -> Iterator[bytes]:
    """The percent-decoded content, slice by slice; `%` that begins no escape stands for itself."""
    rest = b""
    for start in range(begin, len(uri), _SLICE):
        # a lone surrogate becomes "?", which neither base64 nor an image has
        part = rest + uri[start : start + _SLICE].encode("utf-8", "replace")
        cut = part.find(b"%", max(0, len(part) - 2))
        rest = b"" if cut < 0 else part[cut:]
        yield _unquote(part[: len(part) - len(rest)])
    yield _unquote(rest)


def _unquote(part: bytes) -> bytes:
    if b"%" not in part:
        return part
    padded = part + b".."  # a "%" at the end is then followed by no hexadecimal digit
    codes = np.frombuffer(padded, np.uint8)[:-2]
    digits = np.frombuffer(padded.translate(_HEX_VALUES), np.uint8)
    high, low = digits[1:-1], digits[2:]
    is_escape = (codes == ord("%")) & (high < 16) & (low < 16)
    is_kept = np.ones(len(codes), dtype=bool)
    is_kept[1:] &= ~is_escape[:-1]
    is_kept[2:] &= ~is_escape[:-2]
    content: bytes = np.where(is_escape, (high << 4) | low, codes)[is_kept].tobytes()
    return content


def _base64_decoded(parts: Iterator[bytes], head: str) -> Iterator[bytes]:
    # accept what browsers and other encoders produce: line breaks, the URL-safe alphabet, missing padding
    table, rest, is_padded = bytes.maketrans(b"-_", b"+/"), b"", False
    for part in parts:
        compact = part.translate(table, _BLANKS.encode())
        if is_padded and compact.strip(b"="):
            raise ImageDecodeError(f"the base64 content of {shorten(head)},… is broken: it goes on after its padding")
        padding = compact.find(b"=")
        if padding >= 0:
            is_padded = True
            if compact[padding:].strip(b"="):
                raise ImageDecodeError(f"the base64 content of {shorten(head)},… is broken: it has = inside")
            compact = compact[:padding]
        rest += compact
        whole = len(rest) // 4 * 4
        yield _base64_decode(rest[:whole], head)
        rest = rest[whole:]
    yield _base64_decode(rest + b"=" * (-len(rest) % 4), head)


def _base64_decode(encoded: bytes, head: str) -> bytes:
    try:
        return base64.b64decode(encoded, validate=True)
    except binascii.Error as error:
        raise ImageDecodeError(f"the base64 content of {shorten(head)},… is broken: {error}") from None


def check_length(num_bytes: int, max_bytes: int, address: str) -> None:
    """Raises ImageTooLargeError if the content of an address has more bytes than allowed."""
    if num_bytes > max_bytes:
        raise ImageTooLargeError(
            f"{shorten(address)} has at least {num_bytes:,} bytes, allowed are {max_bytes:,}; "
            "raise max_bytes to accept it"
        )
