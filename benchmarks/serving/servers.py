"""A server to measure, and the memory, threads and open files of its process."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from tests import live_server

_READY_SECONDS = 300.0
"""Seconds within which a server must be ready; large models load slowly."""


@dataclass(frozen=True)
class Server:
    """A server on loopback."""

    host: str
    port: int
    pid: int

    def memory_bytes(self) -> int:
        """Returns the resident memory."""
        return self._status("VmRSS") * 1024

    def family_memory_bytes(self) -> int:
        """Returns the resident memory of the server and of its child processes."""
        sizes = [self.memory_bytes()]
        for listed in Path(f"/proc/{self.pid}/task").glob("*/children"):
            for child in listed.read_text().split():
                with contextlib.suppress(OSError, StopIteration):  # it may end meanwhile
                    sizes.append(Server(self.host, self.port, int(child)).memory_bytes())
        return sum(sizes)

    def num_threads(self) -> int:
        """Returns the number of threads."""
        return self._status("Threads")

    def num_files(self) -> int:
        """Returns the number of open files and sockets."""
        return len(list(Path(f"/proc/{self.pid}/fd").iterdir()))

    def _status(self, name: str) -> int:
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


@contextlib.contextmanager
def serve(model: str, *options: str, environment: Mapping[str, str] | None = None) -> Iterator[Server]:
    """Runs `florence-onnx serve` during the block.

    Args:
        model: A bundle.
        *options: More options of the command.
        environment: Environment variables on top of this process's own.
    """
    arguments = ("--grace", "0", *options)
    with live_server.serve(*arguments, environment=environment, model=model, ready_within_s=_READY_SECONDS) as running:
        yield Server(running.host, running.port, running.process.pid)
