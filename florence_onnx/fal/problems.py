"""What can go wrong with a request, as fal says it: an HTTP status, and a body with `detail`.

The in-process client raises these as `FalClientHTTPError`, the server sends them. Types and addresses of the 422 errors are
those of fal's documentation ("Errors"); where fal's own wording is not public, the message says what to do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from florence_onnx.errors import FlorenceError

DOCUMENTATION = "https://docs.fal.ai/errors/#"
TIMEOUT_TYPE_HEADER = "X-Fal-Request-Timeout-Type"
"""Tells fal's clients that the caller's own time limit was reached, so that they do not try again."""


@dataclass(eq=False)
class RequestError(FlorenceError):
    """A request that ends without an answer."""

    status: int
    """HTTP status code."""
    body: Mapping[str, Any]
    """`{"detail": …}`, and `error_type` for errors of the platform."""
    headers: Mapping[str, str] = field(default_factory=dict)
    """Of the response, beside the usual ones."""

    def __str__(self) -> str:
        detail = self.body["detail"]
        if isinstance(detail, str):
            return detail
        return "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in detail)


def invalid(errors: Sequence[Mapping[str, Any]]) -> RequestError:
    """422: the arguments, or the image that they name, cannot be used.

    Args:
        errors: As `field_error` makes them.
    """
    return RequestError(422, {"detail": [dict(error) for error in errors]}, {"X-Fal-Retryable": "false"})


def field_error(
    loc: Sequence[str], message: str, kind: str, context: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """One entry of a 422's `detail`.

    Args:
        loc: Path to the field, without the leading `body`.
        message: For people.
        kind: fal's name of the error, such as `image_load_error`.
        context: Figures that belong to it, such as `{"le": 999}`.
    """
    error: dict[str, Any] = {"loc": ["body", *loc], "msg": message, "type": kind, "url": f"{DOCUMENTATION}{kind}"}
    return {**error, "ctx": dict(context)} if context else error


def _platform(status: int, message: str, kind: str, headers: Mapping[str, str] | None = None) -> RequestError:
    return RequestError(status, {"detail": message, "error_type": kind}, {"X-Fal-Error-Type": kind, **(headers or {})})


def not_found(path: str) -> RequestError:
    """404: no such endpoint."""
    return RequestError(404, {"detail": f"Path /{path.lstrip('/')} not found"})


def unknown_request(request_id: str) -> RequestError:
    """404: no such request, or its result was dropped after its time."""
    return RequestError(404, {"detail": f"Request {request_id} not found"})


def in_progress() -> RequestError:
    """400: the result was asked for before it is there."""
    return RequestError(400, {"detail": "Request is still in progress"})


def bad_request(message: str) -> RequestError:
    """400: the request is no JSON, or asks for what is not offered."""
    return _platform(400, message, "bad_request")


def unauthorized(message: str) -> RequestError:
    """401: no key, or another."""
    return RequestError(401, {"detail": message}, {"WWW-Authenticate": "Key"})


def too_large(max_bytes: int) -> RequestError:
    """413: the body of the request is over the limit."""
    body = {"detail": f"The request is larger than {max_bytes:,} bytes", "error_type": "bad_request"}
    return RequestError(413, body, {"Connection": "close"})  # the rest of it is not read


def queue_full(max_waiting: int) -> RequestError:
    """429: as many requests wait as may."""
    message = f"{max_waiting} requests are waiting already; try again later"
    return _platform(429, message, "concurrent_requests_limit", {"Retry-After": "1"})


def shutting_down() -> RequestError:
    """503: the server accepts nothing any more."""
    return _platform(
        503, "The server is shutting down; try again later", "runner_scheduling_failure", {"Retry-After": "5"}
    )


def timed_out() -> RequestError:
    """504: the caller's limit for the wait was reached before the work began."""
    return _platform(504, "Request timed out", "request_timeout", {TIMEOUT_TYPE_HEADER: "user"})


def cancelled() -> RequestError:
    """499: the caller took the request back."""
    return _platform(499, "Request was cancelled", "client_cancelled")


def already_completed() -> RequestError:
    """400: too late to cancel."""
    return RequestError(400, {"status": "ALREADY_COMPLETED", "detail": "ALREADY_COMPLETED"})


def internal() -> RequestError:
    """500: our own fault; what it was is in the log."""
    return _platform(500, "Internal Server Error", "runner_server_error")
