"""Pictures from `http(s)`, with nothing but the standard library.

Imported at the first download: `http.client`, `ssl` and what they need take as long to import as the rest of this package.
"""

from __future__ import annotations

import http.client
import time
import urllib.error
import urllib.parse
import urllib.request

from florence_onnx.errors import ImageDownloadError, ImageTooLargeError
from florence_onnx.url import check_length, shorten

_CHUNK_BYTES = 1 << 16
_USER_AGENT = "florence-onnx"
# what may stand in a URL as it is; everything else (spaces, letters beyond ASCII) is percent-encoded
_URL_CHARACTERS = "%/:=&?~#+!$,;'@()*[]"


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
        check_length(num_announced, max_bytes, url)
        content = _read(response, max_bytes, deadline, url)
    if len(content) < num_announced:
        raise OSError(f"the connection closed after {len(content)} of {num_announced} bytes")
    return content


def _read(response: http.client.HTTPResponse, max_bytes: int, deadline: float, url: str) -> bytes:
    content = bytearray()
    # read1 returns what has arrived, so a server that sends a byte now and then cannot hold the call past the deadline
    while chunk := response.read1(_CHUNK_BYTES):
        content += chunk
        check_length(len(content), max_bytes, url)
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
