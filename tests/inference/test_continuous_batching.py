"""Continuous batching: prompts get the answers that they get alone, and an error ends only the prompts it concerns."""

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
from florence_onnx.generation.search import DecodeStep, GeneratedSequence
from florence_onnx.inference.continuous_batching import SHRINK_AFTER, ContinuousBatch, DecodeRequest
from florence_onnx.inference.slot_table import SlotTable
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

# ------------------------------------------------------------------------------------------------- the demo model


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
    """Eleven times as many prompts as `max_batch`; each image is encoded once, while others are answered."""
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


def test_threads_share_the_batch(batching: Florence2, expected: dict[tuple[str, str, str], tuple[int, ...]]) -> None:
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


def test_a_bad_image_fails_its_call_and_no_other(batching: Florence2, tmp_path: Path) -> None:
    images = [*SAMPLES[:2], tmp_path / "missing.png", *SAMPLES[2:4]]
    with pytest.raises(ImageNotFoundError):
        batching.run_batch("<OD>", images)
    assert len(batching.run_batch("<OD>", SAMPLES[:3])) == 3


@pytest.mark.parametrize("max_batch", [-1, True, "8", 2.0])
def test_an_invalid_max_batch_is_refused(max_batch: Any) -> None:
    with pytest.raises(InputError, match="max_batch must be a whole number"):
        Florence2.from_pretrained("demo", device="cpu", max_batch=max_batch)


def test_zero_is_no_continuous_batching() -> None:
    model = Florence2.from_pretrained("demo", device="cpu", max_batch=0)
    assert isinstance(model.encode(SAMPLES[0]).stored, np.ndarray)


def test_a_search_that_needs_more_tokens_than_engines_take_is_refused(
    batching: Florence2, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit of TensorRT engines, on the CPU."""
    monkeypatch.setattr(batching._answering._resident, "max_tokens", 4)  # type: ignore[attr-defined]
    for options in (GenerationOptions(num_beams=5), GenerationOptions(num_beams=1, prompt_lookup_num_tokens=4)):
        with pytest.raises(OptionsError, match="4 tokens of a prompt at a time, and this needs 5"):
            batching.run("<OD>", SAMPLES[0], options=options)
    assert batching.run("<OD>", SAMPLES[0], options=GenerationOptions(num_beams=4)).text


def in_threads(calls: list[Callable[[], object]]) -> None:
    """Calls functions at the same time; fails where one does not return."""
    threads = [threading.Thread(target=call, daemon=True) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT)
    assert not any(thread.is_alive() for thread in threads), "a thread is stuck"


# ------------------------------------------------------------------------------------- a decoder that fails on demand


class Countdown:
    """A search that ends after some steps."""

    def __init__(self, num_steps: int) -> None:
        self.left = num_steps

    def start(self) -> Any:
        return np.zeros((1, 1), dtype=np.int64)

    def advance(self, scores: object) -> DecodeStep | None:
        self.left -= 1
        rows = np.zeros(1, dtype=np.int64)
        return DecodeStep(rows, rows, np.zeros((1, 1), dtype=np.int64)) if self.left else None

    def results(self) -> list[GeneratedSequence]:
        return [GeneratedSequence((2,), False)]


class FakeDecoder:
    """A batch without a model; `on` has a hook for each method, which may raise."""

    def __init__(self, **on: Callable[..., None]) -> None:
        self.on = on
        self.batch_size = self.encoder_length = 0
        self.used: dict[int, SlotTable] = {}
        self.log: list[Any] = []

    def _call(self, name: str, *arguments: Any) -> None:
        self.log.append((name, *arguments))
        if name in self.on:
            self.on[name](*arguments)

    def padded_length(self, prompt_ids: Any, features: object) -> int:
        return 16 if len(prompt_ids) <= 16 else 64

    def allocate(self, batch_size: int, encoder_length: int) -> None:
        if (batch_size, encoder_length) == (self.batch_size, self.encoder_length):
            return
        self._call("allocate", batch_size, encoder_length)
        self.batch_size, self.encoder_length = batch_size, encoder_length

    def release(self) -> None:
        assert not self.used
        self.batch_size = self.encoder_length = 0

    def grow_batch(self, batch_size: int) -> None:
        self._call("grow_batch", batch_size)
        self.batch_size = batch_size

    def add(self, prompt_ids: Any, features: object) -> int:
        assert len(self.used) < self.batch_size
        assert len(prompt_ids) <= self.encoder_length
        batch_index = min(set(range(self.batch_size)) - set(self.used))
        self._call("add", batch_index)
        self.used[batch_index] = SlotTable(64, 100)
        return batch_index

    def remove(self, batch_index: int) -> None:
        del self.used[batch_index]

    def slot_table(self, batch_index: int) -> SlotTable:
        return self.used[batch_index]

    def step(self, token_ids: Mapping[int, Any]) -> dict[int, TopScores]:
        assert set(token_ids) == set(self.used)
        self._call("step", len(token_ids))
        one = np.zeros((1, 1, 1))
        return {
            batch_index: TopScores(
                one.astype(np.float32), one.astype(np.int64), one[..., 0].astype(np.float32), 1, lambda: one
            )
            for batch_index in token_ids
        }


def request(num_steps: int = 3, length: int = 4) -> DecodeRequest:
    return DecodeRequest(np.zeros(length, dtype=np.int64), None, lambda: Countdown(num_steps))  # type: ignore[arg-type]


def answer(batch: ContinuousBatch, *requests: DecodeRequest) -> list[str]:
    """The outcome of each request: its tokens, or the name of its error."""
    for each in requests:
        batch.submit(each)
    in_threads([lambda: batch.wait(lambda: all(each.is_done for each in requests))])
    return [outcome(each) for each in requests]


def outcome(done: DecodeRequest) -> str:
    try:
        return str(done.result().token_ids)
    except (FlorenceError, RuntimeError) as error:
        return type(error).__name__


def full(allowed: int) -> Callable[..., None]:
    """A hook that raises where its first argument is greater than `allowed`."""

    def check(count: int, *_: object) -> None:
        if count > allowed:
            raise DeviceMemoryError("full")

    return check


def new_batch(decoder: FakeDecoder, max_batch: int = 8) -> ContinuousBatch:
    return ContinuousBatch(decoder, max_batch)


ANSWER = "(2,)"


def test_the_batch_is_as_large_as_the_prompts_need() -> None:
    decoder = FakeDecoder()
    assert answer(new_batch(decoder), *(request() for _ in range(3))) == [ANSWER] * 3
    assert decoder.log[0] == ("allocate", 4, 16)
    assert [call for call in decoder.log if call[0] == "step"] == [("step", 3)] * 3


def test_a_waiting_request_joins_when_another_is_done() -> None:
    decoder = FakeDecoder()
    assert answer(new_batch(decoder, 2), request(1), request(4), request(2), request(1)) == [ANSWER] * 4
    assert [count for name, count, *_ in decoder.log if name == "step"] == [2, 2, 2, 2]


def test_a_later_request_joins_those_in_flight() -> None:
    late = request(2)
    batch = new_batch(decoder := FakeDecoder())
    decoder.on["step"] = lambda _: batch.submit(late) if len(decoder.log) == 3 else None
    first = request(5)
    batch.submit(first)
    in_threads([lambda: batch.wait(lambda: first.is_done and late.is_done)])
    assert [call for call in decoder.log if call[0] != "add"] == [
        *[("allocate", 1, 16), ("step", 1), ("grow_batch", 2), ("step", 2), ("step", 2), ("step", 1), ("step", 1)]
    ]


def test_a_long_prompt_waits_until_the_batch_is_empty() -> None:
    decoder = FakeDecoder()
    assert answer(new_batch(decoder, 2), request(1), request(3), request(1, length=30), request(1)) == [ANSWER] * 4
    opened = [call for call in decoder.log if call[0] == "allocate"]
    assert opened == [("allocate", 2, 16), ("allocate", 2, 64)], "it was not among the first two"
    answer(new_batch(decoder := FakeDecoder(), 4), request(1), request(3), request(1, length=30), request(1))
    assert [call for call in decoder.log if call[0] == "allocate"] == [("allocate", 4, 64)]
    batch = new_batch(decoder := FakeDecoder())
    late = request(1, length=30)
    decoder.on["step"] = lambda _: batch.submit(late) if len(decoder.log) == 3 else None
    first = request(3)
    batch.submit(first)
    in_threads([lambda: batch.wait(lambda: first.is_done and late.is_done)])
    steps = [call for call in decoder.log if call[0] != "add"]
    assert steps == [("allocate", 1, 16), *[("step", 1)] * 3, ("allocate", 1, 64), ("step", 1)]


def test_long_buffers_are_replaced_after_many_short_prompts() -> None:
    batch = new_batch(decoder := FakeDecoder())
    answer(batch, request(1, length=30))
    for _ in range(SHRINK_AFTER + 2):
        answer(batch, request(1))
    assert [call for call in decoder.log if call[0] == "allocate"] == [("allocate", 1, 64), ("allocate", 1, 16)]


def test_a_batch_that_does_not_fit_is_halved(caplog: pytest.LogCaptureFixture) -> None:
    decoder = FakeDecoder(allocate=full(2))
    assert answer(new_batch(decoder), *(request() for _ in range(8))) == [ANSWER] * 8
    assert [call for call in decoder.log if call[0] == "allocate"] == [
        ("allocate", 8, 16),
        ("allocate", 4, 16),
        ("allocate", 2, 16),
    ]
    assert "no more than 2 prompts in flight" in caplog.text


def test_without_memory_for_one_the_prompt_fails_and_the_next_is_tried() -> None:
    batch = new_batch(decoder := FakeDecoder(allocate=full(0)))
    assert answer(batch, request(), request()) == ["DeviceMemoryError"] * 2
    decoder.on.clear()
    assert answer(batch, request()) == [ANSWER]


def test_without_memory_for_a_larger_batch_requests_wait() -> None:
    batch = new_batch(decoder := FakeDecoder(grow_batch=full(0)))
    late = request()
    decoder.on["step"] = lambda _: batch.submit(late) if len(decoder.log) == 3 else None
    first = request()
    batch.submit(first)
    in_threads([lambda: batch.wait(lambda: first.is_done and late.is_done)])
    assert (outcome(first), outcome(late)) == (ANSWER, ANSWER)
    assert {count for name, count, *_ in decoder.log if name == "step"} == {1}


def test_a_step_that_does_not_fit_starts_over_with_half_the_batch() -> None:
    decoder = FakeDecoder(step=full(3))
    assert answer(new_batch(decoder), *(request() for _ in range(8))) == [ANSWER] * 8
    steps = [count for name, count, *_ in decoder.log if name == "step"]
    assert steps == [8, 4, *[2] * 12]


def test_a_single_prompt_that_does_not_fit_fails() -> None:
    batch = new_batch(decoder := FakeDecoder(step=full(0)))
    assert answer(batch, request(), request()) == ["DeviceMemoryError"] * 2
    decoder.on.clear()
    assert answer(batch, request()) == [ANSWER]


def test_a_prompt_that_does_not_fit_beside_a_large_batch_is_added_to_a_smaller_one() -> None:
    def check(batch_index: int) -> None:
        if decoder.batch_size > 2:
            raise DeviceMemoryError("full")

    decoder = FakeDecoder(add=check)
    assert answer(new_batch(decoder), *(request() for _ in range(8))) == [ANSWER] * 8
    assert decoder.batch_size == 2


def test_a_prompt_that_does_not_fit_at_all_fails_and_the_next_is_tried() -> None:
    batch = new_batch(decoder := FakeDecoder(add=full(-1)))
    assert answer(batch, request(), request(), request()) == ["DeviceMemoryError"] * 3
    decoder.on.clear()
    assert answer(batch, request()) == [ANSWER]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_ends_fails_all_requests() -> None:
    """As on a device that is so broken that not even its buffers can be released."""
    decoder = FakeDecoder(step=full(0))
    decoder.release = lambda: 1 // 0  # type: ignore[method-assign, assignment, return-value]
    batch = new_batch(decoder)
    assert answer(batch, request(), request()) == ["ProviderError"] * 2
    batch._thread.join(TIMEOUT)
    for ask in (lambda: batch.submit(request()), lambda: batch.call(int)):
        with pytest.raises(ProviderError, match="load it again"):
            ask()


def test_a_prompt_that_cannot_be_added_fails_alone() -> None:
    def refuse(batch_index: int) -> None:
        if batch_index == 1:
            decoder.on.clear()
            raise ProviderError("broken")

    decoder = FakeDecoder(add=refuse)
    assert answer(new_batch(decoder), request(), request(), request()) == [ANSWER, "ProviderError", ANSWER]


def test_a_device_error_fails_those_in_flight_and_no_others() -> None:
    def fail(_: int) -> None:
        decoder.on.clear()
        raise ProviderError("broken")

    batch = new_batch(decoder := FakeDecoder(step=fail), 2)
    assert answer(batch, request(), request(), request()) == ["ProviderError", "ProviderError", ANSWER]


def test_an_unexpected_error_fails_those_in_flight_and_not_the_thread() -> None:
    def fail(_: int) -> None:
        decoder.on.clear()
        raise ZeroDivisionError("in a search")

    batch = new_batch(decoder := FakeDecoder(step=fail), 2)
    requests = [request(), request(), request()]
    assert answer(batch, *requests) == ["RuntimeError", "RuntimeError", ANSWER]
    with pytest.raises(RuntimeError, match="decoding failed: in a search") as caught:
        requests[0].result()
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_one_thread_owns_the_device(batching: Florence2, monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime keeps captured graphs per thread: whichever thread calls, the same one runs them."""
    seen = set()
    run = OnnxBinding.run

    def note(self: OnnxBinding) -> None:
        seen.add(threading.current_thread().name)
        run(self)

    monkeypatch.setattr(OnnxBinding, "run", note)
    in_threads([lambda image=image: batching.run("<CAPTION>", image) for image in SAMPLES[:3]])
    batching.run_batch("<OD>", SAMPLES[:3])
    assert seen == {"florence-device"}


def test_functions_are_called_in_the_device_thread() -> None:
    batch = new_batch(FakeDecoder())
    assert batch.call(lambda: threading.current_thread().name) == "florence-device"
    with pytest.raises(ZeroDivisionError):
        batch.call(lambda: 1 // 0)
    assert answer(batch, request()) == [ANSWER], "the thread goes on"


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


def test_closing_fails_the_requests_that_are_not_done() -> None:
    entered, gate = threading.Event(), threading.Event()

    def hold(_: int) -> None:
        entered.set()
        gate.wait(TIMEOUT)

    batch = new_batch(FakeDecoder(step=hold), 1)
    requests = [request(), request()]
    for each in requests:
        batch.submit(each)
    entered.wait(TIMEOUT)
    batch.close()
    gate.set()
    in_threads([lambda: batch.wait(lambda: all(each.is_done for each in requests))])
    assert [outcome(each) for each in requests] == ["ProviderError", "ProviderError"]


def test_cancelled_requests_leave_the_batch() -> None:
    batch = new_batch(decoder := FakeDecoder(), 2)
    unwanted = [request(100), request(100), request(100)]
    decoder.on["step"] = lambda _: batch.cancel(unwanted) if len(decoder.log) > 5 else None
    wanted = request(2)
    for each in (*unwanted, wanted):
        batch.submit(each)
    in_threads([lambda: batch.wait(lambda: wanted.is_done)])
    assert outcome(wanted) == ANSWER
    assert sum(name == "step" for name, *_ in decoder.log) < 10
