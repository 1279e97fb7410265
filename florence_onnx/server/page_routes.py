"""The playground: a page and its scripts, styles and sample images, all from this package."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import FileResponse

from florence_onnx import tasks
from florence_onnx.fal import problems
from florence_onnx.fal.contract import APP
from florence_onnx.server.openapi import output_name
from florence_onnx.server.responses import get_context, json_response
from florence_onnx.tasks import Task

router = APIRouter()
get = partial(router.api_route, methods=["GET", "HEAD"])
STATIC = Path(__file__).parent / "static"
SAMPLES = Path(__file__).parents[1] / "demo" / "samples"
_TYPES = {
    ".js": "text/javascript",
    ".css": "text/css",
    ".html": "text/html",
    ".svg": "image/svg+xml",
    ".png": "image/png",
}
_OUTPUTS = {
    "TextOutput": "text",
    "BoundingBoxOutputWithLabels": "boxes",
    "OCRBoundingBoxOutputWithLabels": "quads",
    "PolygonOutputWithLabels": "polygons",
}


@get("/")
async def page() -> Response:
    """The page."""
    return _file(STATIC, "index.html")


@get("/playground/config.json")
async def config(request: Request) -> Response:
    """The model, tasks, samples and limits that the page shows."""
    context = get_context(request)
    info = context.service.model.info()
    return json_response(
        {
            "model": context.settings.model_name,
            "provider": info["provider"],
            "precision": info["precision"],
            "auth": context.settings.api_key is not None,
            "prefix": APP,
            "tasks": [_describe(task) for task in context.service.model.tasks.values()],
            "samples": _samples(),
            "max_bytes": context.settings.service.image_limits.max_bytes,
        }
    )


@get("/playground/samples/{name}")
async def sample(name: str) -> Response:
    """A sample image."""
    return _file(SAMPLES, name)


@get("/playground/{name}")
async def static(name: str) -> Response:
    """A script, a style sheet or an icon."""
    return _file(STATIC, name)


def _describe(task: Task[Any]) -> dict[str, Any]:
    output = _OUTPUTS[output_name(task)]
    described = {"slug": task.slug, "token": task.token, "needs": task.needs, "output": output}
    return {**described, "description": task.description, "is_own": task.slug not in tasks.TASKS}


def _samples() -> list[dict[str, Any]]:
    known = json.loads((SAMPLES / "samples.json").read_text(encoding="utf-8"))
    return [
        {
            "name": each["file"],
            "url": f"playground/samples/{each['file']}",
            "width": each["size"][0],
            "height": each["size"][1],
        }
        for each in known
    ]


def _file(folder: Path, name: str) -> Response:
    path = folder / name
    if path.parent != folder or path.suffix not in _TYPES or not path.is_file():
        raise problems.not_found(f"playground/{name}")
    return FileResponse(path, media_type=_TYPES[path.suffix], headers={"Cache-Control": "no-cache"})
