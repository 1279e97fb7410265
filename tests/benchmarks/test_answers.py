"""The figures of `benchmarks/results/answers.md`."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="the scenes' variant of the demo model needs the export extra")
pytest.importorskip("matplotlib", reason="the drawn words use matplotlib's bundled fonts")

from benchmarks import results_file
from benchmarks.quality import absence, tiles
from export.demo.scenes import make_scene
from florence_onnx import Florence2


def asked(values: list[float | None], *, present: bool) -> list[absence.Asked]:
    """Answers about as many scenes."""
    return [
        absence.Asked(number, "circle", present, False, {"score": value}, False) for number, value in enumerate(values)
    ]


def test_auroc_and_f1() -> None:
    answers = asked([0.9, 0.5, None], present=True) + asked([0.4, 0.6, None], present=False)
    # of nine pairs: six are in order, one is a tie, two are not
    assert absence.auroc(answers, "score") == pytest.approx((3 + 2 + 0.5) / 9)
    assert absence.f1(answers, "score", 0.5, present=True) == pytest.approx(2 * 2 / (3 + 3))
    assert absence.f1(answers, "score", 0.5, present=False) == pytest.approx(2 * 2 / (3 + 3))
    assert absence.f1(answers, "score", 2, present=True) == 0


def test_every_rule_is_measured() -> None:
    """On the demo model itself, which answers few absent classes, and two scenes."""
    answers, seconds = absence.measure(Florence2.from_pretrained("demo", device="cpu"), 2, 1)
    assert set(seconds) == {*absence.MEASURED, "off"}
    assert {each.is_present for each in answers} == {True, False}
    assert all(set(each.values) == {*absence.MEASURED, "off"} for each in answers)
    text = absence.report(answers, seconds, "")
    assert text.count("\n| `") == len(absence.MEASURED) + 1


def test_names_are_present_as_said() -> None:
    scene = make_scene(random.Random(1))
    names = absence.names_of(scene, random.Random(2))
    assert set(names.values()) == {True, False}


def test_duplicates_are_counted_whatever_their_label() -> None:
    true = [("red star", (0.0, 0.0, 10.0, 10.0)), ("blue star", (50.0, 0.0, 60.0, 10.0))]
    found = [
        ("red star", (0.0, 0.0, 10.0, 9.0)),
        ("pink star", (1.0, 0.0, 10.0, 10.0)),
        ("blue star", (70.0, 0.0, 80.0, 9.0)),
    ]
    counts = tiles.count(found, true)
    assert (counts.true, counts.answers, counts.found, counts.duplicates) == (2, 3, 1, 1)
    assert (counts + counts).duplicates == 2


def test_a_part_of_the_file_replaces_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "answers.md"
    for title, text in (("A", "one"), ("B", "two\n\n### C\n\nthree"), ("A", "four")):
        results_file.write_part(title, text, path)
    assert path.read_text(encoding="utf-8") == (
        f"{results_file.TITLE}\n\n## A\n\nfour\n\n## B\n\ntwo\n\n### C\n\nthree\n"
    )


def test_the_recorded_recall_is_three_times_that_of_the_whole_image() -> None:
    rows = [
        line.split(" | ") for line in results_file.PATH.read_text(encoding="utf-8").splitlines() if "| tiles |" in line
    ]
    whole = [
        line.split(" | ")
        for line in results_file.PATH.read_text(encoding="utf-8").splitlines()
        if "| whole image |" in line
    ]
    assert len(rows) == len(whole) == 2
    for tiled, single in zip(rows, whole, strict=True):
        assert float(tiled[2]) >= max(0.5, 3 * float(single[2])) and int(tiled[4]) == 0
