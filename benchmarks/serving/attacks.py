"""What one client can do to the others: `python -m benchmarks.serving.attacks`.

Sends the worst bodies and connections that we know of, one kind at a time. Meanwhile another client asks for `/health` on a
new connection, again and again. Prints for each kind how long `/health` took, the memory that the server's process needed
at its peak beyond what it had before, and what the attacker got. Needs Linux (`/proc`).
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import json
import resource
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from benchmarks import machine
from benchmarks.models import ROOT
from benchmarks.serving.servers import Server, serve
from florence_onnx.fal.contract import APP

MB = 1_000_000
SILENT_SECONDS = 30.0
"""Seconds for which an attack waits for the server to give it up."""
_PROBE_SECONDS = 0.02
_HOST = "Host: 127.0.0.1\r\n"
_PNG = (ROOT / "florence_onnx" / "demo" / "samples" / "scene-1.png").read_bytes()


def post(path: str, body: bytes) -> bytes:
    """Returns the bytes of a request."""
    head = f"POST {path} HTTP/1.1\r\n{_HOST}Connection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def text(content: bytes) -> bytes:
    """A text, for an image that is one."""
    image = b"data:image/png;base64," + base64.b64encode(_PNG)
    body = b'{"image_url":"' + image + b'","text_input":"' + content + b'"}'
    return post(f"/{APP}/open-vocabulary-detection", body)


def uri(content: bytes) -> bytes:
    """A caption of a data: URI."""
    return post(f"/{APP}/caption", b'{"image_url":"data:' + content + b'"}')


BODIES: dict[str, Callable[[], bytes]] = {
    "text of 1 MB": lambda: text(b"a car " * (1 * MB // 6)),
    "text of 3 MB": lambda: text(b"a car " * (3 * MB // 6)),
    "text of 5 MB": lambda: text(b"a car " * (5 * MB // 6)),
    "JSON of 40 MB, `[[],[],…]`": lambda: post(f"/{APP}/caption", b"[" + b"[]," * (40 * MB // 3) + b"[]]"),
    "JSON of 40 MB, strings": lambda: post(f"/{APP}/caption", b'["' + b'","' * (40 * MB // 3) + b'"]'),
    'text of 40 MB, `\\"\\"…`': lambda: text(b'\\"' * (20 * MB)),
    "`data:,%41%41…` of 48 MB": lambda: uri(b"," + b"%41" * (16 * MB)),
    "base64 with blanks, 32 MB": lambda: uri(b"image/png;base64," + b"AA AA\\n" * (32 * MB // 7)),
    "base64 of 60 MB": lambda: uri(b"image/png;base64," + b"AAAA" * (15 * MB)),
    "base64 of 60 MB, `\\/`": lambda: uri(b"image/png;base64," + b"AA\\/\\/" * (10 * MB)),
}
"""Requests by kind."""


@dataclass
class Probe:
    """Asks for `/health` in a thread until it is stopped."""

    server: Server
    seconds: list[float] = field(default_factory=list)
    statuses: Counter[str] = field(default_factory=Counter)
    is_over: threading.Event = field(default_factory=threading.Event)

    @contextlib.contextmanager
    def running(self) -> Iterator[Probe]:
        """Asks while the block runs."""
        thread = threading.Thread(target=self._run)
        thread.start()
        try:
            yield self
        finally:
            self.is_over.set()
            thread.join()

    def _run(self) -> None:
        request = f"GET /health HTTP/1.1\r\n{_HOST}Connection: close\r\n\r\n".encode()
        while not self.is_over.wait(_PROBE_SECONDS):
            begin = time.monotonic()
            self.statuses[status(self.server, request, timeout=60)] += 1
            self.seconds.append(time.monotonic() - begin)

    def row(self) -> dict[str, float]:
        """Milliseconds: median, 99th percentile and the worst."""
        p50, p99, worst = np.percentile(self.seconds, (50, 99, 100)) * 1000
        return {"p50_ms": float(p50), "p99_ms": float(p99), "worst_ms": float(worst)}


def status(server: Server, content: bytes, timeout: float) -> str:
    """Sends bytes; returns the status of the response, or how the connection ended."""
    try:
        with socket.create_connection((server.host, server.port), timeout=timeout) as connection:
            with contextlib.suppress(ConnectionError):  # refused before its end; the response may be there
                connection.sendall(content)
            answer = connection.recv(64)
    except TimeoutError:
        return "no answer"
    except OSError:
        return "closed"
    return answer.split(b" ")[1].decode("latin-1") if answer.startswith(b"HTTP/1.") else "closed"


def peak_bytes(server: Server) -> int:
    """The most resident memory since the last `reset_peak`."""
    lines = Path(f"/proc/{server.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024


def reset_peak(server: Server) -> None:
    """Forgets the most resident memory."""
    Path(f"/proc/{server.pid}/clear_refs").write_text("5")


def attack(server: Server, name: str, run: Callable[[], str]) -> dict[str, object]:
    """Measures one kind."""
    reset_peak(server)
    before = server.memory_bytes()
    begin = time.monotonic()
    with Probe(server).running() as probe:
        got = run()
        taken = time.monotonic() - begin
        time.sleep(0.5)  # work may go on after an answer
    healthy = dict(probe.statuses)
    return {
        "name": name,
        "got": got,
        "seconds": taken,
        **probe.row(),
        "health": healthy,
        "peak_mb": (peak_bytes(server) - before) / MB,
    }


def send_several(server: Server, content: bytes, num: int) -> str:
    """Sends the same request on several connections at once; returns how often each status came."""
    found: Counter[str] = Counter()
    threads = [threading.Thread(target=lambda: found.update([status(server, content, 120)])) for _ in range(num)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return ", ".join(f"{count} x {each}" for each, count in found.most_common())


def hold(server: Server, content: bytes, num: int) -> str:
    """Opens connections, sends a part of a request on each and waits; returns how they ended."""
    found: Counter[str] = Counter()
    opened = [socket.create_connection((server.host, server.port), timeout=60) for _ in range(num)]
    deadline = time.monotonic() + SILENT_SECONDS
    for connection in opened:
        with contextlib.suppress(OSError):
            connection.sendall(content)
    for connection in opened:
        connection.settimeout(max(0.01, deadline - time.monotonic()))
        try:
            answer = connection.recv(64)
            found[answer.split(b" ")[1].decode() if answer else "closed"] += 1
        except TimeoutError:
            found["still open"] += 1
        except OSError:
            found["closed"] += 1
        connection.close()
    return ", ".join(f"{count} x {each}" for each, count in found.most_common())


def measure_bodies(model: str) -> list[dict[str, object]]:
    """One body at a time, and four at a time of the one that costs most."""
    rows = []
    with serve(model, "--cache-mb", "0", environment={"MALLOC_ARENA_MAX": "2"}) as server:
        send_several(server, uri(b"image/png;base64,AAAA"), 4)
        rows.append(attack(server, "nothing", lambda: time.sleep(3) or "-"))  # type: ignore[func-returns-value]
        for name, make in BODIES.items():
            content = make()
            rows.append(attack(server, name, lambda content=content: send_several(server, content, 1)))  # type: ignore[misc]
        content = BODIES["base64 with blanks, 32 MB"]()
        rows.append(attack(server, "the same, 4 at once", lambda: send_several(server, content, 4)))
    return rows


def measure_connections(model: str) -> list[dict[str, object]]:
    """Refused bodies, and silence."""
    rows = []
    upload = (
        f"PUT /storage/upload/guessed HTTP/1.1\r\n{_HOST}Content-Length: {40 * MB}\r\n\r\n".encode() + b"x" * 40 * MB
    )
    half_body = f"POST /{APP}/caption HTTP/1.1\r\n{_HOST}Authorization: Key k\r\nContent-Length: 99\r\n\r\n{{".encode()
    half_header = f"GET /health HTTP/1.1\r\n{_HOST}X-A: ".encode()
    with serve(model, "--api-key", "k", environment={"MALLOC_ARENA_MAX": "2"}) as server:
        rows.append(attack(server, "20 uploads of 40 MB without a key", lambda: send_several(server, upload, 20)))
        for name, content in (("silent", b""), ("half a header", half_header), ("half a body", half_body)):
            rows.append(
                attack(server, f"50 connections, {name}", lambda content=content: hold(server, content, 50))  # type: ignore[misc]
            )
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        with serve(model) as server:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            rows.append(attack(server, "300 connections, silent, nofile=256", lambda: hold(server, b"", 300)))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return rows


def main() -> None:
    """Prints a table and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--only", choices=("bodies", "connections"))
    arguments = parser.parse_args()
    rows = [] if arguments.only == "connections" else measure_bodies(arguments.model)
    rows += [] if arguments.only == "bodies" else measure_connections(arguments.model)
    print("| attack | it got | after s | /health p50 ms | p99 ms | worst ms | /health answers | peak MB more |")
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        figures = " | ".join(f"{row[name]:.0f}" for name in ("p50_ms", "p99_ms", "worst_ms"))
        print(
            f"| {row['name']} | {row['got']} | {row['seconds']:.1f} | {figures} | {row['health']} | {row['peak_mb']:.0f} |"
        )
    print(json.dumps({"machine": machine.describe(), "rows": rows}))


if __name__ == "__main__":
    main()
