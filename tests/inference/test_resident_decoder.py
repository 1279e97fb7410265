"""Prompts in places of one set of buffers: whatever enters, leaves, branches and grows, logits are those of the bare history."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from florence_onnx import Florence2
from florence_onnx.generation.scores import TopScores
from florence_onnx.inference.decoder import CachedDecoder
from florence_onnx.inference.decoder_call import ResidentSizes
from florence_onnx.inference.resident_decoder import FIRST_CAPACITY, ResidentDecoder
from florence_onnx.runtime.engine import OnnxEngine

TEXT_LENGTH = 16


@pytest.fixture(scope="module")
def model() -> Florence2:
    options = {"intra_op_num_threads": 1}
    return Florence2.from_pretrained("demo", device="cpu", session_options=options, max_batch=4)


@pytest.fixture(params=[True, False], ids=["in-place", "in-turn"])
def decoder(request: pytest.FixtureRequest, model: Florence2, monkeypatch: pytest.MonkeyPatch) -> ResidentDecoder:
    """Caches written in place, and, as for TensorRT, two sets of which one is read while the other is written."""
    monkeypatch.setattr(OnnxEngine, "updates_in_place", request.param)
    return new_decoder(model)


def new_decoder(model: Florence2) -> ResidentDecoder:
    text: Any = model._text_model
    sizes = model._bundle.sizes
    return ResidentDecoder(
        text._text_encoder, text._decoder, ResidentSizes(text._shape, sizes.num_image_tokens, sizes.width)
    )


class Prompts:
    """Prompts in places beside the histories that their rows should have."""

    def __init__(self, model: Florence2, decoder: ResidentDecoder, seed: int = 0) -> None:
        self.random = np.random.default_rng(seed)
        self.model = model
        self.decoder = decoder
        self.given: dict[int, tuple[Any, Any]] = {}
        self.rows: dict[int, list[list[int]]] = {}

    def add(self, length: int = 9) -> int:
        sizes = self.model._bundle.sizes
        ids = self.random.integers(3, 300, length)
        features = self.random.normal(0, 1, (sizes.num_image_tokens, sizes.width)).astype(np.float32)
        memory: Any = self.model._answering
        place = self.decoder.add(ids, memory._resident.upload(features))
        assert place not in self.given
        self.given[place], self.rows[place] = (ids, features), [[]]
        return place

    def remove(self, place: int) -> None:
        self.decoder.remove(place)
        del self.given[place], self.rows[place]

    def fresh(self, place: int, history: list[int]) -> np.ndarray:
        ids, features = self.given[place]
        text: Any = self.model._text_model
        session = text.start(ids[None], np.ones((1, len(ids)), dtype=np.int64), features[None])
        assert isinstance(session, CachedDecoder)
        return session.verify(np.array([history]))[0]

    def step(self, counts: dict[int, int]) -> dict[int, TopScores]:
        """Feeds each prompt so many tokens a row, and compares the logits after each with those of a fresh session."""
        tokens = {place: self.random.integers(3, 1500, (len(self.rows[place]), n)) for place, n in counts.items()}
        found = self.decoder.step(tokens)
        for place, fed in tokens.items():
            for row, history in enumerate(self.rows[place]):
                history += fed[row].tolist()
                expected = self.fresh(place, history)[-counts[place] :]
                for at, logits in enumerate(expected):
                    tolerance = 0.02 * np.abs(logits).max()  # the demo model is fp16
                    np.testing.assert_allclose(found[place].logits(row, at), logits, atol=tolerance)
        return found

    def branch(self, place: int, width: int) -> None:
        parents = self.random.integers(0, len(self.rows[place]), width)
        self.decoder.rows(place).reorder(parents)
        self.rows[place] = [list(self.rows[place][parent]) for parent in parents]

    def keep(self, place: int, num_fed: int) -> None:
        counts = self.random.integers(1, num_fed + 1, len(self.rows[place]))
        self.decoder.rows(place).keep(counts)
        for history, count in zip(self.rows[place], counts, strict=True):
            del history[len(history) - num_fed + count :]


def test_prompts_enter_branch_and_leave(model: Florence2, decoder: ResidentDecoder) -> None:
    decoder.open(4, TEXT_LENGTH)
    prompts = Prompts(model, decoder)
    first, second = prompts.add(), prompts.add(5)
    prompts.step({first: 2, second: 2})
    prompts.branch(first, 3)
    prompts.step({first: 1, second: 4})
    prompts.keep(second, 4)
    third = prompts.add(TEXT_LENGTH)
    prompts.step({first: 1, second: 1, third: 2})
    prompts.remove(first)
    fourth, fifth = prompts.add(1), prompts.add()
    assert fourth == first, "the lowest free place"
    for _ in range(3):
        for place in (fourth, fifth):
            prompts.branch(place, 2)
        prompts.step({second: 1, third: 3, fourth: 1, fifth: 1})
        prompts.keep(third, 3)


def test_a_cache_grows_and_dead_slots_are_used_again(model: Florence2, decoder: ResidentDecoder) -> None:
    decoder.open(2, TEXT_LENGTH)
    prompts = Prompts(model, decoder, seed=1)
    place, other = prompts.add(), prompts.add()
    prompts.step({place: 2, other: 2})
    prompts.branch(place, 3)
    prompts.branch(other, 2)
    for _ in range(20):
        prompts.step({place: 4, other: 1})
    assert decoder.capacity == 4 * FIRST_CAPACITY, "three rows of eighty tokens do not fit 64 slots"
    for _ in range(4):  # of three rows one is continued: what the others had is free
        prompts.branch(place, 1)
        prompts.branch(place, 3)
        prompts.step({place: 20, other: 1})
        prompts.keep(place, 20)
    assert decoder.capacity == 4 * FIRST_CAPACITY


def test_more_places_beside_prompts_in_flight(model: Florence2, decoder: ResidentDecoder) -> None:
    decoder.open(1, TEXT_LENGTH)
    prompts = Prompts(model, decoder, seed=2)
    first = prompts.add()
    prompts.step({first: 2})
    prompts.branch(first, 3)
    prompts.step({first: 1})
    decoder.widen(4)
    second, third = prompts.add(), prompts.add()
    for _ in range(2):
        prompts.step({first: 1, second: 2, third: 1})


def test_prompts_of_other_lengths(model: Florence2, decoder: ResidentDecoder) -> None:
    """A prompt that fills the encoder, after short ones have left."""
    decoder.open(1, TEXT_LENGTH)
    prompts = Prompts(model, decoder, seed=3)
    prompts.remove(prompts.add())
    room = model._bundle.sizes.max_positions - model._bundle.sizes.num_image_tokens
    assert decoder.padded_length(room) == room
    decoder.open(2, room)
    place = prompts.add(room)
    prompts.add(2)
    prompts.step({place: 2, 1 - place: 1})


def test_the_best_tokens_are_those_of_the_logits(model: Florence2) -> None:
    decoder = new_decoder(model)
    decoder.open(2, TEXT_LENGTH)
    prompts = Prompts(model, decoder, seed=4)
    places = [prompts.add(), prompts.add()]
    prompts.step(dict.fromkeys(places, 2))
    prompts.branch(places[1], 3)
    for place, scores in prompts.step({places[0]: 2, places[1]: 1}).items():
        logits = np.stack(
            [[scores.logits(row, at) for at in range(scores.num_tokens)] for row in range(len(prompts.rows[place]))]
        )
        np.testing.assert_array_equal(scores._values, -np.sort(-logits)[..., :32])
        np.testing.assert_array_equal(np.take_along_axis(logits, scores._ids, axis=-1), scores._values)
        sums = np.log(np.exp(logits - logits.max(axis=-1, keepdims=True)).sum(axis=-1))
        np.testing.assert_allclose(scores._log_sums, sums, rtol=1e-5)


def test_what_was_kept_stays_when_nothing_else_fits(model: Florence2, monkeypatch: pytest.MonkeyPatch) -> None:
    """Places cannot be had: those that are there, and the prompts in them, go on as before."""
    decoder = new_decoder(model)
    decoder.open(1, TEXT_LENGTH)
    prompts = Prompts(model, decoder, seed=5)
    place = prompts.add()
    prompts.step({place: 2})

    def refuse(*_: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(type(decoder._memory), "allocate", refuse)
        with pytest.raises(MemoryError):
            decoder.widen(8)
    assert decoder.places == 1
    prompts.step({place: 1})
