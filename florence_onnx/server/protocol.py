"""uvicorn's HTTP protocol with what it lacks: a time limit for headers and for reading a response, and lingering closes.

The rate of a body is `middleware`'s concern, the number of connections `listener`'s.
"""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from florence_onnx.server.listener import refusal
from florence_onnx.server.settings import ServerSettings

LINGER_SECONDS = 2.0
"""Seconds for which a connection is read on after a response that is sent before the body's end."""
LINGER_BYTES = 1 << 20
"""Bytes that are read on, and thrown away."""
MIN_IDLE_SECONDS = 2.0
"""Seconds after which a connection without a complete request may be closed for a new one."""


class _Transport:
    """A transport whose `close` lingers if the client is still sending.

    A socket that is closed with bytes unread sends a reset, upon which some systems throw away the response that has
    arrived before it. So our side is closed first, and bytes are read on for a while.
    """

    def __init__(self, transport: asyncio.Transport, protocol: GuardedProtocol) -> None:
        self._transport = transport
        self._protocol = protocol

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def close(self) -> None:
        self._protocol.close()

    def is_closing(self) -> bool:
        return self._protocol.is_lingering or self._transport.is_closing()


class GuardedProtocol(H11Protocol):
    """One connection."""

    header_seconds: float
    """Seconds for the headers of a request, from the connection or from their first byte."""
    idle_seconds: float
    """Seconds for which the client may not read its response."""
    is_lingering = False
    """Whether what the client sends is thrown away."""

    # ------------------------------------------------------------------------------------------- calls of the event loop

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begins a connection."""
        self._inner = transport
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._num_discarded = 0
        self.idle_since = self.loop.time()
        """The loop's time since which the connection waits for a request."""
        super().connection_made(_Transport(transport, self))  # type: ignore[arg-type]
        self._start("header", self.header_seconds, self._on_header_timeout)

    def connection_lost(self, exc: Exception | None) -> None:
        """Ends a connection."""
        super().connection_lost(exc)
        for name in list(self._timers):
            self._stop(name)

    def data_received(self, data: bytes) -> None:
        """Takes what the client sent."""
        if self.is_lingering:
            self._num_discarded += len(data)
            if self._num_discarded > LINGER_BYTES:
                self._inner.abort()
            return
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._stop("header")
        elif "header" not in self._timers:  # the first bytes of a further request
            self._start("header", self.header_seconds, self._on_header_timeout)

    def pause_writing(self) -> None:
        """The client reads its response slower than it is made."""
        super().pause_writing()
        self._start("write", self.idle_seconds, self._inner.abort)

    def resume_writing(self) -> None:
        """The client has read some of its response."""
        super().resume_writing()
        self._stop("write")

    # -------------------------------------------------------------------------------------------------- ends of requests

    def on_response_complete(self) -> None:
        """Ends a request."""
        self.idle_since = self.loop.time()
        super().on_response_complete()

    @property
    def is_idle(self) -> bool:
        """Whether the connection may be closed to make room: between two requests, or silent for some time."""
        if self.is_lingering or self._inner.is_closing() or self.conn.their_state is not h11.IDLE:
            return False
        return self.cycle is not None or self.loop.time() - self.idle_since > MIN_IDLE_SECONDS

    def close(self) -> None:
        """Closes the connection once the response is written; lingers if the client is still sending."""
        if self.is_lingering or self._inner.is_closing():
            return
        if self.conn.their_state not in (h11.SEND_BODY, h11.ERROR):
            self._inner.close()
            self._start("write", self.idle_seconds, self._inner.abort)
            return
        self.is_lingering = True
        if self._inner.can_write_eof():
            self._inner.write_eof()
        self.flow.resume_reading()
        self._start("linger", LINGER_SECONDS, self._inner.abort)

    def _on_header_timeout(self) -> None:
        if self._inner.is_closing() or self.is_lingering:
            return
        if self.conn.trailing_data[0]:  # a part of the headers
            seconds = f"{self.header_seconds:g} s"
            self._inner.write(refusal(HTTPStatus.REQUEST_TIMEOUT, f"The headers took longer than {seconds}"))
        self._inner.close()

    # ------------------------------------------------------------------------------------------------------------ timers

    def _start(self, name: str, seconds: float, call: Any) -> None:
        self._stop(name)
        self._timers[name] = self.loop.call_later(seconds, call)

    def _stop(self, name: str) -> None:
        timer = self._timers.pop(name, None)
        if timer is not None:
            timer.cancel()


def make_protocol(settings: ServerSettings) -> type[GuardedProtocol]:
    """Returns the protocol with the time limits of a server."""

    class Configured(GuardedProtocol):
        header_seconds = settings.header_seconds
        idle_seconds = settings.idle_seconds

    return Configured
