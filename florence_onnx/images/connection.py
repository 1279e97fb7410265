"""HTTP connections with a deadline and, for untrusted URLs, to public addresses only.

Addresses are checked where the socket is connected: after the host name was resolved, and for each redirect again. No
spelling of an address, redirect or change of a DNS record between check and use gets around it.
"""

from __future__ import annotations

import http.client
import io
import logging
import math
import socket
import ssl
import time
import urllib.request
from dataclasses import dataclass, field
from typing import Any

from florence_onnx.images import addresses
from florence_onnx.images.transfer import Transfer

_log = logging.getLogger("florence_onnx")
RATE_GRACE_S = 10.0
"""Seconds that a server has before `least_rate` applies: some draw the image first."""


NOT_PUBLIC = "the address is not public"
"""Said of a host that resolves to a private address, and of one that does not resolve."""


class RefusedError(Exception):
    """A request that a rule forbids and that is not sent. Untrusted callers may see the message."""


@dataclass(frozen=True)
class Rules:
    """The rules for all connections of one download."""

    deadline: float
    """The value of `time.monotonic()` at which the download is given up."""
    public_only: bool = False
    """Whether to connect to public addresses only, and never through a proxy, which would resolve names by itself."""
    exempt: frozenset[tuple[str, int]] = frozenset()
    """Pairs (host, port) that `public_only` does not apply to."""
    least_rate: float = 0.0
    """Least bytes a second of a response, on average and after `RATE_GRACE_S`; 0 for no limit."""
    transfer: Transfer = field(default_factory=Transfer)
    """Lets other threads end the download."""

    def seconds_left(self) -> float:
        """Seconds until the deadline, more than 0.

        Raises:
            TimeoutError: The deadline has passed.
        """
        seconds = self.deadline - time.monotonic()
        if seconds <= 0:
            raise TimeoutError("timed out")
        return seconds


def make_opener(rules: Rules) -> urllib.request.OpenerDirector:
    """An opener for `http` and `https` only, which follows no redirects and returns responses of any status."""
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
    rules: Rules  # deliberately without a default: a connection whose rules were not set cannot be opened

    def connect(self) -> None:
        self.sock = _connect_to_first(_resolve(self.host, self.port, self.rules), self.rules)
        if self._tunnel_host:  # type: ignore[attr-defined]  # through a proxy
            self._tunnel()  # type: ignore[attr-defined]
            self.sock.settimeout(self.rules.seconds_left())

    def response_class(self, sock: socket.socket, *args: Any, **kwargs: Any) -> http.client.HTTPResponse:  # type: ignore[override]
        return _Response(sock, self.rules, *args, **kwargs)


class _SecureConnection(http.client.HTTPSConnection, _Connection):
    """The same over TLS: `HTTPSConnection.connect` calls `_Connection.connect`, then checks the certificate."""

    def connect(self) -> None:
        super().connect()
        self.sock.settimeout(self.rules.seconds_left())  # less than before the handshake


class _Response(http.client.HTTPResponse):
    def __init__(self, sock: socket.socket, rules: Rules, *args: Any, **kwargs: Any) -> None:
        super().__init__(sock, *args, **kwargs)
        self.fp = io.BufferedReader(_TimedStream(self.fp.detach(), sock, rules))


class _TimedStream(io.RawIOBase):
    """Reads from a socket until the deadline.

    A socket's own timeout starts again with every byte, so a server that sends one now and then, even within the
    headers, would never time out. Here each read gets the time that is left.
    """

    def __init__(self, raw: io.RawIOBase, sock: socket.socket, rules: Rules) -> None:
        self._raw, self._sock, self._rules = raw, sock, rules
        self._begin = time.monotonic()
        self._num_bytes = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        seconds = self._rules.seconds_left()
        at_rate = self._seconds_at_least_rate()
        self._sock.settimeout(min(seconds, max(at_rate, 0.001)))
        try:
            num_bytes = self._raw.readinto(buffer)
        except TimeoutError:
            if at_rate < seconds:
                raise RefusedError(f"the server sends less than {self._rules.least_rate:,.0f} bytes a second") from None
            raise
        self._num_bytes += num_bytes or 0
        return num_bytes

    def _seconds_at_least_rate(self) -> float:
        """Seconds until the average rate is below the least one if nothing more comes."""
        if not self._rules.least_rate:
            return math.inf
        return self._begin + RATE_GRACE_S + self._num_bytes / self._rules.least_rate - time.monotonic()

    def close(self) -> None:
        self._raw.close()
        super().close()


def _resolve(host: str, port: int, rules: Rules) -> list[tuple[int, Any]]:
    """Resolves a host and checks all its addresses.

    This is the only lookup of the name, and the connection goes to one of the addresses returned. A second lookup could
    return a private address after the first returned a public one (DNS rebinding).

    Returns:
        Address family and socket address of each.

    Raises:
        RefusedError: The port or one of the addresses is not allowed.
        OSError: There is no such host.
    """
    is_filtered = rules.public_only and (host.lower(), port) not in rules.exempt
    if is_filtered and not addresses.is_web_port(port):
        _log.info("refused to download from %.100r: port %d", host, port)
        raise RefusedError(f"port {port} is not allowed")
    try:
        found: list[tuple[int, Any]] = [
            (family, address)
            for family, _, _, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            if family in (socket.AF_INET, socket.AF_INET6)
        ]
    except OSError as error:
        if not is_filtered:
            raise
        # the same words as for a private address: else an untrusted caller could try out which internal names there are
        _log.info("refused to download from %.100r, port %d: it does not resolve: %s", host, port, error)
        raise RefusedError(NOT_PUBLIC) from None
    for _, address in found if is_filtered else ():
        has_zone = any(address[3:])  # (address, port) or (address, port, flow, zone)
        if has_zone or not addresses.is_public(address[0]):
            _log.info("refused to download from %.100r, port %d: it resolves to %s", host, port, address[0])
            raise RefusedError(NOT_PUBLIC)
    return found


def _connect_to_first(found: list[tuple[int, Any]], rules: Rules) -> socket.socket:
    """Connects to the first address that answers; each attempt gets an equal share of the time that is left."""
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
        rules.transfer.attach(sock)
        sock.settimeout(rules.seconds_left() / num_shares)
        sock.connect(address)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.settimeout(rules.seconds_left())  # for sending and for the TLS handshake, each as a whole
    except BaseException:
        sock.close()
        raise
    return sock
