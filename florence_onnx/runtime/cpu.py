"""The CPU as this process sees it: the cores that it may use, and the instruction sets."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Iterable
from pathlib import Path

BF16_FLAGS = ("avx512_bf16", "amx_bf16")
"""Flags in `/proc/cpuinfo` of instructions that multiply bf16. Without them OpenVINO accepts the hint `bf16` and
silently computes in fp32 (tried on an AVX2 machine: outputs were equal to the bit)."""


def num_cores(root: Path = Path("/")) -> int:
    """Physical cores that this process may use: those of its affinity mask, at most as many as its cgroup's quota.

    ONNX Runtime's own default counts the cores of the machine, which is too many in a container with a quota.

    Args:
        root: Folder of `sys` and `proc`; another than `/` only in tests.
    """
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    cores = len({_siblings(root, number) for number in allowed})
    quota = min(_quotas(root), default=math.inf)
    return max(1, cores if math.isinf(quota) else min(cores, math.ceil(quota)))


def _siblings(root: Path, number: int) -> str:
    """The hardware threads that share a core with this one, e.g. `"0,64"`; its own number where that is not known."""
    path = root / f"sys/devices/system/cpu/cpu{number}/topology/thread_siblings_list"
    return _read(path) or str(number)


def _quotas(root: Path) -> Iterable[float]:
    """The quotas, in cores, of this process's cgroup and of all cgroups above it; both versions of cgroups are read."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        number, controllers, name = line.split(":", 2)
        if number != "0" and "cpu" not in controllers.split(","):
            continue
        base = root / "sys/fs/cgroup" / ("cpu" if number != "0" else "")
        here = base / name.lstrip("/")
        for folder in (here, *here.parents):
            quota, period = _quota(folder)
            if quota > 0 and period > 0:
                yield quota / period
            if folder == base:
                break


def _quota(folder: Path) -> tuple[int, int]:
    """CPU time per period and the period, both in microseconds; `(0, 0)` where there is no limit."""
    version_2 = _read(folder / "cpu.max").split()
    version_1 = [_read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")]
    for pair in (version_2, version_1):
        if len(pair) == 2 and pair[0].isdecimal() and pair[1].isdecimal():  # not "max", -1 or missing
            return int(pair[0]), int(pair[1])
    return 0, 0


def flags(root: Path = Path("/")) -> frozenset[str]:
    """Instruction set flags by their names in `/proc/cpuinfo`; empty on other systems than Linux."""
    return frozenset(_fact(root, "flags").split())


def name(root: Path = Path("/")) -> str:
    """The CPU's vendor, family, model and name, which kernels are chosen by."""
    facts = [_fact(root, key) for key in ("vendor_id", "cpu family", "model", "model name")]
    return " ".join(filter(None, facts)) or f"{platform.machine()} {platform.processor()}".strip()


def _fact(root: Path, key: str) -> str:
    for line in _read(root / "proc/cpuinfo").splitlines():
        found, _, value = line.partition(":")
        if found.strip() == key:
            return value.strip()
    return ""


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
