"""What a caller sees of a request: states and errors, named and built as in `fal_client` 1.0.3."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn

from florence_onnx.fal.jobs import LogLine
from florence_onnx.fal.problems import RequestError


class FalClientError(Exception):
    """Base of the errors of this client."""


@dataclass(frozen=True)
class Response:
    """What a server would have sent."""

    status_code: int
    headers: dict[str, str]
    body: dict[str, Any]

    def json(self) -> dict[str, Any]:
        """The body."""
        return self.body


@dataclass(eq=False)
class FalClientHTTPError(FalClientError):
    """A request that ended without an answer."""

    message: Any
    """The body's `detail`: text, or the list of a 422."""
    status_code: int
    response_headers: dict[str, str]
    response: Response
    error_type: str | None = None

    def __str__(self) -> str:
        return f"{self.message}"


@dataclass(eq=False)
class FalClientTimeoutError(FalClientError, TimeoutError):
    """`client_timeout` was reached."""

    timeout: float
    request_id: str | None = None

    def __str__(self) -> str:
        request = "Request" if self.request_id is None else f"Request {self.request_id}"
        return f"{request} timed out after {self.timeout} seconds"


@dataclass
class Status:
    """Where a request stands."""


@dataclass
class Queued(Status):
    """It waits."""

    position: int
    """Requests before it."""


@dataclass
class InProgress(Status):
    """The model is at it."""

    logs: list[LogLine] | None


@dataclass
class Completed(Status):
    """It has ended; `result` gives or raises what came of it."""

    logs: list[LogLine] | None
    metrics: dict[str, Any]
    error: str | None = None
    error_type: str | None = None


def raise_as_http_error(problem: RequestError) -> NoReturn:
    """Raises what a caller of `fal_client` would see of a problem."""
    headers = {name.lower(): value for name, value in problem.headers.items()}
    response = Response(problem.status, headers, dict(problem.body))
    kind = problem.body.get("error_type")
    raise FalClientHTTPError(problem.body["detail"], problem.status, headers, response, kind) from None
