"""What a server keeps for its clients, slow image hosts and a full disk: `python -m benchmarks.serving.kept`.

Each row is an attack on a server of its own: what it got, and what it cost others. Needs Linux (`/proc`); the full disk needs the
right to mount a tmpfs.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import json
import subprocess
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from benchmarks import machine
from benchmarks.models import ROOT
from benchmarks.serving.servers import Server, serve
from florence_onnx.fal.contract import APP

MB = 1_000_000
_PNG = (ROOT / "florence_onnx" / "demo" / "samples" / "scene-1.png").read_bytes()
_IMAGE = "data:image/png;base64," + base64.b64encode(_PNG).decode()
_ONE_ARENA = {"MALLOC_ARENA_MAX": "2"}


class _Host(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Drip)
        self.is_over = threading.Event()


class _Drip(BaseHTTPRequestHandler):
    """Announces an image and sends a byte of it a second, until it is over."""

    server: _Host

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(_PNG)))
        self.end_headers()
        with contextlib.suppress(OSError):
            sent = 0
            while not self.server.is_over.wait(1):
                self.wfile.write(_PNG[sent : sent + 1])
                sent += 1
            self.wfile.write(_PNG[sent:])

    def log_message(self, *args: Any) -> None:
        pass


@contextlib.contextmanager
def dripping(
    model: str, *, num: int, environment: dict[str, str] | None = None
) -> Iterator[tuple[Server, httpx.Client]]:
    """A server that has been asked for `num` images of a host that drips until the block ends."""
    host = _Host()
    threading.Thread(target=host.serve_forever, daemon=True).start()
    address = f"127.0.0.1:{host.server_port}"
    with serve(model, "--allow-host", address, environment=environment) as server, client_of(server) as client:
        client.post(f"/{APP}/caption", json={"image_url": _IMAGE})
        for number in range(num):
            client.post(f"/queue/{APP}/caption", json={"image_url": f"http://{address}/{number}"})
        yield server, client
        host.is_over.set()
    host.shutdown()


def client_of(server: Server) -> httpx.Client:
    """A client of a server."""
    return httpx.Client(base_url=f"http://{server.host}:{server.port}", timeout=300)


def count(statuses: list[int]) -> str:
    """How often each status came."""
    return ", ".join(f"{number} x {status}" for status, number in Counter(statuses).most_common())


def measure_downloads(model: str) -> tuple[str, str]:
    """Twelve images of a host that drips, then another client's `data:` URI."""
    with dripping(model, num=12) as (_, client):
        begin = time.monotonic()
        status = client.post(f"/{APP}/ocr", json={"image_url": _IMAGE}).status_code
        return f"{status} after {time.monotonic() - begin:.1f} s", "the other client"


def measure_texts(model: str) -> tuple[str, str]:
    """Sixty queue jobs with a text of 3 MB, all of which end."""
    with serve(model, environment=_ONE_ARENA) as server, client_of(server) as client:
        client.post(f"/{APP}/caption", json={"image_url": _IMAGE})
        before = server.memory_bytes()
        sent = {"image_url": _IMAGE, "text_input": "a car " * (3 * MB // 6)}
        statuses = [client.post(f"/queue/{APP}/caption-to-phrase-grounding", json=sent).status_code for _ in range(60)]
        time.sleep(3)
        return count(statuses), f"+{(server.memory_bytes() - before) / MB:.0f} MB kept"


def measure_waiting(model: str) -> tuple[str, str]:
    """Forty queue jobs with an image of 27 MB each behind a model that is busy."""
    noise = np.random.default_rng(0).bytes(20 * MB)
    sent = json.dumps({"image_url": "data:image/png;base64," + base64.b64encode(_PNG + noise).decode()})
    # these held all loaders, so that what follows waits
    with dripping(model, num=4, environment=_ONE_ARENA) as (server, client):
        before = server.memory_bytes()
        statuses = [client.post(f"/queue/{APP}/caption", content=sent).status_code for _ in range(40)]
        return count(statuses), f"+{(server.memory_bytes() - before) / MB:.0f} MB"


def measure_names(model: str) -> tuple[str, str]:
    """A thousand announced uploads with names of 400 kB."""
    with serve(model, environment=_ONE_ARENA) as server, client_of(server) as client:
        before = server.memory_bytes()
        sent = {"file_name": "x" * 400_000, "content_type": "image/png"}
        statuses = [client.post("/storage/upload/initiate", json=sent).status_code for _ in range(1000)]
        return count(statuses), f"+{(server.memory_bytes() - before) / MB:.0f} MB kept"


def measure_disk(model: str) -> tuple[str, str]:
    """A disk of 6 MB that others fill: detections, then uploads, then again when there is room."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", folder], check=True)
        try:
            with serve(model, environment={"TMPDIR": folder}) as server, client_of(server) as client:
                fill = Path(folder) / "of others"
                with fill.open("wb", buffering=0) as file, contextlib.suppress(OSError):
                    while True:
                        file.write(bytes(4096))
                found = []
                for is_full in (True, False):
                    detect = {"image_url": _IMAGE}
                    answers = [client.post(f"/{APP}/object-detection", json=detect).status_code for _ in range(20)]
                    headers = {"X-Fal-File-Name": "a.png", "Content-Type": "image/png"}
                    uploads = [
                        client.post("/files/upload", content=_PNG * 20, headers=headers).status_code for _ in range(20)
                    ]
                    found.append(f"detections {count(answers)}, uploads {count(uploads)}")
                    if is_full:
                        fill.unlink()
                parts = len([path for path in Path(folder).rglob("*") if path.suffix == ".part"])
                return f"full: {found[0]}; with room again: {found[1]}", f"{parts} partial files left"
        finally:
            subprocess.run(["umount", "--lazy", folder], check=True)


ATTACKS: dict[str, Callable[[str], tuple[str, str]]] = {
    "12 downloads from a host that drips": measure_downloads,
    "60 ended jobs with a text of 3 MB": measure_texts,
    "40 waiting jobs with 27 MB each": measure_waiting,
    "1000 announced uploads with names of 400 kB": measure_names,
    "full disk": measure_disk,
}


def main() -> None:
    """Prints a table and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo")
    arguments = parser.parse_args()
    rows = {name: run(arguments.model) for name, run in ATTACKS.items()}
    print("| attack | it got | cost |\n|---|---|---|")
    for name, (got, cost) in rows.items():
        print(f"| {name} | {got} | {cost} |")
    print(json.dumps({"machine": machine.describe(), "rows": rows}))


if __name__ == "__main__":
    main()
