"""Milliseconds per operator of the vision encoder: `python -m benchmarks.cpu.operators BUNDLE [BUNDLE…]`.

The figures are from ONNX Runtime's profiler, over a few runs after one warm-up. The times of the operators add up to
less than a run, and profiling itself takes some time. To compare whole stages use `benchmarks.cpu.compare`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from florence_onnx.bundles import bundle
from florence_onnx.runtime import cpu

MIN_MS = 1.0
"""Operators that take less are not listed."""


def profile(path: Path, image_size: tuple[int, int], runs: int, threads: int) -> dict[str, tuple[float, int]]:
    """Profiles a vision encoder.

    Args:
        path: The `.onnx` file.
        image_size: `(width, height)` in pixels.
        runs: Number of runs; the times are medians over them.
        threads: Threads of the session.

    Returns:
        Milliseconds per run and number of nodes, by operator, slowest first.
    """
    width, height = image_size
    pixels = np.random.default_rng(0).standard_normal((1, 3, height, width), dtype=np.float32)
    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        for _ in range(runs + 1):
            session.run(None, {"pixel_values": pixels})
        events: list[dict[str, Any]] = json.loads(Path(session.end_profiling()).read_text())
    durations: dict[tuple[str, str], list[float]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            durations[event["args"]["op_name"], event["name"]].append(event["dur"] / 1000)
    found: dict[str, tuple[float, int]] = {}
    for (operator, _), taken in durations.items():
        total, nodes = found.get(operator, (0.0, 0))
        found[operator] = total + float(np.median(taken[1:])), nodes + 1
    return dict(sorted(found.items(), key=lambda item: -item[1][0]))


def main() -> None:
    """Prints one Markdown table per bundle."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundles", type=Path, nargs="+")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=cpu.num_cores())
    arguments = parser.parse_args()
    for path in arguments.bundles:
        described = bundle.read(path)
        graph = described.graphs.get(bundle.VISION_ENCODER)
        if graph is None:
            parser.error(f"{path} is in the layout of transformers.js; export it with python -m export")
        found = profile(graph, described.sizes.image_size, arguments.runs, arguments.threads)
        print(f"\n| {described.vision_precision or described.precision} | ms | nodes |\n|---|---|---|")
        for operator, (milliseconds, nodes) in found.items():
            if milliseconds >= MIN_MS:
                print(f"| {operator} | {milliseconds:.0f} | {nodes} |")
        print(f"| all | {sum(milliseconds for milliseconds, _ in found.values()):.0f} | |")


if __name__ == "__main__":
    main()
