"""Requests/s and latencies at 1, 4, 16 and 64 clients: `python -m benchmarks.serving.load [--model BUNDLE]`.

Every client sends its next request when it has the response to the last one, over one persistent connection. No two
requests have an image with the same bytes, so that no features come from the cache. Clients and server share the
machine's cores. The first seconds at each number of clients are not counted.
"""

from __future__ import annotations

import argparse
import base64
import http.client
import itertools
import json
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import machine
from benchmarks.models import ROOT
from benchmarks.serving.servers import Server, serve
from florence_onnx import Florence2
from florence_onnx.fal.contract import APP

SAMPLES = ROOT / "florence_onnx" / "demo" / "samples"
_ids = itertools.count()


@dataclass
class Tally:
    """Latencies and failures, as seen by the clients."""

    begin: float
    """Time from which requests count, on the monotonic clock."""
    seconds: list[float] = field(default_factory=list)
    failures: dict[str, int] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, started: float, status: int) -> None:
        """Adds one response; requests that started before `begin` are warm-up."""
        now = time.monotonic()
        with self.lock:
            if status != 200:
                self.failures[str(status)] = self.failures.get(str(status), 0) + 1
            elif started >= self.begin:
                self.seconds.append(now - started)


def make_body(image: bytes) -> bytes:
    """Returns a request body with a unique image: decoders ignore bytes after the end of an image."""
    unique = image + next(_ids).to_bytes(8, "big")
    return json.dumps({"image_url": "data:image/png;base64," + base64.b64encode(unique).decode()}).encode()


def ask_on(server: Server, task: str, images: Sequence[bytes], tally: Tally, end: float) -> None:
    """Runs one client until the end time."""
    connection = http.client.HTTPConnection(server.host, server.port, timeout=120)
    for image in itertools.cycle(images):
        if time.monotonic() > end:
            break
        body = make_body(image)
        started = time.monotonic()
        connection.request("POST", f"/{APP}/{task}", body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        response.read()
        tally.add(started, response.status)
    connection.close()


def measure(server: Server, task: str, num_clients: int, images: Sequence[bytes], seconds: float) -> dict[str, Any]:
    """Measures one number of clients."""
    begin = time.monotonic() + min(2.0, seconds / 4)
    tally = Tally(begin)
    arguments = (server, task, images, tally, begin + seconds)
    threads = [threading.Thread(target=ask_on, args=arguments) for _ in range(num_clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    p50, p95, p99 = (float(value) for value in np.percentile(tally.seconds, (50, 95, 99)) * 1000)
    return {
        "clients": num_clients,
        "requests_per_second": len(tally.seconds) / (time.monotonic() - begin),
        "p50_ms": p50,
        "p95_ms": p95,
        "p99_ms": p99,
        "answers": len(tally.seconds),
        "failures": tally.failures,
        "memory_mb": server.memory_bytes() / 1e6,
    }


def in_process(model: str, task: str, images: Sequence[Path], repeats: int) -> float:
    """Returns the median milliseconds of the same request without a server."""
    florence = Florence2.from_pretrained(model)
    florence.warm_up()
    taken = []
    for image in itertools.islice(itertools.cycle(images), repeats):
        started = time.monotonic()
        florence.run(task, image).to_dict()
        taken.append(time.monotonic() - started)
    return float(np.median(taken)) * 1000


def main() -> None:
    """Prints a table and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--task", default="object-detection")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--seconds", type=float, default=15.0)
    parser.add_argument("--images", type=Path, nargs="+", default=sorted(SAMPLES.glob("*.png")))
    arguments, options = parser.parse_known_args()
    alone = in_process(arguments.model, arguments.task, arguments.images, 40)
    images = [path.read_bytes() for path in arguments.images]
    rows = []
    with serve(arguments.model, *options) as server:
        for clients in arguments.clients:
            rows.append(measure(server, arguments.task, clients, images, arguments.seconds))
    print(f"In process, without an image drawn: {alone:.1f} ms a request (median).\n")
    print(
        "| clients | requests/s | p50 ms | p95 ms | p99 ms | answers | failures | server MB |\n|---|---|---|---|---|---|---|---|"
    )
    for row in rows:
        figures = " | ".join(f"{row[name]:.0f}" for name in ("p50_ms", "p95_ms", "p99_ms", "answers"))
        failures = ", ".join(f"{count} x {status}" for status, count in row["failures"].items()) or "none"
        print(
            f"| {row['clients']} | {row['requests_per_second']:.1f} | {figures} | {failures} | {row['memory_mb']:.0f} |"
        )
    print(json.dumps({"machine": machine.describe(), "options": options, "in_process_ms": alone, "rows": rows}))


if __name__ == "__main__":
    main()
