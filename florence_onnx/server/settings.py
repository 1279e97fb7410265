"""The options and limits of a server."""

from __future__ import annotations

import ipaddress
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
MAX_PIXELS = 50_000_000
"""Default for the most pixels of an image: 200 MB at this size, of the gigabyte that all images have together."""
DECODERS = 4
"""Default for the processes that decode images."""


def default_limits() -> ImageLimits:
    """Returns the limits for images of untrusted callers: public addresses, few pixels, and decoders that can be ended."""
    return ImageLimits(max_pixels=MAX_PIXELS, num_processes=DECODERS, public_only=True)


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
    service: ServiceSettings = field(default_factory=lambda: ServiceSettings(image_limits=default_limits()))
    max_files_bytes: int = 2**30
    """Most bytes of uploads and annotated images on disk; the oldest are deleted first."""
    max_results: int = 1000
    """Most results of the queue that are kept to be fetched."""
    result_seconds: float = 3600.0
    """Seconds for which a result can be fetched, counted from the submission."""
    grace_seconds: float = 30.0
    """Seconds after SIGTERM, and after the last request has ended, in which results can still be fetched."""
    certificate: str | None = None
    """Path of a PEM file with the TLS certificate; None for plain HTTP."""
    private_key: str | None = None
    """Path of a PEM file with the certificate's private key."""

    def __post_init__(self) -> None:
        if self.api_key is not None and not self.api_key.strip():
            raise InputError("the API key is blank; omit it to serve without authentication")
        if not 0 <= self.port <= 65535:
            raise InputError(f"port must be 0 to 65535, got {self.port}")
        if self.public_url is not None and urlsplit(self.public_url).scheme not in ("http", "https"):
            raise InputError(f"the public URL must start with http:// or https://, got {self.public_url!r}")
        if (self.certificate is None) != (self.private_key is None):
            raise InputError("TLS needs both a certificate and its private key")
        parse_hosts(self.service.image_limits.allowed_hosts)

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

    @property
    def trusted_hosts(self) -> tuple[str, ...]:
        """Accepted values of the `Host` header; `*` accepts any.

        On loopback, only names that an attacker cannot register. This stops DNS rebinding: a web page whose own host
        name resolves to 127.0.0.1 sends that name as `Host`, and is rejected.
        """
        if not self.is_loopback:
            return ("*",)
        public = (urlsplit(self.public_url).hostname or "",) if self.public_url else ()
        return ("localhost", "*.localhost", "127.0.0.1", "[::1]", self.host, *FAL_HOSTS, *public)
