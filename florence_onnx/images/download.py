"""Downloads over `http(s)`, with the standard library only.

Imported at the first download, because `http.client` and `ssl` take as long to import as the rest of this package.
"""

from __future__ import annotations

import http.client
import string
import time
import urllib.error
import urllib.parse
import urllib.request
import zlib
from collections.abc import Collection
from typing import Any

from florence_onnx.errors import ImageDownloadError, ImageTooLargeError, InputError
from florence_onnx.images import addresses
from florence_onnx.images.connection import RefusedError, Rules, make_opener
from florence_onnx.images.transfer import Transfer
from florence_onnx.images.url import check_length, has_user, shorten

_CHUNK_BYTES = 1 << 16
_HEADERS = {"User-Agent": "florence-onnx", "Accept": "image/*, */*;q=0.5"}
_MAX_REDIRECTS = 5
_MAX_URL_LENGTH = (
    16_384  # a request that fits into the socket's send buffer cannot block on a server that does not read
)
_REDIRECTIONS = (301, 302, 303, 307, 308)
# left as they are in a URL; all other characters (spaces, non-ASCII letters) are percent-encoded
_URL_CHARACTERS = "%/:=&?~#+!$,;'@()*[]"


def download(
    url: str,
    *,
    max_bytes: int,
    timeout: float,
    public_only: bool = False,
    allowed_hosts: Collection[str] = (),
    least_rate: float = 0.0,
    transfer: Transfer | None = None,
) -> bytes:
    """Fetches a URL.

    Up to 5 redirects are followed, to http and https only. No credentials are sent.

    With `public_only`, for servers that accept URLs from untrusted callers, no host inside your network is contacted.
    For the URL and each redirect the host is resolved once, all its addresses must be public, and the connection goes
    to one of them, at port 80, 443 or from 1024 on. Proxies of the environment are not used, because a proxy resolves
    names by itself. A refusal is logged at level INFO; the error does not reveal the address that a name resolves to.

    Args:
        url: An `http(s)` URL.
        max_bytes: Most bytes of content to accept.
        timeout: Seconds for the whole download, redirects included; only the system's resolver has limits of its own.
        public_only: Whether to refuse hosts that are not on the public internet.
        allowed_hosts: Exceptions to `public_only`: `HOST:PORT`, or `HOST` for its ports 80 and 443. Compared with the
            host in the URL, not with the address it resolves to; case is ignored.
        least_rate: Least bytes a second, on average and after ten seconds; 0 for no limit. A server that drips would
            otherwise hold a thread for the whole `timeout`.
        transfer: Counts the bytes as they come, and lets another thread end the download.

    Returns:
        The content.

    Raises:
        ImageDownloadError: The URL was refused, or could not be fetched within `timeout`.
        ImageTooLargeError: The content has more than `max_bytes`.
        InputError: `allowed_hosts` is malformed.
    """
    transfer = transfer or Transfer()
    rules = Rules(time.monotonic() + timeout, public_only, parse_hosts(allowed_hosts), least_rate, transfer)
    try:
        return _fetch(url, max_bytes, rules)
    except ImageTooLargeError:  # caught first: it is a ValueError too
        raise
    except TimeoutError:
        reason = f"no complete answer within {timeout:g} s; raise timeout"
    except urllib.error.URLError as error:
        timed_out = isinstance(error.reason, TimeoutError)
        reason = f"no connection within {timeout:g} s; raise timeout" if timed_out else str(error.reason)
    except (RefusedError, OSError, http.client.HTTPException, ValueError) as error:
        reason = str(error)[:200] or type(error).__name__
    finally:
        transfer.close()
    if transfer.is_cancelled:
        reason = "the download was cancelled"
    raise ImageDownloadError(f"cannot download {shorten(url)}: {reason}")


def parse_hosts(entries: Collection[str]) -> frozenset[tuple[str, int]]:
    """Parses all entries of `allowed_hosts`.

    Returns:
        Pairs of host and port.

    Raises:
        InputError: An entry is malformed.
    """
    if isinstance(entries, str):
        raise InputError(f"allowed_hosts must be a list of hosts, got the string {entries!r}")
    try:
        return frozenset().union(*map(addresses.parse_host, entries))
    except ValueError as error:
        raise InputError(str(error)) from None


def _fetch(url: str, max_bytes: int, rules: Rules) -> bytes:
    opener = make_opener(rules)
    current = url
    for _ in range(1 + _MAX_REDIRECTS):
        with opener.open(_make_request(current), timeout=rules.seconds_left()) as response:
            location = response.headers.get("Location")
            if response.status not in _REDIRECTIONS or location is None:
                return _read(response, max_bytes, url, rules.transfer)
        # http.client decodes headers as Latin-1; this restores the bytes that the server sent, percent-encoded
        current = urllib.parse.urljoin(current, urllib.parse.quote(location, string.punctuation, encoding="latin-1"))
    raise OSError(f"more than {_MAX_REDIRECTS} redirects")


def _make_request(url: str) -> urllib.request.Request:
    if has_user(url):  # before anything that might quote the URL
        raise RefusedError("a user name or password in the URL is not allowed")
    if len(url) > _MAX_URL_LENGTH:
        raise RefusedError(f"the URL has {len(url):,} characters, allowed are {_MAX_URL_LENGTH:,}")
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https"):
        raise RefusedError("only http and https are allowed")
    host = parts.netloc if parts.netloc.isascii() else parts.netloc.encode("idna").decode()
    plain = urllib.parse.urlunsplit(parts._replace(netloc=host, fragment=""))
    request = urllib.request.Request(urllib.parse.quote(plain, _URL_CHARACTERS), headers=_HEADERS)
    if "@" in (request.host or ""):
        raise RefusedError("a user name or password in the URL is not allowed")
    return request


def _read(response: http.client.HTTPResponse, max_bytes: int, url: str, transfer: Transfer) -> bytes:
    if not 200 <= response.status < 300:
        raise OSError(f"the server answered {response.status} {response.reason}")
    announced = response.headers.get("Content-Length", "")
    num_announced = int(announced) if announced.isdecimal() else 0
    check_length(num_announced, max_bytes, url)
    decoder = _Decoder(response.headers.get("Content-Encoding", ""), max_bytes, url)
    num_read = 0
    while chunk := response.read1(_CHUNK_BYTES):
        num_read += len(chunk)
        num_bytes = decoder.feed(chunk)
        if transfer.on_bytes is not None:
            transfer.on_bytes(num_bytes)
    if num_read < num_announced:
        raise OSError(f"the connection closed after {num_read} of {num_announced} bytes")
    return decoder.end()


class _Decoder:
    """Undoes the encoding of a response: gzip or deflate, which some servers use although we ask for none.

    No more than `max_bytes` are ever unpacked, whatever a small response claims to hold.
    """

    def __init__(self, encoding: str, max_bytes: int, url: str) -> None:
        """Raises OSError for an encoding that the standard library cannot undo."""
        self._encoding = encoding.strip().lower()
        if self._encoding not in ("", "identity", "gzip", "x-gzip", "deflate"):
            raise OSError(f"the server sent it encoded as {self._encoding[:40]!r}, which was not asked for")
        self._content = bytearray()
        self._max_bytes, self._url = max_bytes, url
        self._unpacker: Any = None
        self._num_fed = 0

    def feed(self, chunk: bytes) -> int:
        """Takes a piece of the response's body.

        Returns:
            How many bytes of content it gave.

        Raises:
            ImageTooLargeError: There are more than `max_bytes` of content, or of the body.
            OSError: The encoding is broken.
        """
        self._num_fed += len(chunk)
        check_length(self._num_fed, self._max_bytes, self._url)
        if self._encoding in ("", "identity"):
            self._content += chunk
            return len(chunk)
        before = len(self._content)
        try:
            self._unpack(chunk)
        except zlib.error as error:
            raise OSError(f"its {self._encoding} encoding is broken: {error}") from None
        return len(self._content) - before

    def _unpack(self, chunk: bytes) -> None:
        while chunk:
            if self._unpacker is None:
                self._unpacker = zlib.decompressobj(self._window(chunk))
            room = self._max_bytes - len(self._content)
            self._content += self._unpacker.decompress(chunk, room + 1)
            check_length(len(self._content), self._max_bytes, self._url)
            chunk = self._unpacker.unconsumed_tail
            if self._unpacker.eof:  # of one member of a gzip file; zeros may pad the last one
                chunk = self._unpacker.unused_data.lstrip(b"\0")
                self._unpacker = None if chunk else self._unpacker

    def _window(self, chunk: bytes) -> int:
        """zlib's `wbits`: gzip and zlib are told apart by their heads, and servers also send deflate without any."""
        is_bare = self._encoding == "deflate" and chunk[0] & 0x0F != zlib.DEFLATED
        return -zlib.MAX_WBITS if is_bare else zlib.MAX_WBITS | 32

    def end(self) -> bytes:
        """The content.

        Raises:
            OSError: The encoded data is cut off.
        """
        if self._unpacker is not None and not self._unpacker.eof:
            raise OSError(f"its {self._encoding} encoding is cut off")
        return bytes(self._content)
