"""Reading requests and writing responses: JSON in, JSON out."""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import Any

from fastapi import Request, Response

from florence_onnx.fal import problems
from florence_onnx.fal.jobs import Job
from florence_onnx.fal.problems import RequestError, field_error
from florence_onnx.server.context import ServerContext

LARGE = 1 << 18
"""Bytes of JSON beyond which a thread reads it, so that other requests do not wait."""
TIMEOUT_HEADER = "X-Fal-Request-Timeout"
EXTRA_HEADER = "X-Florence-Extra"
"""Asks for what fal's JSON has no place for."""


def get_context(request: Request) -> ServerContext:
    """The server's shared state."""
    context: ServerContext = request.app.state.context
    return context


def base_url(request: Request) -> str:
    """How the client reaches us, without a slash at the end."""
    public = get_context(request).settings.public_url
    return (public or str(request.base_url)).rstrip("/")


async def read_json(request: Request) -> Any:
    """The body, decoded.

    Raises:
        RequestError: 422, it is no JSON.
    """
    content = await request.body()
    try:
        if len(content) > LARGE:
            return await asyncio.to_thread(json.loads, content)
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise problems.invalid([field_error([], f"The body is no JSON: {error}", "json_invalid")]) from None


def read_start_timeout(request: Request) -> float | None:
    """The caller's limit for waiting, in seconds.

    Raises:
        RequestError: 400, it is no positive number.
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


def json_response(body: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A JSON response; letters of all scripts stay as they are."""
    content = json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "backslashreplace")
    return Response(content, status, headers, "application/json")


def problem_response(problem: RequestError) -> Response:
    """A request that ended without an answer."""
    return json_response(problem.body, problem.status, dict(problem.headers))


def answer_response(request: Request, job: Job) -> Response:
    """The answer of an ended job, or its problem."""
    request.state.stages = {stage: round(seconds * 1000, 1) for stage, seconds in job.seconds.items()}
    timing = ", ".join(f"{stage};dur={seconds * 1000:.1f}" for stage, seconds in job.seconds.items())
    headers = {"x-fal-request-id": job.id, "Server-Timing": timing} if timing else {"x-fal-request-id": job.id}
    problem = job.problem
    if problem is not None:
        return json_response(problem.body, problem.status, {**problem.headers, **headers})
    with_extra = request.headers.get(EXTRA_HEADER) == "1"
    return json_response(get_context(request).body(job, base_url(request), with_extra=with_extra), 200, headers)


async def wait(request: Request, job: Job) -> bool:
    """Waits for a job; a client that hangs up takes it back.

    Returns:
        Whether the client is still there.
    """
    ended = job.ended()
    hung_up = asyncio.ensure_future(_wait_for_hang_up(request))
    first: set[asyncio.Future[Any]] = {ended, hung_up}
    try:
        await asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED)
    finally:
        is_there = ended.done()
        hung_up.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await hung_up
        if not is_there:
            get_context(request).service.cancel(job)
    return is_there


async def _wait_for_hang_up(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
