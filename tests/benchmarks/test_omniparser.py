"""`python -m benchmarks.cpu.omniparser` on the smallest model: every figure is there, and nothing is judged."""

from __future__ import annotations

from tests.conftest import Exported


def test_both_sizes_are_measured(sized: Exported) -> None:
    from benchmarks.cpu.omniparser import run, summarise

    report = run(str(sized.bundle), {64: 5, 128: 2}, rounds=1, passes=2, threads=1)
    assert [len(report["sizes"][size]) for size in (64, 128)] == [1, 1]
    (small,) = report["sizes"][64]
    assert len(small["seconds"]) == len(small["processor_seconds"]) == 2 and min(small["seconds"]) > 0
    assert set(small["vision_seconds"]) == {"1", "4"}
    assert len(small["memory_mib"]) == 3 and small["peak_mib"] >= max(small["memory_mib"]) > 10
    table = summarise(report)
    assert "| 64 | 5 | " in table and "| 128 | 2 | " in table
    assert "128 pixels take" in table and "of 64 a crop" in table
