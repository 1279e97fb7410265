"""Memory and time of `run_batch` in portions, against all requests at once.

    python -m benchmarks.cpu.batches MODEL --images 64 --sizes 1 2 4 8 16 64

Prints tables. Peak memory is that of a process of its own for each row (`VmHWM`, as `ru_maxrss` survives an exec). Times
are CPU seconds of one thread, minima of interleaved rounds in one process, so that others on the machine matter little. The
images are drawings of one size; every prediction that is kept refers to its image, decoded.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from florence_onnx import Florence2, GenerationOptions, tasks

SIZE = (640, 480)
OPTIONS = GenerationOptions(num_beams=3, max_new_tokens=24, min_new_tokens=24)


def images(count: int) -> Iterator[np.ndarray[Any, np.dtype[np.uint8]]]:
    """Distinct images `(H, W, 3)`: a gradient with a square at another place in each."""
    width, height = SIZE
    base = np.linspace(0, 255, width, dtype=np.uint8)[None, :, None].repeat(height, 0).repeat(3, 2)
    for index in range(count):
        image = base.copy()
        at = 5 * index % (height - 60)
        image[at : at + 60, at : at + 60] = (index * 37 % 256, 80, 160)
        yield image


def load(model: str) -> Florence2:
    """The model on one thread of the CPU."""
    return Florence2.from_pretrained(model, device="cpu", session_options={"intra_op_num_threads": 1})


def measure_memory(model: str, count: int, batch_size: int, is_kept: bool) -> int:
    """Peak resident bytes of a process that answers `count` images; `is_kept`: with a list of all predictions."""
    command = [sys.executable, "-m", "benchmarks.cpu.batches", model, "--child", str(count), str(batch_size)]
    command += ["--kept"] if is_kept else []
    return int(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))


def run_child(model: str, count: int, batch_size: int, is_kept: bool) -> None:
    """Answers `count` images in portions and prints the peak resident bytes of this process."""
    each = load(model).run_each(tasks.CAPTION, images(count), options=OPTIONS, batch_size=batch_size)
    kept = [prediction for prediction in each if is_kept]
    del kept
    print(
        1024
        * next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line)
    )


def measure_times(model: str, count: int, sizes: Sequence[int], rounds: int) -> tuple[dict[int, float], bool]:
    """CPU seconds by batch size, minima of interleaved rounds, and whether all sizes gave the same tokens."""
    loaded = load(model)
    given = list(images(count))
    seconds = dict.fromkeys(sizes, float("inf"))
    tokens: set[tuple[tuple[int, ...], ...]] = set()
    for _ in range(rounds):
        for size in sizes:
            begin = time.process_time()
            found = loaded.run_batch(tasks.CAPTION, given, options=OPTIONS, batch_size=size)
            seconds[size] = min(seconds[size], time.process_time() - begin)
            tokens.add(tuple(prediction.token_ids for prediction in found))
    return seconds, len(tokens) == 1


def print_times(model: str, count: int, sizes: Sequence[int], rounds: int) -> None:
    """Prints the table of times."""
    seconds, are_equal = measure_times(model, count, sizes, rounds)
    print(f"tokens of all batch sizes equal: {are_equal}\n")
    print("| batch_size | CPU seconds | against all at once |\n|---|---|---|")
    for size, taken in seconds.items():
        print(f"| {size} | {taken:.2f} | {taken / seconds[max(sizes)]:.2f} |", flush=True)


def print_memory(model: str, count: int) -> None:
    """Prints the table of peaks."""
    print("\n| images | batch_size | predictions | peak MiB |\n|---|---|---|---|")
    for images, size, is_kept in (
        (8, 8, False),
        (count, 8, False),
        (count, count, False),
        (8, 8, True),
        (count, 8, True),
    ):
        peak = measure_memory(model, images, size, is_kept)
        print(f"| {images} | {size} | {'kept' if is_kept else 'dropped'} | {peak / 2**20:.0f} |", flush=True)


def main() -> None:
    """Reads the arguments and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--sizes", type=int, nargs="*", default=[1, 2, 4, 8, 16, 64], help="none: no times")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--child", type=int, nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--kept", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        count, batch_size = arguments.child
        run_child(arguments.model, count, batch_size, arguments.kept)
        return
    if arguments.sizes:
        print_times(arguments.model, arguments.images, arguments.sizes, arguments.rounds)
    if not arguments.no_memory:
        print_memory(arguments.model, arguments.images)


if __name__ == "__main__":
    main()
