"""The options and limits of a server."""

from __future__ import annotations

import ipaddress
import math
import re
from dataclasses import dataclass, field
from typing import Literal
from urllib.parse import urlsplit

from florence_onnx.errors import InputError
from florence_onnx.fal.images import ImageLimits
from florence_onnx.fal.service import ServiceSettings
from florence_onnx.images.download import parse_hosts

Images = Literal["url", "data", "none"]
FAL_HOSTS = ("fal.run", "queue.fal.run", "rest.fal.ai", "rest.alpha.fal.ai", "v3.fal.media")
"""fal's host names, which a hosts file may point at this server, so that clients work unchanged."""
_LOCAL_DOMAINS = ("localhost", "local", "internal", "lan", "home.arpa")
"""Domains in which nobody can register a name."""
MAX_PIXELS = 50_000_000
"""Default for the most pixels of an image: 200 MB at this size, of the gigabyte that all images have together."""
DECODERS = 4
"""Default for the processes that decode images."""

LEAST_RATE = 1024.0
"""Default for the least bytes a second of a download."""


def default_limits() -> ImageLimits:
    """Returns the limits for images of untrusted callers: public addresses, few pixels, no dripping, decoders that can be ended."""
    return ImageLimits(max_pixels=MAX_PIXELS, num_processes=DECODERS, public_only=True, least_rate=LEAST_RATE)


@dataclass(frozen=True)
class ServerSettings:
    """Options and limits of a server.

    Raises:
        InputError: A value is invalid.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    """0 picks a free port."""
    api_key: str | None = None
    """The key that clients must send as `Authorization: Key …`; None for no authentication."""
    model_name: str = "florence-2"
    """Name of the model on the page, which needs no key to read."""
    images: Images = "url"
    """Annotated images: as a URL of this server, as a `data:` URI in the JSON, or none (`image` is null)."""
    public_url: str | None = None
    """URL of the server as clients see it, if it differs from the `Host` header, as behind a proxy."""
    origins: tuple[str, ...] = ()
    """Origins whose web pages may call the server, besides its own."""
    trusted_hosts: tuple[str, ...] = ()
    """Values of the `Host` header to accept, as well as this machine's loopback: names, `*.example.com`, or `*` for any.
    Empty for the default of `accepts_host`."""
    service: ServiceSettings = field(default_factory=lambda: ServiceSettings(image_limits=default_limits()))
    max_files_bytes: int = 2**30
    """Most bytes of uploads and annotated images on disk; the oldest are deleted first."""
    max_results: int = 1000
    """Most results of the queue that are kept to be fetched."""
    max_results_bytes: int = 256 * 2**20
    """Most bytes of these results together; only those with images in their JSON (`images="data"`) are large."""
    result_seconds: float = 3600.0
    """Seconds for which a result can be fetched, counted from the submission."""
    grace_seconds: float = 30.0
    """Seconds after SIGTERM, and after the last request has ended, in which results can still be fetched."""
    max_connections: int = 512
    """Most open connections; further ones get 503. Fewer where the limit of open files leaves room for fewer."""
    header_seconds: float = 20.0
    """Seconds for the headers of a request, from the connection or from their first byte."""
    body_seconds: float = 10.0
    """Seconds in which a body that is not complete must bring `min_body_rate` times as many bytes."""
    min_body_rate: float = 1024.0
    """Least bytes per second of a body."""
    idle_seconds: float = 65.0
    """Seconds for which a connection is kept without a request, or with a response that the client does not read. Longer
    than the 60 s of common proxies, so that the proxy closes first."""
    certificate: str | None = None
    """Path of a PEM file with the TLS certificate; None for plain HTTP."""
    private_key: str | None = None
    """Path of a PEM file with the certificate's private key."""

    def __post_init__(self) -> None:
        if self.api_key is not None and not self.api_key.strip():
            raise InputError("the API key is blank; omit it to serve without authentication")
        if self.api_key is not None and (self.api_key != self.api_key.strip() or not self.api_key.isascii()):
            raise InputError("the API key must be ASCII without blanks around it, or no client can send it")
        if not self.host.strip():
            raise InputError("the host is blank; 0.0.0.0 is all addresses of this machine, 127.0.0.1 the loopback one")
        if not 0 <= self.port <= 65535:
            raise InputError(f"port must be 0 to 65535, got {self.port}")
        if self.public_url is not None:
            _check_public_url(self.public_url)
        for origin in self.origins:
            _check_origin(origin)
        for host in self.trusted_hosts:
            if not _HOST.fullmatch(host) and not _is_address(host):
                raise InputError(f"a trusted host is a name without port or scheme, *.example.com or *, got {host!r}")
        self._check_numbers()
        if (self.certificate is None) != (self.private_key is None):
            raise InputError("TLS needs both a certificate and its private key")
        parse_hosts(self.service.image_limits.allowed_hosts)

    def _check_numbers(self) -> None:
        if not 0 <= self.grace_seconds < math.inf:
            raise InputError(f"the grace period must be 0 seconds or more, got {self.grace_seconds}")
        for name in ("header_seconds", "body_seconds", "idle_seconds"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"{name} must be more than 0, got {getattr(self, name)}")
        if not 0 <= self.min_body_rate < math.inf:
            raise InputError(f"the least rate of a body must be 0 bytes per second or more, got {self.min_body_rate}")
        if self.max_connections < 1:
            raise InputError(f"max_connections must be 1 or more, got {self.max_connections}")

    @property
    def max_body_bytes(self) -> int:
        """Most bytes of a request body: an image in base64, and 64 KiB for everything else."""
        return self.service.image_limits.max_bytes * 4 // 3 + 2**16

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    def accepts_host(self, header: str) -> bool:
        """Whether the value of a `Host` header is a name of this server.

        This stops DNS rebinding: a web page whose own host name resolves to this server sends that name as `Host`, and
        is rejected. `trusted_hosts` and loopback names are accepted, and fal's names, which a hosts file may point here.
        Without `trusted_hosts` so is everything with an API key, which such a page does not have; and on an address that
        others can reach, all names that an attacker cannot register: addresses, and names without a dot or of a local
        domain.
        """
        name = _host_name(header)
        if name in self._own_names or name.endswith(".localhost"):
            return True
        if self.trusted_hosts:
            return any(_matches(name, each.lower()) for each in self.trusted_hosts)
        if self.is_loopback:
            return False
        return self.api_key is not None or _is_local_name(name)

    @property
    def is_open(self) -> bool:
        """Whether other machines can use the server without a key."""
        return not self.is_loopback and self.api_key is None

    @property
    def _own_names(self) -> tuple[str, ...]:
        public = (urlsplit(self.public_url).hostname or "",) if self.public_url else ()
        return ("localhost", "127.0.0.1", "::1", self.host.lower(), *FAL_HOSTS, *public)


_HOST = re.compile(r"\*|(\*\.)?[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")


def _host_name(header: str) -> str:
    """The name or address of a `Host` header: without port and brackets, in lower case."""
    if header.startswith("["):
        return header[1:].partition("]")[0].lower()
    return header.partition(":")[0].lower()


def _matches(name: str, pattern: str) -> bool:
    return pattern in ("*", name) or (pattern.startswith("*.") and name.endswith(pattern[1:]))


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _is_local_name(name: str) -> bool:
    return _is_address(name) or "." not in name or name.endswith(tuple(f".{domain}" for domain in _LOCAL_DOMAINS))


def _check_public_url(url: str) -> None:
    """Raises InputError unless clients can append a path to a URL."""
    try:
        parts = urlsplit(url)
        is_whole = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:  # a port that is no number, brackets that are no IPv6 address
        is_whole = False
    if not is_whole:
        raise InputError(f"the public URL must start with http:// or https:// and a host, got {url!r}")
    if parts.query or parts.fragment or parts.username is not None:
        raise InputError(f"the public URL must have no query, fragment or user name, got {url!r}")


def _check_origin(origin: str) -> None:
    """Raises InputError unless a browser can send an origin."""
    if origin == "*":
        raise InputError("--allow-origin takes no *: name each origin, such as https://app.example")
    if origin == "null":  # what browsers send for local files
        return
    try:
        parts = urlsplit(origin)
        default_port = {"http": 80, "https": 443}.get(parts.scheme)
        is_whole = bool(parts.scheme and parts.netloc) and parts.port != (default_port or -1) and "@" not in origin
    except ValueError:
        is_whole = False
    if not is_whole or origin != f"{parts.scheme}://{parts.netloc}".lower():
        raise InputError(
            f"an origin is written as browsers send it, scheme://host or scheme://host:port in lower case without a "
            f"path or a default port, such as https://app.example; got {origin!r}"
        )
