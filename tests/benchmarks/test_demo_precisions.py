"""Scores of precisions on synthetic scenes: the numbers, and that a model has no loss against itself."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

pytest.importorskip("matplotlib", reason="the scenes' fonts come with matplotlib: pip install -e '.[test]'")
pytest.importorskip("rapidfuzz", reason="needs the export extra: pip install -e '.[export]'")
from benchmarks.quality.precisions import PrecisionReport, ask_scenes, measure, score_task, to_dict, to_markdown
from export.demo.metrics import make_scenes
from export.demo.questions import TASK_TOKENS
from export.verification.answerers import open_bundle


def test_the_score_of_a_task() -> None:
    assert score_task({"precision": 0.5, "recall": 1.0, "mean_iou": 0.1}) == pytest.approx(200 / 3)
    assert score_task({"precision": 0.0, "recall": 0.0, "mean_iou": 0.0}) == 0
    assert score_task({"mean_iou": 0.9, "over_half": 1.0}) == 90
    assert score_task({"exact": 1.0, "exact_and_placed": 0.8, "mean_iou": 0.7}) == 80
    assert score_task({"n": 3, "exact": 0.25}) == 25


def test_every_task_is_asked_and_a_scene_at_a_time() -> None:
    scenes = make_scenes(4711, 4)
    asked = ask_scenes(scenes, TASK_TOKENS)
    assert {each.truth.task for each in asked} == set(TASK_TOKENS)
    order = [scenes.index(each.scene) for each in asked]
    assert order == sorted(order)
    for each in asked:
        assert each.question.prompt == each.truth.prompt


@pytest.fixture(scope="module")
def reports() -> list[PrecisionReport]:
    demo = open_bundle("demo", device="cpu")
    asked = ask_scenes(make_scenes(4711, 3), ("<OD>", "<CAPTION>", "<REGION_TO_SEGMENTATION>"))
    return measure(demo, [open_bundle("demo", device="cpu")], asked, (1,))


def test_a_model_loses_nothing_to_itself(reports: list[PrecisionReport]) -> None:
    reference, candidate = reports
    assert reference.score > 80, "the demo model knows drawn scenes"
    assert candidate.scores == reference.scores
    assert candidate.agreement and candidate.agreement.overall.exact == 1


def test_a_loss_is_reported_with_its_task(reports: list[PrecisionReport]) -> None:
    reference, candidate = reports
    worse = {**candidate.figures, "<CAPTION>": {"exact": reference.figures["<CAPTION>"]["exact"] - 0.3}}
    both = [reference, replace(candidate, figures=worse)]
    row = json.loads(json.dumps(to_dict(both, {"scenes": 3}), allow_nan=False))["rows"][1]
    assert row["loss"] == pytest.approx(10)
    assert (row["worst_task"], row["worst_loss"], row["tasks_within"]) == ("<CAPTION>", pytest.approx(30), 2)
    text = to_markdown(both, {"scenes": 3})
    assert "no; 2 of 3 tasks" in text and "| +10.00 | 30.00 `<CAPTION>` |" in text
    assert "yes; 3 of 3 tasks" in to_markdown(reports, {"scenes": 3})
