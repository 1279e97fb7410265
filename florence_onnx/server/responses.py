"""Parses requests and builds responses, for all routes: JSON in, JSON out."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
from collections.abc import Mapping
from typing import Any

from fastapi import Request, Response

from florence_onnx.fal import problems
from florence_onnx.fal.jobs import Job
from florence_onnx.fal.problems import RequestError, field_error
from florence_onnx.server import bodies
from florence_onnx.server.context import ServerContext

TIMEOUT_HEADER = "X-Fal-Request-Timeout"
"""Request header with the start timeout in seconds."""
EXTRA_HEADER = "X-Florence-Extra"
"""Request header: `1` asks for the field `extra`, see `florence_onnx.fal.service.make_extra`."""


def get_context(request: Request) -> ServerContext:
    """Returns the state that all routes share."""
    context: ServerContext = request.app.state.context
    return context


def base_url(request: Request) -> str:
    """Returns the URL of this server as the client sees it, without a trailing slash."""
    public = get_context(request).settings.public_url
    return (public or str(request.base_url)).rstrip("/")


def owner_of(scope: Mapping[str, Any]) -> str:
    """Returns what stands for a client where clients share what is bounded: its IPv4 address, or its IPv6 /64.

    A client has all addresses of its /64, so the whole address would stand for nobody. Behind a proxy on this machine,
    uvicorn takes the address from `X-Forwarded-For`.
    """
    host = (scope.get("client") or ("",))[0]
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return str(host)[:64]
    return host if address.version == 4 else str(ipaddress.ip_network((int(address) >> 64 << 64, 64)))


async def read_body(request: Request) -> bytearray:
    """Reads the body of a request. starlette's own `body` keeps it as long as the request, and takes twice the memory.

    Raises:
        RequestError: 499, the client hung up; 408 and 413, see `middleware`.
    """
    body = bytearray()
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise problems.cancelled()
        body += message.get("body", b"")
        if not message.get("more_body", False):
            return body


async def read_json(request: Request) -> Any:
    """Parses the body of a request; a large one in a thread, in short steps.

    Returns:
        See `bodies.parse`.

    Raises:
        RequestError: As `read_body`, and 422, the body is not JSON or has too many values.
    """
    body = await read_body(request)
    try:
        if len(body) <= bodies.MAX_SMALL:
            return bodies.parse(body)
        return await asyncio.get_running_loop().run_in_executor(get_context(request).body_pool, bodies.parse, body)
    except bodies.BodyError as error:
        raise problems.invalid([field_error([], str(error), "json_invalid")]) from None
    finally:
        request.state.body_charge.shrink(0)  # the body is gone; a job is charged for what was in it


def read_start_timeout(request: Request) -> float | None:
    """Returns the start timeout of a request in seconds, None if it has none.

    Raises:
        RequestError: 400, the header is not a positive number.
    """
    given = request.headers.get(TIMEOUT_HEADER)
    if given is None:
        return None
    try:
        seconds = float(given)
    except ValueError:
        seconds = float("nan")
    if not 0 < seconds < 1e9:
        raise problems.bad_request(f"{TIMEOUT_HEADER} must be a positive number of seconds")
    return seconds


def to_json(value: Any) -> bytes:
    """Returns JSON in UTF-8; non-ASCII characters are not escaped."""
    # backslashreplace turns a lone surrogate, which UTF-8 cannot encode, into a JSON escape
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "backslashreplace")


def json_response(body: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Builds a JSON response."""
    return Response(to_json(body), status, headers, "application/json")


def problem_response(problem: RequestError) -> Response:
    """Builds the response of an error."""
    return json_response(problem.body, problem.status, dict(problem.headers))


def job_response(request: Request, job: Job) -> Response:
    """Builds the response of a job that has ended: its result or its error, and the seconds of its stages."""
    request.state.stages = {stage: round(seconds * 1000, 1) for stage, seconds in job.seconds.items()}
    timing = server_timing(job)
    headers = {"x-fal-request-id": job.id, "Server-Timing": timing} if timing else {"x-fal-request-id": job.id}
    problem = job.problem
    if problem is not None:
        return json_response(problem.body, problem.status, {**problem.headers, **headers})
    with_extra = request.headers.get(EXTRA_HEADER) == "1"
    return json_response(get_context(request).body(job, base_url(request), with_extra=with_extra), 200, headers)


def server_timing(job: Job) -> str:
    """The milliseconds of a job's stages, in the form of the header `Server-Timing`."""
    return ", ".join(f"{stage};dur={seconds * 1000:.1f}" for stage, seconds in job.seconds.items())


async def wait(request: Request, job: Job, event: asyncio.Future[Any] | None = None) -> bool:
    """Waits for a job; cancels it if the client disconnects.

    Args:
        request: The request that it answers.
        job: The job.
        event: What to wait for; None for the end of the job.

    Returns:
        Whether the client is still connected.
    """
    ended = event or job.ended()
    disconnected = asyncio.ensure_future(wait_for_disconnect(request))
    first: set[asyncio.Future[Any]] = {ended, disconnected}
    try:
        await asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED)
    finally:
        is_connected = ended.done()
        disconnected.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await disconnected
        if not is_connected:
            get_context(request).service.cancel(job)
    return is_connected


async def wait_for_disconnect(request: Request) -> None:
    """Returns when the client has hung up."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
