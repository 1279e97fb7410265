"""`evaluate` and calibrations: figures of pycocotools, what scores are worth, and files that turn them into probabilities."""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner, Result

from benchmarks.quality.scores import compare, write_scenes
from florence_onnx import Florence2, GenerationOptions, InputError, Tiles, tasks
from florence_onnx.answers import calibration as calibrations
from florence_onnx.answers.calibration import Calibration
from florence_onnx.commands.main import app
from florence_onnx.evaluating import calibrating
from florence_onnx.evaluating.asking import Asked, ask
from florence_onnx.evaluating.coco import Found, GroundTruth, read_ground_truth
from florence_onnx.evaluating.measuring import evaluate

GREEDY = GenerationOptions(num_beams=1)
SAMPLES = Path(tasks.__file__).parent / "demo" / "samples"
SCORED = GenerationOptions(num_beams=1, scores=True)
OD = tasks.OBJECT_DETECTION


def run_command(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


@pytest.fixture(scope="module")
def model() -> Florence2:
    return Florence2.from_pretrained("demo", device="cpu", session_options={"intra_op_num_threads": 1})


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ground truth of forty unclear scenes, beside them."""
    return write_scenes(tmp_path_factory.mktemp("scenes"), 40, seed=4)


@pytest.fixture(scope="module")
def truth(scenes: Path) -> GroundTruth:
    return read_ground_truth(scenes)


@pytest.fixture(scope="module")
def asked(model: Florence2, truth: GroundTruth, scenes: Path) -> list[Asked]:
    return list(ask(model, truth, scenes.parent, list(truth.images), OD, options=GREEDY))


@pytest.fixture(scope="module")
def calibrated(
    model: Florence2, truth: GroundTruth, asked: list[Asked], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A calibration of the demo model, fitted on twenty scenes."""
    fitted = evaluate(truth, asked, OD.slug, model.digest, calibrate=True).fitted
    assert fitted is not None
    path = tmp_path_factory.mktemp("calibration") / "od.json"
    fitted.calibration.write(path)
    return path


# ------------------------------------------------------------------------------------------------------------- figures


def write_truth(path: Path, **changed: Any) -> Path:
    """A ground truth of two images and two classes, or a damaged one."""
    content: dict[str, Any] = {
        "images": [{"id": 1, "file_name": "a.png", "width": 100, "height": 100}, {"id": 2, "file_name": "b.png"}],
        "categories": [{"id": 7, "name": "Red  Kite"}, {"id": 9, "name": "car"}],
        "annotations": [
            {"image_id": 1, "category_id": 7, "bbox": [10, 10, 20, 20]},
            {"image_id": 1, "category_id": 9, "bbox": [50, 50, 40, 40]},
            {"image_id": 2, "category_id": 9, "bbox": [0, 0, 90, 90], "iscrowd": 1, "area": 8100, "id": 77},
        ],
    }
    path.write_text(json.dumps({**content, **changed}))
    return path


def test_figures_of_exact_and_of_wrong_boxes(tmp_path: Path) -> None:
    truth = read_ground_truth(write_truth(tmp_path / "truth.json"))
    kite = truth.category_id(" red kite ")
    assert kite == 7 and truth.category_id("kite") is None
    exact = Asked(1, (Found(1, 7, (10, 10, 20, 20), 0.9), Found(1, 9, (50, 50, 40, 40), 0.8)))
    found = evaluate(truth, [exact, Asked(2)], "object-detection")
    assert [found.figures.ap, found.figures.ap50, found.figures.ar] == pytest.approx([1, 1, 1])
    assert {name: each.num_objects for name, each in found.by_class.items()} == {"Red  Kite": 1, "car": 1}
    # one box is right by 0.5 and not by 0.75: it is 40 x 28 of 40 x 40, whose intersection over union is 0.7
    close = Asked(1, (exact.found[0], Found(1, 9, (50, 50, 40, 28), 0.8)))
    found = evaluate(truth, [close, Asked(2)], "object-detection")
    assert (found.by_class["car"].ap50, found.by_class["car"].ap75) == (pytest.approx(1), pytest.approx(0))
    assert found.by_class["car"].ap == pytest.approx(0.5), "right at 0.5, 0.55, 0.6, 0.65 and 0.7"
    # a box in a crowd is neither right nor wrong
    crowd = Asked(2, (Found(2, 9, (5, 5, 20, 20), 0.99),))
    assert evaluate(truth, [exact, crowd], "object-detection").reliability.count == 2
    wrong = evaluate(truth, [replace(exact, found=()), replace(crowd, found=())], "object-detection")
    assert wrong.figures.ap == pytest.approx(0) and wrong.reliability.count == 0 and wrong.reliability.ece == 0


def test_images_and_labels_that_do_not_count(tmp_path: Path) -> None:
    truth = read_ground_truth(write_truth(tmp_path / "truth.json"))
    found = evaluate(
        truth, [Asked(1, (), ("bus", "tram", "bus")), Asked(2, error="cannot be read")], "object-detection"
    )
    assert found.other_labels == {"bus": 2, "tram": 1} and list(found.other_labels) == ["bus", "tram"]
    assert found.errors == {"b.png": "cannot be read"} and found.num_images == 1
    assert found.by_class["car"].num_objects == 1, "objects of images without an answer do not count"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"images": None}, "lists images, categories, annotations"),
        ({"images": []}, "not listed"),
        ({"categories": [], "annotations": []}, "no categories"),
        (
            {"annotations": [{"image_id": 1, "category_id": 7}]},
            r"annotations\[0\] must have image_id, category_id, bbox",
        ),
        ({"annotations": [{"image_id": 1, "category_id": 7, "bbox": [1, 2, 3]}]}, "four numbers"),
        ({"annotations": [{"image_id": 5, "category_id": 7, "bbox": [1, 2, 3, 4]}]}, "not listed"),
    ],
)
def test_a_damaged_ground_truth_is_refused(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_ground_truth(write_truth(tmp_path / "truth.json", **changed))


# -------------------------------------------------------------------------------------------------------------- scores


def test_scores_are_worth_more_than_constant_and_shuffled_ones(truth: GroundTruth, asked: list[Asked]) -> None:
    """Of forty scenes by a wide margin; `benchmarks/results/answers.md` has five hundred."""
    ways = compare(truth, asked, seed=1)
    own, constant, shuffled = (each.ap for each in ways.values())
    assert own is not None and constant is not None and shuffled is not None
    assert own > constant + 0.03 and own > shuffled + 0.03
    assert len({each.ar for each in ways.values()}) == 1, "the boxes are the same"


def test_every_box_of_an_image_is_asked_for(
    model: Florence2, truth: GroundTruth, asked: list[Asked], scenes: Path
) -> None:
    assert len(asked) == len(truth.images) and sum(len(each.found) for each in asked) > 60
    alone = model.run(OD, scenes.parent / "scene-3.png", options=SCORED).results.bboxes
    known = [box for box in alone if truth.category_id(box.label) is not None]
    assert [box.score for box in asked[3].found] == [box.score for box in known]


def test_each_class_is_asked_as_by_detect(model: Florence2, truth: GroundTruth, scenes: Path) -> None:
    task = tasks.OPEN_VOCABULARY_DETECTION
    (found,) = ask(model, truth, scenes.parent, [0], task, each_class=True, options=GREEDY)
    expected = model.detect(scenes.parent / "scene-0.png", list(truth.names.values()), options=GREEDY)
    assert [box.score for box in found.found] == [box.score for box in expected.bboxes]
    with pytest.raises(InputError, match="--each-class"):
        next(ask(model, truth, scenes.parent, [0], task))
    with pytest.raises(InputError, match="takes no text"):
        next(ask(model, truth, scenes.parent, [0], OD, each_class=True))
    with pytest.raises(InputError, match="cannot be evaluated"):
        next(ask(model, truth, scenes.parent, [0], tasks.CAPTION))


# --------------------------------------------------------------------------------------------------------- calibration


@pytest.mark.parametrize("power", [0.4, 1.0, 3.0])
def test_a_known_curve_is_found(power: float) -> None:
    """Boxes that are right with the probability score ** power: a line after the calibration."""
    rng = np.random.default_rng(0)
    scores = rng.uniform(0.02, 0.98, 6000)
    right = rng.random(6000) < scores**power
    a, b, c = calibrating.fit(scores[:3000].tolist(), right[:3000].tolist())
    curve = Calibration("object-detection", a, b, c, 3000, 1)
    before = calibrating.measure_reliability(scores[3000:].tolist(), right[3000:].tolist())
    after = calibrating.measure_reliability([curve.apply(each) for each in scores[3000:]], right[3000:].tolist())
    assert after.ece < 0.04 and (power == 1.0 or after.ece < before.ece / 3)
    assert sum(each.count for each in after.bins) == after.count == 3000


def test_a_score_that_says_nothing_or_the_contrary_gives_the_share() -> None:
    rng = np.random.default_rng(1)
    scores = rng.uniform(0, 1, 2000)
    for right in (rng.random(2000) < 0.3, rng.random(2000) < 0.6 * (1 - scores)):
        a, b, c = calibrating.fit(scores.tolist(), right.tolist())
        curve = Calibration("object-detection", a, b, c, 2000, 1)
        assert min(a, b) >= 0 and curve.apply(0.5) == pytest.approx(right.mean(), abs=0.05)


@pytest.mark.parametrize("right", [[True] * 50, [False] * 50, [True, False] * 9])
def test_too_few_boxes_or_only_one_kind(right: list[bool]) -> None:
    with pytest.raises(InputError, match="give more images"):
        calibrating.fit([0.5] * len(right), right)


@given(
    st.floats(0, 20),
    st.floats(0, 20),
    st.floats(-30, 30),
    st.lists(st.floats(0, 1), min_size=2, max_size=2).map(sorted),
)
def test_the_curve_only_grows(a: float, b: float, c: float, scores: list[float]) -> None:
    curve = Calibration("object-detection", a, b, c, 100, 10)
    low, high = map(curve.apply, scores)
    assert 0 <= low <= high <= 1


def test_a_calibrated_model_gives_probabilities_everywhere(
    model: Florence2, truth: GroundTruth, asked: list[Asked], calibrated: Path, scenes: Path
) -> None:
    found = evaluate(truth, asked, OD.slug, model.digest, calibrate=True)
    assert found.fitted is not None
    assert found.fitted.after.ece < found.fitted.before.ece / 1.5
    assert found.fitted.calibration.num_images == 20
    curve = calibrations.read(calibrated)
    options: dict[str, Any] = {
        "device": "cpu",
        "session_options": {"intra_op_num_threads": 1},
        "calibration": calibrated,
    }
    image = scenes.parent / "scene-3.png"
    plain = model.run(OD, image, options=SCORED)
    for max_batch in (0, 4):
        other = Florence2.from_pretrained("demo", max_batch=max_batch, **options)
        answer = other.run(OD, image, options=SCORED)
        assert answer.token_ids == plain.token_ids
        for box, raw in zip(answer.results.bboxes, plain.results.bboxes, strict=True):
            assert raw.score is not None and box.score == pytest.approx(curve.apply(raw.score), rel=1e-4)
            assert box.score_parts is not None and box.score_parts.score == pytest.approx(raw.score, rel=1e-4)
        assert other.run(OD, image, options=GREEDY).results.bboxes[0].score is None
        np.testing.assert_allclose(
            answer.to_transformers()["<OD>"]["scores"], plain.to_transformers()["<OD>"]["scores"], rtol=1e-4
        )
        assert len(answer.above(0.5).results.bboxes) == sum((box.score or 0) >= 0.5 for box in answer.results.bboxes)
    again = pickle.loads(pickle.dumps(other))
    assert again.run(OD, image, options=SCORED).results == answer.results
    tiles = Tiles(size=100, overlap=0.2)
    big = Image.open(image).resize((180, 180))
    tiled, raw_tiled = other.run(OD, big, tiles=tiles, options=GREEDY), model.run(OD, big, tiles=tiles, options=GREEDY)
    assert len(tiled.results.bboxes) == len(raw_tiled.results.bboxes) > 0
    for box, raw in zip(tiled.results.bboxes, raw_tiled.results.bboxes, strict=True):
        assert raw.score is not None and box.score == pytest.approx(curve.apply(raw.score), rel=1e-3)
    # of another task nothing changes, and a rule for absent classes that looks at the score looks at the model's own
    grounded = [each.detect(image, ["circle", "square"], absent="score", options=GREEDY) for each in (model, other)]
    assert grounded[0].present == grounded[1].present
    scores = [[box.score or 0 for box in each.bboxes] for each in grounded]
    assert scores[0] == pytest.approx(scores[1], rel=1e-3)


def test_two_calibrations_for_one_task_and_for_two(calibrated: Path, tmp_path: Path) -> None:
    other = tmp_path / "grounding.json"
    replace(calibrations.read(calibrated), task="open-vocabulary-detection").write(other)
    model = Florence2.from_pretrained("demo", device="cpu", calibration=[calibrated, other])
    box = model.detect(SAMPLES / "scene-1.png", ["square", "circle"], absent="off").bboxes[0]
    assert box.score_parts is not None
    assert box.score == pytest.approx(calibrations.read(other).apply(box.score_parts.score))
    with pytest.raises(InputError, match="second calibration for object-detection"):
        Florence2.from_pretrained("demo", device="cpu", calibration=[calibrated, calibrated])


DAMAGED: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "another file": (lambda content: {"results": []}, "no calibration of florence_onnx"),
    "a list": (lambda content: [content], "no calibration of florence_onnx"),
    "a later version": (lambda content: {**content, "version": 2}, "version 2"),
    "another method": (lambda content: {**content, "method": "isotonic"}, "isotonic"),
    "no parameter": (lambda content: {key: content[key] for key in content if key != "b"}, "'b'"),
    "a text": (lambda content: {**content, "a": "1"}, "a must be a number"),
    "not a number": (lambda content: {**content, "c": math.nan}, "c must be a number"),
    "a falling curve": (lambda content: {**content, "a": -1.0}, "must not be negative"),
    "another model": (lambda content: {**content, "model": "0" * 64}, "another model"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_and_foreign_files_are_refused(calibrated: Path, tmp_path: Path, name: str) -> None:
    change, message = DAMAGED[name]
    path = tmp_path / "damaged.json"
    path.write_text(json.dumps(change(json.loads(calibrated.read_text()))))
    with pytest.raises(InputError, match=message):
        Florence2.from_pretrained("demo", device="cpu", calibration=path)


@pytest.mark.parametrize("content", [None, b"", b"{", b"\xff\xfe", b"[" * 100_000])
def test_unreadable_files_are_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "od.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match="florence-onnx evaluate"):
        Florence2.from_pretrained("demo", device="cpu", calibration=path)


# ---------------------------------------------------------------------------------------------------------- the command


def test_the_command(scenes: Path, tmp_path: Path, model: Florence2) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for path in scenes.parent.glob("*.png"):
        (images / path.name).write_bytes(path.read_bytes())
    (images / "scene-5.png").unlink()
    (images / "scene-6.png").write_bytes(b"no image")
    curve, plot = tmp_path / "od.json", tmp_path / "plot.png"
    base = ["evaluate", "--coco", str(scenes), "--images", str(images), "--beams", "1", "--device", "cpu"]
    result = run_command(*base, "--write-calibration", str(curve), "--plot", str(plot), "--json")
    assert result.exit_code == 1, "two images have no answer"
    found = json.loads(result.stdout)
    assert found["num_images"] == 38 and set(found["errors"]) == {"scene-5.png", "scene-6.png"}
    assert "2 of 40 images have no answer" in result.stderr
    assert 0.1 < found["figures"]["ap"] < 0.9 and found["fitted"]["after"]["ece"] < found["fitted"]["before"]["ece"]
    with Image.open(plot) as drawn:
        assert drawn.width > drawn.height
    assert calibrations.read(curve).model == model.digest
    printed = run_command(*base, "--limit", "3", "--calibration", str(curve))
    assert printed.exit_code == 0 and "all classes" in printed.stdout and "3 images" in printed.stdout
    plain, scored = (
        json.loads(
            run_command(
                "run", "object-detection", str(images / "scene-3.png"), "--beams", "1", "--scores", "--json", *each
            ).stdout
        )
        for each in ([], ["--calibration", str(curve)])
    )
    boxes = [each["results"]["bboxes"] for each in (plain, scored)]
    assert [box["score"] for box in boxes[1]] == pytest.approx(
        [calibrations.read(curve).apply(box["score"]) for box in boxes[0]]
    )
    detected = run_command("detect", "circle", str(images / "scene-3.png"), "--calibration", str(curve), "--json")
    assert detected.exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "caption"], "cannot be evaluated"),
        (["--calibration", "a.json", "--write-calibration", "b.json"], "leave --calibration out"),
        (["--coco", "missing.json"], "cannot be read as JSON"),
        (["--images", "missing"], "is no folder"),
        (["--limit", "2", "--write-calibration", "b.json"], "give more images"),
        (["--limit", "2", "--plot", "plot.xyz"], "cannot be written"),
    ],
)
def test_wrong_arguments_of_the_command(scenes: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    base = ["evaluate", "--coco", str(scenes), "--images", str(scenes.parent), "--beams", "1", "--device", "cpu"]
    result = run_command(*base, *(str(tmp_path / each) if "." in each else each for each in arguments))
    assert result.exit_code == 2 and message in " ".join(result.stderr.split())
    assert not list(tmp_path.iterdir())
