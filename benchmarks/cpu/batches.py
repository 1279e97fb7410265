"""Memory and time of `run_batch` in portions, against all requests at once.

    python -m benchmarks.cpu.batches MODEL --images 64 --sizes 1 2 4 8 16 64

Prints a table. Peak memory is that of a process of its own for each number; times are minima of interleaved rounds in one
process, so that a machine that others use slows all of them alike. The images are noise-free drawings of one size, which
every prediction refers to: their pixels are subtracted where the table says so.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
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
    """The model on the CPU."""
    return Florence2.from_pretrained(model, device="cpu")


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
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def measure_times(model: str, count: int, sizes: Sequence[int], rounds: int) -> tuple[dict[int, float], bool]:
    """Seconds by batch size, minima of interleaved rounds, and whether all sizes gave the same tokens."""
    loaded = load(model)
    given = list(images(count))
    seconds = dict.fromkeys(sizes, float("inf"))
    tokens: set[tuple[tuple[int, ...], ...]] = set()
    for _ in range(rounds):
        for size in sizes:
            begin = time.perf_counter()
            found = loaded.run_batch(tasks.CAPTION, given, options=OPTIONS, batch_size=size)
            seconds[size] = min(seconds[size], time.perf_counter() - begin)
            tokens.add(tuple(prediction.token_ids for prediction in found))
    return seconds, len(tokens) == 1


def main() -> None:
    """Reads the arguments and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 2, 4, 8, 16, 64])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child", type=int, nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--kept", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        run_child(arguments.model, *arguments.child, arguments.kept)
        return
    seconds, are_equal = measure_times(arguments.model, arguments.images, arguments.sizes, arguments.rounds)
    print(f"tokens of all batch sizes equal: {are_equal}\n")
    print("| batch_size | seconds | against all at once |\n|---|---|---|")
    whole = seconds[max(seconds)]
    for size, taken in seconds.items():
        print(f"| {size} | {taken:.2f} | {taken / whole:.2f} |")
    print("\n| images | batch_size | predictions | peak MiB |\n|---|---|---|---|")
    few, many = 8, arguments.images
    for count, size, is_kept in ((few, 8, False), (many, 8, False), (many, many, False), (few, 8, True), (many, 8, True)):
        peak = measure_memory(arguments.model, count, size, is_kept)
        print(f"| {count} | {size} | {'kept' if is_kept else 'dropped'} | {peak / 2**20:.0f} |", flush=True)


if __name__ == "__main__":
    main()
