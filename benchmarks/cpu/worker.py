"""The process of one peer: `python -m benchmarks.cpu.worker JOB` prints one line of JSON.

The line has `stages` (seconds, a list each), `tokens` by search, `load_s`, `cold_start_s` (from the start of the
process to the first answer), `peak_rss_bytes`, `versions`, `notes`, and `precision` where it is not what was asked for;
or `absent` with the reason.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.cpu.jobs import NUM_FIRST_TOKENS, Job, Workload
from benchmarks.cpu.peers.protocol import Runner, UnavailableError

R = TypeVar("R")


class Clock:
    """Collects the seconds of each stage."""

    def __init__(self) -> None:
        self.stages: dict[str, list[float]] = defaultdict(list)

    def time(self, stage: str, function: Callable[..., R], *arguments: Any) -> R:
        """Calls a function, and records the seconds that it took."""
        start = time.perf_counter()
        result = function(*arguments)
        self.stages[stage].append(time.perf_counter() - start)
        return result


def main() -> None:
    """Runs the job of the command line."""
    job = Job.load(sys.argv[1])
    try:
        result = run(job)
    except UnavailableError as error:
        result = {"absent": str(error)}
    except ImportError as error:
        result = {"absent": f"not installed: {error}"}
    sys.stdout.write(json.dumps(result) + "\n")


def run(job: Job) -> dict[str, Any]:
    """Loads the peer, answers once for the cold start, warms up, and times the stages."""
    runner: Runner = importlib.import_module(f"benchmarks.cpu.peers.{job.peer.module}").create(job)
    runner.load()
    loaded = time.time() - job.started
    _ask(runner, job.workload, Clock(), "greedy")
    cold = time.time() - job.started
    _warm_up(runner, job.workload)
    clock = Clock()
    tokens = _measure(runner, job.workload, clock)
    measured = {"stages": clock.stages, "tokens": tokens, "load_s": loaded, "cold_start_s": cold}
    return {**measured, "peak_rss_bytes": peak_rss(), **runner.describe()}


def _warm_up(runner: Runner, workload: Workload) -> None:
    """Runs once everything that is timed, except the greedy answer, which the cold start has run."""
    _, features = _ask(runner, workload, Clock(), "beams")
    for num_beams in (1, workload.num_beams):
        runner.answer(features, workload.first, num_beams, NUM_FIRST_TOKENS)
    runner.encode_text(features, workload.first)
    _second_task(runner, workload, features)


def _measure(runner: Runner, workload: Workload, clock: Clock) -> dict[str, list[int]]:
    tokens: dict[str, list[int]] = {}
    for _ in range(workload.repeats):
        for search in ("greedy", "beams"):
            tokens[search], features = _ask(runner, workload, clock, search)
            arguments = (features, workload.first, _beams(workload, search), NUM_FIRST_TOKENS)
            clock.time(f"first_tokens_{search}", runner.answer, *arguments)
        clock.time("text_encoder", runner.encode_text, features, workload.first)
        clock.time("second_task", _second_task, runner, workload, features)
    return tokens


def _beams(workload: Workload, search: str) -> int:
    return 1 if search == "greedy" else workload.num_beams


def _ask(runner: Runner, workload: Workload, clock: Clock, search: str) -> tuple[list[int], Any]:
    """Times an answer from the image file to the tokens, stage by stage; returns the tokens and the image features."""
    start = time.perf_counter()
    pixel_values = clock.time("preprocess", runner.preprocess, workload.image)
    features = clock.time("vision", runner.vision, pixel_values)
    arguments = (features, workload.first, _beams(workload, search), workload.num_tokens)
    tokens = clock.time(f"answer_{search}", runner.answer, *arguments)
    clock.stages[f"end_to_end_{search}"].append(time.perf_counter() - start)
    return tokens, features


def _second_task(runner: Runner, workload: Workload, features: Any) -> None:
    if not runner.keeps_features:
        features = runner.vision(runner.preprocess(workload.image))
    runner.answer(features, workload.second, 1, workload.num_tokens)


def peak_rss() -> int:
    """Returns the peak resident memory of this process in bytes.

    On Linux from `VmHWM`, which starts anew with every exec; `ru_maxrss` also counts what the parent process held at
    the fork.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    import resource

    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return usage if sys.platform == "darwin" else usage * 1024


if __name__ == "__main__":
    main()
