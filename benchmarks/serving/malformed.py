"""The server's responses to malformed requests: `python -m benchmarks.serving.malformed --requests 10000`.

Broken JSON, wrong types, damaged and hostile images, URLs that must not be fetched, unusual paths, methods and headers, bytes that are
not HTTP, bodies that cost more than they should, and connections that end in the middle.

Prints how often each status came, and memory, threads and open files of the server before and after. The exit code is
1 if a status was 500 or more, or a request got no response.
"""

from __future__ import annotations

import argparse
import base64
import functools
import json
import random
import socket
import sys
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from benchmarks import machine
from benchmarks.models import ROOT
from benchmarks.serving.servers import Server, serve
from export.verification.photograph import PHOTOGRAPH
from florence_onnx import tasks
from florence_onnx.fal.contract import APP
from tests import hostile_images as hostile

IMAGE = (ROOT / "florence_onnx" / "demo" / "samples" / "scene-1.png").read_bytes()
JPEG = PHOTOGRAPH.read_bytes()
ADDRESSES = (
    *(
        "http://127.0.0.1/",
        "http://localhost:22/",
        "http://169.254.169.254/latest/meta-data/",
        "http://[::1]/",
        "http://0/",
    ),
    *(
        "http://2130706433/",
        "http://0x7f.1/",
        "file:///etc/passwd",
        "gopher://127.0.0.1/",
        "ftp://127.0.0.1/",
        "http://a@127.0.0.1/",
    ),
    *(
        "http://",
        "https://[",
        "http://127.0.0.1:99999/",
        "//127.0.0.1/",
        "data:",
        "data:image/png;base64,",
        "data:,%",
        "",
        "\x00",
    ),
)
VALUES: tuple[Any, ...] = (
    None,
    True,
    -1,
    1e308,
    10**400,
    "",
    "x" * 10_000,
    "\ud800",
    [],
    [[]],
    {},
    {"url": "x"},
    "😀" * 1000,
)
CLOSED = "closed without an answer"
"""Correct for bytes that are not HTTP."""

Make = Callable[[random.Random], bytes]


def http(method: str, path: str, body: bytes = b"", headers: str = "") -> bytes:
    """Returns the bytes of an HTTP request."""
    head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\nContent-Length: {len(body)}\r\n{headers}\r\n"
    return head.encode("utf-8", "replace") + body


def endpoint(rng: random.Random) -> str:
    """Returns the path of an endpoint, direct or through the queue."""
    return f"{rng.choice(('', '/queue'))}/{APP}/{rng.choice(list(tasks.TASKS))}"


def broken_json(rng: random.Random) -> bytes:
    """JSON that is cut off, or has one byte changed."""
    body = bytearray(
        json.dumps({"image_url": "data:image/png;base64,AAAA", "text_input": "a", "region": {"x1": 1}}).encode()
    )
    if rng.random() < 0.5:
        return http("POST", endpoint(rng), bytes(body[: rng.randrange(len(body))]))
    body[rng.randrange(len(body))] = rng.randrange(256)
    return http("POST", endpoint(rng), bytes(body))


def wrong_types(rng: random.Random) -> bytes:
    """Valid JSON with values of wrong types."""
    names = ("image_url", "text_input", "region")
    arguments: Any = {name: rng.choice(VALUES) for name in names if rng.random() < 0.7}
    if rng.random() < 0.3:
        arguments["region"] = {name: rng.choice(VALUES) for name in ("x1", "y1", "x2", "y2")}
    if rng.random() < 0.1:
        arguments = rng.choice(VALUES)
    return http("POST", endpoint(rng), json.dumps(arguments).encode())


def damaged_image(rng: random.Random) -> bytes:
    """An image that is cut off, or has bytes changed."""
    content = bytearray(rng.choice((IMAGE, JPEG)))
    if rng.random() < 0.4:
        del content[rng.randrange(len(content)) :]
    for _ in range(rng.randrange(1, 20)):
        if content:
            content[rng.randrange(len(content))] = rng.randrange(256)
    uri = "data:image/png;base64," + base64.b64encode(content).decode()
    return http("POST", f"/{APP}/caption", json.dumps({"image_url": uri}).encode())


@functools.cache
def hostile_images() -> tuple[bytes, ...]:
    """Returns small files that cost a loader much, or did."""
    inner = hostile.png(3000, 3000)
    return (
        *(hostile.iptc(hostile.EPS), hostile.iptc(inner), hostile.icns(inner), hostile.ico(inner), hostile.EPS),
        *(hostile.many_scans(500, count) for count in (20, 32, 33, 150)),
        *(hostile.many_segments(5000), hostile.jpeg_with_shared_tags(), hostile.shared_tags(100, 10_000)),
        *(hostile.huge_tile(3000), hostile.many_tiles(2000), hostile.run_lengths(500, 500)),
        *(hostile.run_lengths(3000, 3000), hostile.gif_with_comments(50_000), hostile.gif_with_comments(50_000, 1)),
        *(hostile.png(70_000, 1), hostile.png(2000, 2000, depth=16), hostile.png(9000, 9000), inner),
        *(hostile.with_chunks(hostile.png(8, 8), hostile.compressed_text(3_000_000)),),
        *(hostile.frames(name, 20) for name in ("GIF", "WEBP", "TIFF", "MPO", "PNG")),
    )


def hostile_image(rng: random.Random) -> bytes:
    """A file that costs a loader much, half of the time with bytes changed."""
    content = bytearray(rng.choice(hostile_images()))
    for _ in range(rng.choice((0, 0, 0, 1, 2, 5))):
        content[rng.randrange(len(content))] = rng.randrange(256)
    uri = "data:image/x;base64," + base64.b64encode(content).decode()
    return http("POST", f"/{APP}/caption", json.dumps({"image_url": uri}).encode())


def bad_address(rng: random.Random) -> bytes:
    """A URL that must not be fetched, or is not valid."""
    return http("POST", f"/{APP}/caption", json.dumps({"image_url": rng.choice(ADDRESSES)}).encode())


def odd_request(rng: random.Random) -> bytes:
    """Unusual paths, methods and headers."""
    letters = "".join(chr(rng.randrange(33, 127)) for _ in range(rng.randrange(1, 60)))
    path = rng.choice(
        (f"/{letters}", f"/queue/{APP}/requests/{letters}/status", f"/files/{letters}/x", "/playground/../../x")
    )
    method = rng.choice(("GET", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD", "POST", "TRACE"))
    header = rng.choice(
        ("", f"Authorization: {letters}\r\n", "X-Fal-Request-Timeout: nan\r\n", "X-Fal-Queue-Priority: \xff\r\n")
    )
    header += rng.choice(
        ("", f"Origin: http://{letters}\r\n", "x-fal-target-url: http://[\r\n", "Expect: 100-continue\r\n")
    )
    return http(method, path.replace("#", "%23"), b"{}", header)


def no_http(rng: random.Random) -> bytes:
    """Random bytes, or a request head with a wrong Content-Length."""
    if rng.random() < 0.5:
        return rng.randbytes(rng.randrange(1, 500))
    length = rng.choice(("-1", "x", "99999999999999999999", "5, 6"))
    return f"POST /{APP}/caption HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {length}\r\n\r\n{{}}".encode()


def costly_body(rng: random.Random) -> bytes:
    """A body of up to a megabyte that would cost a careless server much time or memory."""
    size = rng.randrange(1, 2**20)
    uri = rng.choice(
        (b",%41" * (size // 4), b";base64," + b"AA AA\\n" * (size // 7), b";base64," + b"\\u0041" * (size // 6))
    )
    body = rng.choice(
        (
            b"[" + b"[]," * (size // 3) + b"[]]",
            b"[" * size,
            b'["' + b'","' * (size // 3) + b'"]',
            b'{"image_url":"data:,","text_input":"' + b"a car " * (size // 6) + b'"}',
            b'{"text_input":"' + b'\\"' * (size // 2) + b'"}',
            b'{"image_url":"data:image/png' + uri + b'"}',
            b'{"image_url":"http://' + b"a" * size + b'"}',
            b'{"' + b"k" * size + b'":1}',
            json.dumps({"image_url": "data:,"}).encode("utf-16") + b" " * size,
            b"1" * size,
        )
    )
    return http("POST", rng.choice((endpoint(rng), "/storage/upload/initiate")), body)


def refused_body(rng: random.Random) -> bytes:
    """A body that is refused by its headers, with another request in it."""
    body = http("GET", "/health") * rng.randrange(1, 200)
    head = rng.choice(
        (
            "PUT /storage/upload/guessed HTTP/1.1\r\n",
            "POST /health HTTP/1.1\r\n",
            f"POST /{APP}/no-such-task/x HTTP/1.1\r\n",
            f"POST /{APP}/caption HTTP/1.1\r\nOrigin: http://evil.example\r\n",
            f"POST /{APP}/caption HTTP/1.1\r\nTransfer-Encoding: chunked\r\n",
        )
    )
    return f"{head}Host: 127.0.0.1\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


def cut_off(rng: random.Random) -> bytes:
    """A request of which only a part is sent before the client hangs up."""
    whole = rng.choice((wrong_types(rng), damaged_image(rng), odd_request(rng)))
    chunked = f"POST /{APP}/caption HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{{}}".encode()
    return chunked if rng.random() < 0.2 else whole[: rng.randrange(len(whole))]


KINDS: tuple[Make, ...] = (
    *(broken_json, wrong_types, damaged_image, hostile_image, bad_address, odd_request, no_http),
    *(costly_body, refused_body, cut_off),
)
PARTIAL = {"no_http", "cut_off"}
"""Kinds that are no complete requests."""


def send(server: Server, content: bytes, *, is_whole: bool) -> str:
    """Sends bytes, and returns the status of the response or how the connection ended.

    Args:
        server: The server.
        content: The bytes to send.
        is_whole: Whether they are a complete request. If not, the sending side is closed after them, or both sides
            would wait.
    """
    with socket.create_connection((server.host, server.port), timeout=60) as connection:
        try:
            connection.sendall(content)
            if not is_whole:
                connection.shutdown(socket.SHUT_WR)
            answer = connection.recv(64)
        except TimeoutError:
            return "no answer"
        except OSError:
            return CLOSED
    return answer.split(b" ")[1].decode("latin-1") if answer.startswith(b"HTTP/1.") else CLOSED


def run(server: Server, num_requests: int, seed: int, num_clients: int = 8) -> dict[str, Counter[str]]:
    """Sends requests; returns how often each status came, by kind of request."""
    rng = random.Random(seed)
    requests = [(kind.__name__, kind(rng)) for kind in (rng.choice(KINDS) for _ in range(num_requests))]
    with ThreadPoolExecutor(num_clients) as pool:
        statuses = pool.map(
            lambda request: (request[0], send(server, request[1], is_whole=request[0] not in PARTIAL)), requests
        )
        found: dict[str, Counter[str]] = {kind.__name__: Counter() for kind in KINDS}
        for kind, status in statuses:
            found[kind][status] += 1
    return found


def is_failure(kind: str, status: str) -> bool:
    """Whether a status is wrong for a kind of request."""
    return status.startswith("5") or status == "no answer" or (status == CLOSED and kind not in PARTIAL)


def main() -> None:
    """Prints a table and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    # Without the feature cache, and with few malloc arenas: with many, memory grows for a while without a leak.
    with serve(arguments.model, "--cache-mb", "0", environment={"MALLOC_ARENA_MAX": "2"}) as server:
        run(server, 1000, arguments.seed + 1)  # warm-up: buffers that are allocated once
        before = server.memory_bytes(), server.num_threads(), server.num_files()
        found = run(server, arguments.requests, arguments.seed)
        after = server.memory_bytes(), server.num_threads(), server.num_files()
    print("| kind | statuses |\n|---|---|")
    for kind, counts in found.items():
        print(f"| {kind.replace('_', ' ')} | {', '.join(f'{n} x {status}' for status, n in counts.most_common())} |")
    print(
        f"\nMemory {before[0] / 1e6:.0f} -> {after[0] / 1e6:.0f} MB, threads {before[1]} -> {after[1]}, files {before[2]} -> {after[2]}."
    )
    print(json.dumps({"machine": machine.describe(), "found": found, "before": before, "after": after}))
    failures = sum(n for kind, counts in found.items() for status, n in counts.items() if is_failure(kind, status))
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
