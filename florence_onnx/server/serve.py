"""Runs a server until it is told to stop, and then until its work is done."""

from __future__ import annotations

import logging
import signal
import sys
from types import FrameType
from typing import Literal

import uvicorn
from pythonjsonlogger.core import RESERVED_ATTRS
from pythonjsonlogger.json import JsonFormatter

from florence_onnx.model import Florence2
from florence_onnx.server.app import create_app
from florence_onnx.server.context import ServerContext
from florence_onnx.server.settings import ServerSettings

LogFormat = Literal["json", "text"]
_log = logging.getLogger("florence_onnx.server")


class DrainingServer(uvicorn.Server):
    """The first signal drains, the second ends at once."""

    def __init__(self, config: uvicorn.Config, context: ServerContext) -> None:
        super().__init__(config)
        self._context = context

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called for SIGINT and SIGTERM."""
        if self._context.is_draining:
            self.should_exit = self.force_exit = True
            return
        _log.info("%s: finishing what was accepted", signal.Signals(sig).name)
        self._context.begin_to_drain()

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second; True ends the server."""
        if self._context.is_draining and self._context.is_drained():
            self.should_exit = True
        return await super().on_tick(counter)


def serve(model: Florence2, settings: ServerSettings, log_format: LogFormat = "json") -> None:
    """Serves until SIGINT or SIGTERM, then finishes what was accepted.

    Raises:
        SystemExit: The address cannot be bound (uvicorn's own exit code).
    """
    configure_logging(log_format)
    context = ServerContext(model, settings)
    config = uvicorn.Config(
        create_app(context),
        host=settings.host,
        port=settings.port,
        log_config=None,
        access_log=False,  # ours has more in it
        server_header=False,
        date_header=True,
        lifespan="off",
        timeout_graceful_shutdown=1,  # all work is done by then; what is still open has not sent its request
        timeout_keep_alive=65,  # longer than the usual proxy's, so that it is the proxy that closes
        ssl_certfile=settings.certificate,
        ssl_keyfile=settings.private_key,
    )
    try:
        DrainingServer(config, context).run()
    finally:
        context.close()


def configure_logging(log_format: LogFormat) -> None:
    """Logs to standard error: one JSON object a line, or text for people."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_formatter(log_format))
    for name in ("florence_onnx", "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.setLevel(logging.INFO)
        logger.propagate = False


def _formatter(log_format: LogFormat) -> logging.Formatter:
    if log_format == "text":
        return logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    fields = "%(asctime)s %(levelname)s %(name)s %(message)s"
    return JsonFormatter(
        fields,
        rename_fields={"asctime": "time", "levelname": "level", "name": "logger"},
        reserved_attrs=[*RESERVED_ATTRS, "color_message"],  # uvicorn's, for terminals
    )
