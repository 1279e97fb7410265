"""The figures of agreement, on answers written by hand and on generated ones."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("rapidfuzz", reason="needs the export extra: pip install -e '.[export]'")
from export.verification.agreement import (
    Answer,
    BoxAgreement,
    compare_answers,
    compare_boxes,
    compare_logits,
    compare_masks,
    compare_texts,
    labelled_boxes,
    summarise,
    words,
)
from export.verification.report import Bar, find_failures, make_agreement
from florence_onnx import tasks
from florence_onnx.answers.matching import pair_boxes
from florence_onnx.tasks import Task, parse

SIZE = (500, 250)


def say(text: str, token_ids: tuple[int, ...] = (2, 0, 2), task: Task = tasks.OBJECT_DETECTION) -> Answer:
    return Answer(token_ids, text, parse(task, text, SIZE), SIZE)


def box(label: str, *bins: int) -> str:
    return label + "".join(f"<loc_{value}>" for value in bins)


# --- tokens and text -----------------------------------------------------------------------------------------------


def test_one_token_too_many_moves_all_behind_it() -> None:
    expected = say("", (2, 0, 10, 11, 12, 13, 2))
    found = compare_answers(expected, say("", (2, 0, 10, 99, 11, 12, 13, 2)), num_given=2)
    assert (found.num_equal_tokens, found.num_tokens) == (1, 6), "given tokens are not counted"
    assert found.token_similarity == pytest.approx(5 / 6)
    assert not found.is_exact


def test_equal_given_tokens_do_not_make_an_empty_answer_agree() -> None:
    found = compare_answers(say("", (2, 0, 2)), say("", (2, 0, 7, 8)), num_given=2)
    assert (found.num_equal_tokens, found.token_similarity) == (0, 0)


def test_words_are_what_is_left_without_marks() -> None:
    assert words("</s><s>red circle<loc_1><loc_2><loc_3><loc_4>a < b<poly><loc_1></poly></s>") == "red circle\na < b"
    assert words("</s><s><loc_1><loc_2></s>") == ""


def test_text_similarity() -> None:
    assert compare_texts("kitten", "sitting") == pytest.approx(1 - 3 / 7)
    assert compare_texts("", "word") == 0
    assert compare_texts("", "") is None, "two answers without words say nothing about words"


# --- boxes ---------------------------------------------------------------------------------------------------------


def test_boxes_in_bins_whatever_the_image_is() -> None:
    ((label, found),) = labelled_boxes(say(box("cat", 100, 200, 300, 400)))
    assert label == "cat"
    assert found == pytest.approx((100.5, 200.5, 300.5, 400.5), abs=1e-3)


def test_box_agreement_of_a_moved_a_renamed_and_a_missing_box() -> None:
    expected = say(box("cat", 100, 100, 300, 300) + box("dog", 500, 500, 700, 700) + box("cow", 0, 0, 50, 50))
    answer = say(box("cat", 100, 100, 300, 340) + box("hog", 500, 500, 700, 700))
    found = compare_boxes(expected, answer)
    assert found is not None
    assert (found.num_reference, found.num_found, found.num_loose, found.num_tight) == (3, 2, 1, 0)
    assert found.sum_shift == pytest.approx(10, abs=1e-3), "40 bins on one coordinate of four"
    figures = summarise([compare_answers(expected, answer)])
    assert figures.box_f1_50 == pytest.approx(2 / 5)
    assert figures.box_f1_90 == 0
    assert figures.coordinate_shift == pytest.approx(10, abs=1e-3)


def test_boxes_far_apart_do_not_count_as_shifted() -> None:
    found = compare_boxes(say(box("cat", 0, 0, 100, 100)), say(box("cat", 500, 500, 900, 900)))
    assert found == BoxAgreement(1, 1, 0, 0, 0.0)


def test_answers_of_text_have_no_boxes_and_empty_ones_no_f1() -> None:
    text = say("a cat", task=tasks.CAPTION)
    assert compare_boxes(text, text) is None
    empty = say("")
    assert compare_boxes(empty, empty) == BoxAgreement(0, 0, 0, 0, 0.0)
    assert summarise([compare_answers(empty, empty)]).box_f1_50 is None
    assert summarise([compare_answers(empty, say(box("cat", 0, 0, 9, 9)))]).box_f1_50 == 0


def test_quads_count_by_the_box_around_them() -> None:
    answer = say(box("word", 10, 20, 30, 10, 40, 50, 5, 60), task=tasks.OCR_WITH_REGION)
    ((_, found),) = labelled_boxes(answer)
    assert found == pytest.approx((5.5, 10.5, 40.5, 60.5), abs=1e-3)


def test_equal_boxes_agree_even_without_area() -> None:
    flat = say(box("line", 100, 200, 300, 200))
    found = compare_boxes(flat, flat)
    assert found is not None and found.num_tight == 1


def test_outlines_by_mask_and_by_box() -> None:
    square = say(box("", 0, 0, 400, 0, 400, 400, 0, 400), task=tasks.REGION_TO_SEGMENTATION)
    half = say(box("", 0, 0, 400, 0, 400, 200, 0, 200), task=tasks.REGION_TO_SEGMENTATION)
    assert compare_masks(square, square) == 1
    assert compare_masks(square, half) == pytest.approx(0.5, abs=0.01)
    found = compare_boxes(square, half)
    assert found is not None and (found.num_loose, found.num_tight) == (1, 0)
    nothing = say("", task=tasks.REGION_TO_SEGMENTATION)
    assert compare_masks(square, nothing) == 0
    assert compare_masks(nothing, nothing) is None


# --- logits --------------------------------------------------------------------------------------------------------


def test_logit_errors_by_hand() -> None:
    expected = np.log(np.array([[0.5, 0.25, 0.25], [0.2, 0.7, 0.1]], dtype=np.float32))
    other = np.log(np.array([[0.25, 0.5, 0.25], [0.2, 0.7, 0.1]], dtype=np.float32))
    found = compare_logits(expected, other)
    assert found.num_positions == 2
    assert found.max_abs == pytest.approx(math.log(2), rel=1e-6)
    assert found.mean_abs == pytest.approx(math.log(2) / 3, rel=1e-6)
    assert found.kl == pytest.approx(0.25 * math.log(2) / 2, rel=1e-5)
    assert found.top1 == 0.5


def test_a_constant_moves_logits_but_not_probabilities() -> None:
    logits = np.random.default_rng(0).normal(size=(3, 7)).astype(np.float32)
    found = compare_logits(logits, logits + np.float32(2))
    assert found.max_abs == pytest.approx(2, abs=1e-6)
    assert found.kl == pytest.approx(0, abs=1e-9)
    assert found.top1 == 1


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_an_infinite_error(value: float) -> None:
    logits = np.zeros((2, 3), dtype=np.float32)
    broken = logits.copy()
    broken[1, 2] = value
    for found in (compare_logits(logits, broken), compare_logits(broken, logits)):
        assert found.max_abs == math.inf and found.top1 == 0.5


def test_logits_of_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot be compared"):
        compare_logits(np.zeros((2, 3)), np.zeros((2, 4)))
    with pytest.raises(ValueError, match="cannot be compared"):
        compare_logits(np.zeros((0, 3)), np.zeros((0, 3)))


# --- properties ----------------------------------------------------------------------------------------------------

bins = st.integers(0, 999)
things = st.lists(st.tuples(st.sampled_from(["cat", "dog", ""]), bins, bins, bins, bins), max_size=5)
token_lists = st.lists(st.integers(3, 6), max_size=8)


@st.composite
def answers(draw: st.DrawFn) -> Answer:
    text = "".join(box(*thing) for thing in draw(things))
    task = draw(st.sampled_from([tasks.OBJECT_DETECTION, tasks.REGION_TO_SEGMENTATION]))
    return say(text, (2, *draw(token_lists), 2), task)


@given(answers())
def test_an_answer_agrees_with_itself(answer: Answer) -> None:
    figures = summarise([compare_answers(answer, answer)])
    shares = [figures.exact, figures.token_agreement, figures.token_similarity]
    shares += [figures.text_similarity, figures.box_f1_50, figures.box_f1_90, figures.mask_iou]
    assert all(share in (1.0, None) for share in shares)
    assert figures.coordinate_shift in (0.0, None)


@given(answers(), answers())
def test_agreement_is_symmetric_and_a_share(a: Answer, b: Answer) -> None:
    there, back = summarise([compare_answers(a, b)]), summarise([compare_answers(b, a)])
    assert replace(there, num_boxes=0, coordinate_shift=None) == replace(back, num_boxes=0, coordinate_shift=None)
    assert (there.coordinate_shift or 0) == pytest.approx(back.coordinate_shift or 0)
    for share in (there.token_agreement, there.token_similarity, there.box_f1_50, there.box_f1_90, there.mask_iou):
        assert share is None or 0 <= share <= 1


@given(st.lists(st.lists(st.floats(-30, 30, width=32), min_size=4, max_size=4), min_size=2, max_size=2))
def test_divergence_is_never_negative(rows: list[list[float]]) -> None:
    a, b = (np.array([row], dtype=np.float32) for row in rows)
    there, back = compare_logits(a, b), compare_logits(b, a)
    assert there.kl >= 0
    assert (there.max_abs, there.mean_abs, there.top1) == (back.max_abs, back.mean_abs, back.top1)


def test_the_best_overlap_is_paired_first() -> None:
    true = [("a", (0, 0, 10, 10)), ("a", (0, 0, 10, 8))]
    pairs = pair_boxes([("a", (0, 0, 10, 8)), ("a", (0, 0, 10, 9))], true)
    assert [(pair.found, pair.true) for pair in pairs] == [(0, 1), (1, 0)]


# --- sums and bars -------------------------------------------------------------------------------------------------


def test_sums_weigh_tokens_boxes_and_positions_equally() -> None:
    good, bad = np.zeros((3, 2), dtype=np.float32), np.ones((1, 2), dtype=np.float32) * [[1, 3]]
    long = compare_answers(say("", (2, 3, 4, 5)), say("", (2, 3, 4, 5)), logits=compare_logits(good, good))
    short = compare_answers(say("", (2, 3)), say("", (2, 4)), logits=compare_logits(np.zeros((1, 2)), bad))
    figures = summarise([long, short])
    assert figures.token_agreement == pytest.approx(3 / 4)
    assert figures.token_similarity == pytest.approx(1 / 2)
    assert figures.exact == 0.5
    assert (figures.num_positions, figures.logit_max_abs, figures.logit_mean_abs) == (4, 3, 0.5)
    with pytest.raises(ValueError, match="no comparison"):
        summarise([])


def test_every_task_must_clear_a_bar_and_something_must_be_measured() -> None:
    good, bad = (compare_answers(say("", (2, 3)), say("", (2, token))) for token in (3, 4))
    agreement = make_agreement("int8", "int8", 1, {"caption": [good] * 9, "ocr": [bad]})
    assert agreement.overall.token_agreement == 0.9
    tokens = Bar("--min-token-agreement", "token_agreement", 0.8)
    assert find_failures([agreement], []) == []
    assert find_failures([agreement], [tokens]) == [
        "int8, beams 1, ocr: token_agreement is 0, --min-token-agreement is 0.8"
    ]
    (unmeasured,) = find_failures([agreement], [Bar("--min-box-f1", "box_f1_50", 0.0)])
    assert "nothing was measured for --min-box-f1" in unmeasured


def test_nan_clears_no_bar() -> None:
    for is_maximum in (True, False):
        assert not Bar("", "", 1.0, is_maximum).is_cleared(math.nan)
        assert not Bar("", "", math.nan, is_maximum).is_cleared(1.0)


def test_json_has_no_infinity() -> None:
    broken = compare_logits(np.zeros((1, 2)), np.full((1, 2), np.nan))
    comparison = compare_answers(say(""), say(""), logits=broken)
    written = make_agreement("a", "fp16", 1, {"ocr": [comparison]}).to_dict()
    assert written["overall"]["logit_max_abs"] is None and written["overall"]["logit_top1"] == 0
