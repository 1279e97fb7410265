"""`stream`, `astream` and `arun`: the parts together are exactly the answer, each comes once it is complete, none is taken back."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from florence_onnx import (
    Cancel,
    CancelledError,
    Choice,
    Deadline,
    EncodedImage,
    Florence2,
    GenerationOptions,
    Grammar,
    ImageNotFoundError,
    InputError,
    Prediction,
    ProviderError,
    TextInputError,
    Tiles,
    UnknownTaskError,
    tasks,
)
from florence_onnx.answers.results import BoundingBox
from florence_onnx.answers.settled import items_of
from florence_onnx.parts import ItemPart, Part, PartReader, TextPart
from tests.conftest import Exported
from tests.counted_steps import GIVEN, SAMPLES, WAYS, count_steps, load

GREEDY = GenerationOptions(num_beams=1, prompt_lookup_num_tokens=0)
SEARCHES = {
    "greedy": GREEDY,
    "drafts": GenerationOptions(num_beams=1),
    "beams": GenerationOptions(num_beams=3),
    "many beams": GenerationOptions(num_beams=5, num_return_sequences=2, length_penalty=0.5),
    "samples": GenerationOptions(num_beams=1, do_sample=True, temperature=2.0, seed=5, num_return_sequences=2),
}
LONG = GenerationOptions(num_beams=1, max_new_tokens=400, min_new_tokens=400)


@pytest.fixture(scope="module", params=WAYS.values(), ids=WAYS)
def model(request: pytest.FixtureRequest) -> Florence2:
    return load(request.param)


@pytest.fixture(scope="module")
def encoded(model: Florence2) -> list[EncodedImage]:
    return [model.encode(image) for image in SAMPLES[:3]]


@pytest.fixture
def steps(model: Florence2) -> Callable[[], float]:
    return count_steps(model)


def check_whole(parts: Sequence[Part | Prediction[Any]], expected: Prediction[Any]) -> None:
    """The parts are the answer, in an order that makes sense."""
    *parts, prediction = parts
    assert prediction == expected
    texts = [part for part in parts if isinstance(part, TextPart)]
    items = [part for part in parts if isinstance(part, ItemPart)]
    assert len(texts) + len(items) == len(parts)
    assert "".join(part.text for part in texts) == expected.text
    assert tuple(token for part in texts for token in part.token_ids) == expected.token_ids
    assert tuple(part.item for part in items) == items_of(expected.results)
    assert [part.index for part in items] == list(range(len(items)))
    if isinstance(expected.results, str):
        assert "".join(part.item for part in items) == expected.results  # type: ignore[misc]


# ---------------------------------------------------------------------------------------------------- the whole answer


@pytest.mark.parametrize("search", SEARCHES)
def test_the_parts_together_are_the_answer(model: Florence2, encoded: list[EncodedImage], search: str) -> None:
    for number, task in enumerate(tasks.TASKS.values()):
        image = encoded[number % 3]
        expected = model.run(task, image, options=SEARCHES[search], **GIVEN[task.needs])
        parts = list(model.stream(task, image, options=SEARCHES[search], **GIVEN[task.needs]))
        check_whole(parts, expected)


@pytest.mark.parametrize("search", SEARCHES)
def test_random_weights(tiny: Exported, search: str) -> None:
    """Malformed answers, cut characters and beams that never agree."""
    model = Florence2.from_pretrained(tiny.bundle, device="cpu", session_options={"intra_op_num_threads": 1})
    rng = random.Random(7)
    for task in tasks.TASKS.values():
        options = GenerationOptions(
            **{**vars(SEARCHES[search]), "seed": rng.randrange(1000), "max_new_tokens": rng.randrange(1, 40)}
        )
        image = rng.choice(SAMPLES[:3])
        expected = model.run(task, image, options=options, **GIVEN[task.needs])
        check_whole(list(model.stream(task, image, options=options, **GIVEN[task.needs])), expected)


def test_scores_are_in_the_prediction(model: Florence2, encoded: list[EncodedImage]) -> None:
    options = GenerationOptions(num_beams=1, scores=True)
    parts = list(model.stream("<OD>", encoded[0], options=options))
    check_whole(parts, model.run("<OD>", encoded[0], options=options))
    assert parts[-1].results.bboxes[0].score > 0  # type: ignore[union-attr]


def test_an_unseeded_sample_is_drawn_once(model: Florence2, encoded: list[EncodedImage]) -> None:
    """A seed is drawn for the call, so that an answer which has to start over is the same again."""
    options = GenerationOptions(num_beams=1, do_sample=True, temperature=3.0, max_new_tokens=20)
    answers = {list(model.stream("<CAPTION>", encoded[0], options=options))[-1] for _ in range(3)}
    assert len({answer.token_ids for answer in answers if isinstance(answer, Prediction)}) > 1


# ------------------------------------------------------------------------------------------------------ when they come


@pytest.mark.parametrize("slug", ["object-detection", "region-proposal", "ocr-with-region", "caption"])
def test_an_item_comes_with_the_token_that_completes_it(
    model: Florence2, encoded: list[EncodedImage], slug: str
) -> None:
    task = tasks.get(slug)
    text, num_items = "", 0
    size = encoded[0].size
    for part in list(model.stream(task, encoded[0], options=GREEDY))[:-1]:
        if isinstance(part, TextPart):
            words = text.removeprefix("</s><s>").count(" ")  # those that a blank follows
            assert num_items == (words if slug == "caption" else len(items_of(task.parser(text, size))))
            assert len(part.token_ids) == (1 if text else 3), "the first comes with the start token and the forced one"
            text += part.text
        else:
            num_items += 1
    assert num_items > 0


def test_the_first_box_of_beams_comes_before_the_end(model: Florence2) -> None:
    """In this scene three beams agree on a box while they differ in a later one."""
    parts = list(model.stream("<OD>", SAMPLES[4], options=SEARCHES["beams"]))
    kinds = [type(part) for part in parts]
    last = len(kinds) - 1 - kinds[::-1].index(TextPart)
    assert kinds.index(ItemPart) < last
    assert len(parts[last].token_ids) < len(parts[-1].token_ids) - 6  # type: ignore[union-attr]


def test_a_box_is_there_while_the_decoder_still_runs(
    model: Florence2, encoded: list[EncodedImage], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The decoder is held up at its 12th run until the first box has been received."""
    decoder = model._text_model._decoder  # type: ignore[attr-defined]
    received = threading.Event()
    hold_at(monkeypatch, decoder, 12, received)
    for part in model.stream("<OD>", encoded[0], options=GREEDY):
        if isinstance(part, ItemPart):
            assert isinstance(part.item, BoundingBox)
            received.set()
    assert received.is_set()


def hold_at(monkeypatch: pytest.MonkeyPatch, decoder: Any, count: int, gate: threading.Event) -> None:
    """Makes a decoder wait at its run number `count` from now."""
    from florence_onnx.generation.progress import Progress

    calls: list[int] = []
    after_step = Progress.after_step

    def hold(self: Progress, certain: Any) -> Any:
        calls.append(1)
        reason = after_step(self, certain)
        assert len(calls) != count or gate.wait(60), "the box did not come"
        return reason

    monkeypatch.setattr(Progress, "after_step", hold)


# ----------------------------------------------------------------------------------------------- how they end, and errors


def test_a_deadline_ends_a_stream_with_the_answer_so_far(
    model: Florence2, encoded: list[EncodedImage], steps: Callable[[], float]
) -> None:
    parts = list(model.stream("<OD>", encoded[0], options=GREEDY, deadline=Deadline(8, clock=steps)))
    prediction = parts[-1]
    assert isinstance(prediction, Prediction) and prediction.truncated == "deadline" and steps() == 8
    check_whole(parts, prediction)


def test_closing_a_stream_ends_its_call(model: Florence2, steps: Callable[[], float]) -> None:
    stream = model.stream("<OD>", SAMPLES[0], options=LONG)
    assert steps() == 0, "nothing runs before the first part is asked for"
    assert isinstance(next(stream), TextPart)
    stream.close()
    wait_for_threads()
    assert 0 < steps() < 399


def test_the_callers_cancel_ends_it(model: Florence2, encoded: list[EncodedImage], steps: Callable[[], float]) -> None:
    cancel = Cancel()
    parts = []
    for part in model.stream("<OD>", encoded[0], options=LONG, cancel=cancel):
        parts.append(part)
        cancel.cancel()
    found = parts[-1]
    assert isinstance(found, Prediction) and found.truncated == "cancelled" and steps() < 399
    with pytest.raises(CancelledError):
        list(model.stream("<OD>", encoded[0], cancel=cancel, on_deadline="raise"))


def test_errors(model: Florence2, tmp_path: Path) -> None:
    with pytest.raises(UnknownTaskError):
        model.stream("<NOPE>", SAMPLES[0])
    with pytest.raises(TextInputError):
        model.astream("open-vocabulary-detection", SAMPLES[0])
    with pytest.raises(ImageNotFoundError) as caught:
        next(model.stream("<OD>", tmp_path / "missing.png"))
    assert caught.value.index is None


def wait_for_threads() -> None:
    for thread in threading.enumerate():
        if thread.name == "florence-stream":
            thread.join(60)


# ---------------------------------------------------------------------------------------------------------- the reader


def test_a_character_of_several_tokens_comes_whole(model: Florence2, encoded: list[EncodedImage]) -> None:
    text = "</s><s>naïve 🚗 café 漢字 \N{REPLACEMENT CHARACTER}!</s>"
    ids = model._tokenizer.encode_text(text)
    answer = Prediction(text[7:-4], tasks.CAPTION, text, tuple(ids), False, None)  # type: ignore[arg-type]
    reader = model.part_reader(tasks.CAPTION)
    parts = [part for end in range(len(ids)) for part in reader.read(ids[:end], encoded[0])]
    check_whole([*parts, *reader.finish(answer), answer], answer)
    assert "🚗" in "".join(part.text for part in parts if isinstance(part, TextPart))
    assert any(len(part.token_ids) > 1 for part in parts if isinstance(part, TextPart))


def test_decoding_that_starts_over(model: Florence2, encoded: list[EncodedImage]) -> None:
    """As with too little device memory: the same tokens again change nothing, other ones are an error."""
    answer = model.run("<OD>", encoded[0], options=GREEDY)
    ids = answer.token_ids

    def read(counts: Iterable[int]) -> tuple[PartReader, Iterator[Part]]:
        reader = model.part_reader(answer.task)
        return reader, (part for count in counts for part in reader.read(ids[:count], encoded[0]))

    reader, parts = read([3, 8, 20, 2, 9, 20, 22])
    found = list(parts)
    check_whole([*found, *reader.finish(answer), answer], answer)
    reader, parts = read([9])
    assert list(parts)
    with pytest.raises(ProviderError, match="decoding had to start over and gave another answer"):
        list(reader.finish(model.run("<CAPTION>", encoded[0])))


# -------------------------------------------------------------------------------------------------------------- asyncio


def test_the_event_loop_goes_on(model: Florence2, monkeypatch: pytest.MonkeyPatch) -> None:
    """The decoder waits for what the event loop does meanwhile: a call that blocked the loop would wait for ever."""
    decoder = model._text_model._decoder  # type: ignore[attr-defined]
    gates = [threading.Event(), threading.Event()]
    expected = model.run("<CAPTION>", SAMPLES[0], options=GREEDY)

    async def main() -> None:
        hold_at(monkeypatch, decoder, 2, gates[0])
        run = asyncio.create_task(model.arun("<CAPTION>", SAMPLES[0], options=GREEDY))
        await asyncio.sleep(0.01)
        assert not run.done()
        gates[0].set()
        assert await run == expected
        monkeypatch.undo()
        hold_at(monkeypatch, decoder, 3, gates[1])
        parts: list[Part | Prediction[Any]] = []
        async for part in model.astream("<CAPTION>", SAMPLES[0], options=GREEDY):
            parts.append(part)
            asyncio.get_running_loop().call_soon(gates[1].set)
        check_whole(parts, expected)

    asyncio.run(main())


def test_many_at_once(model: Florence2, encoded: list[EncodedImage]) -> None:
    expected = [model.run("<OD>", image) for image in encoded]

    async def collect(image: EncodedImage) -> list[Part | Prediction[Any]]:
        return [part async for part in model.astream("<OD>", image)]

    async def main() -> tuple[list[Any], list[Any]]:
        streams = asyncio.gather(*(collect(image) for image in encoded))
        runs = asyncio.gather(*(model.arun("<OD>", image) for image in encoded))
        return await streams, await runs

    streams, runs = asyncio.run(main())
    assert runs == expected
    for parts, answer in zip(streams, expected, strict=True):
        check_whole(parts, answer)


def test_cancelling_the_task_ends_the_call(model: Florence2, steps: Callable[[], float]) -> None:
    async def run() -> None:
        task = asyncio.create_task(model.arun("<OD>", SAMPLES[0], options=LONG))
        while not steps():
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    async def stream() -> None:
        parts = model.astream("<OD>", SAMPLES[0], options=LONG)
        async for _ in parts:
            break
        await parts.aclose()

    for main in (run, stream):
        before = steps()
        asyncio.run(main())
        wait_for_threads()
        assert 0 < steps() - before < 399
        end = steps()
        time.sleep(0.05)
        assert steps() == end, "nothing goes on"


def test_errors_reach_the_event_loop(model: Florence2, tmp_path: Path) -> None:
    with pytest.raises(ImageNotFoundError):
        asyncio.run(model.arun("<OD>", tmp_path / "missing.png"))

    async def first() -> object:
        return await anext(model.astream("<OD>", tmp_path / "missing.png"))

    with pytest.raises(ImageNotFoundError):
        asyncio.run(first())


# ------------------------------------------------------------------------------------------ tiles, sizes, lists of classes


def test_arun_takes_all_arguments_of_run(model: Florence2) -> None:
    image = Image.open(SAMPLES[0]).resize((400, 300))
    tiles = Tiles(size=256, overlap=0.1)
    assert asyncio.run(model.arun("<OD>", image, tiles=tiles)) == model.run("<OD>", image, tiles=tiles)
    assert asyncio.run(model.arun("<OD>", image, fit="pad")) == model.run("<OD>", image, fit="pad")


def test_adetect_is_detect(model: Florence2) -> None:
    names = ["circle", "square"]
    found = asyncio.run(model.adetect(SAMPLES[0], names, min_score=0.1, absent="area"))
    assert found == model.detect(SAMPLES[0], names, min_score=0.1, absent="area")
    assert asyncio.run(model.adetect(SAMPLES[0], names, deadline=0)).truncated == "deadline"
    with pytest.raises(InputError, match="at least one name"):
        asyncio.run(model.adetect(SAMPLES[0], []))


@pytest.mark.parametrize("fit", ["pad", "stretch"])
@pytest.mark.parametrize("search", ["greedy", "beams"])
def test_parts_with_margins_are_in_the_image_s_pixels(model: Florence2, fit: Any, search: str) -> None:
    """A wide image, which has margins above and below when it is padded."""
    image = Image.open(SAMPLES[0]).resize((640, 320))
    options = SEARCHES[search]
    expected = model.run("<OD>", image, options=options, fit=fit)
    check_whole(list(model.stream("<OD>", image, options=options, fit=fit)), expected)


def test_a_stream_has_no_tiles_and_no_unknown_arguments(model: Florence2) -> None:
    with pytest.raises(InputError, match="use run or arun"):
        model.stream("<OD>", SAMPLES[0], tiles=Tiles(size=256))
    with pytest.raises(TypeError, match="'dead_line'"):
        model.stream("<OD>", SAMPLES[0], dead_line=1)  # type: ignore[call-arg]


def test_a_stream_under_a_constraint(model: Florence2) -> None:
    options = GenerationOptions(num_beams=1, constrain=Grammar.boxes(["circle", "square"]))
    check_whole(list(model.stream("<OD>", SAMPLES[0], options=options)), model.run("<OD>", SAMPLES[0], options=options))
    options = GenerationOptions(constrain=Choice(["a circle", "a square"]))
    check_whole(
        list(model.stream("<CAPTION>", SAMPLES[0], options=options)),
        model.run("<CAPTION>", SAMPLES[0], options=options),
    )
