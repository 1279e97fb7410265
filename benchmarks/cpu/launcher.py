"""Running each peer in a process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.cpu.jobs import Job
from benchmarks.models import ROOT

NODE_INSTALL = "ONNXRUNTIME_NODE_INSTALL=skip npm install @huggingface/transformers@4"
_PEERS = Path(__file__).parent / "peers"


class FailedError(Exception):
    """A process returned no result; the message says why."""


@dataclass(frozen=True)
class Launcher:
    """Starts the processes of the peers."""

    threads: int
    timeout: float
    """Seconds after which a process is killed."""
    work: Path
    """Folder for the caches of compilers."""
    node: Path
    """Folder in which npm installed transformers.js."""
    interpreters: Mapping[str, str] = field(default_factory=dict)
    """Python interpreters, by peer, of peers in another environment."""

    def run(self, job: Job) -> dict[str, Any]:
        """Runs one peer once.

        Returns:
            The result, see `worker.py`.

        Raises:
            FailedError: The process crashed, took too long, or printed no result.
        """
        command = self._command(job)
        job = replace(job, started=time.time())
        return self.call([part if part != "JOB" else job.dump() for part in command])

    def _command(self, job: Job) -> list[str]:
        if not job.peer.module.endswith(".mjs"):
            return [self.interpreters.get(job.peer.name, sys.executable), "-m", "benchmarks.cpu.worker", "JOB"]
        node = shutil.which("node")
        if node is None:
            raise FailedError("Node is not installed")
        if not (self.node / "node_modules" / "@huggingface" / "transformers").is_dir():
            raise FailedError(f"transformers.js is not in {self.node.name}; run there: {NODE_INSTALL}")
        return [node, str(_PEERS / job.peer.module), "JOB", str(self.node.resolve())]

    def call(self, command: Sequence[str]) -> dict[str, Any]:
        """Runs a command whose last line of output is JSON, in the environment of the comparison."""
        with subprocess.Popen(
            command,
            cwd=ROOT,
            env=self._environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        ) as process:
            try:
                output, errors = process.communicate(timeout=self.timeout)
            except subprocess.TimeoutExpired as error:
                raise FailedError(f"gave up after {self.timeout:.0f} s") from error
            finally:  # also on Ctrl-C, which is not sent to processes of another session
                if process.poll() is None:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGKILL)
        if process.returncode < 0:
            raise FailedError(f"ended by signal {-process.returncode}")
        if process.returncode:
            raise FailedError(_last_line(errors) or f"exit code {process.returncode}")
        try:
            found: dict[str, Any] = json.loads(output.splitlines()[-1])
        except (IndexError, json.JSONDecodeError) as error:
            raise FailedError(f"printed no result: {_last_line(output + errors)}") from error
        return found

    def _environment(self) -> dict[str, str]:
        pools = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
        quiet = {
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
            "TORCHINDUCTOR_CACHE_DIR": str(self.work / "inductor"),
        }
        return {**os.environ, **dict.fromkeys(pools, str(self.threads)), **quiet}


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line and not line.startswith("at ")]
    return (errors or lines or [""])[-1][:500]
