"""Measuring the wall time and the device time of a call."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DEVICE_WORK = ("kernel", "gpu_memcpy", "gpu_memset")
"""Categories of the profiler's events that run on the GPU."""
NUM_SHOWN = 12
"""Number of kernels that are listed by name."""


@dataclass(frozen=True)
class Effort:
    """Warm-ups and repeats of a measurement."""

    warm_ups: int = 3
    """Calls that are not counted. CUDA graphs are captured in the first ones."""
    at_least: int = 5
    """Least number of counted calls."""
    seconds: float = 0.7
    """Calls are repeated until they have taken this long together."""


QUICK = Effort(1, 1, 0.0)
"""For a smoke test."""


def timed(call: Callable[[], object], effort: Effort) -> dict[str, Any]:
    """Measures the wall time of a call that returns when its work is done.

    Returns:
        `ms` (median), `min_ms`, `calls`.
    """
    for _ in range(effort.warm_ups):
        call()
    taken: list[float] = []
    while len(taken) < effort.at_least or sum(taken) < effort.seconds:
        begin = time.perf_counter()
        call()
        taken.append(time.perf_counter() - begin)
    return {"ms": statistics.median(taken) * 1e3, "min_ms": min(taken) * 1e3, "calls": len(taken)}


def device_time(call: Callable[[], object], runs: int = 3) -> dict[str, Any]:
    """Measures the GPU's work in one call through CUPTI, which sees the kernels of every library in this process.

    Args:
        call: The call. It must have run before, so that nothing is compiled or captured in it.
        runs: Calls to average over.

    Returns:
        See `summarize`.

    Raises:
        ImportError: torch, whose profiler is used, is not installed.
        RuntimeError: There is no GPU.
    """
    import torch

    if not torch.cuda.is_available():
        raise RuntimeError("device time needs an NVIDIA GPU")
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(runs):
            call()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        return summarize(json.loads(path.read_text(encoding="utf-8"))["traceEvents"], runs)


def summarize(events: Iterable[Mapping[str, Any]], runs: int) -> dict[str, Any]:
    """Summarises a trace in Chrome's format, as means over `runs` equal runs.

    Returns:
        `device_ms` (time in which the GPU was busy), `copies_ms` (copies and fills within it), `kernels` (their
        number), and `top`, the names of the kernels that took longest with their milliseconds.
    """
    found = [event for event in events if event.get("cat") in DEVICE_WORK and event.get("ph") == "X"]
    by_name: Counter[str] = Counter()
    copies = 0.0
    for event in found:
        by_name[str(event["name"])] += event["dur"]
        copies += event["dur"] if event["cat"] != "kernel" else 0.0
    return {
        "device_ms": _union([(event["ts"], event["ts"] + event["dur"]) for event in found]) / runs / 1e3,
        "copies_ms": copies / runs / 1e3,
        "kernels": sum(event["cat"] == "kernel" for event in found) / runs,
        "top": [[name[:100], round(us / runs / 1e3, 4)] for name, us in by_name.most_common(NUM_SHOWN)],
    }


def _union(spans: list[tuple[float, float]]) -> float:
    """Returns the total length covered by spans. Spans of different streams may overlap."""
    total, end = 0.0, float("-inf")
    for start, stop in sorted(spans):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total
