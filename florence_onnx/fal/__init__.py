"""A drop-in replacement for `fal_client`: `fal-ai/florence-2-large/*` runs in this process, without a socket or a key.

```python
from florence_onnx import fal  # instead of: import fal_client as fal

fal.configure(model="path/to/bundle")  # once; or set the environment variable FLORENCE_ONNX_MODEL
fal.run("fal-ai/florence-2-large/object-detection", arguments={"image_url": "https://…/car.jpg"})
```

Names, arguments and return values are those of `fal_client` 1.0.3, for everything that these endpoints offer. The model
is loaded once, by the first request.

In: an endpoint id and fal's arguments (`image_url`, `text_input` or `region`). Out: fal's JSON as a dict, or fal's
errors (`FalClientHTTPError`, `FalClientTimeoutError`). `contract` validates the arguments, `service` is the bounded
queue in front of one `Florence2`, `jobs` is the state of a request, `problems` holds fal's errors, and `client` wraps
all of it in the interface of `fal_client`. User code may call everything in `__all__`; `server` and `bench_fal` may
also use the modules, above all `service`. Nothing here opens a port: `server` does.
"""

from __future__ import annotations

import base64
import io
import mimetypes
import os
from pathlib import Path
from typing import Any

from PIL import Image as PILImage

from florence_onnx import forks
from florence_onnx.fal.client import AsyncClient, AsyncRequestHandle, SyncClient, SyncRequestHandle
from florence_onnx.fal.service import Service, ServiceSettings, as_data_uri, without_image
from florence_onnx.fal.states import (
    Completed,
    FalClientError,
    FalClientHTTPError,
    FalClientTimeoutError,
    InProgress,
    Queued,
    Status,
)
from florence_onnx.model import Florence2

__all__ = [
    "AsyncClient",
    "AsyncRequestHandle",
    "Completed",
    "FalClientError",
    "FalClientHTTPError",
    "FalClientTimeoutError",
    "InProgress",
    "Queued",
    "Status",
    "SyncClient",
    "SyncRequestHandle",
    "cancel",
    "cancel_async",
    "configure",
    "encode",
    "encode_file",
    "encode_image",
    "result",
    "result_async",
    "run",
    "run_async",
    "status",
    "status_async",
    "submit",
    "submit_async",
    "subscribe",
    "subscribe_async",
    "upload",
    "upload_async",
    "upload_file",
    "upload_file_async",
    "upload_image",
    "upload_image_async",
]

MODEL_VARIABLE = "FLORENCE_ONNX_MODEL"
DEFAULT_MODEL = "onnx-community/Florence-2-large"
"""Hub repository with the ONNX files of the model that the endpoints are named after."""


class _Configuration:
    """The arguments of `configure`, kept until the first request loads the model."""

    def __init__(self) -> None:
        self.lock = forks.Lock()
        self.model: str | os.PathLike[str] | Florence2 | None = None
        self.options: dict[str, Any] = {}
        self.settings = ServiceSettings()
        self.has_images = True

    def make_service(self) -> Service:
        """Loads the model and starts a service in front of it."""
        with self.lock:
            model, options, settings, has_images = self.model, self.options, self.settings, self.has_images
        if not isinstance(model, Florence2):
            name = model if model is not None else os.environ.get(MODEL_VARIABLE) or DEFAULT_MODEL
            model = Florence2.from_pretrained(name, **options)
        return Service(model, settings, publish=as_data_uri if has_images else without_image)


_configuration = _Configuration()
_sync_client = SyncClient(_configuration.make_service)
_async_client = AsyncClient(_sync_client)


def configure(
    model: str | os.PathLike[str] | Florence2 | None = None,
    *,
    images: bool = True,
    settings: ServiceSettings | None = None,
    **options: Any,
) -> None:
    """Chooses the model. A model that is already loaded finishes its requests and is then released.

    Args:
        model: A name or path for `Florence2.from_pretrained`, or a loaded model. None takes the environment variable
            `FLORENCE_ONNX_MODEL`, and `onnx-community/Florence-2-large` where that is not set.
        images: Whether results with geometry include the annotated image, as fal's do; here it is a `data:` URI, and
            drawing it takes a few milliseconds. If False, `image` is None.
        settings: Limits for images, the queue and batches.
        **options: Keyword arguments for `Florence2.from_pretrained`, such as `device`.
    """
    with _configuration.lock:
        _configuration.model = model
        _configuration.options = options
        _configuration.settings = settings or ServiceSettings()
        _configuration.has_images = images
    _sync_client.close()


run = _sync_client.run
subscribe = _sync_client.subscribe
submit = _sync_client.submit
status = _sync_client.status
result = _sync_client.result
cancel = _sync_client.cancel

run_async = _async_client.run
subscribe_async = _async_client.subscribe
submit_async = _async_client.submit
status_async = _async_client.status
result_async = _async_client.result
cancel_async = _async_client.cancel


def encode(data: str | bytes, content_type: str) -> str:
    """Encodes data as a `data:` URI of the given MIME type."""
    content = data.encode("utf-8") if isinstance(data, str) else data
    return f"data:{content_type};base64,{base64.b64encode(content).decode('ascii')}"


def encode_file(path: str | os.PathLike[str]) -> str:
    """Encodes a file as a `data:` URI; the MIME type is guessed from the file name."""
    content_type = mimetypes.guess_type(os.fspath(path))[0] or "application/octet-stream"
    return encode(Path(path).read_bytes(), content_type)


def encode_image(image: PILImage.Image, format: str = "jpeg") -> str:
    """Encodes a PIL image as a `data:` URI."""
    buffer = io.BytesIO()
    image.save(buffer, format=format)
    return encode(buffer.getvalue(), f"image/{format}")


def upload(data: str | bytes, content_type: str, file_name: str | None = None, **options: Any) -> str:
    """Returns a URL for `image_url`: a `data:` URI, as nothing is uploaded."""
    return encode(data, content_type)


def upload_file(path: str | os.PathLike[str], **options: Any) -> str:
    """Returns a URL of a file for `image_url`; see `upload`."""
    return encode_file(path)


def upload_image(image: PILImage.Image, format: str = "jpeg", **options: Any) -> str:
    """Returns a URL of a PIL image for `image_url`; see `upload`."""
    return encode_image(image, format)


async def upload_async(data: str | bytes, content_type: str, file_name: str | None = None, **options: Any) -> str:
    """Async variant of `upload`."""
    return encode(data, content_type)


async def upload_file_async(path: str | os.PathLike[str], **options: Any) -> str:
    """Async variant of `upload_file`."""
    return encode_file(path)


async def upload_image_async(image: PILImage.Image, format: str = "jpeg", **options: Any) -> str:
    """Async variant of `upload_image`."""
    return encode_image(image, format)
