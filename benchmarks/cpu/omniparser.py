"""OmniParser's job at two image sizes: `<CAPTION>` of many crops, 20 tokens, greedy, on the CPU.

    florence-onnx-export CHECKPOINT BUNDLE --image-size 768 --image-size 64
    python -m benchmarks.cpu.omniparser BUNDLE --threads 2

Each size is measured in a process of its own, the sizes by turns. A pass answers all crops of a size in one call of
`run_batch`; at 768 pixels there are fewer, whose KV caches would take gigabytes otherwise. A table is printed to standard
error, and one line of JSON to standard output. Linux only: memory is read from `/proc/self/status`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks import machine
from florence_onnx import Florence2, GenerationOptions

NUM_TOKENS = 20
OPTIONS = GenerationOptions(num_beams=1, max_new_tokens=NUM_TOKENS, min_new_tokens=NUM_TOKENS - 1)
"""Every answer has all its tokens, as random weights would otherwise end some of them early."""
BATCHES = (1, 4, 16, 64)
"""Images in one run of the vision encoder, for the table that shows where a batch pays."""


def make_crops(count: int, seed: int = 0) -> list[Image.Image]:
    """Images of icon size with noise in them, 12 to 90 pixels a side."""
    random = np.random.default_rng(seed)
    return [
        Image.fromarray(random.integers(0, 256, (*random.integers(12, 91, 2), 3), dtype=np.uint8)) for _ in range(count)
    ]


def measure(bundle: str, image_size: int, count: int, passes: int, threads: int) -> dict[str, Any]:
    """Answers `count` crops in one call, several times.

    Returns:
        Seconds a crop of each pass, by the clock and of the processor (which other processes do not lengthen); processor
        seconds an image of the vision encoder by batch; and MiB of resident memory after loading, after each pass and at
        the peak.
    """
    options = {"intra_op_num_threads": threads}
    model = Florence2.from_pretrained(bundle, device="cpu", image_size=image_size, session_options=options)
    memory = [_memory("VmRSS")]
    model.run_batch("<CAPTION>", make_crops(2, seed=1), options=OPTIONS)  # warms up
    seconds, processor_seconds = [], []
    for number in range(passes):
        crops = make_crops(count, seed=number)
        begin, processor_begin = time.perf_counter(), time.process_time()
        answers = model.run_batch("<CAPTION>", crops, options=OPTIONS, batch_size=count)
        seconds.append((time.perf_counter() - begin) / count)
        processor_seconds.append((time.process_time() - processor_begin) / count)
        memory.append(_memory("VmRSS"))
        assert {len(answer.token_ids) for answer in answers} == {NUM_TOKENS + 1}
    batches = {str(size): _vision_seconds(model, image_size, size) for size in BATCHES if size <= count}
    return {
        "seconds": seconds,
        "processor_seconds": processor_seconds,
        "vision_seconds": batches,
        "memory_mib": memory,
        "peak_mib": _memory("VmHWM"),
    }


def _vision_seconds(model: Florence2, image_size: int, batch: int) -> float:
    """Processor seconds an image of the vision encoder, the best of three runs of a batch."""
    pixels = np.zeros((batch, 3, image_size, image_size), dtype=np.float32)
    found = []
    for _ in range(3):
        begin = time.process_time()
        model._vision_encoder.run({"pixel_values": pixels})
        found.append((time.process_time() - begin) / batch)
    return min(found)


def _memory(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name))


def _child(job: dict[str, Any]) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.cpu.omniparser", "--child", json.dumps(job)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def run(bundle: str, counts: dict[int, int], rounds: int, passes: int, threads: int) -> dict[str, Any]:
    """Measures every size in every round.

    Args:
        bundle: A bundle of those image sizes.
        counts: Crops of a pass, by the side in pixels.
        rounds: How often each size is measured, by turns.
        passes: Passes in one process.
        threads: Of ONNX Runtime.
    """
    before = machine.describe()
    samples: dict[int, list[dict[str, Any]]] = {size: [] for size in counts}
    for _ in range(rounds):
        for size, count in counts.items():
            job = {"bundle": bundle, "image_size": size, "count": count, "passes": passes, "threads": threads}
            samples[size].append(_child(job))
    return {"machine": before, "threads": threads, "crops": counts, "sizes": samples}


def summarise(report: dict[str, Any]) -> str:
    """A table in Markdown: for each size the time of a crop and of an image, and the memory."""
    lines = [
        "| pixels | crops a call | s a crop, min | median | processor s a crop, min | median | vision: processor s an image, by "
        "batch | MiB loaded | after each pass | peak |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for size, samples in report["sizes"].items():
        cells = (size, report["crops"][size], *_times(samples), *_memory_cells(samples))
        lines.append(f"| {' | '.join(map(str, cells))} |")
    for kind in ("seconds", "processor_seconds"):
        best = {size: min(_all(samples, kind)) for size, samples in report["sizes"].items()}
        ratio = best[max(best)] / best[min(best)]
        lines += [
            "",
            f"{max(best)} pixels take {ratio:.1f} times the {kind.replace('_', ' ')} of {min(best)} a crop (minima).",
        ]
    return "\n".join(lines)


def _all(samples: list[dict[str, Any]], kind: str) -> list[float]:
    return [value for sample in samples for value in sample[kind]]


def _times(samples: list[dict[str, Any]]) -> list[str]:
    times = [_all(samples, kind) for kind in ("seconds", "processor_seconds")]
    cells = [f"{value:.4f}" for each in times for value in (min(each), statistics.median(each))]
    vision = {
        batch: min(sample["vision_seconds"][batch] for sample in samples) for batch in samples[0]["vision_seconds"]
    }
    return [*cells, ", ".join(f"{batch}: {value:.4f}" for batch, value in vision.items())]


def _memory_cells(samples: list[dict[str, Any]]) -> list[str]:
    loaded, *after = samples[0]["memory_mib"]
    peak = max(sample["peak_mib"] for sample in samples)
    return [f"{loaded:.0f}", ", ".join(f"{value:.0f}" for value in after), f"{peak:.0f}"]


def main() -> None:
    """Reads the arguments, measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", nargs="?", help="bundle of both image sizes")
    parser.add_argument("--small", type=int, default=64, help="side in pixels of the small size (%(default)s)")
    parser.add_argument("--large", type=int, default=768, help="side in pixels of the large size (%(default)s)")
    parser.add_argument("--crops", type=int, default=128, help="crops of a pass at the small size (%(default)s)")
    parser.add_argument("--large-crops", type=int, default=4, help="crops of a pass at the large size (%(default)s)")
    parser.add_argument("--rounds", type=int, default=2, help="processes for each size, by turns (%(default)s)")
    parser.add_argument("--passes", type=int, default=3, help="passes in a process (%(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="threads of ONNX Runtime (%(default)s)")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure(**json.loads(arguments.child))))
        return
    if arguments.bundle is None:
        parser.error("give the bundle")
    counts = {arguments.small: arguments.crops, arguments.large: arguments.large_crops}
    report = run(arguments.bundle, counts, arguments.rounds, arguments.passes, arguments.threads)
    print(summarise(report), file=sys.stderr)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
