"""Measures bundles of the demo model: `python -m benchmarks.quality.precisions INT8 INT4 --reference FP32`.

Every bundle answers questions about the same unseen scenes. Its answers are scored against the ground truth, and
compared with those of fp32. A precision may become a default if its score is within `MAX_LOSS` points of that of fp32.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from export.demo import questions
from export.demo.metrics import collect_questions, from_results, make_scenes, score_answers
from export.demo.scenes import Scene
from export.verification.agreement import Answer, Comparison
from export.verification.answerers import Answerer, open_bundle, open_reference
from export.verification.comparison import compare_models, resolve_searches
from export.verification.questions import NamedImage, Question
from export.verification.report import COLUMNS, Agreement, make_agreement
from florence_onnx import __version__, tasks

DEFAULT_SEED = 20261101
"""Seed of the scenes; it is used neither in training, nor in tests, nor for other published figures."""
DEFAULT_RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
MAX_LOSS = 0.5
"""Points (of 100) that a default precision may lose against fp32."""
MAX_NEW_TOKENS = 100
REFERENCE = "reference"

Figures = dict[str, dict[str, float]]
Row = tuple[str, int]  # (name of the bundle, number of beams)


@dataclass(frozen=True)
class Asked:
    """A question with its scene and ground truth."""

    scene: Scene
    truth: questions.Question
    question: Question


@dataclass(frozen=True)
class PrecisionReport:
    """The figures of one bundle with one search."""

    name: str
    precision: str
    num_beams: int
    figures: Figures  # `metrics.score_answers` by task token
    agreement: Agreement | None  # None for the reference itself

    @property
    def scores(self) -> dict[str, float]:
        """Scores by task token, in points from 0 to 100."""
        return {task: score_task(figures) for task, figures in self.figures.items()}

    @property
    def score(self) -> float:
        """Mean score of the tasks, in points from 0 to 100."""
        return float(np.mean(list(self.scores.values())))


def score_task(figures: Mapping[str, float]) -> float:
    """Returns a task's score in points from 0 to 100: F1 of boxes, mean IoU of masks, or share of exact answers."""
    if "recall" in figures:
        total = figures["precision"] + figures["recall"]
        return 200 * figures["precision"] * figures["recall"] / total if total else 0.0
    if "over_half" in figures:
        return 100 * figures["mean_iou"]
    return 100 * figures.get("exact_and_placed", figures["exact"])


def ask_scenes(scenes: Sequence[Scene], task_tokens: Sequence[str]) -> list[Asked]:
    """Makes the demo's questions about scenes, ordered by scene, so that each image is encoded once."""
    images = {id(scene): NamedImage(f"scene {number}", scene.image) for number, scene in enumerate(scenes)}
    asked: dict[int, list[Asked]] = defaultdict(list)
    for token in task_tokens:
        for scene, truth in collect_questions(scenes, token):
            asked[id(scene)].append(Asked(scene, truth, _to_question(truth, images[id(scene)])))
    return [each for scene in scenes for each in asked[id(scene)]]


def measure(
    reference: Answerer, candidates: Sequence[Answerer], asked: Sequence[Asked], beams: Sequence[int]
) -> list[PrecisionReport]:
    """Measures the reference and all candidates on all questions.

    Args:
        reference: The model in fp32.
        candidates: The models to compare with it.
        asked: The questions.
        beams: Numbers of beams; empty means greedy and the model's own number.

    Returns:
        A report for the reference and for each candidate, for each number of beams.
    """
    searches = resolve_searches(reference.generation, beams, MAX_NEW_TOKENS)
    found: dict[Row, list[Answer]] = defaultdict(list)
    comparisons: dict[Row, dict[str, list[Comparison]]] = defaultdict(lambda: defaultdict(list))
    for each in compare_models(reference, candidates, _with_progress(asked), searches):
        row = (each.candidate.name, each.num_beams)
        found[row].append(each.answer)
        comparisons[row][each.question.task.slug].append(each.comparison)
        if each.candidate is candidates[0]:
            found[REFERENCE, each.num_beams].append(each.expected)
    reports = []
    for num_beams in (options.num_beams or 1 for options in searches):
        figures = _score(asked, found[REFERENCE, num_beams])
        reports.append(PrecisionReport(_base(reference.name), reference.precision, num_beams, figures, None))
        for candidate in candidates:
            row = (candidate.name, num_beams)
            agreement = make_agreement(_base(candidate.name), candidate.precision, num_beams, comparisons[row])
            figures = _score(asked, found[row])
            reports.append(PrecisionReport(_base(candidate.name), candidate.precision, num_beams, figures, agreement))
    return reports


def _with_progress(asked: Sequence[Asked]) -> Iterator[Question]:
    for number, each in enumerate(asked):
        if number % 100 == 0:
            print(f"question {number} of {len(asked)}", flush=True)
        yield each.question


def _score(asked: Sequence[Asked], found: Sequence[Answer]) -> Figures:
    by_task: dict[str, list[tuple[Asked, Answer]]] = defaultdict(list)
    for question, answer in zip(asked, found, strict=True):
        by_task[question.truth.task].append((question, answer))
    return {
        token: score_answers(
            token,
            [question.scene for question, _ in pairs],
            [question.truth for question, _ in pairs],
            [from_results(answer.results) for _, answer in pairs],
        )
        for token, pairs in by_task.items()
    }


def _to_question(truth: questions.Question, image: NamedImage) -> Question:
    return Question(tasks.get(truth.task), image, text_input=truth.text, region=truth.region)


def _base(name: str) -> str:
    """Returns the last part of a path."""
    return Path(name).name


# --- writing -------------------------------------------------------------------------------------------------------


def to_dict(reports: Sequence[PrecisionReport], setup: Mapping[str, Any]) -> dict[str, Any]:
    """Returns all figures, for JSON."""
    return {
        **setup,
        "rows": [
            {
                "bundle": report.name,
                "precision": report.precision,
                "num_beams": report.num_beams,
                "score": report.score,
                **_losses(report, reports),
                "scores": report.scores,
                "figures": report.figures,
                "agreement": report.agreement.to_dict() if report.agreement else None,
            }
            for report in reports
        ],
    }


def to_markdown(reports: Sequence[PrecisionReport], setup: Mapping[str, Any]) -> str:
    """Returns the tables as Markdown."""
    facts = ", ".join(f"{name} {value}" for name, value in setup.items())
    columns = [(heading, *column) for heading, column in COLUMNS.items() if heading != "answers"]
    header = [
        "bundle",
        "precision",
        "beams",
        "score",
        "loss",
        "worst task",
        "within",
        *(name for name, _, _ in columns),
    ]
    rows = [
        [*_score_cells(report, reports), *(_cell(report, field, style) for _, field, style in columns)]
        for report in reports
    ]
    names = [f"{report.precision}, beams {report.num_beams}" for report in reports]
    scores = [[f"`{token}`", *(f"{report.scores[token]:.1f}" for report in reports)] for token in reports[0].scores]
    return "\n".join(
        [
            "# Precisions of the demo model",
            "",
            f"Written by `python -m benchmarks.quality.precisions` ({facts}).",
            "",
            "`score` is the mean of the tasks against the ground truth, in points of 100; `loss` is fp32's score minus",
            "this one; `worst task` is the largest loss of a single task; `within` says whether the score loses at",
            f"most {MAX_LOSS} points, and in how many tasks it does. The other columns are agreement with the fp32",
            "answers to the same questions.",
            "",
            *_markdown_table(header, rows),
            "",
            "## Scores by task",
            "",
            *_markdown_table(["task", *names], scores),
            "",
        ]
    )


def _losses(report: PrecisionReport, reports: Sequence[PrecisionReport]) -> dict[str, Any]:
    base = next(each for each in reports if each.agreement is None and each.num_beams == report.num_beams)
    by_task = {token: base.scores[token] - score for token, score in report.scores.items()}
    worst = max(by_task, key=lambda token: by_task[token])
    within = sum(loss <= MAX_LOSS for loss in by_task.values())
    loss = base.score - report.score
    return {"loss": loss, "worst_task": worst, "worst_loss": by_task[worst], "tasks_within": within}


def _score_cells(report: PrecisionReport, reports: Sequence[PrecisionReport]) -> list[str]:
    losses = _losses(report, reports)
    start = [report.name, report.precision, str(report.num_beams), f"{report.score:.2f}"]
    if report.agreement is None:
        return [*start, "", "", ""]
    verdict = "yes" if losses["loss"] <= MAX_LOSS else "no"
    worst = f"{losses['worst_loss']:.2f} `{losses['worst_task']}`"
    within = f"{verdict}; {losses['tasks_within']} of {len(report.scores)} tasks"
    return [*start, f"{losses['loss']:+.2f}", worst, within]


def _cell(report: PrecisionReport, field: str, style: str) -> str:
    value = getattr(report.agreement.overall, field) if report.agreement else None
    return "" if value is None else format(value, style)


def _markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [" ".join(heading.split()) for heading in header], ["---"] * len(header), *rows
    return ["| " + " | ".join(line) + " |" for line in lines]


def main() -> None:
    """Command line: measures bundles, prints the tables, and writes them as Markdown and JSON."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("bundles", nargs="+", help="bundles of the demo model")
    parser.add_argument("--reference", required=True, help="its checkpoint or fp32 bundle")
    parser.add_argument("--scenes", type=int, default=200)
    parser.add_argument("--seed", type=int, default=DEFAULT_SEED)
    parser.add_argument("--beams", type=int, action="append", help="may be repeated; default: 1 and 3")
    parser.add_argument("--task", action="append", choices=questions.TASK_TOKENS, help="may be repeated; default: all")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=DEFAULT_RESULTS, help="folder of precisions_demo.md and .json")
    arguments = parser.parse_args()
    candidates = [open_bundle(name, device=arguments.device) for name in dict.fromkeys(arguments.bundles)]
    reference = open_reference(arguments.reference, candidates[0].generation, device=arguments.device)
    asked = ask_scenes(make_scenes(arguments.seed, arguments.scenes), arguments.task or questions.TASK_TOKENS)
    reports = measure(reference, candidates, asked, arguments.beams or (1, 3))
    versions = {"florence_onnx": __version__, "onnxruntime": onnxruntime.__version__, "device": arguments.device}
    setup = {"scenes": arguments.scenes, "seed": arguments.seed, **versions}
    text = to_markdown(reports, setup)
    print(text)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "precisions_demo.md").write_text(text, encoding="utf-8")
    content = json.dumps(to_dict(reports, setup), indent=1, allow_nan=False)
    (arguments.out / "precisions_demo.json").write_text(f"{content}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
