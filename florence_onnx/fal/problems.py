"""The errors of a request in fal's form: an HTTP status, headers, and a JSON body with `detail`.

The in-process client raises them as `FalClientHTTPError`; the server sends them as responses. The types and URLs of
the 422 errors are from fal's documentation (https://docs.fal.ai/errors/); where fal's wording is not public, the
messages are ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from florence_onnx.errors import FlorenceError

DOCUMENTATION = "https://docs.fal.ai/errors/#"
"""Prefix of the URLs in 422 errors; the error type follows."""
TIMEOUT_TYPE_HEADER = "X-Fal-Request-Timeout-Type"
"""Response header: `user` says that the caller's own timeout was reached, after which fal's clients do not retry."""


@dataclass(eq=False)
class RequestError(FlorenceError):
    """A request that failed."""

    status: int
    """HTTP status code."""
    body: Mapping[str, Any]
    """`{"detail": …}`, with `error_type` for errors that fal's platform would report rather than the model."""
    headers: Mapping[str, str] = field(default_factory=dict)
    """Response headers of this error."""

    def __str__(self) -> str:
        detail = self.body["detail"]
        if isinstance(detail, str):
            return detail
        return "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in detail)


def invalid(errors: Sequence[Mapping[str, Any]]) -> RequestError:
    """422: an argument, or the image behind `image_url`, is invalid.

    Args:
        errors: Entries from `field_error`.
    """
    return RequestError(422, {"detail": [dict(error) for error in errors]}, {"X-Fal-Retryable": "false"})


def field_error(
    loc: Sequence[str], message: str, kind: str, context: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Returns one entry of the `detail` of a 422.

    Args:
        loc: Path to the field, without the leading `body`.
        message: A sentence for people.
        kind: fal's error type, such as `image_load_error`.
        context: Values that belong to the error, such as `{"le": 999}`.
    """
    error: dict[str, Any] = {"loc": ["body", *loc], "msg": message, "type": kind, "url": f"{DOCUMENTATION}{kind}"}
    return {**error, "ctx": dict(context)} if context else error


def _platform(status: int, message: str, kind: str, headers: Mapping[str, str] | None = None) -> RequestError:
    return RequestError(status, {"detail": message, "error_type": kind}, {"X-Fal-Error-Type": kind, **(headers or {})})


def not_found(path: str) -> RequestError:
    """404: there is no such endpoint."""
    return RequestError(404, {"detail": f"Path /{path.lstrip('/')} not found"})


def unknown_request(request_id: str) -> RequestError:
    """404: there is no such request, or its result has expired."""
    return RequestError(404, {"detail": f"Request {request_id} not found"})


def in_progress() -> RequestError:
    """400: the result was fetched before the request had ended."""
    return RequestError(400, {"detail": "Request is still in progress"})


def bad_request(message: str) -> RequestError:
    """400: a malformed header, or a feature that is not supported."""
    return _platform(400, message, "bad_request")


def unauthorized(message: str) -> RequestError:
    """401: the API key is missing or wrong."""
    return RequestError(401, {"detail": message}, {"WWW-Authenticate": "Key"})


def too_large(max_bytes: int) -> RequestError:
    """413: the body of the request is too large."""
    body = {"detail": f"The request is larger than {max_bytes:,} bytes", "error_type": "bad_request"}
    return RequestError(413, body, {"Connection": "close"})  # the rest of the body is never read


def too_slow(num_bytes: float, seconds: float) -> RequestError:
    """408: the body of the request arrives too slowly."""
    message = f"The body must come at {num_bytes:,.0f} bytes in {seconds:g} s or faster"
    body = {"detail": message, "error_type": "bad_request"}
    return RequestError(408, body, {"Connection": "close"})


def queue_full(max_waiting: int) -> RequestError:
    """429: the queue is full."""
    message = f"{max_waiting} requests are already waiting; try again later"
    return _platform(429, message, "concurrent_requests_limit", {"Retry-After": "1"})


def out_of_budget(max_bytes: int) -> RequestError:
    """429: the requests that were accepted and not answered yet hold as much memory as they may."""
    message = f"requests that are not answered yet hold {max_bytes:,} bytes, the most allowed; try again later"
    return _platform(429, message, "concurrent_requests_limit", {"Retry-After": "1"})


def out_of_memory() -> RequestError:
    """503: there was not enough memory for this request; others go on."""
    return _platform(
        503,
        "The server has too little memory for this request; try again later",
        "runner_server_error",
        {"Retry-After": "5"},
    )


def storage_full() -> RequestError:
    """507: the disk of the file store is full."""
    return _platform(507, "The disk for uploads is full; try again later", "runner_server_error", {"Retry-After": "30"})


def shutting_down() -> RequestError:
    """503: the service has stopped accepting requests."""
    return _platform(
        503, "The server is shutting down; try again later", "runner_scheduling_failure", {"Retry-After": "5"}
    )


def forked() -> RequestError:
    """503: the request was submitted before this process was forked, and its parent works on it."""
    message = "This request was submitted before the process was forked, and runs in the parent; submit it again here"
    return _platform(503, message, "runner_scheduling_failure")


def timed_out() -> RequestError:
    """504: the caller's start timeout passed before the model started on the request."""
    return _platform(504, "Request timed out", "request_timeout", {TIMEOUT_TYPE_HEADER: "user"})


def cancelled() -> RequestError:
    """499: the caller cancelled the request."""
    return _platform(499, "Request was cancelled", "client_cancelled")


def already_completed() -> RequestError:
    """400: a request that has ended cannot be cancelled."""
    return RequestError(400, {"status": "ALREADY_COMPLETED", "detail": "ALREADY_COMPLETED"})


def internal() -> RequestError:
    """500: a bug or a failure on our side; the log has the traceback."""
    return _platform(500, "Internal Server Error", "runner_server_error")
