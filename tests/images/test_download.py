"""Downloads from real servers on the loopback interface; no test leaves the machine.

`World` replaces the internet: a few names resolve to public addresses, and connections to these addresses end at the
loopback interface.
"""

from __future__ import annotations

import contextlib
import ipaddress
import itertools
import logging
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from florence_onnx import Florence2
from florence_onnx.errors import ImageDownloadError, InputError
from florence_onnx.images.addresses import is_public, is_web_port, parse_host
from florence_onnx.images.decoding import load
from florence_onnx.images.download import download

PUBLIC, OTHER_PUBLIC = "93.184.216.34", "8.8.4.4"
IMAGE = Path(__file__).parents[2] / "florence_onnx" / "demo" / "samples" / "scene-1.png"
REAL_RESOLVER, REAL_CONNECT = socket.getaddrinfo, socket.socket.connect


def get(url: str, *, public_only: bool = True, timeout: float = 10, **options: Any) -> bytes:
    return download(url, max_bytes=10**6, timeout=timeout, public_only=public_only, **options)


# --- which addresses are public ------------------------------------------------------------------------------------

NOT_PUBLIC = [
    *("0.0.0.0", "0.1.2.3", "10.0.0.1", "100.64.0.1", "100.100.100.200", "127.0.0.1", "127.255.255.254"),
    *("168.63.129.16", "169.254.169.254", "172.16.0.1", "172.31.255.255", "192.0.0.9", "192.0.0.192", "192.0.2.1"),
    *("192.88.99.1", "192.168.1.1", "198.18.0.1", "198.19.255.255", "198.51.100.1", "203.0.113.1", "224.0.0.1"),
    *("239.255.255.250", "240.0.0.1", "255.255.255.255"),
    *("::", "::1", "fe80::1", "fec0::1", "fc00::1", "fd00:ec2::254", "ff02::1", "ff0e::1", "2001:db8::1", "100::1"),
    *("3fff::1", "5f00::1", "4000::1", "64:ff9b:1::1", "2001:2::1", "2001:20::1", "::ffff:0:127.0.0.1"),
    *(
        "::8.8.8.8",
        "2002:808:808::1",
        "2001:0:808:808::1",
    ),  # obsolete embeddings of IPv4, whatever address they contain
    *("2606:4700::1111%eth0", "fe80::1%1"),
    *("", "localhost", "1", "127.1", "0x7f.0.0.1", "8.8.8.8 ", "8.8.8.8%1", "１.１.１.１"),  # not addresses
]
IS_PUBLIC = [
    *("1.1.1.1", "8.8.8.8", PUBLIC, OTHER_PUBLIC, "100.63.255.255", "100.128.0.0", "172.15.255.255", "172.32.0.0"),
    *("192.0.1.0", "223.255.255.255", "168.63.129.15", "2606:4700::1111", "2001:4860:4860::8888", "2a00::1"),
    *("::ffff:8.8.8.8", "64:ff9b::8.8.8.8"),
]


@pytest.mark.parametrize("address", NOT_PUBLIC)
def test_special_addresses_are_not_public(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("address", IS_PUBLIC)
def test_ordinary_addresses_are_public(address: str) -> None:
    assert is_public(address)


def embeddings(address: ipaddress.IPv4Address) -> list[ipaddress.IPv6Address]:
    """IPv6 addresses by which the IPv4 address may be reached: mapped, compatible, NAT64, 6to4, Teredo (two ways)."""
    value = int(address)
    ones = 0xFFFFFFFF
    teredo = 0x2001_0000 << 96
    return [
        ipaddress.IPv6Address(embedded)
        for embedded in (
            0xFFFF << 32 | value,
            value,
            0x0064_FF9B << 96 | value,
            0x2002 << 112 | value << 80 | 1,
            teredo | value << 64 | ones ^ 0x08080808,
            teredo | 0x08080808 << 64 | ones ^ value,
        )
    ]


def is_special(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    kinds = ("private", "loopback", "link_local", "multicast", "reserved", "unspecified")
    return any(getattr(address, f"is_{kind}") for kind in kinds) or not address.is_global


SPECIAL_NETWORKS = ["10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.168.0.0/16"]
IPV4 = st.ip_addresses(v=4) | st.sampled_from(SPECIAL_NETWORKS).flatmap(lambda net: st.ip_addresses(network=net))


@given(IPV4)
@settings(max_examples=500, deadline=None)
def test_what_python_calls_special_is_refused_in_every_embedding(address: ipaddress.IPv4Address) -> None:
    if is_special(address):
        assert not is_public(str(address))
    if not is_public(str(address)):
        assert not any(is_public(str(embedded)) for embedded in embeddings(address))


@given(st.ip_addresses(v=6) | st.ip_addresses(network="2000::/3") | st.ip_addresses(network="64:ff9b::/96"))
@settings(max_examples=300, deadline=None)
def test_public_ipv6_is_global_unicast_or_holds_public_ipv4(address: ipaddress.IPv6Address) -> None:
    if not is_public(str(address)):
        return
    if address in ipaddress.IPv6Network("2000::/3"):
        assert not is_special(address) and address.sixtofour is None and address.teredo is None
    else:
        assert is_public(str(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)))


@pytest.mark.parametrize(
    ("port", "expected"),
    [(80, True), (443, True), (1024, True), (8080, True), (65535, True)]
    + [(port, False) for port in (0, 1, 22, 25, 445, 1023, 65536)],
)
def test_which_ports_may_be_contacted(port: int, expected: bool) -> None:
    assert is_web_port(port) is expected


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ("Images.Internal", {("images.internal", 80), ("images.internal", 443)}),
        ("images.internal:8080", {("images.internal", 8080)}),
        ("10.0.0.7:22", {("10.0.0.7", 22)}),
        ("[::1]:8080", {("::1", 8080)}),
        ("[::1]", {("::1", 80), ("::1", 443)}),
    ],
)
def test_allowed_hosts_are_a_host_and_its_ports(entry: str, expected: set[tuple[str, int]]) -> None:
    assert parse_host(entry) == expected


@pytest.mark.parametrize(
    "entry",
    [
        "",
        ":80",
        "http://a/",
        "a/b",
        "a?b",
        "a#b",
        "a:port",
        "a:99999",
        "a:",
        "u@a",
        "::1",
        "[::1",
        "a\nb",
        "bücher.test",
    ],
)
def test_malformed_allowed_hosts_are_refused(entry: str) -> None:
    with pytest.raises(InputError, match="an allowed host is HOST or HOST:PORT"):
        get("http://127.0.0.1:1/", allowed_hosts=[entry])
    with pytest.raises(InputError, match="must be a list"):
        get("http://127.0.0.1:1/", allowed_hosts="127.0.0.1")


# --- servers -------------------------------------------------------------------------------------------------------


class Server(ThreadingHTTPServer):
    """Responds by path, and records its requests."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.redirects: dict[str, str] = {}
        self.requested: list[str] = []
        self.hosts: list[str | None] = []
        self.headers: list[str] = []
        self.tunnel_port: int | None = None
        threading.Thread(target=self.serve_forever, args=[0.02], daemon=True).start()

    def handle_error(self, request: object, client_address: object) -> None:
        """Prints nothing: clients close connections early, as they should."""


class _Answers(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.requested.append(self.path)
        self.server.hosts.append(self.headers["Host"])
        self.server.headers.append(str(self.headers).lower())
        location = self.server.redirects.get(self.path)
        if location is None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"the content")
            return
        self.send_response(302)
        self.send_header("Location", location)
        self.end_headers()
        if self.path == "/endless":
            for _ in range(10_000):  # 640 MB
                self.wfile.write(b"x" * 64_000)
            self.server.requested.append("read to the end")

    def do_CONNECT(self) -> None:
        self.server.requested.append(f"CONNECT {self.path}")
        if self.server.tunnel_port is None:
            self.send_error(502)
            return
        self.send_response(200)
        self.end_headers()
        with socket.create_connection(("127.0.0.1", self.server.tunnel_port)) as upstream:
            threading.Thread(target=_pump, args=[upstream, self.connection], daemon=True).start()
            _pump(self.connection, upstream)
        self.close_connection = True

    def log_message(self, *arguments: object) -> None:
        """Says nothing."""


def _pump(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while piece := source.recv(1 << 16):
            target.sendall(piece)
        target.shutdown(socket.SHUT_WR)


@pytest.fixture
def make_server() -> Iterator[Callable[[], Server]]:
    with contextlib.ExitStack() as stack:

        def make() -> Server:
            server = Server()
            stack.callback(server.server_close)
            stack.callback(server.shutdown)
            return server

        yield make


@pytest.fixture
def server(make_server: Callable[[], Server]) -> Server:
    return make_server()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


class World:
    """Names, the addresses that they resolve to at each lookup (the last ones forever), and the connections made."""

    def __init__(self) -> None:
        self.names: dict[str, list[list[str]]] = {"public.test": [[PUBLIC]], "other.test": [[OTHER_PUBLIC]]}
        self.lookups: list[str] = []
        self.connected: list[str] = []

    def resolve(self, host: str, port: int, *arguments: Any, **options: Any) -> list[Any]:
        self.lookups.append(host)
        answers = self.names.get(host.lower())
        if answers is None:
            return REAL_RESOLVER(host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        return [self._entry(*address.partition("%")[::2], port) for address in answer]

    @staticmethod
    def _entry(address: str, zone: str, port: int) -> tuple[Any, ...]:
        if ":" in address:
            return (socket.AF_INET6, socket.SOCK_STREAM, 6, "", (address, port, 0, int(zone or 0)))
        return (socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))

    def connect(self, sock: socket.socket, address: Any) -> None:
        self.connected.append(address[0])
        if address[0] in (PUBLIC, OTHER_PUBLIC):
            return REAL_CONNECT(sock, ("127.0.0.1", address[1]))
        if address[0] == "127.0.0.1":
            return REAL_CONNECT(sock, address)
        raise OSError(f"no way to {address[0]}")


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    world = World()
    monkeypatch.setattr(socket, "getaddrinfo", world.resolve)
    monkeypatch.setattr(socket.socket, "connect", lambda sock, address: world.connect(sock, address))
    return world


# --- the filter ----------------------------------------------------------------------------------------------------


def test_a_public_host_is_contacted_at_the_address_that_was_checked(world: World, server: Server) -> None:
    assert get(f"http://public.test:{server.server_port}/a?b=c#d") == b"the content"
    assert (world.lookups, world.connected) == (["public.test"], [PUBLIC])
    assert (server.requested, server.hosts) == (["/a?b=c"], [f"public.test:{server.server_port}"])


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "2130706433", "0x7f.1", "0x7f000001", "017700000001"])
def test_without_the_filter_the_loopback_interface_is_contacted(host: str, server: Server) -> None:
    """Shows that it is the filter that refuses these hosts below, and not a failure to connect."""
    assert get(f"http://{host}:{server.server_port}/", public_only=False) == b"the content"


@pytest.mark.parametrize(
    "host",
    [
        *("127.0.0.1", "2130706433", "0x7f.1", "0x7f000001", "017700000001", "127.1", "127.0.1", "0", "0.0.0.0"),
        *("１２７.０.０.１", "127。0。0。1", "①②⑦.0.0.1", "%31%32%37.0.0.1", "LOCALHOST", "localhost"),
        *("[::1]", "[::]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[::127.0.0.1]", "[64:ff9b::7f00:1]"),
        *("169.254.169.254", "10.0.0.1", "[fe80::1]", "[fd00:ec2::254]"),
    ],
)
def test_spellings_of_private_addresses_end_at_the_filter(
    host: str, server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "florence_onnx")
    with pytest.raises(ImageDownloadError, match=r"the address is not public$"):
        get(f"http://{host}:{server.server_port}/")
    assert server.requested == []
    (record,) = caplog.records
    assert "it resolves to" in record.getMessage()


@pytest.mark.parametrize("address", [each for each in NOT_PUBLIC if ":" in each or each.replace(".", "").isdecimal()])
def test_names_that_resolve_to_special_addresses_are_refused(
    address: str, world: World, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "florence_onnx")
    address = address.replace("%eth0", "%2")
    world.names["inner.test"] = [[PUBLIC, address]]  # one public address does not excuse the other
    with pytest.raises(ImageDownloadError) as caught:
        get("http://inner.test/secret.png")
    assert str(caught.value) == "cannot download http://inner.test/secret.png: the address is not public"
    assert world.connected == []
    (record,) = caplog.records
    assert record.levelno == logging.INFO and address.split("%")[0] in record.getMessage()


def test_a_name_with_a_trailing_dot_is_looked_up_like_any_other(world: World) -> None:
    world.names["localhost."] = [["127.0.0.1"]]
    with pytest.raises(ImageDownloadError, match="not public"):
        get("http://localhost./")
    assert (world.lookups, world.connected) == (["localhost."], [])


def test_a_name_that_changes_its_address_is_still_checked(world: World, server: Server) -> None:
    world.names["rebinding.test"] = [["1.2.3.4"], ["127.0.0.1"]]
    url = f"http://rebinding.test:{server.server_port}/"
    with pytest.raises(ImageDownloadError, match=r"no way to 1\.2\.3\.4"):
        get(url)
    assert (world.lookups, world.connected) == (["rebinding.test"], ["1.2.3.4"])
    with pytest.raises(ImageDownloadError, match="not public"):
        get(url)
    assert world.connected == ["1.2.3.4"]
    assert server.requested == []


def test_all_checked_addresses_are_tried(world: World, server: Server) -> None:
    world.names["many.test"] = [["2606:4700::1111", "1.2.3.4", PUBLIC]]
    assert get(f"http://many.test:{server.server_port}/") == b"the content"
    assert world.connected[-2:] == ["1.2.3.4", PUBLIC]  # a machine without IPv6 does not even try the first


@pytest.mark.parametrize("port", [0, 1, 22, 25, 1023])
def test_ports_of_other_services_are_refused(port: int, world: World) -> None:
    with pytest.raises(ImageDownloadError, match=f"port {port} is not allowed"):
        get(f"http://public.test:{port}/")
    assert (world.lookups, world.connected) == ([], [])


@pytest.mark.parametrize("public_only", [True, False])
@pytest.mark.parametrize("user", ["a@", "a:b@", "a%40", "public.test@", ":@", "@"])
def test_user_names_in_urls_are_refused(user: str, public_only: bool, world: World, server: Server) -> None:
    with pytest.raises(ImageDownloadError, match="user name or password"):
        get(f"http://{user}127.0.0.1:{server.server_port}/", public_only=public_only)
    assert (world.lookups, server.requested) == ([], [])


@pytest.mark.parametrize(
    "url",
    [
        *("file:///etc/passwd", "ftp://public.test/", "gopher://public.test/", "data:,x", "jar:http://public.test/!/"),
        *("//public.test/", "/etc/passwd", "", "http:", "http://", "http:///x", "http://a..b/", "http://a\x00b/"),
        *("http://public.test%0d%0aX:1/", "http://public.test:80:80/", "http://[::1/", "http://public.test\\@x/"),
    ],
)
def test_what_is_not_a_web_address_is_refused(url: str, world: World) -> None:
    with pytest.raises(ImageDownloadError, match="cannot download"):
        get(url)
    assert world.connected == []


@pytest.mark.parametrize("public_only", [True, False])
def test_endless_urls_are_refused(public_only: bool, world: World, server: Server) -> None:
    url = f"http://public.test:{server.server_port}/"
    assert get(url + "x" * 16_000, public_only=public_only) == b"the content"
    server.redirects = {"/": "x" * 17_000}
    for long in (url + "x" * 17_000, url):
        with pytest.raises(ImageDownloadError, match=r"the URL has 17,0\d\d characters, allowed are 16,384"):
            get(long, public_only=public_only)
    assert len(server.requested) == 2


def test_internationalized_names_are_sent_in_their_ascii_form(world: World, server: Server) -> None:
    world.names["xn--bcher-kva.test"] = [[PUBLIC]]
    assert get(f"http://bücher.test:{server.server_port}/") == b"the content"
    assert server.hosts == [f"xn--bcher-kva.test:{server.server_port}"]


# --- redirects -----------------------------------------------------------------------------------------------------


def test_redirects_between_public_hosts_are_followed(world: World, make_server: Callable[[], Server]) -> None:
    first, second = make_server(), make_server()
    first.redirects = {"/1": "2", "/2": f"//other.test:{second.server_port}/3?a=b c"}
    assert get(f"http://public.test:{first.server_port}/1") == b"the content"
    assert (first.requested, second.requested) == (["/1", "/2"], ["/3?a=b%20c"])
    assert world.connected == [PUBLIC, PUBLIC, OTHER_PUBLIC]
    assert not any(word in headers for headers in second.headers for word in ("authorization", "cookie", "referer"))


@pytest.mark.parametrize("target", ["127.0.0.1", "2130706433", "[::1]", "inner.test", "rebinding.test"])
def test_redirects_to_private_hosts_are_refused(
    target: str, world: World, make_server: Callable[[], Server], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "florence_onnx")
    outer, inner = make_server(), make_server()
    world.names |= {"inner.test": [["127.0.0.1"]], "rebinding.test": [[PUBLIC], ["127.0.0.1"]]}
    start = "rebinding.test" if target == "rebinding.test" else "public.test"
    outer.redirects = {"/1": "/2", "/2": f"http://{target}:{inner.server_port}/"}
    if target == "rebinding.test":
        outer.redirects = {"/1": f"http://{target}:{inner.server_port}/"}
    with pytest.raises(ImageDownloadError, match=rf"cannot download http://{start}:\d+/1: the address is not public$"):
        get(f"http://{start}:{outer.server_port}/1")
    assert inner.requested == []
    assert set(world.connected) == {PUBLIC}
    assert len(caplog.records) == 1


@pytest.mark.parametrize("location", ["file:///etc/passwd", "ftp://public.test/", "gopher://public.test/", "data:,x"])
@pytest.mark.parametrize("public_only", [True, False])
def test_redirects_to_other_schemes_are_refused(location: str, public_only: bool, world: World, server: Server) -> None:
    server.redirects = {"/": location}
    with pytest.raises(ImageDownloadError, match="only http and https are allowed"):
        get(f"http://public.test:{server.server_port}/", public_only=public_only)


def test_redirects_with_a_password_are_refused(world: World, server: Server) -> None:
    server.redirects = {"/": f"http://a:b@public.test:{server.server_port}/x"}
    with pytest.raises(ImageDownloadError, match="user name or password"):
        get(f"http://public.test:{server.server_port}/")
    assert server.requested == ["/"]


@pytest.mark.parametrize("public_only", [True, False])
def test_five_redirects_are_the_limit(public_only: bool, world: World, server: Server) -> None:
    server.redirects = {f"/{number}": f"/{number + 1}" for number in range(6)}
    base = f"http://public.test:{server.server_port}"
    assert get(f"{base}/1", public_only=public_only) == b"the content"
    with pytest.raises(ImageDownloadError, match="more than 5 redirects"):
        get(f"{base}/0", public_only=public_only)


@pytest.mark.parametrize("public_only", [True, False])
def test_the_body_of_a_redirect_is_not_read(public_only: bool, world: World, server: Server) -> None:
    server.redirects = {"/endless": "/"}
    assert get(f"http://public.test:{server.server_port}/endless", public_only=public_only) == b"the content"
    assert server.requested == ["/endless", "/"]


# --- exceptions and proxies ----------------------------------------------------------------------------------------


def test_an_allowed_host_is_contacted_at_its_port_only(make_server: Callable[[], Server], world: World) -> None:
    allowed, other = make_server(), make_server()
    world.names["inner.test"] = [["127.0.0.1"]]
    hosts = [f"inner.test:{allowed.server_port}"]
    assert get(f"http://Inner.Test:{allowed.server_port}/", allowed_hosts=hosts) == b"the content"
    refused = [
        f"http://inner.test:{other.server_port}/",  # another port
        f"http://127.0.0.1:{allowed.server_port}/",  # another name of the same host
        f"http://inner.test.:{allowed.server_port}/",
    ]
    world.names["inner.test."] = [["127.0.0.1"]]
    for url in refused:
        with pytest.raises(ImageDownloadError, match="not public"):
            get(url, allowed_hosts=hosts)
    with pytest.raises(ImageDownloadError, match="not public"):  # without a port: 80 and 443
        get(f"http://inner.test:{allowed.server_port}/", allowed_hosts=["inner.test"])
    assert (len(allowed.requested), other.requested) == (1, [])


def test_an_allowed_host_without_a_port_has_ports_80_and_443(world: World) -> None:
    world.names["inner.test"] = [["10.0.0.7"]]
    for scheme in ("http", "https"):
        with pytest.raises(ImageDownloadError, match=r"no way to 10\.0\.0\.7"):
            get(f"{scheme}://inner.test/", allowed_hosts=["inner.test"])
    assert world.connected == ["10.0.0.7", "10.0.0.7"]


def test_an_allowed_host_may_have_a_port_of_another_service(world: World) -> None:
    with pytest.raises(ImageDownloadError, match=r"no way to 10\.0\.0\.7"):
        get("http://10.0.0.7:81/", allowed_hosts=["10.0.0.7:81"])


def test_an_allowed_host_that_redirects_to_another_private_one_is_refused(make_server: Callable[[], Server]) -> None:
    allowed, other = make_server(), make_server()
    allowed.redirects = {"/": f"http://127.0.0.1:{other.server_port}/"}
    with pytest.raises(ImageDownloadError, match="not public"):
        get(f"http://127.0.0.1:{allowed.server_port}/", allowed_hosts=[f"127.0.0.1:{allowed.server_port}"])
    assert (allowed.requested, other.requested) == (["/"], [])


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_proxies_are_used_for_trusted_urls_only(
    scheme: str, make_server: Callable[[], Server], monkeypatch: pytest.MonkeyPatch, world: World
) -> None:
    proxy, server = make_server(), make_server()
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.server_port}")
    url = f"{scheme}://public.test:{server.server_port}/"
    with contextlib.suppress(ImageDownloadError):  # https: the server speaks no TLS
        get(url)
    assert (proxy.requested, world.connected) == ([], [PUBLIC])
    with contextlib.suppress(ImageDownloadError):
        get(url, public_only=False)
    asked = {"http": url, "https": f"CONNECT public.test:{server.server_port}"}
    assert (proxy.requested, world.connected) == ([asked[scheme]], [PUBLIC, "127.0.0.1"])


# --- TLS -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A self-signed certificate for public.test, and its key."""
    if shutil.which("openssl") is None:
        pytest.skip("makes a certificate with openssl, which is not installed")
    folder = tmp_path_factory.mktemp("certificate")
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    options = ["-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=public.test"]
    extension = ["-addext", "subjectAltName=DNS:public.test"]
    command = ["openssl", "req", *options, *extension, "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)
    return certificate, key


@pytest.fixture
def secure_server(server: Server, certificate: tuple[Path, Path]) -> tuple[Server, list[str | None]]:
    """A server with TLS, and the names that clients asked it for."""
    names: list[str | None] = []
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    context.sni_callback = lambda _socket, name, _context: names.append(name)
    server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    return server, names


def test_certificates_are_checked_by_name(
    secure_server: tuple[Server, list[str | None]],
    certificate: tuple[Path, Path],
    world: World,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server, names = secure_server
    url = f"https://public.test:{server.server_port}/"
    with pytest.raises(ImageDownloadError, match="CERTIFICATE_VERIFY_FAILED"):  # self-signed, and not trusted yet
        get(url)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
    assert get(url) == b"the content"
    assert get(url, public_only=False) == b"the content"
    assert names == ["public.test"] * 3
    assert server.hosts == [f"public.test:{server.server_port}"] * 2
    for host in ("other.test", PUBLIC):
        with pytest.raises(ImageDownloadError, match=r"CERTIFICATE_VERIFY_FAILED.*(Hostname|IP address) mismatch"):
            get(f"https://{host}:{server.server_port}/")
    assert len(server.requested) == 2


def test_trusted_urls_go_through_the_tunnel_of_a_proxy(
    secure_server: tuple[Server, list[str | None]],
    certificate: tuple[Path, Path],
    make_server: Callable[[], Server],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server, names = secure_server
    proxy = make_server()
    proxy.tunnel_port = server.server_port
    monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{proxy.server_port}")
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
    assert get("https://public.test/x", public_only=False) == b"the content"  # a name that only the proxy knows
    assert (proxy.requested, server.requested, names) == (["CONNECT public.test:443"], ["/x"], ["public.test"])


def test_private_hosts_are_refused_with_tls_as_well(
    secure_server: tuple[Server, list[str | None]], world: World
) -> None:
    server, names = secure_server
    world.names["inner.test"] = [["127.0.0.1"]]
    for host in ("inner.test", "127.0.0.1", "[::1]"):
        with pytest.raises(ImageDownloadError, match="not public"):
            get(f"https://{host}:{server.server_port}/")
    assert (names, world.connected) == ([], [])


# --- the deadline --------------------------------------------------------------------------------------------------


class Dripping:
    """A server that sends pieces of a response with a pause before each, whatever the request."""

    def __init__(self, pieces: Callable[[], Iterable[bytes]], pause: float) -> None:
        self._pieces, self._pause = pieces, pause
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._is_open = True
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while self._is_open:
                connection, _ = self._listener.accept()
                threading.Thread(target=self._drip, args=[connection], daemon=True).start()

    def _drip(self, connection: socket.socket) -> None:
        end = time.monotonic() + 6  # a client that ignores its deadline fails the test instead of blocking it
        with contextlib.suppress(OSError), connection:
            for piece in self._pieces():
                if not self._is_open or time.monotonic() > end:
                    return
                time.sleep(self._pause)
                connection.sendall(piece)

    def close(self) -> None:
        self._is_open = False
        self._listener.close()


def endlessly(beginning: bytes, piece: bytes) -> Callable[[], Iterable[bytes]]:
    return lambda: itertools.chain([beginning], itertools.repeat(piece))


HEAD = b"HTTP/1.1 200 OK\r\n"
DRIPS = {
    "silent": endlessly(b"", b""),
    "status line": endlessly(b"HTTP/1.1 200 O", b"K"),
    "header": endlessly(HEAD + b"X: ", b"x"),
    "headers": endlessly(HEAD, b"X: x\r\n"),
    "continue": endlessly(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "body": endlessly(HEAD + b"\r\n", b"x"),
    "announced body": endlessly(HEAD + b"Content-Length: 1000\r\n\r\n", b"x"),
    "size of a chunk": endlessly(HEAD + b"Transfer-Encoding: chunked\r\n\r\n1;x=", b"x"),
    "trailer": endlessly(HEAD + b"Transfer-Encoding: chunked\r\n\r\n0\r\n", b"X: x\r\n"),
    "redirects": lambda: [b""] * 3 + [b"HTTP/1.1 302 Found\r\nLocation: /again\r\n\r\n"],
}


@pytest.mark.parametrize("public_only", [True, False])
@pytest.mark.parametrize("kind", DRIPS)
def test_a_slow_response_is_given_up_at_the_deadline(kind: str, public_only: bool) -> None:
    """Each piece arrives well within the timeout; the last one never, or (redirects, 0.2 s each) too late."""
    dripping = Dripping(DRIPS[kind], 0.05)
    start = time.monotonic()
    try:
        with pytest.raises(ImageDownloadError, match=r"within 0\.5 s; raise timeout"):
            get(
                f"http://127.0.0.1:{dripping.port}/",
                timeout=0.5,
                public_only=public_only,
                allowed_hosts=[f"127.0.0.1:{dripping.port}"],
            )
    finally:
        dripping.close()
    assert time.monotonic() - start < 4


@pytest.mark.parametrize("public_only", [True, False])
def test_a_slow_tls_handshake_is_given_up_at_the_deadline(public_only: bool) -> None:
    # the head of a TLS record of 16 KiB, and then its content byte by byte
    dripping = Dripping(endlessly(b"\x16\x03\x03\x40\x00", b"\x02"), 0.05)
    start = time.monotonic()
    try:
        with pytest.raises(ImageDownloadError, match=r"within 0\.5 s; raise timeout"):
            get(
                f"https://127.0.0.1:{dripping.port}/",
                timeout=0.5,
                public_only=public_only,
                allowed_hosts=[f"127.0.0.1:{dripping.port}"],
            )
    finally:
        dripping.close()
    assert time.monotonic() - start < 4


@pytest.mark.parametrize("public_only", [True, False])
def test_addresses_that_do_not_answer_share_the_time(
    public_only: bool, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    timeouts: list[float] = []

    def time_out(sock: socket.socket, address: object) -> None:
        timeouts.append(sock.gettimeout() or 0)
        raise TimeoutError

    monkeypatch.setattr(socket.socket, "connect", time_out)
    world.names["slow.test"] = [["1.1.1.1", "1.1.1.2", "1.1.1.3"]]
    with pytest.raises(ImageDownloadError, match="no connection within 6 s; raise timeout"):
        get("http://slow.test/", timeout=6, public_only=public_only)
    assert 0 < timeouts[0] <= 2 and timeouts[1] <= 3 and timeouts[2] <= 6


# --- load and encode -----------------------------------------------------------------------------------------------


def test_load_passes_all_options_on(server: Server) -> None:
    url = f"http://127.0.0.1:{server.server_port}/"
    with pytest.raises(ImageDownloadError, match="the address is not public"):
        load(url, public_only=True)
    with pytest.raises(ImageDownloadError, match="gave no image"):  # the server was contacted
        load(url, public_only=True, allowed_hosts=[f"127.0.0.1:{server.server_port}"])
    with pytest.raises(ImageDownloadError, match="gave no image"):
        load(url)


def test_encode_passes_all_options_on(server: Server) -> None:
    model = Florence2.from_pretrained("demo", device="cpu")
    url = f"http://127.0.0.1:{server.server_port}/"
    with pytest.raises(ImageDownloadError, match="the address is not public"):
        model.encode(url, public_only=True)
    with pytest.raises(ImageDownloadError, match="gave no image"):
        model.encode(url, public_only=True, allowed_hosts=[f"127.0.0.1:{server.server_port}"])


def test_strings_from_untrusted_callers_are_not_paths() -> None:
    assert load(str(IMAGE)).size == load(IMAGE, public_only=True).size
    for text in (str(IMAGE), f"file://{IMAGE}", f" http://127.0.0.1{IMAGE}", "ftp://public.test/x.png", ""):
        with pytest.raises(ImageDownloadError, match=r"it is neither an http\(s\) URL nor a data: URI"):
            load(text, public_only=True)
    assert load("data:image/gif;base64,R0lGODlhAQABAAAAACwAAAAAAQABAAACAkQBADs=", public_only=True).size == (1, 1)
