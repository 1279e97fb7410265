"""Connections of strangers: silent, slow, too many, refused; and the names and options of a server."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import re
import resource
import select
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

httpx = pytest.importorskip("httpx", reason="pip install -e '.[test]'")
for needed in ("fastapi", "uvicorn", "prometheus_client", "pythonjsonlogger"):
    pytest.importorskip(needed, reason="pip install -e '.[serve]'")

from florence_onnx import tasks  # noqa: E402
from florence_onnx.commands.serve import check_certificate  # noqa: E402
from florence_onnx.errors import InputError  # noqa: E402
from florence_onnx.server import listener  # noqa: E402
from florence_onnx.server.log_format import TextFormatter  # noqa: E402
from florence_onnx.server.settings import ServerSettings  # noqa: E402
from tests.fal.test_fal import APP, SAMPLE, arguments, wait_for  # noqa: E402
from tests.live_server import LiveServer, serve  # noqa: E402
from tests.server.test_server import CAPTION, metric  # noqa: E402

ONE_THREAD = {"OMP_NUM_THREADS": "1"}
MAX_CONNECTIONS = 40
HEAD = "Host: 127.0.0.1\r\n"
LIMITS = ("--max-connections", str(MAX_CONNECTIONS), "--header-timeout", "1.5", "--body-timeout", "0.5")


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    """A server with short limits and a key."""
    with serve(
        *("--grace", "0", "--api-key", "id:secret", "--log-format", "text", *LIMITS), environment=ONE_THREAD
    ) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: LiveServer) -> Iterator[Any]:
    with httpx.Client(base_url=server.url, timeout=30, headers={"Authorization": "Key id:secret"}) as made:
        yield made


@contextlib.contextmanager
def connect(server: LiveServer, content: str = "") -> Iterator[socket.socket]:
    with socket.create_connection((server.host, server.port), timeout=30) as connection:
        connection.sendall(content.encode())
        yield connection


def read_all(connection: socket.socket) -> bytes:
    """What the server sends until it closes the connection."""
    found = b""
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(65536):
            found += part
    return found


def statuses(answer: bytes) -> list[int]:
    return [int(each) for each in re.findall(rb"HTTP/1\.1 (\d{3}) ", answer)]


# ----------------------------------------------------------------------------------------------------- slow and silent


def test_silence_and_slow_headers_end_a_connection(server: LiveServer) -> None:
    with connect(server) as silent, connect(server, f"GET /health HTTP/1.1\r\n{HEAD}X-A: ") as half:
        assert read_all(silent) == b""
        answer = read_all(half)
    assert statuses(answer) == [408]
    assert b"headers took longer than 1.5 s" in answer


def test_a_drip_of_headers_does_not_renew_the_time(server: LiveServer) -> None:
    with connect(server, f"GET /health HTTP/1.1\r\n{HEAD}X-A: ") as drip:
        drip.settimeout(0.1)
        answer = b""
        for _ in range(300):
            with contextlib.suppress(TimeoutError):
                answer = drip.recv(1000)
                break
            with contextlib.suppress(OSError):
                drip.sendall(b"a")
    assert statuses(answer) == [408]


def test_the_second_request_of_a_connection_has_the_same_limits(server: LiveServer) -> None:
    request = f"GET /health HTTP/1.1\r\n{HEAD}\r\n"
    with connect(server, request) as kept:
        assert statuses(kept.recv(4000)) == [200]
        kept.sendall(request[:20].encode())
        assert statuses(read_all(kept)) == [408]


@pytest.mark.parametrize("path", [f"/{APP}/caption", "/files/upload"])
@pytest.mark.parametrize("num_sent", [1, 200_000], ids=["silent", "silent-after-a-part"])
def test_a_body_that_stops_is_given_up(path: str, num_sent: int, server: LiveServer, client: Any) -> None:
    head = f"POST {path} HTTP/1.1\r\n{HEAD}Authorization: Key id:secret\r\nContent-Length: 1000000\r\n\r\n"
    with connect(server, head + "x" * num_sent) as half:
        answer = read_all(half)
    assert statuses(answer) == [408]
    assert b"must come at 512 bytes in 0.5 s" in answer and b"connection: close" in answer.lower()
    endpoint = "caption" if "caption" in path else "files"
    assert metric(client, "florence_requests_total", endpoint=endpoint, status="408") > 0


def test_a_slow_body_above_the_rate_is_read(server: LiveServer) -> None:
    body = json.dumps(arguments(tasks.CAPTION)).encode()
    head = f"POST /{APP}/caption HTTP/1.1\r\n{HEAD}Authorization: Key id:secret\r\nContent-Length: {len(body)}\r\n"
    with connect(server, head + "Connection: close\r\n\r\n") as slow:
        for start in range(0, len(body), len(body) // 8 + 1):
            slow.sendall(body[start : start + len(body) // 8 + 1])
            time.sleep(0.15)
        answer = read_all(slow)
    assert statuses(answer) == [200] and json.loads(answer.partition(b"\r\n\r\n")[2]) == CAPTION


# ----------------------------------------------------------------------------------------------------------- refusals


def send_body(server: LiveServer, head: str, num_bytes: int) -> tuple[bytes, int]:
    """Sends a body and reads what comes; returns it and how many bytes could be sent."""
    part, num_sent = b"x" * 2**16, 0
    with connect(server, f"{head}Content-Length: {num_bytes}\r\n\r\n") as connection:
        # small buffers, so that what the system takes on its own is not mistaken for what the server reads
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**16)
        with contextlib.suppress(OSError):
            while num_sent < num_bytes:
                num_sent += connection.send(part)
        return read_all(connection), num_sent


@pytest.mark.parametrize(
    ("request_line", "status"),
    [
        (f"POST /{APP}/caption HTTP/1.1", 401),
        ("POST /files/upload HTTP/1.1", 401),
        ("POST /storage/upload/initiate HTTP/1.1", 401),
        ("PUT /storage/upload/guessed HTTP/1.1", 404),
        ("POST /health HTTP/1.1", 405),
        ("POST /playground/none HTTP/1.1", 401),
    ],
)
def test_a_refused_body_is_not_read_and_the_connection_is_closed(
    request_line: str, status: int, server: LiveServer, client: Any
) -> None:
    answer, num_sent = send_body(server, f"{request_line}\r\n{HEAD}", 40_000_000)
    assert statuses(answer) == [status] and b"connection: close" in answer.lower()
    assert num_sent < 16_000_000  # the system's buffers and what is thrown away
    refused, _ = send_body(server, f"{request_line}\r\n{HEAD}Expect: 100-continue\r\n", 40_000_000)
    assert statuses(refused) == [status]  # and no 100 before it


def test_a_refused_request_leaves_its_connection_no_second_one(server: LiveServer) -> None:
    second = f"GET /health HTTP/1.1\r\n{HEAD}\r\n"
    with connect(
        server, f"POST /{APP}/caption HTTP/1.1\r\n{HEAD}Content-Length: {len(second) + 1}\r\n\r\n{second}"
    ) as sent:
        assert statuses(read_all(sent)) == [401]


def test_an_upload_token_is_good_for_one_body(server: LiveServer, client: Any) -> None:
    announced = client.post("/storage/upload/initiate", json={"file_name": "a.png", "content_type": "image/png"}).json()
    path = announced["upload_url"].removeprefix(server.url)
    assert httpx.put(announced["upload_url"], content=SAMPLE.read_bytes()).status_code == 200
    answer, _ = send_body(server, f"PUT {path} HTTP/1.1\r\n{HEAD}", 40_000_000)
    assert statuses(answer) == [404]
    assert httpx.get(announced["file_url"]).content == SAMPLE.read_bytes()


def test_two_lengths_are_refused_and_the_connection_closed(server: LiveServer) -> None:
    smuggled = f"GET /ready HTTP/1.1\r\n{HEAD}\r\n"
    head = f"POST /{APP}/caption HTTP/1.1\r\n{HEAD}Authorization: Key id:secret\r\n"
    for lengths in (
        f"Content-Length: {len(smuggled) + 5}\r\nTransfer-Encoding: chunked\r\n",
        f"Transfer-Encoding: chunked\r\nContent-Length: {len(smuggled) + 5}\r\n",
    ):
        with connect(server, f"{head}{lengths}\r\n0\r\n\r\n{smuggled}") as sent:
            answer = read_all(sent)
        assert statuses(answer) == [400] and b"not both" in answer


def test_head_is_answered_like_get_without_a_body(client: Any, server: LiveServer) -> None:
    for path in (
        "/health",
        "/ready",
        "/metrics",
        "/openapi.json",
        "/",
        "/playground/app.js",
        "/playground/config.json",
    ):
        got, head = client.get(path), client.head(path)
        assert (head.status_code, head.content) == (200, b""), path
        assert path == "/metrics" or head.headers["content-length"] == str(len(got.content)), path
    assert httpx.head(f"{server.url}/health").status_code == 200  # without a key
    assert httpx.head(f"{server.url}/metrics").status_code == 401
    assert client.head(f"/{APP}/caption").status_code == 405


# -------------------------------------------------------------------------------------------------------- too many


def test_connections_above_the_limit_get_503_and_old_silent_ones_make_room(server: LiveServer, client: Any) -> None:
    """Silence of a stranger costs others a moment at most: what is silent is closed first."""
    request = f"GET /health HTTP/1.1\r\n{HEAD}Connection: close\r\n\r\n"
    with contextlib.ExitStack() as opened:
        before = metric(client, "florence_connections_refused_total")
        busy = f"POST /{APP}/caption HTTP/1.1\r\n{HEAD}Authorization: Key id:secret\r\nContent-Length: 9\r\n\r\n"
        for _ in range(MAX_CONNECTIONS - 1):  # and the client's own
            opened.enter_context(connect(server, busy))
        wait_for(lambda: metric(client, "florence_connections") >= MAX_CONNECTIONS)
        late = [opened.enter_context(connect(server, request)) for _ in range(5)]
        answers = [read_all(each) for each in late]
        # the client's connection is between two requests, and makes room for the first of them
        assert sorted(status for each in answers for status in statuses(each)) == [200, 503, 503, 503, 503]
        refused = next(each for each in answers if statuses(each) == [503])
        assert b"Retry-After" in refused and b"connections are open, the most that this server takes" in refused
    wait_for(lambda: metric(client, "florence_connections") <= 3)
    assert metric(client, "florence_connections_refused_total") == before + 4
    assert server.stderr.count("refused so far") == 1


@pytest.fixture(scope="module")
def small() -> Iterator[LiveServer]:
    """A server with 128 files, which others can reach, without a key; nothing may be idle for long."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (128, hard))  # what a child inherits
    try:
        options = ("--host", "0.0.0.0", "--idle-timeout", "1", "--grace", "0")
        with serve(*options, environment=ONE_THREAD) as running:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            yield running
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_the_limit_of_open_files_limits_connections(small: LiveServer) -> None:
    """300 silent connections and 128 files: one line is logged, and others are served as soon as silence is old."""
    (limit,) = {int(each) for each in re.findall(r"at most (\d+) connections instead of 512", small.stderr)}
    assert listener.MIN_CONNECTIONS <= limit < 128 - listener.RESERVED_FILES
    with contextlib.ExitStack() as opened:
        silent = [opened.enter_context(connect(small)) for _ in range(300)]
        wait_for(lambda: len(select.select(silent, [], [], 0)[0]) >= 300 - limit)
        answers = [statuses(each.recv(1000)) for each in select.select(silent, [], [], 0)[0]]
        assert set(map(tuple, answers)) == {(503,)} and len(answers) <= 301 - limit
        wait_for(lambda: httpx.get(f"{small.url}/health").status_code == 200)
        assert httpx.post(f"{small.url}/{APP}/caption", json=arguments(tasks.CAPTION), timeout=60).json() == CAPTION
    assert len(small.stderr) < 10_000 and "Traceback" not in small.stderr


def test_idle_connections_are_closed(small: LiveServer) -> None:
    """One that sends no second request, and one that does not read its response."""
    with connect(small, f"GET /health HTTP/1.1\r\n{HEAD}\r\n") as kept:
        assert statuses(read_all(kept)) == [200]
    content = b"x" * 30_000_000
    stored = httpx.post(f"{small.url}/files/upload", content=content).json()["access_url"].removeprefix(small.url)
    with connect(small, f"GET {stored} HTTP/1.1\r\n{HEAD}\r\n") as unread:
        wait_for(lambda: num_connections(small) == 2)
        wait_for(lambda: num_connections(small) == 1)
        answer = read_all(unread)
    assert statuses(answer[:100]) in ([200], []) and len(answer) < len(content)


def num_connections(server: LiveServer) -> float:
    """Open connections, the one that asks included."""
    with httpx.Client(base_url=server.url) as asking:
        return metric(asking, "florence_connections")


def test_too_few_descriptors_for_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener, "_max_files", lambda: 64)
    with pytest.raises(InputError, match=r"limit of open files, 64, .* ulimit -n 1024"):
        listener.fit_connections(512)
    monkeypatch.setattr(listener, "_max_files", lambda: None)
    assert listener.fit_connections(512) == 512


# -------------------------------------------------------------------------------------------------------------- the log


def test_a_path_can_neither_forge_a_line_nor_control_the_terminal(client: Any, server: LiveServer) -> None:
    forged = "2026-01-01 00:00:00,000 INFO florence_onnx.access: GET /forged 200"
    for separator in ("%0A", "%0D", "%C2%85", "%E2%80%A8", "%0B"):
        assert client.get(f"/x{separator}{forged}%1B%5B2J%E2%80%AE").status_code == 404
    wait_for(lambda: server.stderr.count("/forged") == 5)
    lines = [line for line in server.stderr.splitlines() if "/forged" in line]
    assert len(lines) == 5 and all("GET /x\\" in line and "\\x1b[2J\\u202e" in line for line in lines)
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u202e]", server.stderr)


def test_tracebacks_in_the_text_log_are_indented() -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(TextFormatter("%(levelname)s %(message)s"))
    try:
        raise ValueError("quoted\nERROR forged \x1b[2J")
    except ValueError:
        record = logging.LogRecord("x", logging.ERROR, __file__, 1, "failed %s", ("é\n",), sys.exc_info())
    handler.emit(record)
    first, *rest = stream.getvalue().splitlines()
    assert first == "ERROR failed é\\n"
    assert all(line.startswith("    ") for line in rest) and "    ERROR forged \\x1b[2J" in rest


# -------------------------------------------------------------------------------------------------- names and options


@pytest.mark.parametrize(
    ("settings", "accepted", "refused"),
    [
        ({}, ("127.0.0.1:8000", "[::1]:8000", "localhost", "x.localhost"), ("evil.example", "10.0.0.1", "box")),
        (
            {"host": "0.0.0.0"},
            ("10.0.0.1:8000", "[fe80::1]:80", "box", "box.local", "queue.fal.run", "LOCALHOST"),
            ("evil.example", "127.0.0.1.evil.example", "10.0.0.1.evil.example:8000", "local.evil.example"),
        ),
        ({"host": "0.0.0.0", "api_key": "k"}, ("evil.example", "10.0.0.1"), ()),
        (
            {"host": "0.0.0.0", "api_key": "k", "trusted_hosts": ("*.example.com", "api.test")},
            ("a.example.com:1", "API.test", "localhost", "127.0.0.1"),
            ("example.com", "10.0.0.1", "box", "xapi.test", "a.example.com.evil.test"),
        ),
        ({"host": "0.0.0.0", "trusted_hosts": ("*",)}, ("evil.example",), ()),
        ({"public_url": "https://demo.example/x"}, ("demo.example",), ("evil.example",)),
    ],
)
def test_names_of_a_server(settings: dict[str, Any], accepted: tuple[str, ...], refused: tuple[str, ...]) -> None:
    made = ServerSettings(**settings)
    assert [name for name in accepted if not made.accepts_host(name)] == []
    assert [name for name in refused if made.accepts_host(name)] == []


def test_an_open_server_says_so_and_refuses_foreign_names(small: LiveServer) -> None:
    response = httpx.get(f"{small.url}/health", headers={"Host": "evil.example"})
    assert response.status_code == 400 and "--trusted-host NAME" in response.json()["detail"]
    assert httpx.get(f"{small.url}/health").status_code == 200
    assert "* WARNING: no key: anyone who can reach 0.0.0.0 can use this server." in small.stderr
    assert '"level": "WARNING"' in small.stderr and "there is no key" in small.stderr


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"origins": ("*",)}, "takes no *"),
        ({"origins": ("https://app.example/",)}, "as browsers send it"),
        ({"origins": ("app.example",)}, "as browsers send it"),
        ({"origins": ("https://App.example",)}, "as browsers send it"),
        ({"origins": ("https://app.example:443",)}, "as browsers send it"),
        ({"origins": ("https://[",)}, "as browsers send it"),
        ({"public_url": "http://"}, "and a host"),
        ({"public_url": "https://:8000"}, "and a host"),
        ({"public_url": "https://a:b"}, "and a host"),
        ({"public_url": "https://a/?b"}, "no query"),
        ({"grace_seconds": -1.0}, "0 seconds or more"),
        ({"grace_seconds": float("nan")}, "0 seconds or more"),
        ({"grace_seconds": float("inf")}, "0 seconds or more"),
        ({"header_seconds": 0.0}, "header_seconds must be more than 0"),
        ({"min_body_rate": -1.0}, "0 bytes per second or more"),
        ({"max_connections": 0}, "1 or more"),
        ({"host": " "}, "the host is blank"),
        ({"api_key": "a\n"}, "ASCII without blanks"),
        ({"api_key": "schlüssel"}, "ASCII without blanks"),
        ({"trusted_hosts": ("http://a",)}, "a name without port or scheme"),
        ({"trusted_hosts": ("a:80",)}, "a name without port or scheme"),
    ],
)
def test_options_that_cannot_work_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=re.escape(said)):
        ServerSettings(**settings)
    ServerSettings(
        origins=("https://app.example", "http://localhost:3000", "null", "app://x"),
        public_url="https://a.example/florence",
        grace_seconds=0.0,
        trusted_hosts=("a", "*.b", "::1"),
    )


def test_what_cannot_be_listened_on_is_found_before_the_model_is_loaded(server: LiveServer, tmp_path: Path) -> None:
    missing = str(tmp_path / "no-bundle")
    options = ("serve", "--port", str(server.port), "--model", missing)
    command = [sys.executable, "-m", "florence_onnx", *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=60)
    assert done.returncode == 2 and f"port {server.port}" in done.stderr
    assert "in use; choose another with --port" in done.stderr
    assert "no-bundle" not in done.stderr and "Traceback" not in done.stderr
    pem = tmp_path / "x.pem"
    pem.write_text("no certificate")
    for name in (str(pem), missing):
        settings = ServerSettings(certificate=name, private_key=str(pem))
        with pytest.raises(InputError, match="cannot use the certificate"):
            check_certificate(settings)


def test_addresses_that_cannot_be_bound() -> None:
    with pytest.raises(InputError, match="pass an address of this machine"):
        listener.bind("no such host", 0)
    with pytest.raises(InputError, match=r"cannot listen on 192\.0\.2\.1 port 0"):
        listener.bind("192.0.2.1", 0)


def test_limits_hold_over_tls(tmp_path: Path) -> None:
    trustme = pytest.importorskip("trustme")
    authority = trustme.CA()
    made = authority.issue_cert("127.0.0.1")
    made.cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
    made.private_key_pem.write_to_path(tmp_path / "key.pem")
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    options = (
        "--certificate",
        str(tmp_path / "cert.pem"),
        "--private-key",
        str(tmp_path / "key.pem"),
        "--api-key",
        "k",
    )
    with serve(
        "--grace", "0", *options, *LIMITS, environment=ONE_THREAD, authority=str(tmp_path / "ca.pem")
    ) as running:
        context = ssl.create_default_context(cafile=str(tmp_path / "ca.pem"))
        raw = socket.create_connection((running.host, running.port), timeout=30)
        with context.wrap_socket(raw, server_hostname="127.0.0.1") as half:
            half.sendall(f"GET /health HTTP/1.1\r\n{HEAD}".encode())
            assert statuses(read_all(half)) == [408]
        with httpx.Client(base_url=running.url, verify=context) as client:
            refused = client.post(f"/{APP}/caption", content=b"x" * 300_000)
            assert (refused.status_code, refused.headers["connection"]) == (401, "close")
            assert client.get("/health").status_code == 200
