"""A server to measure, and what the kernel says about its process."""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.models import ROOT

_READY_SECONDS = 300.0


@dataclass(frozen=True)
class Server:
    """One that runs on loopback."""

    host: str
    port: int
    pid: int

    def memory_bytes(self) -> int:
        """Resident memory."""
        return self._status("VmRSS") * 1024

    def num_threads(self) -> int:
        """Threads."""
        return self._status("Threads")

    def num_files(self) -> int:
        """Open files and sockets."""
        return len(list(Path(f"/proc/{self.pid}/fd").iterdir()))

    def _status(self, name: str) -> int:
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


@contextlib.contextmanager
def serve(model: str, *options: str, environment: Mapping[str, str] | None = None) -> Iterator[Server]:
    """Runs `florence-onnx serve` while the block runs.

    Args:
        model: A bundle.
        *options: More of the command's options.
        environment: Over this process's own.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    command = [
        sys.executable,
        "-m",
        "florence_onnx",
        "serve",
        "--model",
        model,
        "--port",
        str(port),
        "--grace",
        "0",
        *options,
    ]
    with subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, **(environment or {})}, stderr=subprocess.DEVNULL
    ) as process:
        server = Server("127.0.0.1", port, process.pid)
        try:
            _wait(server, process)
            yield server
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


def _wait(server: Server, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + _READY_SECONDS
    while not _is_ready(server):
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"the server did not start: {' '.join(map(os.fsdecode, process.args))}")  # type: ignore[arg-type]
        time.sleep(0.1)


def _is_ready(server: Server) -> bool:
    connection = http.client.HTTPConnection(server.host, server.port, timeout=5)
    try:
        connection.request("GET", "/ready")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()
