"""`Florence2.detect`: the answers of single calls, by class, without boxes of what is not there."""

from __future__ import annotations

import math
from typing import Any
from unittest import mock

import numpy as np
import pytest

from florence_onnx import (
    BoundingBox,
    BoundingBoxes,
    Detections,
    Florence2,
    GenerationOptions,
    InputError,
    Point,
    Polygon,
    Region,
    TextInputError,
    Tiles,
    UnknownTaskError,
    tasks,
)
from florence_onnx.answers.matching import box_iou
from florence_onnx.bundles import bundle
from florence_onnx.detecting import absence, asking
from florence_onnx.tasks import Task
from florence_onnx.tiling import merging
from florence_onnx.tiling.pieces import pieces_of

SAMPLES = sorted((bundle.DEMO_DIRECTORY.parent / "samples").glob("*.png"))
CLASSES = ["circle", "a red star", "square", "triangle", "salt and pepper", "square"]
GREEDY = GenerationOptions(num_beams=1)
SCORED = GenerationOptions(scores=True)
RULES = [rule for rule in absence.RULES if rule != "off"]


@pytest.fixture(scope="module", params=[0, 4], ids=["host", "continuous batching"])
def model(request: pytest.FixtureRequest) -> Florence2:
    options = {"intra_op_num_threads": 1}
    return Florence2.from_pretrained("demo", device="cpu", session_options=options, max_batch=request.param)


@pytest.fixture(scope="module")
def plain() -> Florence2:
    return Florence2.from_pretrained("demo", device="cpu", session_options={"intra_op_num_threads": 1})


@pytest.mark.parametrize("task", [tasks.OPEN_VOCABULARY_DETECTION, tasks.CAPTION_TO_PHRASE_GROUNDING])
def test_where_nothing_is_dropped_the_answers_are_those_of_single_calls(model: Florence2, task: Task[Any]) -> None:
    """Greedy and with the checkpoint's beams; a class twice, and one with "and", are among them."""
    for image, options in ((SAMPLES[0], GREEDY), (SAMPLES[1], None)):
        found = model.detect(image, CLASSES, task=task, absent="off", nms=None, options=options)
        assert list(found.by_class) == CLASSES[:-1]
        for each in found.classes:
            single = model.run(task, image, text_input=each.name, options=asking.SCORED if options is None else None)
            if options is not None:
                single = model.run(
                    task, image, text_input=each.name, options=GenerationOptions(num_beams=1, scores=True)
                )
            assert [answer.token_ids for answer in each.answers] == [single.token_ids]
            expected = sorted(single.results.bboxes, key=lambda box: -(box.score or 0))
            assert [(b.x, b.y) for b in each.bboxes] == [(b.x, b.y) for b in expected]
            assert [b.w for b in each.bboxes] == pytest.approx([b.w for b in expected])
            assert [b.score for b in each.bboxes] == pytest.approx([b.score for b in expected], rel=1e-4)
            assert {b.label for b in each.bboxes} <= {each.name}
            assert each.presence is None
    assert found.bboxes, "something must have been found, or nothing was compared"


def test_one_encoding_and_one_batch(plain: Florence2) -> None:
    with (
        mock.patch.object(Florence2, "encode", autospec=True, side_effect=Florence2.encode) as encode,
        mock.patch.object(Florence2, "run_batch", autospec=True, side_effect=Florence2.run_batch) as run_batch,
    ):
        plain.detect(SAMPLES[0], CLASSES, absent="score")
        assert (encode.call_count, run_batch.call_count) == (0, 1)
        assert len({id(image) for image in run_batch.call_args.args[2]}) == 1, "which run_batch encodes once"
        assert run_batch.call_args.kwargs["text_inputs"] == CLASSES[:-1]
        encoded = plain.encode(SAMPLES[0])
        plain.detect(encoded, CLASSES, absent="area")
        assert encode.call_count == 1, "an encoded image is not encoded again"


@pytest.mark.parametrize("rule", RULES)
def test_present_classes_pass_every_rule_and_wrong_answers_do_not_pass_a_high_threshold(
    model: Florence2, rule: absence.Absent
) -> None:
    found = model.detect(SAMPLES[0], ["circle", "square"], absent=rule, options=GREEDY)
    assert found.present == ("circle",) and found["square"] == ()
    circle = found.classes[0]
    assert circle.presence is not None and circle.presence >= absence.THRESHOLDS[rule]
    strict = model.detect(SAMPLES[0], ["circle"], absent=rule, threshold=circle.presence * 1.5 + 1, options=GREEDY)
    assert strict.present == () and strict.classes[0].presence == pytest.approx(circle.presence, rel=1e-4)


def test_contrast_and_likelihood_are_what_teacher_forcing_says(plain: Florence2) -> None:
    image = plain.encode(SAMPLES[0])
    found = plain.detect(image, ["circle"], absent="contrast", options=GREEDY).classes[0]
    answer = found.answers[0]
    blank = absence.PILImage.new("RGB", (10, 10), absence.BLANK)
    log_probs = [
        _log_softmax(plain.score_tokens(answer.task, each, answer.token_ids, text_input="circle"))
        for each in (image, blank)
    ]
    locations = [index for index, token in enumerate(answer.token_ids) if "<loc_" in plain._tokenizer.decode([token])]
    sums = [
        [sum(each[index - 1, answer.token_ids[index]] for index in locations[k : k + 4]) for k in (0, 4)]
        for each in log_probs
    ]
    assert len(locations) == 8
    assert found.presence == pytest.approx(max(np.subtract(*sums)), abs=1e-3)

    likely = plain.detect(image, ["circle"], absent="likelihood", options=GREEDY).classes[0]
    probabilities = []
    for box in answer.results.bboxes:
        region = Region.from_pixels(box.x, box.y, box.x + box.w, box.y + box.h, image.size)
        ids = [2, 0, *plain._tokenizer.encode_text("circle")]
        logits = plain.score_tokens(tasks.REGION_TO_CATEGORY, image, ids, region=region)
        logs = [_log_softmax(logits)[index - 1, ids[index]] for index in range(2, len(ids))]
        probabilities.append(math.exp(sum(logs) / len(logs)))
    assert likely.presence == pytest.approx(max(probabilities), abs=1e-4)


def _log_softmax(logits: Any) -> Any:
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


@pytest.mark.parametrize("options", [GenerationOptions(num_beams=1, scores=True), SCORED], ids=["greedy", "beams"])
def test_scores_of_given_answers_are_those_of_generated_ones(model: Florence2, options: GenerationOptions) -> None:
    """Answers of several lengths in one batch."""
    images = [model.encode(path) for path in SAMPLES[:3]]
    answers = model.run_batch(tasks.OBJECT_DETECTION, images, options=options)
    again = model.score_answers(tasks.OBJECT_DETECTION, images, [answer.token_ids for answer in answers])
    for answer, scored in zip(answers, again, strict=True):
        assert scored.results == answer.results and scored.token_ids == answer.token_ids
        assert scored.token_logprobs == pytest.approx(answer.token_logprobs, abs=1e-3)
    assert len({len(answer.token_ids) for answer in answers}) > 1


def test_answers_that_cannot_be_scored(plain: Florence2) -> None:
    for answers in ([], [""], [[2]], [[2, 0, 10**6]], ["a"] * 2):
        with pytest.raises(InputError):
            plain.score_answers(tasks.CAPTION, [SAMPLES[0]], answers)


def test_suppression_is_by_class_and_score() -> None:
    boxes = [(0, 0, 100, 100, 0.5), (5, 5, 100, 100, 0.9), (200, 0, 50, 50, 0.1), (0, 0, 40, 40, 0.8)]
    results = BoundingBoxes(tuple(BoundingBox(x, y, w, h, "a", score=score) for x, y, w, h, score in boxes))
    kept = merging.suppress(pieces_of(results, (0, 0, 300, 300), (300, 300)), 0.5)
    assert [piece.score for piece in kept] == [0.9, 0.8, 0.1]
    assert [piece.score for piece in merging.suppress(kept, 0.05)] == [0.9, 0.1]


def test_boxes_are_in_order_and_outlines_become_boxes() -> None:
    outline = Polygon((Point(9, 1), Point(3, 8), Point(5, 2)), "x", score=0.3)
    results = BoundingBoxes((BoundingBox(10, 20, -4, -6, "x", score=0.5),), (outline, Polygon((), "x")))
    found = asking._bboxes(results, "kite")
    assert [(b.x, b.y, b.w, b.h, b.label, b.score) for b in found] == [
        (6, 14, 4, 6, "kite", 0.5),
        (3, 1, 6, 7, "kite", 0.3),
    ]


def test_least_score(plain: Florence2) -> None:
    found = plain.detect(SAMPLES[0], ["circle"], options=GREEDY)
    scores = [box.score for box in found["circle"]]
    assert len(scores) == 2 and scores == sorted(scores, reverse=True)
    only = plain.detect(SAMPLES[0], ["circle"], min_score=scores[0], options=GREEDY)
    assert [box.score for box in only["circle"]] == scores[:1]


def test_tiles_of_an_image_that_fits_change_nothing(plain: Florence2) -> None:
    image = plain.encode(SAMPLES[0])
    for rule in ("off", "area"):
        found = [
            plain.detect(image, ["circle", "square"], absent=rule, tiles=tiles, options=GREEDY)
            for tiles in (None, Tiles(max(image.size)))
        ]
        assert found[0] == found[1]


def test_tiles_find_what_the_whole_image_does(plain: Florence2) -> None:
    """Each tile is asked for all classes, and by the rule for absence too."""
    image = plain.encode(SAMPLES[0])
    whole = plain.detect(image, ["circle", "square"], options=GREEDY)
    found = plain.detect(image, ["circle", "square"], tiles=Tiles(200, 0.6), options=GREEDY)
    assert len(found.classes[0].answers) == len(Tiles(200, 0.6).boxes(image.size)) + 1
    assert found["square"] == ()
    for box in whole["circle"]:
        assert sum(box_iou(_corners(box), _corners(other)) > 0.5 for other in found["circle"]) == 1


def _corners(box: BoundingBox) -> tuple[float, float, float, float]:
    return box.x, box.y, box.x + box.w, box.y + box.h


@pytest.mark.parametrize(
    ("classes", "error"),
    [
        ("car", InputError),
        ([], InputError),
        (7, InputError),
        (["car", ""], TextInputError),
        (["car", " \n"], TextInputError),
        (["car", 3], TextInputError),
        (["x" * 20000], TextInputError),
    ],
)
def test_wrong_classes(plain: Florence2, classes: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        plain.detect(SAMPLES[0], classes)


@pytest.mark.parametrize(
    "arguments",
    [
        {"min_score": -0.1},
        {"min_score": math.nan},
        {"nms": 2},
        {"nms": "no"},
        {"absent": "guess"},
        {"threshold": "high"},
        {"tiles": 768},
        {"task": tasks.OBJECT_DETECTION},
        {"task": tasks.REFERRING_EXPRESSION_SEGMENTATION},
        {"task": tasks.REGION_TO_CATEGORY},
    ],
)
def test_wrong_arguments(plain: Florence2, arguments: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        plain.detect(SAMPLES[0], ["car"], **arguments)


def test_an_unknown_task(plain: Florence2) -> None:
    with pytest.raises(UnknownTaskError):
        plain.detect(SAMPLES[0], ["car"], task="open-vocabulary")


def test_names_are_stripped_and_taken_once() -> None:
    assert asking.class_names([" car", "car ", "a car"]) == ["car", "a car"]


def test_other_forms(plain: Florence2) -> None:
    pytest.importorskip("supervision")
    found = plain.detect(SAMPLES[0], ["square", "circle"], options=GREEDY)
    assert list(found.to_dict()["results"]) == list(found.to_dict()["presence"]) == ["square", "circle"]
    assert found.to_dict()["results"]["circle"][0]["score"] == found.bboxes[0].score
    assert found.to_dict()["presence"]["square"] is None
    detections = found.to_supervision()
    box = found.bboxes[0]
    assert detections.xyxy[0] == pytest.approx([box.x, box.y, box.x + box.w, box.y + box.h])
    assert detections.class_id.tolist() == [1, 1] and detections["class_name"].tolist() == ["circle", "circle"]
    assert detections.confidence == pytest.approx([each.score for each in found.bboxes])
    assert found.draw().size == found.source_image.size
    with pytest.raises(KeyError):
        found["diamond"]
    empty = Detections((), found.source_image).to_supervision()
    assert len(empty) == 0


def test_fitted_thresholds() -> None:
    assert absence.fit_threshold([0.9, 0.8, 0.4], [0.1, 0.2]) == pytest.approx(0.3)
    assert absence.fit_threshold([0.9, 0.8, 0.1], [0.5, 0.6, 0.7, None]) == pytest.approx(0.75)
    assert absence.fit_threshold([5.0, None], [None]) == 5
    with pytest.raises(InputError):
        absence.fit_threshold([None], [0.3])
