"""The machine on which a benchmark runs."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path
from typing import Any

from florence_onnx.runtime import cpu

_FLAGS = re.compile(r"avx|f16c|fma|sse4_2|amx|bf16|vnni|asimd|sve|i8mm|neon")
"""CPU features that the runtimes' kernels use."""


def describe() -> dict[str, Any]:
    """Describes the CPU, its instruction sets, cores, memory and load average."""
    facts = _cpuinfo()
    return {
        "cpu": facts.get("model name") or platform.processor() or platform.machine(),
        "family": " ".join(facts[name] for name in ("cpu family", "model", "stepping") if name in facts),
        "flags": sorted(flag for flag in facts.get("flags", "").split() if _FLAGS.search(flag)),
        "cores": cpu.num_cores(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "load_before": round(os.getloadavg()[0], 2),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }


def _cpuinfo() -> dict[str, str]:
    """Reads the first processor of `/proc/cpuinfo`."""
    path = Path("/proc/cpuinfo")
    first = path.read_text().split("\n\n")[0] if path.is_file() else ""
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}
