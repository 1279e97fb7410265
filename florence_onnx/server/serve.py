"""Runs a server until SIGINT, SIGTERM or SIGHUP, then drains it."""

from __future__ import annotations

import logging
import signal
import socket
from collections.abc import Sequence
from types import FrameType

import uvicorn

from florence_onnx.model import Florence2
from florence_onnx.server.app import create_app
from florence_onnx.server.context import ServerContext
from florence_onnx.server.listener import BACKLOG, Listener, bind, fit_connections
from florence_onnx.server.log_format import LogFormat, configure_logging
from florence_onnx.server.protocol import GuardedProtocol, make_protocol
from florence_onnx.server.settings import ServerSettings

_log = logging.getLogger("florence_onnx.server")


class DrainingServer(uvicorn.Server):
    """A uvicorn server that drains at the first signal and exits at the second."""

    def __init__(self, config: uvicorn.Config, context: ServerContext) -> None:
        super().__init__(config)
        self._context = context

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Called by uvicorn to start listening."""
        await super().startup(sockets)
        scheme = "https" if self.config.is_ssl else "http"
        for each in sockets or ():
            host, port = each.getsockname()[:2]
            shown = f"[{host}]" if ":" in host else host
            _log.info("listening on %s://%s:%d", scheme, shown, port)
        if self._context.settings.is_open:
            _log.warning("there is no key: anyone who can reach %s can use this server", self._context.settings.host)

    def close_idle(self) -> bool:
        """Closes the connection that has waited longest for a request; returns whether there was one."""
        connections = [each for each in self.server_state.connections if isinstance(each, GuardedProtocol)]
        idle = [each for each in connections if each.is_idle]
        if idle:
            min(idle, key=lambda each: each.idle_since).close()
        return bool(idle)

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


def serve(
    model: Florence2,
    settings: ServerSettings,
    log_format: LogFormat = "json",
    listeners: Sequence[Listener] | None = None,
) -> None:
    """Serves until SIGINT, SIGTERM or SIGHUP, then finishes all accepted requests.

    Args:
        model: The loaded model.
        settings: Options and limits of the server.
        log_format: Format of the log on standard error: one JSON object per line, or text for people.
        listeners: Sockets from `bind`; None to bind them now.

    Raises:
        InputError: The address cannot be bound, or the limit of open files is too low.
    """
    configure_logging(log_format)
    listeners = bind(settings.host, settings.port) if listeners is None else listeners
    context = ServerContext(model, settings)
    config = uvicorn.Config(
        create_app(context),
        host=settings.host,
        port=settings.port,
        http=make_protocol(settings),
        ws="none",
        loop="asyncio",  # uvloop would not call Listener.accept
        backlog=BACKLOG,
        log_config=None,
        access_log=False,  # `middleware` logs more
        server_header=False,
        date_header=True,
        lifespan="off",
        timeout_graceful_shutdown=1,  # drained by then: an open connection has not sent its whole request
        timeout_keep_alive=max(1, round(settings.idle_seconds)),
        ssl_certfile=settings.certificate,
        ssl_keyfile=settings.private_key,
    )
    server = DrainingServer(config, context)
    _handle_hangup(server)
    try:
        context.connections.max_open = fit_connections(settings.max_connections)
        context.connections.close_idle = server.close_idle
        for listener in listeners:
            listener.limit, listener.is_tls = context.connections, settings.certificate is not None
        server.run(sockets=list(listeners))
    finally:
        for listener in listeners:
            listener.close()
        context.close()


def _handle_hangup(server: DrainingServer) -> None:
    """Treats SIGHUP, sent when a terminal is closed, as SIGTERM, unless it is ignored as under nohup."""
    hangup = getattr(signal, "SIGHUP", None)  # Windows has none
    if hangup is not None and signal.getsignal(hangup) == signal.SIG_DFL:
        signal.signal(hangup, server.handle_exit)
