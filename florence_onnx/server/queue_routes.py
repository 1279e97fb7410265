"""fal's queue: submit, status, status stream, result and cancel.

The task is optional in the URLs of a request: fal's clients leave it out, fal's OpenAPI document has it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from fastapi import APIRouter, Request, Response
from fastapi.responses import StreamingResponse

from florence_onnx.fal import problems
from florence_onnx.fal.contract import APP
from florence_onnx.fal.jobs import Job
from florence_onnx.server.responses import (
    base_url,
    get_context,
    job_response,
    json_response,
    owner_of,
    read_json,
    read_start_timeout,
    to_json,
)

router = APIRouter(prefix=f"/queue/{APP}")
KEEP_ALIVE_SECONDS = 15.0
"""Seconds without an event after which a stream sends a comment, so that no proxy closes the connection."""


@router.post("/{slug}")
async def submit(slug: str, request: Request) -> Response:
    """Puts a request into the queue."""
    if "fal_webhook" in request.query_params:
        raise problems.bad_request("webhooks are not supported: poll the status, or use the status stream")
    context = get_context(request)
    priority = request.headers.get("X-Fal-Queue-Priority", "normal").lower()
    if priority not in ("normal", "low"):
        raise problems.bad_request("X-Fal-Queue-Priority must be normal or low")
    job = context.service.submit(
        f"{APP}/{slug}",
        await read_json(request),
        start_timeout=read_start_timeout(request),
        priority="low" if priority == "low" else "normal",
        owner=owner_of(request.scope),
    )
    context.results.add(job)
    described = context.status(job, base_url(request), with_logs=False)
    # a submission always reports IN_QUEUE, even if the request has already started or failed
    described |= {"status": "IN_QUEUE", "queue_position": described.get("queue_position", 0)}
    kept = ("status", "request_id", "response_url", "status_url", "cancel_url", "queue_position")
    return json_response({name: described[name] for name in kept}, 200, {"x-fal-request-id": job.id})


@router.get("/requests/{request_id}/status")
@router.get("/{slug}/requests/{request_id}/status")
async def status(request_id: str, request: Request) -> Response:
    """The status of a request; 202 until it has ended."""
    context = get_context(request)
    job = context.results.get(request_id)
    described = context.status(job, base_url(request), with_logs=_wants_logs(request))
    return json_response(described, 200 if described["status"] == "COMPLETED" else 202, {"x-fal-request-id": job.id})


@router.get("/requests/{request_id}/status/stream")
@router.get("/{slug}/requests/{request_id}/status/stream")
async def stream(request_id: str, request: Request) -> Response:
    """The status after every change, as server-sent events."""
    job = get_context(request).results.get(request_id)
    headers = {"Cache-Control": "no-store", "x-fal-request-id": job.id}
    return StreamingResponse(_events(request, job), media_type="text/event-stream", headers=headers)


@router.get("/requests/{request_id}")
@router.get("/{slug}/requests/{request_id}")
async def result(request_id: str, request: Request) -> Response:
    """The result of a request."""
    job = get_context(request).results.get(request_id)
    if job.state != "COMPLETED":
        raise problems.in_progress()
    response = job_response(request, job)
    job.was_fetched = True
    return response


@router.put("/requests/{request_id}/cancel")
@router.put("/{slug}/requests/{request_id}/cancel")
async def cancel(request_id: str, request: Request) -> Response:
    """Cancels a request."""
    context = get_context(request)
    job = context.results.get(request_id)
    job.was_fetched = True  # a shutdown need not wait for somebody to fetch the result
    if not context.service.cancel(job):
        raise problems.already_completed()
    return json_response({"status": "CANCELLATION_REQUESTED"}, 202)


def _wants_logs(request: Request) -> bool:
    return request.query_params.get("logs", "").lower() in ("1", "true")


def _wake(loop: asyncio.AbstractEventLoop, changed: asyncio.Event) -> None:
    loop.call_soon_threadsafe(changed.set)


async def _events(request: Request, job: Job) -> AsyncIterator[bytes]:
    context, loop, changed = get_context(request), asyncio.get_running_loop(), asyncio.Event()
    stop = job.listen(lambda: _wake(loop, changed))
    try:
        while True:
            changed.clear()
            described = context.status(job, base_url(request), with_logs=_wants_logs(request))
            yield b"data: " + to_json(described) + b"\n\n"
            if described["status"] == "COMPLETED":
                return
            while not changed.is_set():
                try:
                    await asyncio.wait_for(changed.wait(), KEEP_ALIVE_SECONDS)
                except asyncio.TimeoutError:
                    yield b": keep-alive\n\n"
    finally:
        stop()
