"""What happens to every request before a route sees it. Plain ASGI, so that bodies stream and hang-ups are seen."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from typing import Any
from urllib.parse import SplitResult, urlsplit

from florence_onnx import tasks
from florence_onnx.fal import problems
from florence_onnx.fal.contract import APP
from florence_onnx.fal.problems import RequestError
from florence_onnx.server.context import ServerContext
from florence_onnx.server.responses import problem_response

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

TARGET_HEADER = "x-fal-target-url"
"""In which fal's JavaScript client, set to a proxy, names the address that it means."""
PROXY_PATHS = ("/proxy", "/api/fal/proxy")
OPEN_PATHS = ("/", "/health", "/ready", "/openapi.json")
OPEN_PREFIXES = (("GET", "/playground/"), ("GET", "/files/"), ("PUT", "/storage/upload/"))
"""Without a key: the page, and addresses that cannot be guessed."""
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
    """A header of a request; None if it was not sent."""
    wanted = name.lower().encode("ascii")
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == wanted), None)


class Gate:
    """Addresses, keys, sizes, errors and the log of requests, in the order in which a request meets them."""

    def __init__(self, app: App, context: ServerContext) -> None:
        """Args:
        app: The routes.
        context: Of the server.
        """
        self._app = app
        self._context = context

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = _Request(self._context, scope, receive, send)
        self._context.num_active += 1
        try:
            await self._pass(request)
        finally:
            self._context.num_active -= 1
            request.log()

    async def _pass(self, request: _Request) -> None:
        try:
            rewrite(request.scope)
            self._check_origin(request.scope)
            self._check_key(request.scope)
            request.check_announced_length()
            await self._app(request.scope, request.receive, request.send)
        except RequestError as problem:
            await request.answer(problem)
        except Exception:  # noqa: BLE001 - the last resort: the client gets fal's 500, the log the trace
            _log.exception("request %s failed", request.id)
            await request.answer(problems.internal())

    def _check_origin(self, scope: Scope) -> None:
        """Keeps other people's web pages from using a server that their visitors can reach."""
        origin = header(scope, "origin")
        if origin is None or origin in self._context.settings.origins:
            return
        if origin.partition("://")[2] != header(scope, "host"):
            message = f"pages of {origin} may not call this server; allow them with --allow-origin"
            raise RequestError(403, {"detail": message})

    def _check_key(self, scope: Scope) -> None:
        path, method = scope["path"], scope["method"]
        is_open = path in OPEN_PATHS or any(
            method == each and path.startswith(prefix) for each, prefix in OPEN_PREFIXES
        )
        if self._context.settings.api_key is None or is_open or method == "OPTIONS":  # browsers ask those without a key
            return
        scheme, _, given = (header(scope, "authorization") or "").partition(" ")
        if scheme.lower() == "bearer" and self._context.is_token(given):
            return
        if scheme.lower() != "key" or not given:
            raise problems.unauthorized("Invalid Key Authorization header format. Expected 'Authorization: Key <key>'.")
        if not self._context.is_key(given):
            raise problems.unauthorized("No user found for Key ID and Secret")


class _Request:
    """One request under way."""

    def __init__(self, context: ServerContext, scope: Scope, receive: Receive, send: Send) -> None:
        self.id = str(uuid.uuid4())
        self.scope = scope
        self.scope.setdefault("state", {})["request_id"] = self.id
        self._context = context
        self._receive = receive
        self._send = send
        self._begin = time.monotonic()
        self._num_received = 0
        self._status = 0

    @property
    def max_bytes(self) -> int:
        """Of its body."""
        settings = self._context.settings
        is_upload = self.scope["path"].startswith(("/files/", "/storage/"))
        return settings.service.image_limits.max_bytes if is_upload else settings.max_body_bytes

    def check_announced_length(self) -> None:
        """Refuses before a byte is read."""
        announced = header(self.scope, "content-length") or ""
        if announced.isdecimal() and int(announced[:20]) > self.max_bytes:
            raise problems.too_large(self.max_bytes)

    async def receive(self) -> Message:
        """Counts what comes."""
        message = await self._receive()
        if message["type"] == "http.request":
            self._num_received += len(message.get("body", b""))
            if self._num_received > self.max_bytes:
                raise problems.too_large(self.max_bytes)
        return message

    async def send(self, message: Message) -> None:
        """Adds the headers that every response has."""
        if message["type"] == "http.response.start":
            self._status = message["status"]
            message["headers"] = [*message.get("headers", []), *self._headers(message)]
        await self._send(message)

    def _headers(self, message: Message) -> Iterator[tuple[bytes, bytes]]:
        present = {name.lower() for name, _ in message.get("headers", [])}
        own = {"x-fal-request-id": self.id, **SECURITY_HEADERS}
        origin = header(self.scope, "origin")
        if origin in self._context.settings.origins:
            own["Access-Control-Expose-Headers"] = "x-fal-request-id, server-timing"
        for name, value in own.items():
            if name.lower().encode() not in present:
                yield name.lower().encode(), value.encode()

    async def answer(self, problem: RequestError) -> None:
        """Ends with an error, unless the response has begun."""
        if self._status == 0:
            await problem_response(problem)(self.scope, self.receive, self.send)

    def log(self) -> None:
        """One line a request, and its figures."""
        seconds = time.monotonic() - self._begin
        path = self.scope["path"]
        # an abandoned request was never answered; 499 is what proxies note
        status = self._status or 499
        self._context.metrics.count(endpoint_of(path), status, seconds)
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


def endpoint_of(path: str) -> str:
    """A label of few values: requests and files are not told apart, unknown addresses are one."""
    parts = path.strip("/").split("/")
    is_queue = parts[0] == "queue"
    rest = parts[1:] if is_queue else parts
    if "/".join(rest[:2]) == APP:
        tail = rest[-1] if rest[-1] in ("status", "stream", "cancel") else "result"
        name = rest[2] if len(rest) == 3 and rest[2] in tasks.TASKS else tail if "requests" in rest else "unknown"
        return f"queue/{name}" if is_queue else name
    return parts[0] if parts[0] in ("files", "storage", "playground", "health", "ready", "metrics", "") else "unknown"


def _split(address: str) -> SplitResult:
    try:
        parts = urlsplit(address)
        if parts.scheme in ("http", "https") and parts.hostname:
            return parts
    except ValueError:  # brackets around no IPv6 address
        pass
    raise problems.bad_request(f"{TARGET_HEADER} must be an http(s) URL")


def rewrite(scope: Scope) -> None:
    """Turns fal's hosts into paths of ours: by `Host`, and by the address that a client set to a proxy names.

    Raises:
        RequestError: 400, the address in the header is none.
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
