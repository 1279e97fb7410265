"""Uploads, as fal's clients make them, and the files that we serve."""

from __future__ import annotations

import datetime
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import FileResponse

from florence_onnx.fal import problems
from florence_onnx.server.context import TOKEN_SECONDS
from florence_onnx.server.file_store import IMAGE_TYPES
from florence_onnx.server.responses import base_url, get_context, json_response, read_json

router = APIRouter()


@router.post("/storage/auth/token")
async def make_token(request: Request) -> Response:
    """A token and where to send files with it."""
    end = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(seconds=TOKEN_SECONDS)
    token = get_context(request).make_token()
    return json_response(
        {"token": token, "token_type": "Bearer", "base_url": base_url(request), "expires_at": end.isoformat()}
    )


@router.post("/files/upload")
async def upload(request: Request) -> Response:
    """Takes a file whole."""
    name = request.headers.get("X-Fal-File-Name", "file")
    content_type = request.headers.get("Content-Type", "application/octet-stream")
    address = get_context(request).files.put(await request.body(), name, content_type)
    return json_response({"access_url": base_url(request) + address})


@router.post("/storage/upload/initiate")
async def initiate(request: Request) -> Response:
    """Announces a file."""
    described: Any = await read_json(request)
    if not isinstance(described, dict):
        raise problems.bad_request("an object with file_name and content_type is needed")
    name, content_type = (
        str(described.get(field) or default)
        for field, default in (("file_name", "file"), ("content_type", "application/octet-stream"))
    )
    token, address = get_context(request).files.expect(name, content_type)
    base = base_url(request)
    return json_response({"upload_url": f"{base}/storage/upload/{token}", "file_url": base + address})


@router.put("/storage/upload/{token}")
async def receive(token: str, request: Request) -> Response:
    """Takes an announced file; its address cannot be guessed, so no key is needed."""
    get_context(request).files.receive(token, await request.body())
    return Response(status_code=200)


@router.get("/files/{token}/{name}")
@router.get("/files/{token}")
async def download(token: str, request: Request) -> Response:
    """Serves a file."""
    stored = get_context(request).files.get(token)
    if stored is None:
        raise problems.not_found(request.url.path)
    disposition = "inline" if stored.content_type in IMAGE_TYPES else "attachment"
    headers = {
        "Cache-Control": "private, max-age=3600, immutable",
        "Content-Security-Policy": "default-src 'none'; sandbox",
        "Cross-Origin-Resource-Policy": "cross-origin",
    }
    return FileResponse(
        stored.path,
        media_type=stored.content_type,
        filename=stored.name,
        content_disposition_type=disposition,
        headers=headers,
    )
