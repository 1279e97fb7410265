"""Scores of parsed answers: which tokens a box, a quad, an outline or a word was made of."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from florence_onnx import Florence2, GenerationOptions, InputError, tasks
from florence_onnx.answers import postprocess, scoring
from florence_onnx.answers.results import BoundingBoxes, OCRBoundingBox, PolygonOutput, to_dict
from florence_onnx.answers.scoring import ScoredToken
from florence_onnx.bundles.bundle import DEMO_DIRECTORY

SAMPLE = DEMO_DIRECTORY.parent / "samples" / "scene-1.png"
SIZE = (640, 480)


class Answer:
    """An answer whose tokens are given as text; the log-probability of token i is -(i + 1) / 100."""

    def __init__(self, *pieces: str) -> None:
        self.text = "".join(pieces)
        self.tokens = [
            ScoredToken(index, piece, -(index + 1) / 100, index / 1000, bool(re.fullmatch(r"<loc_\d+>", piece)))
            for index, piece in enumerate(pieces)
        ]
        self._pieces = pieces

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self._pieces[index] for index in ids)

    def scored(self, parser: Callable[..., Any]) -> Any:
        results = parser(self.text, SIZE)
        found = scoring.score_results(results, parser, self.text, self.tokens, self.decode)
        assert found == results and to_dict(found) == to_dict(results)
        return found


def loc(*bins: int) -> list[str]:
    return [f"<loc_{value}>" for value in bins]


def mean_of(*indices: int) -> Any:
    return pytest.approx(math.exp(sum(-(index + 1) / 100 for index in indices) / len(indices)))


def test_boxes_that_share_a_label() -> None:
    answer = Answer("</s>", "red", " car", *loc(5, 5, 5, 5), *loc(9, 9, 1, 1), "sign", *loc(5, 5, 5, 5), "</s>")
    first, second, third = answer.scored(postprocess.description_with_bboxes).bboxes
    assert [each.score for each in (first, second, third)] == [
        mean_of(3, 4, 5, 6),
        mean_of(7, 8, 9, 10),
        mean_of(12, 13, 14, 15),
    ]
    assert first.score_parts.coordinates == pytest.approx((-0.04, -0.05, -0.06, -0.07))
    assert first.score_parts.near == pytest.approx((0.003, 0.004, 0.005, 0.006))
    assert first.score_parts.label == second.score_parts.label == pytest.approx(-0.05)
    assert [(word.text, word.score) for word in first.score_parts.text.words] == [
        ("red", mean_of(1)),
        ("car", mean_of(2)),
    ]
    assert third.score_parts.label == pytest.approx(-0.12)


def test_a_dropped_box_does_not_shift_the_others() -> None:
    answer = Answer("the", *loc(1, 2, 3, 4), "a", " car", *loc(5, 6, 7, 8, 9), " sign", *loc(1, 2, 3, 4))
    found = answer.scored(postprocess.phrase_grounding).bboxes
    assert [box.label for box in found] == ["a car", "sign"]
    assert [box.score for box in found] == [mean_of(7, 8, 9, 10), mean_of(13, 14, 15, 16)]


def test_proposals_have_no_label_to_score() -> None:
    (box,) = Answer("</s>", *loc(1, 2, 3, 4), "</s>").scored(postprocess.bboxes).bboxes
    assert (box.score, box.score_parts.label, box.score_parts.text) == (mean_of(1, 2, 3, 4), None, None)


def test_lines_of_text_and_their_words() -> None:
    answer = Answer("STOP", " HE", "RE", *loc(*range(8)), "\n", "exit", *loc(*range(8)))
    first, second = answer.scored(postprocess.ocr).quad_boxes
    assert first.score == mean_of(*range(3, 11)) and second.score == mean_of(*range(13, 21))
    assert [word.text for word in first.score_parts.text.words] == ["STOP", "HERE"]
    assert first.score_parts.text.words[1].score == mean_of(1, 2)
    assert first.score_parts.text.least == pytest.approx(math.exp(-0.03))


def test_outlines_of_several_parts() -> None:
    answer = Answer(
        "cat", "<poly>", *loc(1, 2, 3, 4, 5, 6), "<sep>", *loc(7, 8, 9, 1, 2, 3), "</poly>", "dog", *loc(1, 2, 3, 4)
    )
    first, second, third = answer.scored(postprocess.description_with_polygons).polygons
    assert first.score == mean_of(*range(2, 8)) and second.score == mean_of(*range(9, 15))
    assert third.score == mean_of(*range(17, 21))
    assert first.score_parts.label == second.score_parts.label == pytest.approx(-0.01)


def test_locations_that_ordinary_tokens_spell_have_no_score() -> None:
    spelled = ("<", "loc", "_1", ">")
    answer = Answer("car", *loc(1, 2, 3), *spelled, "sign", *loc(5, 6, 7, 8))
    first, second = answer.scored(postprocess.description_with_bboxes).bboxes
    assert first.score is None and first.score_parts is None
    assert second.score == mean_of(9, 10, 11, 12)


def test_a_parser_that_reads_the_numbers_gives_no_scores() -> None:
    def first_half(text: str, size: Any) -> BoundingBoxes:
        found = postprocess.description_with_bboxes(text, size).bboxes
        return BoundingBoxes(tuple(box for box in found if box.x > 300))

    answer = Answer("car", *loc(1, 1, 5, 5), "sign", *loc(800, 800, 900, 900))
    (box,) = answer.scored(first_half).bboxes
    assert (box.label, box.score) == ("sign", None)


@given(
    st.lists(st.sampled_from(["car", " red", "<poly>", "</poly>", "<sep>", "\n", "<loc_1>", "<loc_999>", "</s>", "<"]))
)
@settings(max_examples=300, deadline=None)
def test_any_answer_can_be_scored(pieces: list[str]) -> None:
    answer = Answer(*pieces)
    for task in tasks.TASKS.values():
        found = answer.scored(task.parser)
        items = [] if isinstance(found, str) else [item for part in vars(found).values() for item in part]
        for item in items:
            num_coordinates = len(getattr(item, "points", ())) * 2 or (8 if isinstance(found, OCRBoundingBox) else 4)
            if item.score_parts is not None:
                assert len(item.score_parts.coordinates) == num_coordinates
                assert 0 < item.score <= 1


def test_texts_and_their_words() -> None:
    answer = Answer("</s>", "Two", " circ", "les", ",", " a", "<loc_3>", "b", "</s>")
    given_first = [replace(answer.tokens[0], is_given=True), *answer.tokens[1:]]
    found = scoring.score_text(given_first, answer.decode)
    assert found is not None
    assert [word.text for word in found.words] == ["Two", "circles,", "a", "b"]
    assert found.words[1].score == mean_of(2, 3, 4)
    assert (found.mean, found.least) == (mean_of(*range(1, 9)), pytest.approx(math.exp(-0.09)))
    assert scoring.score_text(given_first[:1], answer.decode) is None


# ---------------------------------------------------------------------------------------------------------- predictions


@pytest.fixture(scope="module")
def model() -> Florence2:
    return Florence2.from_pretrained("demo", device="cpu")


@pytest.mark.parametrize("task", tasks.TASKS.values(), ids=lambda task: task.slug)
@pytest.mark.parametrize("beams", [1, 3])
def test_scores_change_no_answer_and_no_json(task: tasks.Task[Any], beams: int, model: Florence2) -> None:
    region = tasks.Region(430, 364, 592, 539) if task.needs == "region" else None
    text = "a red circle" if task.needs == "text" else None
    plain = model.run(task, SAMPLE, text_input=text, region=region, options=GenerationOptions(beams))
    scored = model.run(task, SAMPLE, text_input=text, region=region, options=GenerationOptions(beams, scores=True))
    assert scored == plain and scored.to_dict() == plain.to_dict()
    assert plain.token_logprobs is None and plain.sequence_logprob is None and plain.text_score is None
    assert scored.token_logprobs is not None and len(scored.token_logprobs) == len(scored.token_ids)
    assert scored.sequence_logprob == pytest.approx(sum(scored.token_logprobs))
    described = scored.to_dict(with_scores=True)
    if isinstance(scored.results, str):
        assert scored.text_score is not None and described["text_score"] == to_dict(scored.text_score)
        assert described["text_score"]["words"]
    else:
        items = [item for part in described["results"].values() for item in part]
        assert items and all(0 < item["score"] <= 1 for item in items)
        assert all(
            item["score"] is None for part in plain.to_dict(with_scores=True)["results"].values() for item in part
        )


def test_results_can_be_cut_by_their_score(model: Florence2) -> None:
    found = model.run(tasks.OBJECT_DETECTION, SAMPLE, options=GenerationOptions(scores=True))
    scores = sorted(box.score for box in found.results.bboxes if box.score is not None)
    assert [box.score for box in found.above(scores[1]).results.bboxes] == [
        box.score for box in found.results.bboxes if box.score is not None and box.score >= scores[1]
    ]
    assert found.above(0) == found and found.above(1).results == BoundingBoxes(())
    with pytest.raises(InputError, match=r"GenerationOptions\(scores=True\)"):
        model.run(tasks.OBJECT_DETECTION, SAMPLE).above(0.5)
    with pytest.raises(InputError, match="the answer is text"):
        model.run(tasks.CAPTION, SAMPLE, options=GenerationOptions(scores=True)).above(0.5)


def test_scores_in_the_forms_of_others(model: Florence2) -> None:
    found = model.run(tasks.OBJECT_DETECTION, SAMPLE, options=GenerationOptions(scores=True))
    scores = [box.score for box in found.results.bboxes]
    assert found.to_transformers()["<OD>"]["scores"] == scores
    assert "scores" not in model.run(tasks.OBJECT_DETECTION, SAMPLE).to_transformers()["<OD>"]
    proposals = model.run(tasks.REGION_PROPOSAL, SAMPLE, options=GenerationOptions(scores=True))
    assert "scores" not in proposals.to_transformers()["<REGION_PROPOSAL>"]  # nor in Microsoft's
    pytest.importorskip("supervision", reason="pip install -e '.[supervision]'")
    assert found.to_supervision().confidence.tolist() == pytest.approx(scores)
    outlined = model.run(
        tasks.REGION_TO_SEGMENTATION,
        SAMPLE,
        region=tasks.Region(430, 364, 592, 539),
        options=GenerationOptions(scores=True),
    )
    assert isinstance(outlined.results, PolygonOutput)
    assert outlined.to_supervision().confidence.tolist() == pytest.approx([outlined.results.polygons[0].score])
