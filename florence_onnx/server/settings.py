"""How a server is set up."""

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
"""Names that a hosts file may point at us, so that a client needs no change at all."""
MAX_PIXELS = 50_000_000
"""Default limit of an image: several are held decoded at a time, 150 MB each at this size."""


def default_limits() -> ImageLimits:
    """What a server accepts from strangers."""
    return ImageLimits(max_pixels=MAX_PIXELS, public_only=True)


@dataclass(frozen=True)
class ServerSettings:
    """Everything but the model.

    Raises:
        InputError: A value makes no sense.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    """0: any that is free."""
    api_key: str | None = None
    """What clients must send as `Authorization: Key …`; None: nothing."""
    model_name: str = "florence-2"
    """As the page names the model, to everybody who sees it."""
    images: Images = "url"
    """Annotated images: served by us, in the JSON, or not at all (`image` is null)."""
    public_url: str | None = None
    """How clients reach us, where that is not the `Host` that they send."""
    origins: tuple[str, ...] = ()
    """Web pages of other origins that may call us."""
    service: ServiceSettings = field(default_factory=lambda: ServiceSettings(image_limits=default_limits()))
    max_files_bytes: int = 2**30
    """Of uploads and annotated images on disk; the oldest are dropped first."""
    max_results: int = 1000
    """Ended queue requests whose results can still be fetched."""
    result_seconds: float = 3600.0
    """How long a result can be fetched."""
    grace_seconds: float = 30.0
    """After SIGTERM: how long results of the queue wait to be fetched, once all work is done."""
    certificate: str | None = None
    """Path of a PEM file, for TLS."""
    private_key: str | None = None

    def __post_init__(self) -> None:
        if self.api_key is not None and not self.api_key.strip():
            raise InputError("the API key is blank; leave it out to serve without one")
        if not 0 <= self.port <= 65535:
            raise InputError(f"port must be 0 to 65535, got {self.port}")
        if self.public_url is not None and urlsplit(self.public_url).scheme not in ("http", "https"):
            raise InputError(f"the public URL must begin with http:// or https://, got {self.public_url!r}")
        if (self.certificate is None) != (self.private_key is None):
            raise InputError("TLS needs both a certificate and its private key")
        parse_hosts(self.service.image_limits.allowed_hosts)

    @property
    def max_body_bytes(self) -> int:
        """Of a request: an image in base64, and some room for the rest."""
        return self.service.image_limits.max_bytes * 4 // 3 + 2**16

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach us."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def trusted_hosts(self) -> tuple[str, ...]:
        """What `Host` may say; `*` for anything.

        On loopback only names that no web page can point at us: a page under its own name, with that name's address changed to
        127.0.0.1, is refused.
        """
        if not self.is_loopback:
            return ("*",)
        public = (urlsplit(self.public_url).hostname or "",) if self.public_url else ()
        return ("localhost", "*.localhost", "127.0.0.1", "[::1]", self.host, *FAL_HOSTS, *public)
