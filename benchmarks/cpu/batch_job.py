"""`florence-onnx batch` beside a plain loop of `run`: `python -m benchmarks.cpu.batch_job --images 400 --rounds 3`.

Both sides answer the same drawn scenes, from files to JSON lines, in processes of their own, by turns, with the same number of
cores; the start of the process and of the model is not counted. `--memory 5000` also says how the memory of a job with one
process grows over so many images. Written to a part of `benchmarks/results/batch.md`.
"""

import argparse
import json
import multiprocessing
import random
import resource
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

from benchmarks.machine import describe
from benchmarks.results_file import write_part
from export.demo.scenes import make_scene
from florence_onnx import GenerationOptions, tasks
from florence_onnx.batch.answering import Loading, Question
from florence_onnx.batch.job import Job, Summary, run
from florence_onnx.batch.rows import Row, of_prediction

RESULTS = Path(__file__).resolve().parents[1] / "results" / "batch.md"
QUESTION = Question((tasks.OBJECT_DETECTION,), options=GenerationOptions(num_beams=1))
LOADING = Loading("demo", {"device": "cpu"})


def draw(folder: Path, count: int) -> list[str]:
    """Writes scenes as JPEG files of 640 pixels."""
    rng = random.Random(1)
    scenes = [make_scene(rng).image.resize((640, 640)) for _ in range(min(count, 100))]
    for number in range(count):
        scenes[number % len(scenes)].save(folder / f"{number:05}.jpg", quality=90)
    return sorted(map(str, folder.glob("*.jpg")))


def loop(names: list[str], out: str) -> float:
    """Images a second of a plain loop, with all cores for the model."""
    model = LOADING.load()
    model.run(tasks.OBJECT_DETECTION, names[0], options=QUESTION.options)
    begin = time.monotonic()
    with Path(out).open("w", encoding="utf-8") as file:
        for name in names:
            answer = model.run(tasks.OBJECT_DETECTION, name, options=QUESTION.options)
            file.write(of_prediction(name, name, None, answer, 0, "demo").to_json() + "\n")
    return len(names) / (time.monotonic() - begin)


def job(names: list[str], out: str) -> float:
    """Images a second of a job, from its first row on to its last."""
    times: list[float] = []

    def on_row(row: Row, summary: Summary) -> None:
        times.append(time.monotonic())

    run(Job(tuple(names), Path(out), QUESTION, LOADING), on_row=on_row)
    return (len(times) - 1) / (times[-1] - times[0])


def memory(names: list[str], out: str) -> list[int]:
    """Peak MB of a job in one process, at each tenth of its rows."""
    peaks: list[int] = []
    step = max(1, len(names) // 10)

    def on_row(row: Row, summary: Summary) -> None:
        if summary.num_rows % step == 0:
            peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)

    run(replace(Job(tuple(names), Path(out), QUESTION, LOADING), workers=1), on_row=on_row)
    return peaks


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", type=int, default=0)
    given = parser.parse_args()
    machine = describe()
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        names = draw(Path(folder), max(given.images, given.memory))
        rates: dict[str, list[float]] = {"loop": [], "job": []}
        for turn in range(given.rounds):
            for name, found in rates.items():
                arguments = names[: given.images], f"{folder}/{name}-{turn}.jsonl"
                if name == "job":  # it has processes of its own, and those of a pool may not have any
                    found.append(job(*arguments))
                    continue
                with spawn.Pool(1) as pool:
                    found.append(pool.apply(loop, arguments))
        peaks: list[int] = []
        if given.memory:
            with spawn.Pool(1) as pool:
                peaks = pool.apply(memory, (names, f"{folder}/memory.jsonl"))
        same = [
            [json.loads(line)["answer"] for line in Path(f"{folder}/{name}-0.jsonl").read_text().splitlines()]
            for name in rates
        ]
    ratio = median(rates["job"]) / median(rates["loop"])
    lines = [
        f"Written by `python -m benchmarks.cpu.batch_job --images {given.images} --rounds {given.rounds}"
        f"{f' --memory {given.memory}' if given.memory else ''}`: the demo model, `<OD>`, greedy, JPEG files of 640 pixels, "
        f"{machine['cores']} cores of {machine['cpu']}, load {machine['load_before']} before.",
        "",
        "| | images/s, each round | median |",
        "|---|---|---|",
        f"| plain loop of `run` | {', '.join(f'{rate:.1f}' for rate in rates['loop'])} | {median(rates['loop']):.1f} |",
        f"| `batch` | {', '.join(f'{rate:.1f}' for rate in rates['job'])} | {median(rates['job']):.1f} |",
        "",
        f"**{ratio:.2f} times** the plain loop; {sum(a == b for a, b in zip(*same, strict=True))} of {len(same[0])} answers are equal.",
    ]
    if peaks:
        tenths = ", ".join(map(str, peaks))
        lines += [
            "",
            f"Peak memory of a job in one process over {given.memory} images, at each tenth, in MB: {tenths}.",
        ]
    write_part("Beside a plain loop", "\n".join(lines), RESULTS)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
