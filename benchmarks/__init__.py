"""Timing: stages of our own runtime (pytest-benchmark), and `python -m benchmarks.cpu.compare` against its peers."""
