"""HTTP connections that end at a deadline and, when asked, only at public addresses.

The check sits where the connection is made, so that no way of writing a URL and no redirect leads past it.
"""

from __future__ import annotations

import http.client
import io
import logging
import socket
import ssl
import time
import urllib.request
from dataclasses import dataclass
from typing import Any

from florence_onnx.images import addresses

_log = logging.getLogger("florence_onnx")


class RefusedError(Exception):
    """Something that is not asked for at all; the message may be shown to a stranger."""


@dataclass(frozen=True)
class Rules:
    """What holds for all connections of one download."""

    deadline: float
    """What `time.monotonic()` may at most be."""
    public_only: bool = False
    """Whether hosts must be public: no proxy, as that would resolve names by itself, and no private address."""
    exempt: frozenset[tuple[str, int]] = frozenset()
    """(host, port) for which `public_only` does not hold."""

    def seconds_left(self) -> float:
        """Seconds until the deadline, more than 0.

        Raises:
            TimeoutError: It has passed.
        """
        seconds = self.deadline - time.monotonic()
        if seconds <= 0:
            raise TimeoutError("timed out")
        return seconds


def make_opener(rules: Rules) -> urllib.request.OpenerDirector:
    """An opener for `http` and `https` only, that follows no redirect and returns every status."""
    opener = urllib.request.OpenerDirector()
    if not rules.public_only:
        opener.add_handler(urllib.request.ProxyHandler())
    opener.add_handler(_Handler(rules))
    return opener


class _Handler(urllib.request.AbstractHTTPHandler):
    def __init__(self, rules: Rules) -> None:
        super().__init__()
        self._rules = rules

    def http_request(self, request: urllib.request.Request) -> urllib.request.Request:
        return self.do_request_(request)

    https_request = http_request

    def http_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(self._connect_http, request)

    def https_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(self._connect_https, request)

    def _connect_http(self, host: str, **options: Any) -> http.client.HTTPConnection:
        connection = _Connection(host, **options)
        connection.rules = self._rules
        return connection

    def _connect_https(self, host: str, **options: Any) -> http.client.HTTPConnection:
        connection = _SecureConnection(host, context=ssl.create_default_context(), **options)
        connection.rules = self._rules
        return connection


class _Connection(http.client.HTTPConnection):
    rules: Rules  # without a default: a connection that was not given any cannot be opened

    def connect(self) -> None:
        found = _resolve(self.host, self.port, self.rules)
        self.sock = _connect_to_first(found, self.rules)
        if self._tunnel_host:  # type: ignore[attr-defined]  # through a proxy
            self._tunnel()  # type: ignore[attr-defined]
            self.sock.settimeout(self.rules.seconds_left())

    def response_class(self, sock: socket.socket, *arguments: Any, **options: Any) -> http.client.HTTPResponse:  # type: ignore[override]
        return _Response(sock, self.rules, *arguments, **options)


class _SecureConnection(http.client.HTTPSConnection, _Connection):
    """TLS on top: `HTTPSConnection.connect` calls the `connect` above and checks the certificate by the name."""

    def connect(self) -> None:
        super().connect()
        self.sock.settimeout(self.rules.seconds_left())  # the handshake took some


class _Response(http.client.HTTPResponse):
    def __init__(self, sock: socket.socket, rules: Rules, *arguments: Any, **options: Any) -> None:
        super().__init__(sock, *arguments, **options)
        self.fp = io.BufferedReader(_TimedStream(self.fp.detach(), sock, rules))


class _TimedStream(io.RawIOBase):
    """Reads from a socket until the deadline.

    A socket's own timeout starts anew with every byte that comes, also within the headers.
    """

    def __init__(self, raw: io.RawIOBase, sock: socket.socket, rules: Rules) -> None:
        self._raw, self._sock, self._rules = raw, sock, rules

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        self._sock.settimeout(self._rules.seconds_left())
        return self._raw.readinto(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()


def _resolve(host: str, port: int, rules: Rules) -> list[tuple[int, Any]]:
    """The (family, socket address) of a host, every one of them allowed; this is the only look-up of its name.

    Raises:
        RefusedError: The port or one of the addresses is not allowed.
        OSError: There is no such host.
    """
    is_filtered = rules.public_only and (host.lower(), port) not in rules.exempt
    if is_filtered and not addresses.is_web_port(port):
        _log.info("refused to download from %.100r: port %d", host, port)
        raise RefusedError(f"port {port} is not allowed")
    found: list[tuple[int, Any]] = [
        (family, address)
        for family, _, _, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        if family in (socket.AF_INET, socket.AF_INET6)
    ]
    for _, address in found if is_filtered else ():
        has_zone = any(address[3:])  # (address, port) or (address, port, flow, zone)
        if has_zone or not addresses.is_public(address[0]):
            _log.info("refused to download from %.100r, port %d: it resolves to %s", host, port, address[0])
            raise RefusedError("the address is not public")
    return found


def _connect_to_first(found: list[tuple[int, Any]], rules: Rules) -> socket.socket:
    """A connection to the first address that answers; each gets an equal share of the time that is left."""
    error = OSError("the host has no address")
    for position, (family, address) in enumerate(found):
        try:
            return _connect(family, address, rules, len(found) - position)
        except OSError as caught:
            error = caught
    raise error


def _connect(family: int, address: Any, rules: Rules, num_shares: int) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.settimeout(rules.seconds_left() / num_shares)
        sock.connect(address)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.settimeout(rules.seconds_left())  # for what is sent and for the handshake of TLS, each as a whole
    except BaseException:
        sock.close()
        raise
    return sock
