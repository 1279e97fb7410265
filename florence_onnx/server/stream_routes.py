"""`POST …/{slug}/stream`: the answer in parts, as server-sent events, which fal's clients read with `stream()`.

Each event is a JSON object. Those with `part` come while the answer is generated; the last one is the result that the direct
endpoint returns, or an error body with `detail`. An error before the first part is an ordinary response with its status.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, TypeAlias

from fastapi import APIRouter, Request, Response
from fastapi.responses import StreamingResponse

from florence_onnx.answers.results import BoundingBox, OCRBoundingBoxSingle, Polygon, to_dict
from florence_onnx.fal import problems
from florence_onnx.fal.contract import APP, find_task
from florence_onnx.fal.jobs import Job
from florence_onnx.parts import Part, PartReader, TextPart
from florence_onnx.prediction import EncodedImage, Prediction
from florence_onnx.server.queue_routes import KEEP_ALIVE_SECONDS
from florence_onnx.server.responses import (
    EXTRA_HEADER,
    base_url,
    get_context,
    job_response,
    owner_of,
    problem_response,
    read_json,
    read_start_timeout,
    server_timing,
    wait,
)
from florence_onnx.streams import putter

router = APIRouter()
_Event: TypeAlias = "tuple[Sequence[int], EncodedImage] | Prediction[Any] | None"
"""Tokens so far and the image, the model's answer, or the end of the job."""
_KINDS: dict[type, str] = {BoundingBox: "box", OCRBoundingBoxSingle: "quad", Polygon: "polygon", str: "word"}


@router.post(f"/{APP}/{{slug}}/stream")
async def stream(slug: str, request: Request) -> Response:
    """Runs a request and sends the parts of its answer as they come."""
    context = get_context(request)
    events: asyncio.Queue[_Event] = asyncio.Queue()
    put = putter(events)
    job = context.service.submit(
        f"{APP}/{slug}",
        await read_json(request),
        start_timeout=read_start_timeout(request),
        owner=owner_of(request.scope),
        on_tokens=lambda token_ids, image: put((token_ids, image)),
        on_prediction=put,
    )
    job.future.add_done_callback(lambda _: put(None))
    first = asyncio.ensure_future(events.get())
    if not await wait(request, job, first):
        first.cancel()
        return problem_response(problems.cancelled())  # ASGI needs a response, though the client is gone
    if first.result() is None:  # only a failed job ends without an answer
        return job_response(request, job)
    reader = context.service.model.part_reader(find_task(f"{APP}/{slug}", context.service.model.tasks))
    headers = {"Cache-Control": "no-store", "x-fal-request-id": job.id}
    return StreamingResponse(
        _send(request, job, reader, events, first.result()), media_type="text/event-stream", headers=headers
    )


async def _send(
    request: Request, job: Job, reader: PartReader, events: asyncio.Queue[_Event], event: _Event
) -> AsyncIterator[str]:
    """The text of the events; ends the job when the client hangs up."""
    try:
        while event is not None:
            parts = reader.finish(event) if isinstance(event, Prediction) else reader.read(*event)
            for part in parts:
                yield _format(_describe(part))
            following = asyncio.ensure_future(events.get())
            while not following.done():
                await asyncio.wait({following}, timeout=KEEP_ALIVE_SECONDS)
                if not following.done():
                    yield ": keep-alive\n\n"
            event = following.result()
        problem = job.problem
        yield f": server-timing {server_timing(job)}\n\n"  # a comment, which clients ignore: headers went before
        with_extra = request.headers.get(EXTRA_HEADER) == "1"
        yield _format(
            problem.body
            if problem is not None
            else get_context(request).body(job, base_url(request), with_extra=with_extra)
        )
    finally:
        get_context(request).service.cancel(job)  # changes nothing for a job that has ended


def _describe(part: Part) -> dict[str, Any]:
    if isinstance(part, TextPart):
        return {"part": "text", "text": part.text}
    described = {"part": _KINDS[type(part.item)], "index": part.index, "item": to_dict(part.item)}
    if isinstance(part.item, OCRBoundingBoxSingle):
        described["quad"] = to_dict(part.item.quad)
    return described


def _format(body: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"
