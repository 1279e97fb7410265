"""Statuses and errors that callers see, with the names and fields of `fal_client` 1.0.3."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn

from florence_onnx.fal.jobs import LogLine
from florence_onnx.fal.problems import RequestError


class FalClientError(Exception):
    """Base class of the errors of this client."""


@dataclass(frozen=True)
class Response:
    """The HTTP response that a server would have sent."""

    status_code: int
    headers: dict[str, str]
    body: dict[str, Any]

    def json(self) -> dict[str, Any]:
        """Returns the body."""
        return self.body


@dataclass(eq=False)
class FalClientHTTPError(FalClientError):
    """A request that failed."""

    message: Any
    """The body's `detail`: a string, or the list of a 422."""
    status_code: int
    response_headers: dict[str, str]
    response: Response
    error_type: str | None = None

    def __str__(self) -> str:
        return f"{self.message}"


@dataclass(eq=False)
class FalClientTimeoutError(FalClientError, TimeoutError):
    """The result took longer than `timeout` or `client_timeout`."""

    timeout: float
    request_id: str | None = None

    def __str__(self) -> str:
        request = "Request" if self.request_id is None else f"Request {self.request_id}"
        return f"{request} timed out after {self.timeout} seconds"


@dataclass
class Status:
    """Base class of the statuses of a request."""


@dataclass
class Queued(Status):
    """The request waits in the queue."""

    position: int
    """Number of requests ahead of it."""


@dataclass
class InProgress(Status):
    """The model is running the request."""

    logs: list[LogLine] | None


@dataclass
class Completed(Status):
    """The request has ended; `result` returns its result or raises its error."""

    logs: list[LogLine] | None
    metrics: dict[str, Any]
    error: str | None = None
    error_type: str | None = None


def raise_as_http_error(problem: RequestError) -> NoReturn:
    """Raises the error that `fal_client` would raise for the same response."""
    headers = {name.lower(): value for name, value in problem.headers.items()}
    response = Response(problem.status, headers, dict(problem.body))
    kind = problem.body.get("error_type")
    raise FalClientHTTPError(problem.body["detail"], problem.status, headers, response, kind) from None
