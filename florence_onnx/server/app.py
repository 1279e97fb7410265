"""The ASGI application: routes, middleware and error handlers."""

from __future__ import annotations

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response

from florence_onnx.fal import problems
from florence_onnx.fal.problems import RequestError
from florence_onnx.server import operation_routes, page_routes, queue_routes, run_routes, storage_routes, stream_routes
from florence_onnx.server.context import ServerContext
from florence_onnx.server.middleware import RequestMiddleware
from florence_onnx.server.responses import json_response, problem_response


def create_app(context: ServerContext) -> FastAPI:
    """Builds the ASGI application of a server.

    Args:
        context: The state that all routes share.
    """
    # no OpenAPI document from FastAPI: it does not know fal's titles, and its pages load scripts from a CDN
    app = FastAPI(title="florence_onnx", openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.state.context = context
    for routes in (run_routes, stream_routes, queue_routes, storage_routes, operation_routes, page_routes):
        app.include_router(routes.router)
    app.add_exception_handler(RequestError, _on_request_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    # the middleware that is added last runs first
    settings = context.settings
    if settings.origins:
        app.add_middleware(CORSMiddleware, allow_origins=settings.origins, allow_methods=["*"], allow_headers=["*"])
    app.add_middleware(RequestMiddleware, context=context)
    return app


async def _on_request_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    return problem_response(error)


async def _on_http_exception(request: Request, error: Exception) -> Response:
    """Turns the router's own errors, unknown paths and methods, into fal's JSON."""
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        return problem_response(problems.not_found(request.url.path))
    return json_response({"detail": error.detail}, error.status_code, dict(error.headers or {}))
