"""Rules for absent classes on a model that always answers: `python -m benchmarks.quality.absence --scenes 250`.

The model is the variant of the demo model that `export.demo.always` makes. Each drawn scene is asked for classes that are in
it and for classes that are not; each rule gives each class a value, and the figures say how well that value tells the two
apart. Thresholds are fitted on the scenes with even numbers and judged on the others. Written to a part of `answers.md`.
"""

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.results_file import write_part
from export.bundles.writer import export_bundle
from export.checkpoints.checkpoint import load_checkpoint
from export.demo.always import absent_name, is_present, make_always_scene, write_checkpoint
from export.demo.questions import full_name, short_name
from export.demo.scenes import Scene
from florence_onnx import Florence2, GenerationOptions
from florence_onnx.detecting.absence import RULES, THRESHOLDS, Absent, fit_threshold

SEED = 20261201
"""Seed of the scenes; training uses others."""
CLASSES = 3
"""Present and absent classes that are asked a scene, at most."""
GREEDY = GenerationOptions(num_beams=1)
MEASURED: tuple[Absent, ...] = tuple(rule for rule in RULES if rule != "off")


@dataclass(frozen=True)
class Asked:
    """A class, asked about a scene."""

    scene: int
    name: str
    is_present: bool
    is_close_up: bool
    values: dict[str, float | None]
    """By rule."""
    is_whole: bool
    """Whether the answer is one box of more than 82 % of the image."""


def names_of(scene: Scene, rng: random.Random) -> dict[str, bool]:
    """Classes to ask about, and whether they are in the scene."""
    shapes = [rng.choice(scene.shapes) for _ in range(CLASSES)]
    names = [rng.choice((shape.kind, short_name(shape), full_name(shape))) for shape in shapes]
    names += [absent_name(scene, rng) for _ in range(CLASSES)]
    return {name: is_present(scene, name) for name in names}


def measure(model: Florence2, num_scenes: int, seed: int) -> tuple[list[Asked], dict[str, float]]:
    """Asks all classes about all scenes by all rules; returns the answers and the median seconds of a call by rule."""
    rng = random.Random(seed)
    asked: list[Asked] = []
    seconds: dict[str, list[float]] = {rule: [] for rule in RULES}
    for number in range(num_scenes):
        scene = make_always_scene(rng)
        names = names_of(scene, rng)
        encoded = model.encode(scene.image)
        values: dict[str, dict[str, float | None]] = {name: {} for name in names}
        for rule in RULES:
            start = time.perf_counter()
            found = model.detect(encoded, list(names), absent=rule, options=GREEDY)
            seconds[rule].append(time.perf_counter() - start)
            for each in found.classes:
                values[each.name][rule] = each.presence
        box = scene.shapes[0].box
        is_close_up = (box[2] - box[0]) * (box[3] - box[1]) > 0.82
        for name, is_there in names.items():
            area = values[name]["area"]
            asked.append(Asked(number, name, is_there, is_close_up, values[name], area is not None and area < 0.18))
    return asked, {rule: statistics.median(each) for rule, each in seconds.items()}


def auroc(asked: Sequence[Asked], rule: str) -> float:
    """Probability that a present class has a greater value than an absent one; an answer without boxes is the least."""
    yes, no = (np.array([_value(each, rule) for each in asked if each.is_present == kind]) for kind in (True, False))
    if not len(yes) or not len(no):
        return float("nan")
    greater = (yes[:, None] > no[None]).sum() + 0.5 * (yes[:, None] == no[None]).sum()
    return float(greater / (len(yes) * len(no)))


def _value(asked: Asked, rule: str) -> float:
    value = asked.values[rule]
    return -1e9 if value is None else value


def f1(asked: Sequence[Asked], rule: str, threshold: float, *, present: bool) -> float:
    """F1 of calling classes present (or absent) by a threshold."""
    said = [(_value(each, rule) >= threshold) == present for each in asked]
    true = [each.is_present == present for each in asked]
    hits = sum(a and b for a, b in zip(said, true, strict=True))
    return 2 * hits / (sum(said) + sum(true)) if hits else 0.0


def threshold_of(asked: Sequence[Asked], rule: str) -> float:
    """The threshold with the best F1 of present classes."""
    yes, no = ([each.values[rule] for each in asked if each.is_present == kind] for kind in (True, False))
    return fit_threshold(yes, no)


def table(asked: Sequence[Asked], seconds: dict[str, float]) -> Iterator[str]:
    """The lines of the table."""
    parts: tuple[tuple[str, Callable[[Asked], bool]], ...] = (
        ("all", lambda each: True),
        ("ordinary scenes", lambda each: not each.is_close_up),
        ("close-ups", lambda each: each.is_close_up),
        ("kinds", lambda each: " " not in each.name),
        ("colour and kind", lambda each: " " in each.name),
    )
    heads = [f"AUROC, {name}" for name, _ in parts]
    columns = ["rule", *heads, "threshold", "F1 present", "F1 absent", "F1 present, default", "ms a call"]
    yield f"| {' | '.join(columns)} |"
    yield f"|{' --- |' * len(columns)}"
    fitted, judged = ([each for each in asked if each.scene % 2 == half] for half in (0, 1))
    for rule in MEASURED:
        threshold = threshold_of(fitted, rule)
        aurocs = [auroc([each for each in asked if part(each)], rule) for _, part in parts]
        scores = [f1(judged, rule, threshold, present=kind) for kind in (True, False)]
        scores.append(f1(judged, rule, THRESHOLDS[rule], present=True))
        numbers = [*(f"{value:.3f}" for value in aurocs), f"{threshold:.3g}", *(f"{value:.3f}" for value in scores)]
        yield f"| `{rule}` | {' | '.join(numbers)} | {1000 * seconds[rule]:.0f} |"
    always = f1(judged, "score", -np.inf, present=True)
    yield f"| `off` | {' | '.join(['0.500'] * len(parts))} | | {always:.3f} | 0.000 | | {1000 * seconds['off']:.0f} |"


def report(asked: Sequence[Asked], seconds: dict[str, float], arguments: str) -> str:
    """The part of `answers.md`."""
    absent = [each for each in asked if not each.is_present]
    answered = sum(each.values["score"] is not None for each in absent) / len(absent)
    whole = sum(each.is_whole for each in absent) / len(absent)
    num_scenes = len({each.scene for each in asked})
    num_close_ups = len({each.scene for each in asked if each.is_close_up})
    return "\n".join(
        [
            f"Written by `python -m benchmarks.quality.absence {arguments}`.",
            "",
            f"{num_scenes} drawn scenes, {num_close_ups} of them close-ups in which a shape fills the image; "
            f"{len(asked) - len(absent)} classes that are in their scene and {len(absent)} that are not. The model is the demo "
            f"model's variant that always answers (`export/demo/always.py`): it answers {answered:.0%} of the absent classes, "
            f"{whole:.0%} with a box of more than 82 % of the image. Thresholds are fitted on the even scenes, and F1 is "
            "measured on the odd ones; `default` is the threshold of `absence.THRESHOLDS`.",
            "",
            *table(asked, seconds),
        ]
    )


def main() -> None:
    """Command line: measures and writes the part."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--scenes", type=int, default=250)
    parser.add_argument("--seed", type=int, default=SEED)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = load_checkpoint(write_checkpoint(Path(folder) / "checkpoint"))
        model = Florence2.from_bundle(export_bundle(checkpoint, Path(folder) / "bundle"))
        asked, seconds = measure(model, arguments.scenes, arguments.seed)
    text = report(asked, seconds, f"--scenes {arguments.scenes} --seed {arguments.seed}")
    print(text)
    write_part("Absent classes", text)


if __name__ == "__main__":
    main()
