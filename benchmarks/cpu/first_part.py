"""When the first box is there: `python -m benchmarks.cpu.first_part [--rounds N] [--bundle DIRECTORY]`.

Every task is streamed on the eight sample scenes, greedily and with three beams. Decode steps do not depend on the machine: those
before the first item (a box, quad, outline or word), as a share of all. Times are wall times from the call on an image file, the
vision encoder included; of several rounds the least. `run` is timed beside `stream`, in turns.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from florence_onnx import EncodedImage, Florence2, GenerationOptions, Prediction, tasks
from florence_onnx.bundles.bundle import DEMO, DEMO_DIRECTORY
from florence_onnx.parts import ItemPart
from florence_onnx.tasks import Task

SAMPLES = sorted((DEMO_DIRECTORY.parent / "samples").glob("*.png"))
SLUGS = (
    "object-detection",
    "dense-region-caption",
    "region-proposal",
    "ocr-with-region",
    "caption",
    "more-detailed-caption",
)


@dataclass(frozen=True)
class Figures:
    """Of one answer."""

    steps: float
    """Decode steps up to the first item, as a share of all."""
    time: float
    """Seconds up to the first item, as a share of all."""
    stream: float
    """Seconds of `stream` over seconds of `run`."""


def measure(model: Florence2, task: Task[Any], image: Path, num_beams: int, rounds: int) -> Figures | None:
    """The figures of an answer; None where it has no items."""
    options = GenerationOptions(num_beams=num_beams, prompt_lookup_num_tokens=0)
    first, whole, plain = [], [], []
    for _ in range(rounds):
        begin = time.perf_counter()
        model.run(task, image, options=options)
        plain.append(time.perf_counter() - begin)
        at, end = _time_stream(model, task, image, options)
        if at is None:
            return None
        first.append(at)
        whole.append(end)
    return Figures(count_steps(model, task, image, options), min(first) / min(whole), min(whole) / min(plain))


def _time_stream(
    model: Florence2, task: Task[Any], image: Path, options: GenerationOptions
) -> tuple[float | None, float]:
    """Seconds to the first item and to the end."""
    begin, first = time.perf_counter(), None
    for part in model.stream(task, image, options=options):
        if first is None and isinstance(part, ItemPart):
            first = time.perf_counter() - begin
    return first, time.perf_counter() - begin


def count_steps(model: Florence2, task: Task[Any], image: Path, options: GenerationOptions) -> float:
    """Decode steps up to the first item, as a share of all; 1 where it comes with the end."""
    reader = model.part_reader(task)
    steps: list[bool] = []  # for each step but the last whether there was an item

    def listen(index: int, token_ids: Sequence[int], image: EncodedImage) -> None:
        found = any(isinstance(part, ItemPart) for part in reader.read(token_ids, image))
        steps.append(found)

    model.run_batch(task, [image], options=options, on_tokens=listen)
    return (steps.index(True) + 1 if True in steps else len(steps) + 1) / (len(steps) + 1)


def table(model: Florence2, rounds: int) -> str:
    """A Markdown table with a row per task and number of beams: medians over the scenes."""
    lines = [
        "| task | beams | scenes | steps to the first item | time to the first item | `stream` / `run` |",
        "|---|---|---|---|---|---|",
    ]
    for slug in SLUGS:
        for num_beams in (1, 3):
            measured = (measure(model, tasks.get(slug), image, num_beams, rounds) for image in SAMPLES)
            found = [each for each in measured if each is not None]
            columns = (median(getattr(each, name) for each in found) for name in ("steps", "time", "stream"))
            lines.append(f"| {slug} | {num_beams} | {len(found)} | " + " | ".join(f"{x:.2f}" for x in columns) + " |")
    return "\n".join(lines)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--bundle", default=DEMO)
    given = parser.parse_args()
    model = Florence2.from_pretrained(given.bundle, device="cpu", session_options={"intra_op_num_threads": 1})
    assert isinstance(model.run("<CAPTION>", SAMPLES[0]), Prediction)  # warm-up
    print(table(model, given.rounds))


if __name__ == "__main__":
    main()
