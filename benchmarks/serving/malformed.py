"""What a server does with nonsense: `python -m benchmarks.serving.malformed --requests 10000`.

Broken JSON, wrong types, damaged images, addresses that must not be fetched, odd paths, methods and headers, and bytes that are no
HTTP at all. Prints how often each status came, and memory, threads and open files of the server before and after. Exit code 1: a
status of 500 or more, or an answer that did not come.
"""

from __future__ import annotations

import argparse
import base64
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
from florence_onnx import tasks
from florence_onnx.fal.contract import APP

IMAGE = (ROOT / "florence_onnx" / "demo" / "samples" / "scene-1.png").read_bytes()
JPEG = (ROOT / "export" / "verification" / "photograph.jpg").read_bytes()
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
"""Right for bytes that are no HTTP."""

Make = Callable[[random.Random], bytes]


def http(method: str, path: str, body: bytes = b"", headers: str = "") -> bytes:
    """A request as it goes over the wire."""
    head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\nContent-Length: {len(body)}\r\n{headers}\r\n"
    return head.encode("utf-8", "replace") + body


def endpoint(rng: random.Random) -> str:
    """One of ours, direct or through the queue."""
    return f"{rng.choice(('', '/queue'))}/{APP}/{rng.choice(list(tasks.TASKS))}"


def broken_json(rng: random.Random) -> bytes:
    """Cut off, or with a byte changed."""
    body = bytearray(
        json.dumps({"image_url": "data:image/png;base64,AAAA", "text_input": "a", "region": {"x1": 1}}).encode()
    )
    if rng.random() < 0.5:
        return http("POST", endpoint(rng), bytes(body[: rng.randrange(len(body))]))
    body[rng.randrange(len(body))] = rng.randrange(256)
    return http("POST", endpoint(rng), bytes(body))


def wrong_types(rng: random.Random) -> bytes:
    """Valid JSON, wrong values."""
    names = ("image_url", "text_input", "region")
    arguments: Any = {name: rng.choice(VALUES) for name in names if rng.random() < 0.7}
    if rng.random() < 0.3:
        arguments["region"] = {name: rng.choice(VALUES) for name in ("x1", "y1", "x2", "y2")}
    if rng.random() < 0.1:
        arguments = rng.choice(VALUES)
    return http("POST", endpoint(rng), json.dumps(arguments).encode())


def damaged_image(rng: random.Random) -> bytes:
    """An image cut off, or with bytes changed."""
    content = bytearray(rng.choice((IMAGE, JPEG)))
    if rng.random() < 0.4:
        del content[rng.randrange(len(content)) :]
    for _ in range(rng.randrange(1, 20)):
        if content:
            content[rng.randrange(len(content))] = rng.randrange(256)
    uri = "data:image/png;base64," + base64.b64encode(content).decode()
    return http("POST", f"/{APP}/caption", json.dumps({"image_url": uri}).encode())


def bad_address(rng: random.Random) -> bytes:
    """An address that must not be fetched, or is none."""
    return http("POST", f"/{APP}/caption", json.dumps({"image_url": rng.choice(ADDRESSES)}).encode())


def odd_request(rng: random.Random) -> bytes:
    """Odd paths, methods and headers."""
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
    """Bytes, or a head that contradicts itself."""
    if rng.random() < 0.5:
        return rng.randbytes(rng.randrange(1, 500))
    length = rng.choice(("-1", "x", "99999999999999999999", "5, 6"))
    return f"POST /{APP}/caption HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {length}\r\n\r\n{{}}".encode()


KINDS: tuple[Make, ...] = (broken_json, wrong_types, damaged_image, bad_address, odd_request, no_http)


def send(server: Server, content: bytes, *, is_whole: bool) -> str:
    """The status that came back, or how it ended.

    Args:
        server: To ask.
        content: What goes over the wire.
        is_whole: Whether it is a request; otherwise the end of what is sent is shown, or both sides would wait.
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
    """Sends them; how often each status came, by kind."""
    rng = random.Random(seed)
    requests = [(kind.__name__, kind(rng)) for kind in (rng.choice(KINDS) for _ in range(num_requests))]
    with ThreadPoolExecutor(num_clients) as pool:
        statuses = pool.map(
            lambda request: (request[0], send(server, request[1], is_whole=request[0] != "no_http")), requests
        )
        found: dict[str, Counter[str]] = {kind.__name__: Counter() for kind in KINDS}
        for kind, status in statuses:
            found[kind][status] += 1
    return found


def is_failure(kind: str, status: str) -> bool:
    """Whether that must not come."""
    return status.startswith("5") or status == "no answer" or (status == CLOSED and kind != "no_http")


def main() -> None:
    """Prints a table and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    # without what is kept on purpose, and with few arenas of malloc, whose number alone lets memory grow for a while
    with serve(arguments.model, "--cache-mb", "0", environment={"MALLOC_ARENA_MAX": "2"}) as server:
        run(server, 1000, arguments.seed + 1)  # what is allocated once
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
