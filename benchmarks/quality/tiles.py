"""Recall on large drawn sheets, whole and in tiles: `python -m benchmarks.quality.tiles --sheets 2`.

Each sheet of 3,000 pixels has 40 shapes and 40 words. A thing is found where an answer has its label (its text) and a box
with an intersection over union of at least 0.5; a duplicate is an answer that lies on a thing which another answer has found
already, whatever its label. Written to a part of `answers.md`.
"""

import argparse
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL.Image import Image

from benchmarks.results_file import write_part
from export.demo.sheets import PixelBox, make_sheet
from florence_onnx import Florence2, GenerationOptions, Tiles, tasks
from florence_onnx.answers.matching import box_iou, pair_boxes

SEED = 20261202
"""Of the sheets; training uses others."""
SIZE = 3000
GREEDY = GenerationOptions(num_beams=1)
Labelled = Sequence[tuple[str, PixelBox]]
TASKS: tuple[tasks.Task[Any], ...] = (tasks.OBJECT_DETECTION, tasks.OCR_WITH_REGION)


@dataclass(frozen=True)
class Counts:
    """What was found on some sheets."""

    true: int = 0
    answers: int = 0
    found: int = 0
    duplicates: int = 0
    seconds: float = 0.0

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))


def count(found: Labelled, true: Labelled, seconds: float = 0.0) -> Counts:
    """Compares the answers about a sheet with what is drawn on it."""
    hits = [pair for pair in pair_boxes(found, true) if pair.iou >= 0.5]
    on_things = [sum(box_iou(box, each) >= 0.5 for _, box in found) for _, each in true]
    return Counts(len(true), len(found), len(hits), sum(max(0, number - 1) for number in on_things), seconds)


def ask(model: Florence2, image: Image, task: tasks.Task[Any], tiles: Tiles | None, true: Labelled) -> Counts:
    """Runs a task on a sheet and counts."""
    start = time.perf_counter()
    results = model.run(task, image, tiles=tiles, options=GREEDY).results
    seconds = time.perf_counter() - start
    items = results.bboxes if task is tasks.OBJECT_DETECTION else results.quad_boxes
    return count([(item.label, (item.x, item.y, item.x + item.w, item.y + item.h)) for item in items], true, seconds)


def measure(model: Florence2, num_sheets: int, tiles: Tiles, seed: int) -> dict[tuple[str, str], Counts]:
    """Counts by task and way."""
    rng = random.Random(seed)
    counts: dict[tuple[str, str], Counts] = {}
    for _ in range(num_sheets):
        sheet = make_sheet(rng, SIZE)
        for task, true in zip(TASKS, (sheet.shapes, sheet.words), strict=True):
            for way, used in (("whole image", None), ("tiles", tiles)):
                key = task.token, way
                counts[key] = counts.get(key, Counts()) + ask(model, sheet.image, task, used, true)
    return counts


def report(counts: dict[tuple[str, str], Counts], num_sheets: int, tiles: Tiles, arguments: str) -> str:
    """The part of `answers.md`."""
    number = len(tiles.boxes((SIZE, SIZE)))
    lines = [
        f"Written by `python -m benchmarks.quality.tiles {arguments}`.",
        "",
        f"{num_sheets} drawn sheets of {SIZE} pixels with 40 shapes and 40 words each, the demo model, greedy; {number} tiles of "
        f"{tiles.size} pixels that overlap by at least {tiles.overlap:.0%}, and the whole image. The tiles are small because the "
        "demo model reads 128 pixels; published checkpoints read 768.",
        "",
        "| task | asked | recall | precision | duplicates | seconds a sheet |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for (token, way), each in counts.items():
        precision = each.found / each.answers if each.answers else 0.0
        lines.append(
            f"| `{token}` | {way} | {each.found / each.true:.3f} | {precision:.3f} | {each.duplicates} | "
            f"{each.seconds / num_sheets:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Command line: measures and writes the part."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--sheets", type=int, default=2)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--size", type=int, default=400, help="side of a tile in pixels")
    parser.add_argument("--overlap", type=float, default=0.5)
    arguments = parser.parse_args()
    tiles = Tiles(arguments.size, arguments.overlap)
    counts = measure(Florence2.from_pretrained("demo", device="cpu"), arguments.sheets, tiles, arguments.seed)
    text = report(
        counts,
        arguments.sheets,
        tiles,
        f"--sheets {arguments.sheets} --seed {arguments.seed} --size {arguments.size} --overlap {arguments.overlap}",
    )
    print(text)
    write_part("Tiles", text)


if __name__ == "__main__":
    main()
