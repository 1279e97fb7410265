"""The listening sockets: bound before the model is loaded, and never with more connections than there are descriptors."""

from __future__ import annotations

import errno
import json
import logging
import os
import socket
import time
from collections.abc import Callable
from http import HTTPStatus
from pathlib import Path
from typing import Any

from florence_onnx.errors import InputError

RESERVED_FILES = 64
"""Descriptors that are kept for everything but connections: downloads, stored files, refusals, libraries."""
MIN_CONNECTIONS = 16
"""Fewest connections that a server can work with."""
BACKLOG = 512
"""Connections that the system accepts for us before we do."""
_LOG_SECONDS = 10.0
_NO_DESCRIPTOR = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_log = logging.getLogger("florence_onnx.server")


def refusal(status: HTTPStatus, detail: str) -> bytes:
    """Returns a whole response, for connections that are refused outside of the routes."""
    body = json.dumps({"detail": detail}).encode()
    head = f"HTTP/1.1 {status.value} {status.phrase}\r\nContent-Type: application/json\r\nConnection: close\r\n"
    retry = "Retry-After: 5\r\n" if status == HTTPStatus.SERVICE_UNAVAILABLE else ""
    return f"{head}{retry}Content-Length: {len(body)}\r\n\r\n".encode() + body


class ConnectionLimit:
    """Counts connections. Used by the event loop's thread only."""

    def __init__(self, max_open: int) -> None:
        """Starts with none.

        Args:
            max_open: Most connections at a time.
        """
        self.max_open = max_open
        self.num_open = 0
        self.num_refused = 0
        """Connections that got a 503 since the start."""
        self.close_idle: Callable[[], bool] = lambda: False
        """Closes a connection that waits for its next request; returns whether there was one."""
        self._logged = float("-inf")

    def has_room(self) -> bool:
        """Whether one more connection may be accepted; closes an idle one for it if need be."""
        if self.num_open < self.max_open:
            return True
        # what was closed goes in the loop's next round, so a burst may exceed the limit for a moment, but not by much
        return self.num_open < self.max_open + RESERVED_FILES // 4 and self.close_idle()

    def count_refusal(self) -> None:
        """Counts a refused connection, and logs the number now and then."""
        self.num_refused += 1
        now = time.monotonic()
        if now - self._logged > _LOG_SECONDS:
            self._logged = now
            _log.warning(
                "%d connections are open, the most allowed: %d refused so far", self.num_open, self.num_refused
            )


class Listener(socket.socket):
    """A listening socket whose `accept` keeps to a `ConnectionLimit`. asyncio's selector loop calls it."""

    limit: ConnectionLimit
    is_tls = False

    def accept(self) -> tuple[socket.socket, Any]:
        """Accepts a connection; those above the limit are answered with 503 and closed.

        Raises:
            BlockingIOError: There is none.
        """
        for _ in range(BACKLOG):
            try:
                connection, address = super().accept()
            except OSError as error:
                if error.errno not in _NO_DESCRIPTOR:
                    raise
                self.limit.count_refusal()
                time.sleep(0.01)  # the connection cannot even be closed; asyncio would log it BACKLOG times
                break
            if self.limit.has_room():
                return _Connection(self.limit, connection.detach()), address
            self._refuse(connection)
        raise BlockingIOError

    def _refuse(self, connection: socket.socket) -> None:
        self.limit.count_refusal()
        message = f"{self.limit.max_open} connections are open, the most that this server takes; try again later"
        with connection:
            connection.setblocking(False)
            try:
                if not self.is_tls:
                    connection.recv(65536)  # a socket that is closed with bytes unread takes back what it has sent
            except OSError:
                pass
            try:
                if not self.is_tls:
                    connection.send(refusal(HTTPStatus.SERVICE_UNAVAILABLE, message))
                    connection.shutdown(socket.SHUT_WR)
            except OSError:  # gone already
                pass


class _Connection(socket.socket):
    """An accepted connection, counted until it is closed."""

    def __init__(self, limit: ConnectionLimit, fileno: int) -> None:
        super().__init__(fileno=fileno)
        self._limit = limit
        limit.num_open += 1

    def close(self) -> None:
        """Closes the connection."""
        if self.fileno() >= 0:
            self._limit.num_open -= 1
        super().close()


def bind(host: str, port: int) -> list[Listener]:
    """Binds sockets to all addresses of a host, without listening yet.

    Args:
        host: A name or an address.
        port: 0 for a free port.

    Raises:
        InputError: The host is unknown, the port is in use, or either is not allowed.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise InputError(
            f"cannot listen on {host!r}: {error.strerror or error}; pass an address of this machine"
        ) from None
    listeners: list[Listener] = []
    try:
        for family, kind, protocol, _, address in dict.fromkeys(found):
            listeners += _bind_one(family, kind, protocol, address, is_only=len(found) == 1)
        if not listeners:
            raise OSError(errno.EADDRNOTAVAIL, os.strerror(errno.EADDRNOTAVAIL))
    except OSError as error:
        for listener in listeners:
            listener.close()
        remedy = "; choose another with --port, 0 picks a free one" if error.errno == errno.EADDRINUSE else ""
        raise InputError(f"cannot listen on {host} port {port}: {error.strerror or error}{remedy}") from None
    return listeners


def _bind_one(family: int, kind: int, protocol: int, address: Any, *, is_only: bool) -> list[Listener]:
    try:
        listener = Listener(family, kind, protocol)
    except OSError:  # a name with an IPv6 address, on a machine without IPv6
        if is_only:
            raise
        return []
    try:
        if os.name == "posix":
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as asyncio does
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRNOTAVAIL and not is_only:
            return []
        raise
    return [listener]


def fit_connections(wanted: int) -> int:
    """Returns how many connections there are descriptors for, at most `wanted`.

    Raises:
        InputError: There are too few to work with.
    """
    soft = _max_files()
    room = wanted if soft is None else soft - _num_files() - RESERVED_FILES
    if room < MIN_CONNECTIONS:
        raise InputError(
            f"the limit of open files, {soft}, leaves room for {max(0, room)} connections; raise it: ulimit -n 1024"
        )
    if room < wanted:
        _log.warning("at most %d connections instead of %d: the limit of open files is %d", room, wanted, soft)
    return min(wanted, room)


def _max_files() -> int | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return None if soft == resource.RLIM_INFINITY else soft


def _num_files() -> int:
    for folder in ("/proc/self/fd", "/dev/fd"):
        if Path(folder).is_dir():
            return len(os.listdir(folder))  # noqa: PTH208 - the folder changes while it is read
    return RESERVED_FILES
