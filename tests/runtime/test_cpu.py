"""Cores and instruction sets of the CPU, read from made-up `/sys` and `/proc` trees."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from florence_onnx.runtime import cpu


def write(root: Path, **files: str) -> Path:
    """Writes files and returns the last one's folder; two underscores in a name stand for a slash."""
    for name, text in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return path.parent if files else root


@pytest.fixture
def four_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with four hardware threads on two cores."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3}, raising=False)
    for number, siblings in enumerate(("0,2", "1,3", "0,2", "1,3")):
        folder = tmp_path / f"sys/devices/system/cpu/cpu{number}/topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{siblings}\n")
    return tmp_path


def test_hardware_threads_of_a_core_count_once(four_threads: Path) -> None:
    assert cpu.num_cores(four_threads) == 2


def test_the_affinity_mask_is_followed(four_threads: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 2}, raising=False)
    assert cpu.num_cores(four_threads) == 1


@pytest.mark.parametrize(("limit", "cores"), [("max 100000", 2), ("100000 100000", 1), ("150000 100000", 2)])
def test_a_quota_of_cgroups_2_is_followed(four_threads: Path, limit: str, cores: int) -> None:
    write(four_threads, proc__self__cgroup="0::/pod/box\n")
    (four_threads / "sys/fs/cgroup/pod/box").mkdir(parents=True)
    (four_threads / "sys/fs/cgroup/pod/cpu.max").write_text(f"{limit}\n")
    (four_threads / "sys/fs/cgroup/pod/box/cpu.max").write_text("max 100000\n")
    assert cpu.num_cores(four_threads) == cores


@pytest.mark.parametrize(("quota", "cores"), [("-1", 2), ("50000", 1)])
def test_a_quota_of_cgroups_1_is_followed(four_threads: Path, quota: str, cores: int) -> None:
    write(four_threads, proc__self__cgroup="4:memory:/\n2:cpu,cpuacct:/box\n")
    folder = four_threads / "sys/fs/cgroup/cpu/box"
    folder.mkdir(parents=True)
    (folder / "cpu.cfs_quota_us").write_text(f"{quota}\n")
    (folder / "cpu.cfs_period_us").write_text("100000\n")
    assert cpu.num_cores(four_threads) == cores


def test_flags_and_name_come_from_cpuinfo(tmp_path: Path) -> None:
    write(
        tmp_path, proc__cpuinfo="vendor_id\t: Maker\nmodel name\t: Chip 9\nflags\t\t: avx2 avx512_bf16\n\nflags : sse\n"
    )
    assert cpu.flags(tmp_path) == {"avx2", "avx512_bf16"}
    assert cpu.name(tmp_path) == "Maker Chip 9"


def test_an_unknown_machine_is_one_core_without_flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert cpu.num_cores(tmp_path) == 1
    assert cpu.flags(tmp_path) == frozenset()
