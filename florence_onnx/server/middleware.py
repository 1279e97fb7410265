"""Checks that every request passes before its route: host, origin, API key, size and rate; and the log of requests.

Plain ASGI rather than starlette's `BaseHTTPMiddleware`, which hides disconnects of the client from the routes.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Container
from urllib.parse import SplitResult, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from florence_onnx import tasks
from florence_onnx.fal import problems
from florence_onnx.fal.contract import APP
from florence_onnx.fal.problems import RequestError
from florence_onnx.server.context import ServerContext
from florence_onnx.server.responses import problem_response

TARGET_HEADER = "x-fal-target-url"
"""Header in which fal's JavaScript client sends the real URL when it is configured with a proxy."""
PROXY_PATHS = ("/proxy", "/api/fal/proxy")
"""Paths at which clients can use this server as fal's proxy."""
OPEN_PATHS = ("/", "/health", "/ready", "/openapi.json")
OPEN_PREFIXES = (("GET", "/playground/"), ("GET", "/files/"), ("PUT", "/storage/upload/"))
"""Paths that need no API key: the page, health checks, and URLs that cannot be guessed."""
SECURITY_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Content-Security-Policy": (
        "default-src 'self'; img-src 'self' data: blob:; style-src 'self'; script-src 'self'; connect-src 'self'; "
        "object-src 'none'; base-uri 'none'; frame-ancestors 'none'"
    ),
}
_access_log = logging.getLogger("florence_onnx.access")
_log = logging.getLogger("florence_onnx.server")


def header(scope: Scope, name: str) -> str | None:
    """Returns a header of a request, or None if it was not sent."""
    return Headers(scope=scope).get(name)


class RequestMiddleware:
    """Rewrites URLs, checks a request, turns errors into fal's JSON, and logs the request, in this order."""

    def __init__(self, app: ASGIApp, context: ServerContext) -> None:
        """Wraps the routes.

        Args:
            app: The next ASGI application.
            context: The state of the server.
        """
        self._app = app
        self._context = context

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = _Request(self._context, scope, receive, send)
        self._context.num_active += 1
        try:
            await self._handle(request)
        finally:
            self._context.num_active -= 1
            request.end()

    async def _handle(self, request: _Request) -> None:
        try:
            rewrite_path(request.scope)
            _check_framing(request.scope)
            self._check_host(request.scope)
            self._check_origin(request.scope)
            self._check_key(request.scope)
            request.check_content_length()
            await self._app(request.scope, request.receive, request.send)
        except RequestError as problem:
            await request.send_error(problem)
        except ClientDisconnect:
            pass  # nobody is there to answer; `log` writes 499
        except Exception:  # noqa: BLE001 - a bug in a route: the client gets fal's 500, the log the traceback
            _log.exception("request %s failed", request.id)
            await request.send_error(problems.internal())

    def _check_host(self, scope: Scope) -> None:
        """Rejects host names that are not this server's; see `ServerSettings.accepts_host`."""
        host = header(scope, "host") or ""
        if not self._context.settings.accepts_host(host):
            raise problems.bad_request(
                f"{host[:100]!r} is not a name of this server; to accept it, pass --trusted-host NAME"
            )

    def _check_origin(self, scope: Scope) -> None:
        """Rejects web pages of other origins: a visitor's browser can reach servers that the page itself cannot."""
        origin = header(scope, "origin")
        if origin is None or origin in self._context.settings.origins:
            return
        if origin.partition("://")[2] != header(scope, "host"):
            message = f"web pages of {origin} may not call this server; to allow them, pass --allow-origin {origin}"
            raise RequestError(403, {"detail": message})

    def _check_key(self, scope: Scope) -> None:
        path, method = scope["path"], scope["method"]
        is_open = path in OPEN_PATHS or any(
            {"HEAD": "GET"}.get(method, method) == each and path.startswith(prefix) for each, prefix in OPEN_PREFIXES
        )
        # browsers send CORS preflight requests (OPTIONS) without credentials
        if self._context.settings.api_key is None or is_open or method == "OPTIONS":
            return
        scheme, _, given = (header(scope, "authorization") or "").partition(" ")
        if scheme.lower() == "bearer" and self._context.is_valid_token(given):
            return
        if scheme.lower() != "key" or not given:
            raise problems.unauthorized("Invalid Key Authorization header format. Expected 'Authorization: Key <key>'.")
        if not self._context.is_valid_key(given):
            raise problems.unauthorized("No user found for Key ID and Secret")


class _Request:
    """A request in flight: counts its body, adds response headers, and logs it."""

    def __init__(self, context: ServerContext, scope: Scope, receive: Receive, send: Send) -> None:
        self.id = str(uuid.uuid4())
        self.scope = scope
        self.scope.setdefault("state", {})["request_id"] = self.id
        self._context = context
        self._receive = receive
        self._send = send
        self._begin = time.monotonic()
        self._num_received = 0
        self._charge = context.service.budget.charge()
        self.scope["state"]["body_charge"] = self._charge
        self._status = 0
        # without either header a request has no body
        self._is_received = header(scope, "transfer-encoding") is None and header(scope, "content-length") in (
            None,
            "0",
        )
        self._window_end = 0.0
        self._window_bytes = 0

    @property
    def max_bytes(self) -> int:
        """Most bytes of the body."""
        settings = self._context.settings
        is_upload = self.scope["path"].startswith(("/files/", "/storage/"))
        return settings.service.image_limits.max_bytes if is_upload else settings.max_body_bytes

    def check_content_length(self) -> None:
        """Rejects a body that is too large by its `Content-Length`, before a byte of it is read."""
        length = header(self.scope, "content-length") or ""
        if length.isdecimal() and int(length[:20]) > self.max_bytes:
            raise problems.too_large(self.max_bytes)

    async def receive(self) -> Message:
        """Receives a part of the body; after its end, waits for the client to hang up.

        Raises:
            RequestError: 413, the sum is too large, for bodies without a `Content-Length`; 408, the body is too slow.
        """
        if self._is_received:
            return await self._receive()
        message = await self._receive_in_time()
        if message["type"] == "http.request":
            self._is_received = not message.get("more_body", False)
            num_bytes = len(message.get("body", b""))
            self._charge.grow(num_bytes)
            self._num_received += num_bytes
            if self._num_received > self.max_bytes:
                raise problems.too_large(self.max_bytes)
        return message

    async def _receive_in_time(self) -> Message:
        """Receives a part; every `body_seconds` must bring `min_body_rate` times as many bytes."""
        seconds = self._context.settings.body_seconds
        while True:
            left = self._window_end - time.monotonic()
            if left <= 0:
                self._start_window(seconds)
                left = seconds
            try:
                message = await asyncio.wait_for(self._receive(), left)
            except asyncio.TimeoutError:
                continue
            self._window_bytes += len(message.get("body", b""))
            return message

    def _start_window(self, seconds: float) -> None:
        needed = self._context.settings.min_body_rate * seconds
        if self._window_end and self._window_bytes < needed:
            raise problems.too_slow(needed, seconds)
        self._window_end = time.monotonic() + seconds
        self._window_bytes = 0

    async def send(self, message: Message) -> None:
        """Sends a part of the response; adds the headers that every response has."""
        if message["type"] == "http.response.start":
            self._status = message["status"]
            headers = MutableHeaders(scope=message)
            for name, value in {"x-fal-request-id": self.id, **SECURITY_HEADERS}.items():
                headers.setdefault(name, value)  # a route may have set its own
            if not self._is_received:
                headers.setdefault("connection", "close")  # or the rest of the body would be read
            if header(self.scope, "origin") in self._context.settings.origins:
                headers.setdefault("access-control-expose-headers", "x-fal-request-id, server-timing")
        await self._send(message)

    async def send_error(self, problem: RequestError) -> None:
        """Sends an error response, unless a response has already started."""
        if self._status == 0:
            await problem_response(problem)(self.scope, self.receive, self.send)

    def end(self) -> None:
        """Gives the bytes of the body back, and logs the request."""
        self._charge.release()
        self._log()

    def _log(self) -> None:
        """Writes the line of the access log and updates the metrics."""
        seconds = time.monotonic() - self._begin
        path = self.scope["path"]
        # a client that disconnected got no response; 499 is nginx's code for that
        status = self._status or 499
        self._context.metrics.count(endpoint_of(path, self._context.service.model.tasks), status, seconds)
        client = self.scope.get("client") or ("", 0)
        fields = {
            "request_id": self.id,
            "method": self.scope["method"],
            "path": path[:200],
            "status": status,
            "milliseconds": round(seconds * 1000, 1),
            "client": client[0],
            "stages": self.scope["state"].get("stages"),
        }
        _access_log.info("%s %s %d", self.scope["method"], path[:200], status, extra=fields)


def _check_framing(scope: Scope) -> None:
    """Rejects a request with two lengths: a proxy before this server may take the other one, and see other requests."""
    if header(scope, "transfer-encoding") is not None and header(scope, "content-length") is not None:
        raise problems.bad_request("a request has either Content-Length or Transfer-Encoding, not both")


def endpoint_of(path: str, slugs: Container[str] = tasks.TASKS) -> str:
    """Returns a metrics label with few distinct values: no request ids, no file names, one value for unknown paths."""
    parts = path.strip("/").split("/")
    is_queue = parts[0] == "queue"
    rest = parts[1:] if is_queue else parts
    if "/".join(rest[:2]) == APP:
        tail = rest[-1] if rest[-1] in ("status", "stream", "cancel") else "result"
        name = rest[2] if len(rest) == 3 and rest[2] in slugs else tail if "requests" in rest else "unknown"
        return f"queue/{name}" if is_queue else name
    return parts[0] if parts[0] in ("files", "storage", "playground", "health", "ready", "metrics", "") else "unknown"


def _split(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        if parts.scheme in ("http", "https") and parts.hostname:
            return parts
    except ValueError:  # malformed IPv6 address in brackets
        pass
    raise problems.bad_request(f"{TARGET_HEADER} must be an http(s) URL")


def rewrite_path(scope: Scope) -> None:
    """Maps fal's hosts to paths of this server: requests to `queue.…` go below `/queue`.

    The host is that of `Host`, or of the URL in `TARGET_HEADER` where this server is used as fal's proxy.

    Raises:
        RequestError: 400, the header does not hold an http(s) URL.
    """
    target = header(scope, TARGET_HEADER)
    if target is not None and scope["path"] in PROXY_PATHS:
        parts = _split(target)
        host, path = parts.hostname or "", parts.path
        scope["query_string"] = parts.query.encode("ascii", "replace")
    else:
        host, path = (header(scope, "host") or "").lower(), scope["path"]
    if host.startswith("queue.") and path.startswith(f"/{APP}/"):
        path = "/queue" + path
    scope["path"] = path
    scope["raw_path"] = path.encode("utf-8", "replace")
