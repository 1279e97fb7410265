"""A real `florence-onnx serve` in a process of its own, on a free port of the loopback interface.

```python
with serve("--api-key", "secret", environment={"OMP_NUM_THREADS": "1"}) as server:
    server.url                      # "http://127.0.0.1:43211"
    server.process, server.stderr   # the process, and what it has written so far
```
"""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

COMMAND = (sys.executable, "-m", "florence_onnx", "serve")
READY_WITHIN_S = 60.0
STOPS_WITHIN_S = 15.0
_REPOSITORY = Path(__file__).parent.parent
_POLL_EVERY_S = 0.05


class ServerFailedError(RuntimeError):
    """The server ended, or did not get ready or stop in time; the message has what it wrote to stderr."""


class LiveServer:
    """A running server; `serve` makes one."""

    def __init__(
        self, process: subprocess.Popen[bytes], host: str, port: int, stderr: Path, authority: str | None = None
    ) -> None:
        self.process = process
        """The server's process."""
        self.host = host
        """Address it listens on."""
        self.port = port
        """Port it listens on."""
        self._tls = ssl.create_default_context(cafile=authority) if authority else None
        self.url = f"{'https' if authority else 'http'}://{host}:{port}"
        """Where it answers, without a slash at the end."""
        self._stderr = stderr

    @property
    def stderr(self) -> str:
        """What the server has written so far, stdout included."""
        return self._stderr.read_text(encoding="utf-8", errors="replace")

    def wait_until_ready(self, timeout_s: float = READY_WITHIN_S) -> None:
        """Returns once `GET /ready` gives 200.

        Raises:
            ServerFailedError: The process ended, or the time is over.
        """
        deadline = time.monotonic() + timeout_s
        while not self._is_ready():
            if self.process.poll() is not None:
                raise self._failure(f"ended with exit code {self.process.returncode} before it was ready")
            if time.monotonic() > deadline:
                raise self._failure(f"was not ready within {timeout_s:g} s")
            time.sleep(_POLL_EVERY_S)

    def stop(self) -> int:
        """Sends SIGTERM and waits; a server that has ended already is left alone.

        Returns:
            The exit code.

        Raises:
            ServerFailedError: It did not end in time, and was killed.
        """
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(STOPS_WITHIN_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise self._failure(f"did not stop within {STOPS_WITHIN_S:g} s of SIGTERM") from None

    def _is_ready(self) -> bool:
        connection = http.client.HTTPConnection(self.host, self.port, timeout=5)
        if self._tls is not None:
            connection = http.client.HTTPSConnection(self.host, self.port, timeout=5, context=self._tls)
        try:
            connection.request("GET", "/ready")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def _failure(self, what: str) -> ServerFailedError:
        command = " ".join(map(str, self.process.args)) if isinstance(self.process.args, (list, tuple)) else ""
        return ServerFailedError(f"the server {what}: {command}\n{self.stderr or '(nothing on stderr)'}")


@contextlib.contextmanager
def serve(
    *arguments: str,
    environment: Mapping[str, str] | None = None,
    model: str = "demo",
    authority: str | None = None,
    ready_within_s: float = READY_WITHIN_S,
) -> Iterator[LiveServer]:
    """Runs `florence-onnx serve` while the block runs.

    Args:
        *arguments: More arguments of the command, such as `"--api-key", "secret"`.
        environment: Variables on top of this process's own.
        model: What to serve.
        authority: PEM file of what signed the server's certificate, where `arguments` have it serve https.
        ready_within_s: Time for the model to load.

    Yields:
        The server, ready to answer.

    Raises:
        ServerFailedError: It ended, or did not get ready or stop in time.
    """
    host, port = "127.0.0.1", _free_port()
    command = [*COMMAND, "--model", model, "--host", host, "--port", str(port), *arguments]
    with tempfile.TemporaryDirectory(prefix="florence-onnx-serve-") as folder:
        stderr = Path(folder) / "stderr.txt"
        with stderr.open("wb") as log:
            process = subprocess.Popen(
                command,
                cwd=_REPOSITORY,  # what `python -m` imports is this checkout, installed or not
                env={**os.environ, **(environment or {})},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        server = LiveServer(process, host, port, stderr, authority)
        try:
            server.wait_until_ready(ready_within_s)
            yield server
        finally:
            server.stop()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
