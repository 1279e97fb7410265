"""Timing: stages of our own runtime (pytest-benchmark), and `python -m benchmarks.compare` against its peers."""
