"""The HTTP transport below `fal_client`: one request per call, to one host, without retries.

`fal_client` retries up to ten times after 408, 409, 429, gateway errors and broken connections, and then tries fal's
backup domain. In a comparison each retry would be a paid call, and its back-off would be part of the time. So this
transport raises an error type that `fal_client` does not retry, and refuses a second request.
"""

from __future__ import annotations

from collections.abc import Mapping

import fal_client.client
import httpx

from florence_onnx.errors import FlorenceError

_KEEPALIVE = 120.0
"""Seconds for which an idle connection is kept. With httpx's 5, times at a low rate would include a TLS handshake."""
_MAX_ERROR = 2000
"""Most characters of an error response to keep."""


class CallFailedError(FlorenceError):
    """A call that failed."""

    def __init__(self, message: str, status: int | None = None, headers: Mapping[str, str] | None = None) -> None:
        """Creates the error.

        Args:
            message: What went wrong.
            status: HTTP status; None if there was no response.
            headers: The `x-fal-…` headers of the response.
        """
        super().__init__(message)
        self.status = status
        self.headers = dict(headers or {})


class SingleRequestTransport(httpx.BaseTransport):
    """Sends the requests of `fal_client` to a base URL instead of fal.run, one for each call of `allow_one`."""

    def __init__(self, base_url: str, *, trust_env: bool) -> None:
        """Opens no connection yet.

        Args:
            base_url: URL that replaces `https://fal.run/`.
            trust_env: Whether to use the proxies and certificates of the environment, as `fal_client` does.
        """
        self.headers: dict[str, str] = {}
        """The `x-fal-…` headers of the last response."""
        self._base_url = base_url.rstrip("/") + "/"
        self._prefix = str(httpx.URL(fal_client.client.RUN_URL_FORMAT))
        self._is_allowed = False
        limits = httpx.Limits(keepalive_expiry=_KEEPALIVE)
        self._client = httpx.Client(trust_env=trust_env, follow_redirects=False, limits=limits)

    def allow_one(self) -> None:
        """Permits the next request."""
        self._is_allowed = True

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Sends a request and reads the whole response.

        Raises:
            CallFailedError: The request is not permitted, got no response, or one whose status is not 2xx.
        """
        if not self._is_allowed:
            raise CallFailedError("fal_client wanted to send a second request for one call; it was not sent")
        self._is_allowed = False
        self.headers = {}
        try:
            response = self._client.send(self._redirect(request), stream=True)
            response.read()
        except httpx.HTTPError as error:
            raise CallFailedError(f"{type(error).__name__}: {error}") from None
        self.headers = {name: text for name, text in response.headers.items() if name.startswith("x-fal-")}
        if not response.is_success:
            raise CallFailedError(response.text[:_MAX_ERROR], response.status_code, self.headers)
        return response

    def close(self) -> None:
        """Closes the connections."""
        self._client.close()

    def _redirect(self, request: httpx.Request) -> httpx.Request:
        address = str(request.url)
        if not address.startswith(self._prefix):
            raise CallFailedError(f"fal_client wanted to call {request.url.host}, not fal.run; nothing was sent")
        url = httpx.URL(self._base_url + address.removeprefix(self._prefix))
        headers = request.headers.copy()
        headers["Host"] = url.netloc.decode("ascii")
        return httpx.Request(
            request.method, url, headers=headers, stream=request.stream, extensions=request.extensions.copy()
        )
