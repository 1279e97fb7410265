"""Pictures by address: `http(s)` downloads and `data:` URIs, with nothing but the standard library."""

from __future__ import annotations

import base64
import binascii
import http.client
import re
import time
import urllib.error
import urllib.parse
import urllib.request

from florence_onnx.errors import ImageDecodeError, ImageDownloadError, ImageTooLargeError

_CHUNK_BYTES = 1 << 16
_USER_AGENT = "florence-onnx"
# what may stand in a URL as it is; everything else (spaces, letters beyond ASCII) is percent-encoded
_URL_CHARACTERS = "%/:=&?~#+!$,;'@()*[]"


def is_url(address: str) -> bool:
    """Whether `address` begins with `http://` or `https://`, in any case."""
    return address[:8].lower().startswith(("http://", "https://"))


def is_data_uri(address: str) -> bool:
    """Whether `address` begins with `data:`, in any case."""
    return address[:5].lower() == "data:"


def shorten(address: str) -> str:
    """An address for messages: cut to 100 characters, without the query, which often holds a secret signature."""
    plain = address.split("?", 1)[0] if is_url(address) else address
    return plain if len(plain) <= 100 else plain[:97] + "…"


def download(url: str, *, max_bytes: int, timeout: float) -> bytes:
    """Fetches a URL.

    Only http and https are followed, also in redirects. Addresses inside your own network are not kept out: a server
    that takes URLs from strangers must check them first.

    Args:
        url: An `http(s)` URL.
        max_bytes: Most bytes of content to accept.
        timeout: Seconds for the whole download.

    Returns:
        The content.

    Raises:
        ImageDownloadError: It could not be fetched in time, or at all.
        ImageTooLargeError: There is more than `max_bytes`.
    """
    try:
        return _fetch(url, max_bytes, time.monotonic() + timeout, timeout)
    except ImageTooLargeError:  # a ValueError as well, and no failure of the download
        raise
    except urllib.error.HTTPError as error:
        reason = f"the server answered {error.code} {error.reason}"
        error.close()
    except TimeoutError:
        reason = f"no complete answer within {timeout:g} s; raise timeout"
    except urllib.error.URLError as error:
        timed_out = isinstance(error.reason, TimeoutError)
        reason = f"no connection within {timeout:g} s; raise timeout" if timed_out else str(error.reason)
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = str(error) or type(error).__name__
    raise ImageDownloadError(f"cannot download {shorten(url)}: {reason}")


def _fetch(url: str, max_bytes: int, deadline: float, timeout: float) -> bytes:
    quoted = urllib.parse.quote(url, safe=_URL_CHARACTERS)
    request = urllib.request.Request(quoted, headers={"User-Agent": _USER_AGENT, "Accept": "image/*, */*;q=0.5"})
    with _make_opener().open(request, timeout=timeout) as response:
        announced = response.headers.get("Content-Length", "")
        num_announced = int(announced) if announced.isdecimal() else 0
        _check_length(num_announced, max_bytes, url)
        content = _read(response, max_bytes, deadline, url)
    if len(content) < num_announced:
        raise OSError(f"the connection closed after {len(content)} of {num_announced} bytes")
    return content


def _read(response: http.client.HTTPResponse, max_bytes: int, deadline: float, url: str) -> bytes:
    content = bytearray()
    # read1 returns what has arrived, so a server that sends a byte now and then cannot hold the call past the deadline
    while chunk := response.read1(_CHUNK_BYTES):
        content += chunk
        _check_length(len(content), max_bytes, url)
        if time.monotonic() > deadline:
            raise TimeoutError
    return bytes(content)


def _make_opener() -> urllib.request.OpenerDirector:
    """An opener without the `file:` and `ftp:` handlers that urllib would add."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.UnknownHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPRedirectHandler(),
        urllib.request.HTTPErrorProcessor(),
    ):
        opener.add_handler(handler)
    return opener


def decode_data_uri(uri: str, *, max_bytes: int) -> bytes:
    """Reads the content of a `data:` URI, base64 or percent-encoded.

    Args:
        uri: `data:image/png;base64,…` or `data:image/png,…`; the media type is not looked at.
        max_bytes: Most bytes of content to accept.

    Returns:
        The content.

    Raises:
        ImageDecodeError: The URI has no comma, or its base64 is broken.
        ImageTooLargeError: There is more than `max_bytes`.
    """
    head, comma, body = uri.partition(",")
    if not comma:
        raise ImageDecodeError(f"{shorten(uri)} is not a data: URI: it needs a comma before the content")
    is_base64 = head.rstrip().lower().endswith(";base64")
    _check_length(len(body) * 3 // 4 if is_base64 else body.count("%"), max_bytes, head)
    content = urllib.parse.unquote_to_bytes(body)
    if is_base64:
        content = _decode_base64(content, head)
    _check_length(len(content), max_bytes, head)
    return content


def _decode_base64(encoded: bytes, head: str) -> bytes:
    compact = re.sub(rb"\s+", b"", encoded).rstrip(b"=").translate(bytes.maketrans(b"-_", b"+/"))
    try:
        return base64.b64decode(compact + b"=" * (-len(compact) % 4), validate=True)
    except binascii.Error as error:
        raise ImageDecodeError(f"the base64 content of {shorten(head)},… is broken: {error}") from None


def _check_length(num_bytes: int, max_bytes: int, address: str) -> None:
    if num_bytes > max_bytes:
        raise ImageTooLargeError(
            f"{shorten(address)} has at least {num_bytes:,} bytes, allowed are {max_bytes:,}; "
            "raise max_bytes to accept it"
        )
