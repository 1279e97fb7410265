"""A server to measure, and what the kernel says about its process."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from tests import live_server

_READY_SECONDS = 300.0
"""Large models take their time."""


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
    arguments = ("--grace", "0", *options)
    with live_server.serve(*arguments, environment=environment, model=model, ready_within_s=_READY_SECONDS) as running:
        yield Server(running.host, running.port, running.process.pid)
