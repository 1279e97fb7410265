"""`deadline` and `cancel`: answers end within one decode step, on the host and in continuous batching. Steps are counted.

The clock of these deadlines is the number of decoder runs.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from florence_onnx import (
    Cancel,
    CancelledError,
    Choice,
    Deadline,
    DeadlineError,
    EncodedImage,
    Florence2,
    FlorenceError,
    GenerationOptions,
    ImageNotFoundError,
    InputError,
    Prediction,
    Tiles,
    tasks,
)
from florence_onnx.answers.results import to_dict
from florence_onnx.generation.generate import drive, new_search
from florence_onnx.generation.options import SearchConfig
from florence_onnx.generation.progress import Progress
from florence_onnx.inference.continuous_batching import ContinuousBatch, DecodeRequest
from florence_onnx.tiling.asking import TiledPrediction
from tests.counted_steps import GIVEN, SAMPLES, WAYS, count_steps, load
from tests.generation.test_generation import EOS, START, TableSession, make_tables
from tests.inference.test_continuous_batching import Countdown, FakeDecoder

SEARCHES = {
    "greedy": GenerationOptions(num_beams=1, prompt_lookup_num_tokens=0),
    "beams": GenerationOptions(num_beams=3),
    "samples": GenerationOptions(num_beams=1, do_sample=True, seed=3, num_return_sequences=2),
}
CUT = {"deadline", "cancelled"}


@pytest.fixture(scope="module", params=WAYS.values(), ids=WAYS)
def model(request: pytest.FixtureRequest) -> Florence2:
    return load(request.param)


@pytest.fixture
def steps(model: Florence2) -> Callable[[], float]:
    return count_steps(model)


# ------------------------------------------------------------------------------------------------------ one answer


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_deadline_ends_the_answer_at_the_step_in_which_it_passes(
    model: Florence2, steps: Callable[[], float], search: str, count: int
) -> None:
    encoded, options = model.encode(SAMPLES[0]), SEARCHES[search]
    found = model.run("<OD>", encoded, options=options, deadline=Deadline(count, clock=steps))
    assert steps() == count
    assert found.truncated == "deadline"
    assert count < len(found.token_ids) <= count + 2, "a forced first token comes without a step"
    whole = model.run("<OD>", encoded, options=options)
    assert whole.truncated is False and steps() > 2 * count
    if search != "beams":  # among beams another one may have led at that step
        assert found.token_ids == whole.token_ids[: len(found.token_ids)]
        assert whole.text.startswith(found.text)


def test_the_answer_so_far_is_parsed(model: Florence2, steps: Callable[[], float]) -> None:
    whole = model.run("<OD>", SAMPLES[0], options=SEARCHES["greedy"])
    num_steps = steps()
    found = model.run(
        "<OD>",
        SAMPLES[0],
        options=SEARCHES["greedy"],
        deadline=Deadline(num_steps - 2, clock=lambda: steps() - num_steps),
    )
    assert 0 < len(found.results.bboxes) < len(whole.results.bboxes)
    assert found.results.bboxes == whole.results.bboxes[: len(found.results.bboxes)]
    assert found.draw().size == whole.draw().size


@pytest.mark.parametrize("search", SEARCHES)
def test_a_cancel_ends_the_answer_at_the_next_step(model: Florence2, steps: Callable[[], float], search: str) -> None:
    cancel = Cancel()

    def listen(index: int, token_ids: Sequence[int], image: EncodedImage) -> None:
        if steps() == 4:
            cancel.cancel()

    (found,) = model.run_batch("<OD>", SAMPLES[:1], options=SEARCHES[search], cancel=cancel, on_tokens=listen)
    assert cancel.is_cancelled and steps() == 4
    assert found.truncated == "cancelled"


@pytest.mark.parametrize("task", tasks.TASKS.values(), ids=lambda task: task.slug)
@pytest.mark.parametrize("stop", ["deadline", "cancelled"])
def test_what_is_over_before_it_begins_runs_no_graph(
    model: Florence2, steps: Callable[[], float], task: tasks.Task[Any], stop: str
) -> None:
    cancel = Cancel()
    cancel.cancel()
    limit: dict[str, Any] = {"deadline": 0} if stop == "deadline" else {"cancel": cancel}
    before = model._vision_encoder.num_runs
    found = model.run(task, SAMPLES[0], **GIVEN[task.needs], **limit)
    assert model._vision_encoder.num_runs == before and steps() == 0
    assert found.truncated == stop
    assert not any(to_dict(found.results).values()) if task.has_image else found.results == ""
    assert found.source_image.size == Image.open(SAMPLES[0]).size
    with pytest.raises(DeadlineError if stop == "deadline" else CancelledError):
        model.run(task, SAMPLES[0], **GIVEN[task.needs], **limit, on_deadline="raise")
    assert model._vision_encoder.num_runs == before and steps() == 0


def test_an_encoded_image_needs_no_encoder_and_a_later_deadline_comes_before_the_first_step(
    model: Florence2, steps: Callable[[], float]
) -> None:
    encoded = model.encode(SAMPLES[0])
    found = model.run("<CAPTION>", encoded, deadline=0)
    assert (found.truncated, found.results, steps()) == ("deadline", "", 0)


def test_the_encoder_is_not_run_where_it_has_never_been_so_quick(
    model: Florence2, steps: Callable[[], float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An encoding of 9 of these seconds is not begun with 8 left, and is with 10 left."""
    model.encode(SAMPLES[0])
    encoding_time = model._answering._encoding_time  # type: ignore[attr-defined]
    assert encoding_time.least(model.image_sizes[0]) > 0
    monkeypatch.setattr(encoding_time, "least", lambda image_size: 9.0)
    before = model._vision_encoder.num_runs
    found = model.run("<CAPTION>", SAMPLES[0], deadline=Deadline(8, clock=steps))
    assert model._vision_encoder.num_runs == before and steps() == 0
    assert found.truncated == "deadline"
    found = model.run("<CAPTION>", SAMPLES[0], deadline=Deadline(10, clock=steps))
    assert model._vision_encoder.num_runs == before + 1 and 0 < steps() <= 10
    assert found.text


def test_an_image_that_another_request_needs_is_encoded(model: Florence2) -> None:
    before = model._vision_encoder.num_runs
    over, whole = model.run_batch(["<CAPTION>", "<CAPTION>"], [SAMPLES[0]] * 2, deadline=[0, None])
    assert model._vision_encoder.num_runs == before + 1
    assert over.truncated == "deadline" and not over.results
    assert not whole.truncated and whole.results


def test_an_error_instead_of_the_answer_so_far(model: Florence2, steps: Callable[[], float]) -> None:
    with pytest.raises(DeadlineError, match='on_deadline="return" returns the answer so far') as caught:
        model.run("<OD>", SAMPLES[0], deadline=Deadline(3, clock=steps), on_deadline="raise")
    assert steps() == 3
    assert isinstance(caught.value, TimeoutError) and isinstance(caught.value, FlorenceError)
    assert caught.value.index is None


def test_without_a_limit_in_sight_the_answer_is_as_ever(model: Florence2) -> None:
    for task in tasks.TASKS.values():
        found = model.run(task, SAMPLES[1], **GIVEN[task.needs], deadline=1e6, cancel=Cancel(), on_deadline="raise")
        assert found == model.run(task, SAMPLES[1], **GIVEN[task.needs])


def test_a_bad_image_is_still_an_error(model: Florence2, tmp_path: Path) -> None:
    with pytest.raises(ImageNotFoundError):
        model.run("<OD>", tmp_path / "missing.png", deadline=0)


# --------------------------------------------------------------------------------------------------------- batches


@pytest.mark.parametrize("search", SEARCHES)
def test_in_a_batch_the_others_go_on(model: Florence2, steps: Callable[[], float], search: str) -> None:
    options = SEARCHES[search]
    images = [SAMPLES[0], SAMPLES[1], SAMPLES[2], SAMPLES[0]]
    names = ["<OD>", "<OD>", "<DETAILED_CAPTION>", "<OCR_WITH_REGION>"]
    alone = [model.run(name, image, options=options) for name, image in zip(names, images, strict=True)]
    rows: list[set[int]] = [set() for _ in range(2000)]

    def listen(index: int, token_ids: Sequence[int], image: EncodedImage) -> None:
        rows[int(steps())].add(index)

    begin = steps()
    limits = [None, Deadline(3, clock=steps), None, Deadline(5, clock=steps)]
    found = model.run_batch(names, images, options=options, deadline=limits, on_tokens=listen)
    assert found[0] == alone[0] and found[2] == alone[2]
    assert found[1].truncated == found[3].truncated == "deadline"
    assert not any(1 in each for each in rows[int(begin) + 4 :]), "its rows have left the batch"
    if not model.max_batch:  # there requests join the batch one by one
        assert rows[int(begin) + 4] == {0, 2, 3} and rows[int(begin) + 5] == {0, 2, 3}
        assert rows[int(begin) + 6] <= {0, 2}


def test_errors_in_their_places(model: Florence2, steps: Callable[[], float]) -> None:
    limits = [None, Deadline(2, clock=steps), 0, None]
    found = model.run_batch("<OD>", SAMPLES[:4], deadline=limits, on_deadline="raise", on_error="return")
    assert [type(each) for each in found] == [Prediction, DeadlineError, DeadlineError, Prediction]
    assert [each.index for each in found[1:3]] == [1, 2]  # type: ignore[union-attr]
    assert str(found[1]).startswith("image 2 of 4: the deadline has passed")


def test_one_deadline_for_all_portions(model: Florence2, steps: Callable[[], float]) -> None:
    before = model._vision_encoder.num_runs
    found = model.run_batch("<OD>", SAMPLES[:4], batch_size=1, deadline=Deadline(2, clock=steps))
    assert [each.truncated for each in found] == ["deadline"] * 4
    assert steps() == 2 and model._vision_encoder.num_runs == before + 1
    assert found[0].text.startswith("</s><s>green") and {each.text for each in found[1:]} == {"</s><s>"}


def test_what_a_listener_raises_ends_its_call_alone(model: Florence2) -> None:
    expected = model.run("<OD>", SAMPLES[0])
    found: list[object] = []
    other = threading.Thread(target=lambda: found.append(model.run("<OD>", SAMPLES[0])))

    def listen(index: int, token_ids: Sequence[int], image: EncodedImage) -> None:
        if not other.ident:
            other.start()
        elif len(token_ids) > 6:
            raise LookupError("in the listener")

    with pytest.raises(LookupError, match="in the listener"):
        model.run_batch("<OD>", SAMPLES[1:2], options=SEARCHES["greedy"], on_tokens=listen)
    other.join(120)
    assert found == [expected]


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"deadline": -1}, "at least 0, got -1"),
        ({"deadline": float("nan")}, "at least 0, got nan"),
        ({"deadline": float("inf")}, "at least 0, got inf"),
        ({"deadline": True}, "got True"),
        ({"deadline": "0.5"}, "deadline must be a number of seconds or a Deadline, or a list"),
        ({"deadline": [-1]}, "at least 0, got -1"),
        ({"deadline": [None, None]}, "deadline has more entries than the 1 images"),
        ({"cancel": 1}, "cancel must be a Cancel, got 1"),
        ({"cancel": [threading.Event()]}, "cancel must be a Cancel"),
        ({"cancel": []}, "cancel has 0 entries"),
        ({"on_deadline": "stop"}, 'must be "return" or "raise"'),
    ],
)
def test_wrong_limits_are_refused(model: Florence2, limits: dict[str, Any], message: str) -> None:
    before = model._vision_encoder.num_runs
    with pytest.raises(InputError, match=message):
        model.run_batch("<CAPTION>", SAMPLES[:1], **limits)
    assert model._vision_encoder.num_runs == before


# ----------------------------------------------------------------------------------------------- continuous batching


def test_a_cancelled_prompt_frees_its_row_at_the_next_step() -> None:
    """Three prompts for two rows: the one that waits takes the row of the one that is cancelled in the second step."""
    cancel = Cancel()
    waiting = threading.Event()

    def on_step(count: int) -> None:
        waiting.wait(120)
        if sum(name == "step" for name, *_ in decoder.log) == 2:
            cancel.cancel()

    decoder = FakeDecoder(step=on_step)
    batch = ContinuousBatch(decoder, 2)
    requests = [followed(50, Progress(cancel=cancel)), followed(4, Progress()), followed(3, Progress())]
    for each in requests:
        batch.submit(each)
    waiting.set()
    batch.wait(lambda: all(each.is_done for each in requests))
    batch.close()
    assert [each.result().truncated for each in requests] == ["cancelled", False, False]
    assert [entry for entry in decoder.log if entry[0] != "allocate"][:8] == [
        *[("add", 0), ("add", 1), ("step", 2), ("step", 2)],
        *[("add", 0), ("step", 2), ("step", 2), ("step", 1)],
    ]


def test_a_prompt_that_waits_behind_its_deadline_is_never_begun() -> None:
    steps = [0.0]
    decoder = FakeDecoder(step=lambda count: steps.__setitem__(0, steps[0] + 1))
    batch = ContinuousBatch(decoder, 1)
    first = followed(6, Progress())
    late = followed(6, Progress(Deadline(2, clock=lambda: steps[0])))
    batch.submit(first)
    batch.submit(late)
    batch.wait(lambda: late.is_done)
    batch.wait(lambda: first.is_done)
    batch.close()
    assert late.result().truncated == "deadline" and late.result().token_ids == (0,)
    assert first.result().truncated is False
    assert [entry for entry in decoder.log if entry[0] == "add"] == [("add", 0)]


class Followed(Countdown):
    """A search that ends after some steps, or when its progress says so."""

    def __init__(self, num_steps: int, progress: Progress) -> None:
        super().__init__(num_steps)
        self.progress = progress
        self.reason: Any = False

    def advance(self, scores: object) -> Any:
        step = super().advance(scores)
        self.reason = self.progress.after_step(tuple) or False
        return None if self.reason else step

    def results(self) -> Any:
        return [type(super().results()[0])((2,), self.reason)]


def followed(num_steps: int, progress: Progress) -> DecodeRequest:
    ids = np.zeros(4, dtype=np.int64)
    return DecodeRequest(ids, None, lambda: Followed(num_steps, progress), progress)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------ what is told of it


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    num_prompts=st.integers(1, 3),
    num_beams=st.integers(1, 4),
    do_sample=st.booleans(),
    end_bias=st.sampled_from([-1.0, 1.0, 2.5]),
    early_stopping=st.sampled_from([True, False, "never"]),
    stop_at=st.none() | st.integers(1, 12),
)
def test_what_is_told_is_never_taken_back(
    seed: int,
    num_prompts: int,
    num_beams: int,
    do_sample: bool,
    end_bias: float,
    early_stopping: Any,
    stop_at: int | None,
) -> None:
    """Of any search, each report begins with the one before, and so does the answer; also where one prompt is stopped."""
    config = SearchConfig(
        START,
        EOS,
        max_length=16,
        num_beams=num_beams,
        do_sample=do_sample,
        seed=seed,
        early_stopping=early_stopping,
    )
    session = TableSession(make_tables(num_prompts, seed, end_bias))
    told: list[list[tuple[int, ...]]] = [[] for _ in range(num_prompts)]

    def follow(index: int) -> Progress:
        deadline = Deadline(stop_at, clock=lambda: session.steps) if stop_at and index == 0 else None
        return Progress(deadline, on_tokens=lambda tokens, image: told[index].append(tuple(tokens)))

    progress = [follow(index) for index in range(num_prompts)]
    found = drive(session, new_search(num_prompts, config, None, None, progress))
    expected = drive(TableSession(session.tables), new_search(num_prompts, config, None))
    for index, (reports, answer) in enumerate(zip(told, found, strict=True)):
        for before, after in pairwise([*reports, answer.token_ids]):
            assert after[: len(before)] == before
        assert answer.truncated in CUT or answer == expected[index]
    assert found[1:] == expected[1:]
    if stop_at and len(told[0]) >= stop_at:
        assert found[0].truncated == "deadline" and len(told[0]) == stop_at
        assert session.steps >= stop_at


# ------------------------------------------------------------------------------- choices, scores, tiles, lists of classes


@pytest.mark.parametrize("count", [0, 1, 2])
def test_a_choice_that_ends_early_is_no_choice(model: Florence2, steps: Callable[[], float], count: int) -> None:
    """Which of them is the likeliest is not known before all are; the other request of the batch gets its answer."""
    choice = GenerationOptions(constrain=Choice(["A red circle.", "two green squares and a blue star."]), scores=True)
    encoded = model.encode(SAMPLES[0])
    deadlines = [Deadline(count, clock=steps), None]
    over, whole = model.run_batch("<CAPTION>", [encoded] * 2, options=choice, deadline=deadlines)
    assert over.truncated == "deadline" and over.results == "" and over.choice_logprobs is None
    assert over.token_logprobs is not None and len(over.token_logprobs) == len(over.token_ids)
    assert whole == model.run("<CAPTION>", encoded, options=choice)


def test_choices_of_several_passes_end_early(model: Florence2, steps: Callable[[], float]) -> None:
    """More choices than one pass takes: the deadline is in the second pass."""
    choice = GenerationOptions(constrain=Choice([f"{number} circles" for number in range(70)]))
    encoded = model.encode(SAMPLES[0])
    found = model.run("<CAPTION>", encoded, options=choice, deadline=Deadline(6, clock=steps))
    whole_steps = steps()
    assert whole_steps == 6 and found.truncated == "deadline" and found.results == ""
    whole = model.run("<CAPTION>", encoded, options=choice)
    assert steps() - whole_steps == 8 and whole.truncated is False and whole.choice_logprobs is not None


@pytest.mark.parametrize("deadline", [0.0, 3.0])
def test_scores_of_an_answer_that_ends_early(model: Florence2, steps: Callable[[], float], deadline: float) -> None:
    options = GenerationOptions(num_beams=1, scores=True)
    found = model.run("<OD>", SAMPLES[0], options=options, deadline=Deadline(deadline, clock=steps))
    assert found.truncated == "deadline" and found.token_logprobs is not None
    assert len(found.token_logprobs) == len(found.token_ids)


def test_tiles_end_together(model: Florence2, steps: Callable[[], float]) -> None:
    image = Image.open(SAMPLES[0]).resize((512, 512))
    tiles = Tiles(size=256, overlap=0.1)
    found = model.run("<OD>", image, tiles=tiles, deadline=Deadline(3, clock=steps))
    assert found.truncated == "deadline" and isinstance(found, TiledPrediction)
    assert {each.prediction.truncated for each in found.tiles} == {"deadline"}
    with pytest.raises(DeadlineError):
        model.run("<OD>", image, tiles=tiles, deadline=0, on_deadline="raise")
    small = model.run("<OD>", SAMPLES[0], tiles=Tiles(size=4000), deadline=0)
    assert small.truncated == "deadline"


@pytest.mark.parametrize("rule", ["contrast", "likelihood", "off"])
def test_detect_ends_early(model: Florence2, steps: Callable[[], float], rule: Any) -> None:
    before = model._vision_encoder.num_runs
    none = model.detect(SAMPLES[0], ["circle", "square"], absent=rule, deadline=0)
    assert model._vision_encoder.num_runs == before
    assert (
        none.truncated == "deadline"
        and not none.bboxes
        and [each.name for each in none.classes]
        == [
            "circle",
            "square",
        ]
    )
    some = model.detect(SAMPLES[0], ["circle", "square"], absent=rule, deadline=Deadline(4, clock=steps))
    assert some.truncated == "deadline" and steps() <= 5
    assert all(each.presence is None for each in some.classes)
    cancel = Cancel()
    cancel.cancel()
    with pytest.raises(CancelledError):
        model.detect(SAMPLES[0], ["circle"], absent=rule, cancel=cancel, on_deadline="raise")


@pytest.mark.parametrize(
    "value",
    [
        -1,
        "soon",
        float("nan"),
    ],
)
def test_detect_refuses_a_wrong_deadline(model: Florence2, value: Any) -> None:
    with pytest.raises(InputError, match="deadline"):
        model.detect(SAMPLES[0], ["circle"], deadline=value)
    with pytest.raises(InputError, match="deadline"):
        model.run("<OD>", SAMPLES[0], deadline=value)
