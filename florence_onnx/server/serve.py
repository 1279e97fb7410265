"""Runs a server until SIGINT, SIGTERM or SIGHUP, then drains it."""

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
    """A uvicorn server that drains at the first signal and exits at the second."""

    def __init__(self, config: uvicorn.Config, context: ServerContext) -> None:
        super().__init__(config)
        self._context = context

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called for SIGINT, SIGTERM and SIGHUP."""
        if self._context.is_draining:
            self.should_exit = self.force_exit = True
            return
        _log.info("%s: finishing accepted requests", signal.Signals(sig).name)
        self._context.start_draining()

    async def on_tick(self, counter: int) -> bool:
        """Called by uvicorn ten times a second; returns whether to exit."""
        if self._context.is_draining and self._context.is_drained():
            self.should_exit = True
        return await super().on_tick(counter)


def serve(model: Florence2, settings: ServerSettings, log_format: LogFormat = "json") -> None:
    """Serves until SIGINT, SIGTERM or SIGHUP, then finishes all accepted requests.

    Args:
        model: The loaded model.
        settings: Options and limits of the server.
        log_format: Format of the log on standard error: one JSON object per line, or text for people.

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
        access_log=False,  # `middleware` logs more
        server_header=False,
        date_header=True,
        lifespan="off",
        timeout_graceful_shutdown=1,  # drained by then: an open connection has not sent its whole request
        timeout_keep_alive=65,  # longer than the 60 s of common proxies, so that the proxy closes first
        ssl_certfile=settings.certificate,
        ssl_keyfile=settings.private_key,
    )
    server = DrainingServer(config, context)
    _handle_hangup(server)
    try:
        server.run()
    finally:
        context.close()


def _handle_hangup(server: DrainingServer) -> None:
    """Treats SIGHUP, sent when a terminal is closed, as SIGTERM, unless it is ignored as under nohup."""
    hangup = getattr(signal, "SIGHUP", None)  # Windows has none
    if hangup is not None and signal.getsignal(hangup) == signal.SIG_DFL:
        signal.signal(hangup, server.handle_exit)


def configure_logging(log_format: LogFormat) -> None:
    """Sends the logs of this package and of uvicorn to standard error."""
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
        reserved_attrs=[*RESERVED_ATTRS, "color_message"],  # uvicorn's message with terminal colours
    )
