"""The wire under `fal_client`: one request a call, to one host, and no silent repetition.

`fal_client` repeats a request up to ten times after 408, 409, 429, gateway errors and broken connections, and then tries
fal's backup domain. Here each of those would be a call too many, and the waiting before it would be in the time. So a
failure leaves this transport as an error that `fal_client` does not know, and a second request is refused.
"""

from __future__ import annotations

from collections.abc import Mapping

import fal_client.client
import httpx

from florence_onnx.errors import FlorenceError

_KEEPALIVE = 120.0
"""Seconds that an idle connection stays open: at a low rate httpx's 5 would put a TLS handshake into every time."""
_MAX_ERROR = 2000
"""Characters of an error's body that are kept."""


class CallFailedError(FlorenceError):
    """A call that got no answer."""

    def __init__(self, message: str, status: int | None = None, headers: Mapping[str, str] | None = None) -> None:
        """Keeps what is known.

        Args:
            message: What went wrong.
            status: HTTP status, where one came.
            headers: The `x-fal-…` headers.
        """
        super().__init__(message)
        self.status = status
        self.headers = dict(headers or {})


class SingleRequestTransport(httpx.BaseTransport):
    """Sends what `fal_client` means for fal.run to a base URL, once per permission."""

    def __init__(self, base_url: str, *, trust_env: bool) -> None:
        """Opens no connection yet.

        Args:
            base_url: Where requests go, in place of `https://fal.run/`.
            trust_env: Whether proxies and certificates of the environment count, as they do in `fal_client`.
        """
        self.headers: dict[str, str] = {}
        """The `x-fal-…` headers of the last answer."""
        self._base_url = base_url.rstrip("/") + "/"
        self._prefix = str(httpx.URL(fal_client.client.RUN_URL_FORMAT))
        self._is_allowed = False
        limits = httpx.Limits(keepalive_expiry=_KEEPALIVE)
        self._client = httpx.Client(trust_env=trust_env, follow_redirects=False, limits=limits)

    def allow_one(self) -> None:
        """Permits the next request."""
        self._is_allowed = True

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Sends a request and reads the whole answer.

        Raises:
            CallFailedError: It is not permitted, no answer came, or its status is not 2xx.
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
