"""Uploads with the protocol of fal's clients, and downloads of stored files."""

from __future__ import annotations

import asyncio
import datetime
from functools import partial
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import FileResponse

from florence_onnx.fal import problems
from florence_onnx.server.context import TOKEN_SECONDS
from florence_onnx.server.file_store import IMAGE_TYPES
from florence_onnx.server.responses import base_url, get_context, json_response, owner_of, read_body, read_json

router = APIRouter()
get = partial(router.api_route, methods=["GET", "HEAD"])


@router.post("/storage/auth/token")
async def make_token(request: Request) -> Response:
    """Creates an upload token."""
    end = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(seconds=TOKEN_SECONDS)
    token = get_context(request).make_token()
    return json_response(
        {"token": token, "token_type": "Bearer", "base_url": base_url(request), "expires_at": end.isoformat()}
    )


@router.post("/files/upload")
async def upload(request: Request) -> Response:
    """Stores a file that is sent in one request."""
    name = request.headers.get("X-Fal-File-Name", "file")
    content_type = request.headers.get("Content-Type", "application/octet-stream")
    content, owner = await read_body(request), owner_of(request.scope)
    address = await asyncio.to_thread(get_context(request).files.put, content, name, content_type, owner)
    return json_response({"access_url": base_url(request) + address})


@router.post("/storage/upload/initiate")
async def initiate(request: Request) -> Response:
    """Reserves a URL for a file that is uploaded next."""
    described: Any = await read_json(request)
    if not isinstance(described, dict):
        raise problems.bad_request("the body must be an object with file_name and content_type")
    name, content_type = (
        str(described.get(field) or default)
        for field, default in (("file_name", "file"), ("content_type", "application/octet-stream"))
    )
    token, address = get_context(request).files.reserve(name, content_type, owner_of(request.scope))
    base = base_url(request)
    return json_response({"upload_url": f"{base}/storage/upload/{token}", "file_url": base + address})


@router.put("/storage/upload/{token}")
async def upload_reserved(token: str, request: Request) -> Response:
    """Stores a file under a reserved URL. It cannot be guessed, so no key is needed."""
    files = get_context(request).files
    files.check_reserved(token)  # before the body is read: anybody can send one here
    await asyncio.to_thread(files.put_reserved, token, await read_body(request))
    return Response(status_code=200)


@get("/files/{token}/{name}")
@get("/files/{token}")
async def download(token: str, request: Request) -> Response:
    """Sends a stored file."""
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
