"""From a folder of images to data sets: `python -m benchmarks.quality.data_set --scenes 1000 --damaged 20 --kills 10`.

Draws scenes, damages some, runs `florence-onnx batch` for boxes and lines of text, kills it (`kill -9`) at random moments and
starts it again, compares the rows with those of an uninterrupted run, writes all forms, and reads them back with others'
readers. Written to a part of `benchmarks/results/batch.md`.
"""

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pypdfium2
import supervision

from benchmarks.machine import describe
from benchmarks.results_file import write_part
from export.demo.scenes import make_scene
from florence_onnx.batch.outputs import read_rows

RESULTS = Path(__file__).resolve().parents[1] / "results" / "batch.md"
TASKS = ("object-detection", "ocr-with-region")


def draw(folder: Path, count: int, damaged: int) -> None:
    """Writes scenes as JPEG files, some of them cut off."""
    rng = random.Random(7)
    for number in range(count):
        make_scene(rng).image.convert("RGB").save(folder / f"{number:04}.jpg", quality=92)
    for number in rng.sample(range(count), damaged):
        path = folder / f"{number:04}.jpg"
        path.write_bytes(path.read_bytes()[: rng.randrange(2, 400)])


def command(name: str, *arguments: object) -> list[str]:
    """A command line."""
    return [sys.executable, "-m", "florence_onnx", name, *map(str, arguments)]


def work(folder: Path, out: Path, kills: int) -> tuple[int, float]:
    """Runs the job, killing it at random moments; returns how often it was killed, and the seconds in all."""
    rng, begin, killed = random.Random(3), time.monotonic(), 0
    tasks = [part for task in TASKS for part in ("--task", task)]
    given = command("batch", folder, *tasks, "--out", out, "--scores", "--beams", 1, "--device", "cpu")
    while True:
        process = subprocess.Popen(given, stderr=subprocess.DEVNULL)
        try:
            process.wait(None if killed == kills else rng.uniform(3, 8))
            if process.returncode >= 0:
                return killed, time.monotonic() - begin
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            killed += 1


def rows(out: Path) -> list[dict[str, Any]]:
    """All rows without their times."""
    return [asdict(replace(row, milliseconds=0.0)) for row in read_rows(out)]


def convert(folder: Path, out: Path, target: Path) -> dict[str, str]:
    """Writes the forms and reads them back; returns what each reader found."""
    for form, name, task in (
        ("coco", "coco.json", TASKS[0]),
        ("yolo", "yolo", TASKS[0]),
        ("label-studio", "tasks.json", TASKS[0]),
        ("pdf", "pages.pdf", TASKS[1]),
        ("html", "gallery.html", TASKS[0]),
    ):
        subprocess.run(
            command("convert", out, "--to", form, "--out", target / name, "--task", task),
            check=True,
            stderr=subprocess.DEVNULL,
        )
    expected = [row for row in rows(out) if row["error"] is None]
    boxes = [row for row in expected if row["task"] == TASKS[0]]
    count = sum(len(row["answer"]["bboxes"]) for row in boxes)
    coco = supervision.DetectionDataset.from_coco(str(folder), str(target / "coco.json"))
    good = target / "good"
    good.mkdir()
    for row in boxes:
        (good / Path(row["source"]).name).symlink_to(Path(row["source"]).resolve())
    yolo = supervision.DetectionDataset.from_yolo(
        str(good), str(target / "yolo" / "labels"), str(target / "yolo" / "data.yaml")
    )
    worst = max(_distances(boxes, coco) + _distances(boxes, yolo))
    tasks = json.loads((target / "tasks.json").read_text(encoding="utf-8"))
    words = [quad["label"] for row in expected if row["task"] == TASKS[1] for quad in row["answer"]["quad_boxes"]]
    with pypdfium2.PdfDocument(target / "pages.pdf") as document:
        texts = "\n".join(page.get_textpage().get_text_range() for page in document)
        num_pages = len(document)
    found = sum(word in texts for word in words)
    return {
        "COCO and YOLO, by supervision": f"{sum(len(each) for _, _, each in coco)} and {sum(len(each) for _, _, each in yolo)} of "
        f"{count} boxes, at most {worst:.2f} pixels from the answers",
        "Label Studio's tasks": f"{len(tasks)} tasks, {sum(len(task['predictions'][0]['result']) for task in tasks)} results",
        "PDF, by PDFium": f"{num_pages} pages, {found} of {len(words)} lines of text found",
        "gallery": f"{(target / 'gallery.html').stat().st_size // 1024} KB of {len(rows(out)) // len(TASKS)} images",
    }


def _distances(expected: list[dict[str, Any]], data: Any) -> list[float]:
    """Greatest distance of an edge in each image, in pixels, with boxes in the order of the answer."""
    found = {Path(path).name: detections.xyxy for path, _, detections in data}
    distances = [0.0]
    for row in expected:
        wanted = [[b["x"], b["y"], b["x"] + b["w"], b["y"] + b["h"]] for b in row["answer"]["bboxes"]]
        if wanted:
            distances.append(float(abs(found[Path(row["source"]).name] - wanted).max()))
    return distances


def main() -> None:
    """Does all of it and writes what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=1000)
    parser.add_argument("--damaged", type=int, default=20)
    parser.add_argument("--kills", type=int, default=10)
    given = parser.parse_args()
    machine = describe()
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "scenes"
        folder.mkdir()
        draw(folder, given.scenes, given.damaged)
        killed, seconds = work(folder, Path(root) / "killed.jsonl", given.kills)
        _, whole = work(folder, Path(root) / "whole.jsonl", 0)
        first, second = rows(Path(root) / "killed.jsonl"), rows(Path(root) / "whole.jsonl")
        target = Path(root) / "forms"
        target.mkdir()
        forms = convert(folder, Path(root) / "whole.jsonl", target)
    errors = sum(row["error"] is not None for row in second)
    asked = f"--scenes {given.scenes} --damaged {given.damaged} --kills {given.kills}"
    equal = "equal to" if first == second else "NOT EQUAL to"
    lines = [
        f"Written by `python -m benchmarks.quality.data_set {asked}`: the demo model, {machine['cores']} cores of "
        f"{machine['cpu']}.",
        "",
        f"{given.scenes} drawn scenes, {given.damaged} of them damaged, two tasks: {len(second)} rows, {errors} of them "
        f"errors, in {whole:.0f} s. Killed {killed} times and started again: {len(first)} rows in {seconds:.0f} s, {equal} "
        "those of the uninterrupted run, in the same order.",
        "",
        "| form and reader | what was read back |",
        "|---|---|",
        *(f"| {name} | {found} |" for name, found in forms.items()),
    ]
    write_part("From a folder to data sets", "\n".join(lines), RESULTS)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
