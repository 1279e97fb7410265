"""Many prompts at once: the answers are those of one at a time, whoever asks, whatever fails."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from florence_onnx import (
    DeviceMemoryError,
    Florence2,
    FlorenceError,
    GenerationOptions,
    ImageNotFoundError,
    InputError,
    OptionsError,
    ProviderError,
    Region,
    tasks,
)
from florence_onnx.bundles import bundle
from florence_onnx.generation.scores import TopScores
from florence_onnx.generation.search import Continuation, GeneratedSequence
from florence_onnx.inference.continuous_batching import SHRINK_AFTER, ContinuousBatch, Job
from florence_onnx.inference.slot_table import PromptRows
from florence_onnx.runtime.engine import OnnxBinding

SAMPLES = sorted((bundle.DEMO_DIRECTORY.parent / "samples").glob("*.png"))
GIVEN: dict[str, dict[str, Any]] = {
    "nothing": {},
    "text": {"text_input": "a red circle and a green square"},
    "region": {"region": Region(217, 475, 377, 648)},
}
SEARCHES = {"greedy": GenerationOptions(num_beams=1), "beams": GenerationOptions(max_new_tokens=60)}
TIMEOUT = 120
"""Seconds after which a thread counts as stuck."""

# ------------------------------------------------------------------------------------------------- the real thing


@pytest.fixture(scope="module")
def plain() -> Florence2:
    return Florence2.from_pretrained("demo", device="cpu", session_options={"intra_op_num_threads": 1})


@pytest.fixture(scope="module")
def batching() -> Florence2:
    options = {"intra_op_num_threads": 1}
    return Florence2.from_pretrained("demo", device="cpu", session_options=options, max_batch=4)


@pytest.fixture(scope="module")
def expected(plain: Florence2) -> dict[tuple[str, str, str], tuple[int, ...]]:
    """Tokens by search, image and task."""
    return {
        (search, image.name, task.slug): plain.run(task, image, options=options, **GIVEN[task.needs]).token_ids
        for search, options in SEARCHES.items()
        for image in SAMPLES[:3]
        for task in tasks.TASKS.values()
    }


@pytest.mark.parametrize("search", SEARCHES)
def test_single_answers_are_those_of_the_plain_model(
    batching: Florence2, expected: dict[tuple[str, str, str], tuple[int, ...]], search: str
) -> None:
    for image in SAMPLES[:3]:
        encoded = batching.encode(image)
        for task in tasks.TASKS.values():
            found = batching.run(task, encoded, options=SEARCHES[search], **GIVEN[task.needs])
            assert found.token_ids == expected[search, image.name, task.slug]


@pytest.mark.parametrize("search", SEARCHES)
def test_a_batch_of_all_tasks_about_several_images(
    batching: Florence2, expected: dict[tuple[str, str, str], tuple[int, ...]], search: str
) -> None:
    """Eleven times as many questions as places; each image is encoded once, in threads beside the answers."""
    pairs = [(task, image) for task in tasks.TASKS.values() for image in SAMPLES[:3]]
    before = batching._vision_encoder.num_runs
    found = batching.run_batch(
        [task for task, _ in pairs],
        [image for _, image in pairs],
        text_inputs=[GIVEN[task.needs].get("text_input") for task, _ in pairs],
        regions=[GIVEN[task.needs].get("region") for task, _ in pairs],
        options=SEARCHES[search],
    )
    for (task, image), prediction in zip(pairs, found, strict=True):
        assert prediction.token_ids == expected[search, image.name, task.slug]
        assert prediction.task is task
    assert batching._vision_encoder.num_runs == before + 1, "three images in one run"


def test_prompts_are_decoded_together(batching: Florence2) -> None:
    decoder = batching._text_model._decoder  # type: ignore[attr-defined]
    encoded = [batching.encode(image) for image in SAMPLES[:4]]
    runs = []
    for images in (*([each] for each in encoded), encoded):
        before = decoder.num_runs
        batching.run_batch("<DETAILED_CAPTION>", images, options=SEARCHES["greedy"])
        runs.append(decoder.num_runs - before)
    *single, together = runs
    assert together == max(single) < sum(single)


def test_threads_share_the_places(batching: Florence2, expected: dict[tuple[str, str, str], tuple[int, ...]]) -> None:
    wrong: list[object] = []

    def ask(number: int) -> None:
        image = SAMPLES[number % 3]
        for task in list(tasks.TASKS.values())[number % 5 :: 5]:
            for search, options in SEARCHES.items():
                found = batching.run(task, image, options=options, **GIVEN[task.needs])
                if found.token_ids != expected[search, image.name, task.slug]:
                    wrong.append((search, task.slug, found.text))

    in_threads([lambda number=number: ask(number) for number in range(10)])
    assert wrong == []


def test_images_encoded_elsewhere_and_here(plain: Florence2, batching: Florence2) -> None:
    elsewhere, here = plain.encode(SAMPLES[0]), batching.encode(SAMPLES[0])
    np.testing.assert_allclose(here.image_features, elsewhere.image_features, atol=1e-3)
    for model in (plain, batching):
        answers = {model.run("<OD>", each).text for each in (elsewhere, here)}
        assert len(answers) == 1


def test_scores_of_a_given_answer(plain: Florence2, batching: Florence2) -> None:
    answer = plain.run("<OD>", SAMPLES[0]).token_ids
    expected, found = (model.score_tokens("<OD>", SAMPLES[0], answer) for model in (plain, batching))
    np.testing.assert_allclose(found, expected, atol=0.02 * np.abs(expected).max())
    assert batching.score_tokens("<OD>", SAMPLES[0], answer[:1]).shape == (0, found.shape[1])


def test_a_bad_image_ends_its_batch_and_nothing_else(batching: Florence2, tmp_path: Path) -> None:
    images = [*SAMPLES[:2], tmp_path / "missing.png", *SAMPLES[2:4]]
    with pytest.raises(ImageNotFoundError):
        batching.run_batch("<OD>", images)
    assert len(batching.run_batch("<OD>", SAMPLES[:3])) == 3


@pytest.mark.parametrize("max_batch", [-1, True, "8", 2.0])
def test_a_batch_size_that_is_none(max_batch: Any) -> None:
    with pytest.raises(InputError, match="max_batch must be a whole number"):
        Florence2.from_pretrained("demo", device="cpu", max_batch=max_batch)


def test_zero_is_no_continuous_batching() -> None:
    model = Florence2.from_pretrained("demo", device="cpu", max_batch=0)
    assert isinstance(model.encode(SAMPLES[0]).stored, np.ndarray)


def test_engines_that_take_few_tokens_say_so(batching: Florence2, monkeypatch: pytest.MonkeyPatch) -> None:
    """As TensorRT's do."""
    monkeypatch.setattr(batching._answering._resident, "max_tokens", 4)  # type: ignore[attr-defined]
    for options in (GenerationOptions(num_beams=5), GenerationOptions(num_beams=1, prompt_lookup_num_tokens=4)):
        with pytest.raises(OptionsError, match="4 tokens of a prompt at a time, and this needs 5"):
            batching.run("<OD>", SAMPLES[0], options=options)
    assert batching.run("<OD>", SAMPLES[0], options=GenerationOptions(num_beams=4)).text


def in_threads(calls: list[Callable[[], object]]) -> None:
    """Calls at the same time; fails where one does not come back."""
    threads = [threading.Thread(target=call, daemon=True) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT)
    assert not any(thread.is_alive() for thread in threads), "a thread is stuck"


# ------------------------------------------------------------------------- a decoder that fails when it is told to


class Countdown:
    """A search that is over after some steps."""

    def __init__(self, num_steps: int) -> None:
        self.left = num_steps

    def start(self) -> Any:
        return np.zeros((1, 1), dtype=np.int64)

    def advance(self, scores: object) -> Continuation | None:
        self.left -= 1
        rows = np.zeros(1, dtype=np.int64)
        return Continuation(rows, rows, np.zeros((1, 1), dtype=np.int64)) if self.left else None

    def results(self) -> list[GeneratedSequence]:
        return [GeneratedSequence((2,), False)]


class FakeDecoder:
    """Places without a model; `on` says what happens at each call."""

    def __init__(self, **on: Callable[..., None]) -> None:
        self.on = on
        self.places = self.text_length = 0
        self.used: dict[int, PromptRows] = {}
        self.log: list[Any] = []

    def _call(self, name: str, *arguments: Any) -> None:
        self.log.append((name, *arguments))
        if name in self.on:
            self.on[name](*arguments)

    def padded_length(self, num_tokens: int) -> int:
        return 16 if num_tokens <= 16 else 64

    def open(self, num_places: int, text_length: int) -> None:
        if (num_places, text_length) == (self.places, self.text_length):
            return
        self._call("open", num_places, text_length)
        self.places, self.text_length = num_places, text_length

    def close(self) -> None:
        assert not self.used
        self.places = self.text_length = 0

    def widen(self, num_places: int) -> None:
        self._call("widen", num_places)
        self.places = num_places

    def add(self, prompt_ids: Any, features: object) -> int:
        assert len(self.used) < self.places
        assert len(prompt_ids) <= self.text_length
        place = min(set(range(self.places)) - set(self.used))
        self._call("add", place)
        self.used[place] = PromptRows(64, 100)
        return place

    def remove(self, place: int) -> None:
        del self.used[place]

    def rows(self, place: int) -> PromptRows:
        return self.used[place]

    def step(self, token_ids: Mapping[int, Any]) -> dict[int, TopScores]:
        assert set(token_ids) == set(self.used)
        self._call("step", len(token_ids))
        one = np.zeros((1, 1, 1))
        return {
            place: TopScores(
                one.astype(np.float32), one.astype(np.int64), one[..., 0].astype(np.float32), 1, lambda: one
            )
            for place in token_ids
        }


def job(num_steps: int = 3, length: int = 4) -> Job:
    return Job(np.zeros(length, dtype=np.int64), None, lambda: Countdown(num_steps))  # type: ignore[arg-type]


def answer(batch: ContinuousBatch, *jobs: Job) -> list[str]:
    """What became of each job: its answer's tokens, or the name of its error."""
    for each in jobs:
        batch.submit(each)
    in_threads([lambda: batch.wait(lambda: all(each.is_done for each in jobs))])
    return [outcome(each) for each in jobs]


def outcome(each: Job) -> str:
    try:
        return str(each.result().token_ids)
    except (FlorenceError, RuntimeError) as error:
        return type(error).__name__


def full(allowed: int) -> Callable[..., None]:
    """Refuses more than so many of something."""

    def check(count: int, *_: object) -> None:
        if count > allowed:
            raise DeviceMemoryError("full")

    return check


def new_batch(decoder: FakeDecoder, max_batch: int = 8) -> ContinuousBatch:
    return ContinuousBatch(decoder, max_batch)


ANSWER = "(2,)"


def test_as_many_places_as_there_are_prompts() -> None:
    decoder = FakeDecoder()
    assert answer(new_batch(decoder), *(job() for _ in range(3))) == [ANSWER] * 3
    assert decoder.log[0] == ("open", 4, 16)
    assert [call for call in decoder.log if call[0] == "step"] == [("step", 3)] * 3


def test_who_waits_enters_when_a_place_is_free() -> None:
    decoder = FakeDecoder()
    assert answer(new_batch(decoder, 2), job(1), job(4), job(2), job(1)) == [ANSWER] * 4
    assert [count for name, count, *_ in decoder.log if name == "step"] == [2, 2, 2, 2]


def test_who_comes_later_joins_those_in_flight() -> None:
    late = job(2)
    batch = new_batch(decoder := FakeDecoder())
    decoder.on["step"] = lambda _: batch.submit(late) if len(decoder.log) == 3 else None
    first = job(5)
    batch.submit(first)
    in_threads([lambda: batch.wait(lambda: first.is_done and late.is_done)])
    assert [call for call in decoder.log if call[0] != "add"] == [
        *[("open", 1, 16), ("step", 1), ("widen", 2), ("step", 2), ("step", 2), ("step", 1), ("step", 1)]
    ]


def test_a_long_prompt_waits_until_the_places_are_free() -> None:
    decoder = FakeDecoder()
    assert answer(new_batch(decoder, 2), job(1), job(3), job(1, length=30), job(1)) == [ANSWER] * 4
    opened = [call for call in decoder.log if call[0] == "open"]
    assert opened == [("open", 2, 16), ("open", 2, 64)], "it was not among the first two"
    answer(new_batch(decoder := FakeDecoder(), 4), job(1), job(3), job(1, length=30), job(1))
    assert [call for call in decoder.log if call[0] == "open"] == [("open", 4, 64)]
    batch = new_batch(decoder := FakeDecoder())
    late = job(1, length=30)
    decoder.on["step"] = lambda _: batch.submit(late) if len(decoder.log) == 3 else None
    first = job(3)
    batch.submit(first)
    in_threads([lambda: batch.wait(lambda: first.is_done and late.is_done)])
    steps = [call for call in decoder.log if call[0] != "add"]
    assert steps == [("open", 1, 16), *[("step", 1)] * 3, ("open", 1, 64), ("step", 1)]


def test_long_places_are_given_up_after_many_short_prompts() -> None:
    batch = new_batch(decoder := FakeDecoder())
    answer(batch, job(1, length=30))
    for _ in range(SHRINK_AFTER + 2):
        answer(batch, job(1))
    assert [call for call in decoder.log if call[0] == "open"] == [("open", 1, 64), ("open", 1, 16)]


def test_places_that_do_not_fit_become_fewer(caplog: pytest.LogCaptureFixture) -> None:
    decoder = FakeDecoder(open=full(2))
    assert answer(new_batch(decoder), *(job() for _ in range(8))) == [ANSWER] * 8
    assert [call for call in decoder.log if call[0] == "open"] == [("open", 8, 16), ("open", 4, 16), ("open", 2, 16)]
    assert "no more than 2 prompts at a time" in caplog.text


def test_without_room_for_one_the_prompt_fails_and_the_next_is_tried() -> None:
    batch = new_batch(decoder := FakeDecoder(open=full(0)))
    assert answer(batch, job(), job()) == ["DeviceMemoryError"] * 2
    decoder.on.clear()
    assert answer(batch, job()) == [ANSWER]


def test_no_room_beside_those_in_flight() -> None:
    batch = new_batch(decoder := FakeDecoder(widen=full(0)))
    late = job()
    decoder.on["step"] = lambda _: batch.submit(late) if len(decoder.log) == 3 else None
    first = job()
    batch.submit(first)
    in_threads([lambda: batch.wait(lambda: first.is_done and late.is_done)])
    assert (outcome(first), outcome(late)) == (ANSWER, ANSWER)
    assert {count for name, count, *_ in decoder.log if name == "step"} == {1}


def test_a_step_that_does_not_fit_begins_again_with_fewer() -> None:
    decoder = FakeDecoder(step=full(3))
    assert answer(new_batch(decoder), *(job() for _ in range(8))) == [ANSWER] * 8
    steps = [count for name, count, *_ in decoder.log if name == "step"]
    assert steps == [8, 4, *[2] * 12]


def test_a_single_prompt_that_does_not_fit_fails() -> None:
    batch = new_batch(decoder := FakeDecoder(step=full(0)))
    assert answer(batch, job(), job()) == ["DeviceMemoryError"] * 2
    decoder.on.clear()
    assert answer(batch, job()) == [ANSWER]


def test_a_prompt_that_does_not_fit_beside_so_many_places_is_added_with_fewer() -> None:
    def check(place: int) -> None:
        if decoder.places > 2:
            raise DeviceMemoryError("full")

    decoder = FakeDecoder(add=check)
    assert answer(new_batch(decoder), *(job() for _ in range(8))) == [ANSWER] * 8
    assert decoder.places == 2


def test_a_prompt_that_does_not_fit_at_all_fails_and_the_next_is_tried() -> None:
    batch = new_batch(decoder := FakeDecoder(add=full(-1)))
    assert answer(batch, job(), job(), job()) == ["DeviceMemoryError"] * 3
    decoder.on.clear()
    assert answer(batch, job()) == [ANSWER]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_ends_leaves_nobody_waiting() -> None:
    """As where a device is so broken that not even its buffers can be given up."""
    decoder = FakeDecoder(step=full(0))
    decoder.close = lambda: 1 // 0  # type: ignore[method-assign, assignment, return-value]
    batch = new_batch(decoder)
    assert answer(batch, job(), job()) == ["ProviderError"] * 2
    batch._thread.join(TIMEOUT)
    for ask in (lambda: batch.submit(job()), lambda: batch.call(int)):
        with pytest.raises(ProviderError, match="load it again"):
            ask()


def test_a_prompt_that_cannot_be_added_fails_alone() -> None:
    def refuse(place: int) -> None:
        if place == 1:
            decoder.on.clear()
            raise ProviderError("broken")

    decoder = FakeDecoder(add=refuse)
    assert answer(new_batch(decoder), job(), job(), job()) == [ANSWER, "ProviderError", ANSWER]


def test_a_device_that_fails_ends_those_in_flight_and_no_others() -> None:
    def fail(_: int) -> None:
        decoder.on.clear()
        raise ProviderError("broken")

    batch = new_batch(decoder := FakeDecoder(step=fail), 2)
    assert answer(batch, job(), job(), job()) == ["ProviderError", "ProviderError", ANSWER]


def test_an_error_that_nobody_expects_ends_those_in_flight_and_not_the_thread() -> None:
    def fail(_: int) -> None:
        decoder.on.clear()
        raise ZeroDivisionError("in a search")

    batch = new_batch(decoder := FakeDecoder(step=fail), 2)
    jobs = [job(), job(), job()]
    assert answer(batch, *jobs) == ["RuntimeError", "RuntimeError", ANSWER]
    with pytest.raises(RuntimeError, match="decoding failed: in a search") as caught:
        jobs[0].result()
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_one_thread_has_the_device(batching: Florence2, monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime keeps the CUDA graphs of each thread apart: whoever asks, the same one runs them."""
    seen = set()
    run = OnnxBinding.run

    def note(self: OnnxBinding) -> None:
        seen.add(threading.current_thread().name)
        run(self)

    monkeypatch.setattr(OnnxBinding, "run", note)
    in_threads([lambda image=image: batching.run("<CAPTION>", image) for image in SAMPLES[:3]])
    batching.run_batch("<OD>", SAMPLES[:3])
    assert seen == {"florence-device"}


def test_between_two_steps_others_have_the_device() -> None:
    batch = new_batch(FakeDecoder())
    assert batch.call(lambda: threading.current_thread().name) == "florence-device"
    with pytest.raises(ZeroDivisionError):
        batch.call(lambda: 1 // 0)
    assert answer(batch, job()) == [ANSWER], "the thread is there still"


def test_a_model_that_is_dropped_ends_its_thread() -> None:
    before = threading.active_count()
    model = Florence2.from_pretrained("demo", device="cpu", max_batch=2)
    thread = model._answering._resident._batch._thread  # type: ignore[attr-defined]
    assert model.run("<CAPTION>", SAMPLES[0]).text
    assert thread.is_alive()
    del model
    gc.collect()
    thread.join(TIMEOUT)
    assert not thread.is_alive()
    assert threading.active_count() <= before


def test_what_is_closed_fails_who_waits() -> None:
    entered, gate = threading.Event(), threading.Event()

    def hold(_: int) -> None:
        entered.set()
        gate.wait(TIMEOUT)

    batch = new_batch(FakeDecoder(step=hold), 1)
    jobs = [job(), job()]
    for each in jobs:
        batch.submit(each)
    entered.wait(TIMEOUT)
    batch.close()
    gate.set()
    in_threads([lambda: batch.wait(lambda: all(each.is_done for each in jobs))])
    assert [outcome(each) for each in jobs] == ["ProviderError", "ProviderError"]


def test_what_nobody_wants_any_more_leaves() -> None:
    batch = new_batch(decoder := FakeDecoder(), 2)
    unwanted = [job(100), job(100), job(100)]
    decoder.on["step"] = lambda _: batch.discard(unwanted) if len(decoder.log) > 5 else None
    wanted = job(2)
    for each in (*unwanted, wanted):
        batch.submit(each)
    in_threads([lambda: batch.wait(lambda: wanted.is_done)])
    assert outcome(wanted) == ANSWER
    assert sum(name == "step" for name, *_ in decoder.log) < 10
