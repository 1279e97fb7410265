"""Direct endpoints: the response is the result."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from florence_onnx.fal import problems
from florence_onnx.fal.contract import APP
from florence_onnx.server.responses import (
    get_context,
    job_response,
    owner_of,
    problem_response,
    read_json,
    read_start_timeout,
    wait,
)

router = APIRouter()


@router.post(f"/{APP}/{{slug}}")
async def run(slug: str, request: Request) -> Response:
    """Runs a request and waits for its result."""
    context = get_context(request)
    job = context.service.submit(
        f"{APP}/{slug}",
        await read_json(request),
        start_timeout=read_start_timeout(request),
        owner=owner_of(request.scope),
    )
    if not await wait(request, job):
        return problem_response(problems.cancelled())  # ASGI needs a response, though the client is gone
    return job_response(request, job)
