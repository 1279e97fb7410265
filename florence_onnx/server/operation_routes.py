"""Operational endpoints: health, readiness, metrics and the OpenAPI document."""

from __future__ import annotations

from functools import partial

from fastapi import APIRouter, Request, Response

from florence_onnx import __version__
from florence_onnx.fal import problems
from florence_onnx.server import openapi
from florence_onnx.server.responses import get_context, json_response

router = APIRouter()
get = partial(router.api_route, methods=["GET", "HEAD"])


@get("/health")
async def health() -> Response:
    """Liveness: the process answers."""
    return json_response({"status": "ok", "version": __version__})


@get("/ready")
async def ready(request: Request) -> Response:
    """Readiness: requests are accepted. The model is always loaded, as the server listens only after that.

    `storage` is `full` where the disk is: uploads fail then, and results have no annotated image.
    """
    context = get_context(request)
    if context.is_draining:
        raise problems.shutting_down()
    return json_response({"status": "ready", "storage": "full" if context.files.is_full else "ok"})


@get("/metrics")
async def metrics(request: Request) -> Response:
    """Metrics for Prometheus."""
    return Response(get_context(request).metrics.render(), media_type="text/plain; version=0.0.4")


@get("/openapi.json")
async def document(request: Request) -> Response:
    """The OpenAPI document."""
    context = get_context(request)
    has_options = context.settings.service.allow_options
    return json_response(openapi.document(context.service.model.tasks, has_options=has_options))
