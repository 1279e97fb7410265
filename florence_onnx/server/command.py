"""`florence-onnx serve`: from the command line's words to a running server."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import cast, get_args

from florence_onnx.bundle import DEMO
from florence_onnx.errors import InputError, MissingExtraError
from florence_onnx.fal.service import ServiceSettings
from florence_onnx.model import Florence2
from florence_onnx.server.settings import Images, ServerSettings, default_limits

_PACKAGES = ("fastapi", "uvicorn", "prometheus_client", "pythonjsonlogger", "starlette", "anyio")
_LOG_FORMATS = ("json", "text")


def run(
    model: str,
    *,
    device: str,
    precision: str | None,
    host: str,
    port: int,
    api_key: str | None,
    workers: int,
    max_batch: int,
    max_waiting: int,
    cache_mb: int,
    images: str,
    public_url: str | None,
    origins: Sequence[str],
    allowed_hosts: Sequence[str],
    certificate: str | None,
    private_key: str | None,
    grace: float,
    log_format: str,
) -> None:
    """Loads the model and serves until told to stop.

    Raises:
        FlorenceError: The model cannot be loaded, or an argument makes no sense.
        MissingExtraError: The extra `serve` is not installed.
    """
    if images not in get_args(Images):
        raise InputError(f"--images must be one of {', '.join(get_args(Images))}, got {images!r}")
    if log_format not in _LOG_FORMATS:
        raise InputError(f"--log-format must be json or text, got {log_format!r}")
    limits = replace(default_limits(), allowed_hosts=tuple(allowed_hosts))
    settings = ServerSettings(
        host=host,
        port=port,
        api_key=api_key,
        images=cast(Images, images),
        public_url=public_url,
        origins=tuple(origins),
        service=ServiceSettings(
            pictures=limits,
            workers=workers,
            max_batch=max_batch,
            max_waiting=max_waiting,
            feature_cache_bytes=cache_mb * 2**20,
        ),
        grace_seconds=grace,
        certificate=certificate,
        private_key=private_key,
    )
    try:
        from florence_onnx.server.serve import serve
    except ImportError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _PACKAGES:
            raise
        raise MissingExtraError(package, "serve") from None
    if not settings.is_loopback and api_key is None:
        _say(f"everybody who reaches {host} can use this server: pass --api-key to keep strangers out")
    if model == DEMO:
        _say("the demo model knows drawn shapes and words only; for photographs, pass --model")
    florence = Florence2.from_pretrained(model, device=device, precision=precision)
    florence.warm_up()
    scheme = "https" if certificate else "http"
    _say(f"serving {model} on {scheme}://{host}:{port}/ (Ctrl-C finishes what was accepted and ends)")
    serve(florence, settings, "text" if log_format == "text" else "json")


def _say(message: str) -> None:
    sys.stderr.write(f"{message}\n")
