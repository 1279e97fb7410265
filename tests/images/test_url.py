"""Addresses that are nearly ones, what messages show of an address, and responses that come encoded."""

from __future__ import annotations

import base64
import gzip
import logging
import socket
import threading
import zlib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from florence_onnx import ImageDownloadError, ImageError, ImageTooLargeError
from florence_onnx.bundles.bundle import DEMO_DIRECTORY
from florence_onnx.fal.images import ImageLimits, ImageReader
from florence_onnx.fal.problems import RequestError
from florence_onnx.images import url
from florence_onnx.images.decoding import load
from florence_onnx.images.download import download

PNG = (DEMO_DIRECTORY.parent / "samples" / "scene-1.png").read_bytes()
ENCODED = base64.b64encode(PNG).decode()
JPEG = "/9j/" + "4AAQSkZJRgABAQAAAQABAAD" * 40

NEARLY = {
    "base64": (ENCODED, "it is base64 without a head"),
    "short base64": (ENCODED[:64], "it is base64 without a head"),
    "base64 like a path": (JPEG, "it is base64 without a head"),
    "leading blank": (" https://example.com/a.png", "there is white space around the address: remove it"),
    "line break": ("data:image/png;base64,AAAA\n".rjust(40), "there is white space around the address: remove it"),
    "file URL": ("file:///tmp/a.png", "a file: URL is not taken: pass the path itself"),
    "FTP": ("ftp://example.com/a.png", r"only http\(s\) URLs and data: URIs are taken"),
    "base64 not last": ("data:image/png;base64;charset=utf-8," + ENCODED, "base64 must stand right before the comma"),
}


@pytest.mark.parametrize(("address", "said"), NEARLY.values(), ids=NEARLY)
def test_near_misses_are_explained_in_python_and_by_the_server(address: str, said: str) -> None:
    for public_only in (False, True):
        with pytest.raises(ImageError, match=said) as caught:
            load(address, public_only=public_only)
        assert len(str(caught.value)) < 400
    with pytest.raises(RequestError) as refused:
        ImageReader(ImageLimits()).read(address)
    assert said.replace("\\", "") in str(refused.value.body)


def test_files_with_such_names_are_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in (" a.png", ENCODED[:60].replace("/", "_")):
        Path(name).write_bytes(PNG)
        assert load(name).size == load(PNG).size
    with pytest.raises(ImageError, match=r"no such image file: b\.png \(working directory"):
        load("b.png")


# ----------------------------------------------------------------------------------------------------------- passwords

SECRET = "hunter2"
WITH_PASSWORD = [
    f"https://user:{SECRET}@example.com/a.png",
    f"https://{SECRET}@example.com/a.png",
    f"HTTP://user:{SECRET}@example.com:8080",
    f"http://user:pass/{SECRET}@example.com/a.png",
    f"http://user:a#{SECRET}@example.com/a.png",
    f"http://us:er@:{SECRET}@example.com/a.png",
    f"http://user:{SECRET}?{SECRET}@example.com/a.png",
    f"http:/user:{SECRET}@example.com/a.png",
    f" https://user:{SECRET}@example.com/a.png",
    f"http:\\\\user:{SECRET}@example.com/a.png",
    f"ftp://user:{SECRET}@example.com/a.png",
    f"http://user:{SECRET}@[::1]/a.png",
    f"http://user:{SECRET}@ex\u2100mple.com/a.png",
    f"http://user:{SECRET}@a..b/",
    f"https://example.com/a.png?signature={SECRET}",
    f" https://example.com/a.png?signature={SECRET}",
]


@pytest.mark.parametrize("address", WITH_PASSWORD)
@pytest.mark.parametrize("public_only", [True, False])
def test_no_password_is_in_an_error_or_in_the_log(
    address: str, public_only: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_network(*arguments: object, **options: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    caplog.set_level(logging.DEBUG)
    with pytest.raises(ImageError) as caught:
        load(address, public_only=public_only)
    with pytest.raises(RequestError) as refused:
        ImageReader(ImageLimits(public_only=public_only)).read(address)
    assert SECRET not in f"{caught.value} {refused.value.body} {caplog.text} {url.shorten(address)}"


@pytest.mark.parametrize(
    "address",
    [
        *("https://example.com/@user/a.png", "http://example.com:8080/@user", "http://[::1]:80/a@2x.png"),
        *("https://example.com/a//b:c@2x.png", "https://a.test/https://b.test/c@d", "folder//a@2x.png"),
    ],
)
def test_an_at_sign_elsewhere_is_no_password(address: str) -> None:
    assert not url.has_user(address)
    assert url.shorten(address) == address


# ------------------------------------------------------------------------------------------------------ internal names


def test_whether_an_internal_name_exists_is_not_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def resolve(host: str, port: int, **options: object) -> list[object]:
        if host == "exists.test":
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("10.0.0.7", port))]
        raise socket.gaierror(-3 if host == "later.test" else -2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    caplog.set_level(logging.INFO, "florence_onnx")
    said = set()
    for host in ("exists.test", "absent.test", "later.test"):
        with pytest.raises(ImageDownloadError) as caught:
            download(f"http://{host}/", max_bytes=100, timeout=5, public_only=True)
        said.add(str(caught.value).replace(host, "HOST"))
    assert said == {"cannot download http://HOST/: the address is not public"}
    assert "it does not resolve: " in caplog.text  # the operator is told
    for trusted in ({"public_only": False}, {"public_only": True, "allowed_hosts": ["absent.test"]}):
        with pytest.raises(ImageDownloadError, match="Name or service not known"):
            download("http://absent.test/", max_bytes=100, timeout=5, **trusted)  # type: ignore[arg-type]


# --------------------------------------------------------------------------------------------------- encoded responses


def bare_deflate(content: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return packer.compress(content) + packer.flush()


BODIES: dict[str, tuple[str, bytes]] = {
    "/plain": ("identity", PNG),
    "/gzip": ("gzip", gzip.compress(PNG)),
    "/upper": (" GZIP ", gzip.compress(PNG)),
    "/x-gzip": ("x-gzip", gzip.compress(PNG)),
    "/members": ("gzip", gzip.compress(PNG[:500]) + gzip.compress(PNG[500:]) + bytes(20)),
    "/deflate": ("deflate", zlib.compress(PNG)),
    "/bare": ("deflate", bare_deflate(PNG)),
    "/cut": ("gzip", gzip.compress(PNG)[:-40]),
    "/broken": ("gzip", b"\x1f\x8b" + bytes(80)),
    "/brotli": ("br", PNG),
    "/twice": ("gzip, gzip", gzip.compress(gzip.compress(PNG))),
    "/bomb": ("gzip", gzip.compress(bytes(50_000_000), 9)),
}


class Answers(BaseHTTPRequestHandler):
    """Answers by path, in pieces."""

    def do_GET(self) -> None:
        encoding, body = BODIES[self.path]
        self.send_response(200)
        self.send_header("Content-Encoding", encoding)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        for start in range(0, len(body), 1000):
            self.wfile.write(body[start : start + 1000])

    def log_message(self, *arguments: object) -> None:
        """Says nothing."""


@pytest.fixture(scope="module")
def base() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    server.daemon_threads = True
    server.handle_error = lambda *arguments: None  # type: ignore[method-assign]  # clients hang up early, as they should
    threading.Thread(target=server.serve_forever, args=[0.02], daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("path", ["/plain", "/gzip", "/upper", "/x-gzip", "/members", "/deflate", "/bare"])
def test_encoded_responses_are_decoded(path: str, base: str) -> None:
    assert download(base + path, max_bytes=len(PNG) + 60, timeout=30) == PNG
    assert load(base + path).size == load(PNG).size


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("/cut", "its gzip encoding is cut off"),
        ("/broken", "its gzip encoding is broken"),
        ("/brotli", "the server sent it encoded as 'br', which was not asked for"),
        ("/twice", "encoded as 'gzip, gzip'"),
    ],
)
def test_encodings_that_cannot_be_undone_are_named(path: str, said: str, base: str) -> None:
    with pytest.raises(ImageDownloadError, match=said):
        download(base + path, max_bytes=10**6, timeout=30)


def test_no_more_is_unpacked_than_is_allowed(base: str) -> None:
    with pytest.raises(ImageTooLargeError, match=r"/bomb has at least 1,000,001 bytes, allowed are 1,000,000"):
        download(f"{base}/bomb", max_bytes=10**6, timeout=30)
