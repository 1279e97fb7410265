"""A batch on the device: while prompts join, branch and leave and caches grow, logits are those of a fresh session."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from florence_onnx import Florence2
from florence_onnx.generation.scores import TopScores
from florence_onnx.inference.decoder import FIRST_CAPACITY, CachedDecoder
from florence_onnx.inference.decoder_call import ResidentSizes
from florence_onnx.inference.resident_decoder import ResidentDecoder
from florence_onnx.runtime.engine import OnnxEngine

NUM_IMAGE_TOKENS = 65
ENCODER_LENGTH = NUM_IMAGE_TOKENS + 16


@pytest.fixture(scope="module")
def model() -> Florence2:
    options = {"intra_op_num_threads": 1}
    return Florence2.from_pretrained("demo", device="cpu", session_options=options, max_batch=4)


@pytest.fixture(params=[True, False], ids=["in-place", "two-sets"])
def decoder(request: pytest.FixtureRequest, model: Florence2, monkeypatch: pytest.MonkeyPatch) -> ResidentDecoder:
    """With caches updated in place, and with two sets as for TensorRT, one read while the other is written."""
    monkeypatch.setattr(OnnxEngine, "updates_in_place", request.param)
    return new_decoder(model)


def new_decoder(model: Florence2) -> ResidentDecoder:
    text: Any = model._text_model
    sizes = model._bundle.sizes
    return ResidentDecoder(
        text._text_encoder, text._decoder, ResidentSizes(text._shape, sizes.num_image_tokens, sizes.width)
    )


class Prompts:
    """Prompts in a batch, with the tokens that each of their rows should have been fed."""

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
        batch_index = self.decoder.add(ids, memory._resident.upload(features))
        assert batch_index not in self.given
        self.given[batch_index], self.rows[batch_index] = (ids, features), [[]]
        return batch_index

    def remove(self, batch_index: int) -> None:
        self.decoder.remove(batch_index)
        del self.given[batch_index], self.rows[batch_index]

    def fresh(self, batch_index: int, history: list[int]) -> np.ndarray:
        ids, features = self.given[batch_index]
        text: Any = self.model._text_model
        session = text.start(ids[None], np.ones((1, len(ids)), dtype=np.int64), features[None])
        assert isinstance(session, CachedDecoder)
        return session.verify(np.array([history]))[0]

    def step(self, counts: dict[int, int]) -> dict[int, TopScores]:
        """Feeds every row of each prompt some tokens, and compares the logits after each with those of a fresh session.

        Args:
            counts: Tokens for each row, by batch index.
        """
        tokens = {
            batch_index: self.random.integers(3, 1500, (len(self.rows[batch_index]), n))
            for batch_index, n in counts.items()
        }
        found = self.decoder.step(tokens)
        for batch_index, fed in tokens.items():
            for row, history in enumerate(self.rows[batch_index]):
                history += fed[row].tolist()
                expected = self.fresh(batch_index, history)[-counts[batch_index] :]
                for at, logits in enumerate(expected):
                    tolerance = 0.02 * np.abs(logits).max()  # the demo model is fp16
                    np.testing.assert_allclose(found[batch_index].logits(row, at), logits, atol=tolerance)
        return found

    def branch(self, batch_index: int, width: int) -> None:
        parents = self.random.integers(0, len(self.rows[batch_index]), width)
        self.decoder.slot_table(batch_index).reorder(parents)
        self.rows[batch_index] = [list(self.rows[batch_index][parent]) for parent in parents]

    def keep(self, batch_index: int, num_fed: int) -> None:
        counts = self.random.integers(1, num_fed + 1, len(self.rows[batch_index]))
        self.decoder.slot_table(batch_index).keep(counts)
        for history, count in zip(self.rows[batch_index], counts, strict=True):
            del history[len(history) - num_fed + count :]


def test_prompts_join_branch_and_leave(model: Florence2, decoder: ResidentDecoder) -> None:
    decoder.allocate(4, ENCODER_LENGTH)
    prompts = Prompts(model, decoder)
    first, second = prompts.add(), prompts.add(5)
    prompts.step({first: 2, second: 2})
    prompts.branch(first, 3)
    prompts.step({first: 1, second: 4})
    prompts.keep(second, 4)
    third = prompts.add(ENCODER_LENGTH - NUM_IMAGE_TOKENS)
    prompts.step({first: 1, second: 1, third: 2})
    prompts.remove(first)
    fourth, fifth = prompts.add(1), prompts.add()
    assert fourth == first, "the lowest free batch index"
    for _ in range(3):
        for batch_index in (fourth, fifth):
            prompts.branch(batch_index, 2)
        prompts.step({second: 1, third: 3, fourth: 1, fifth: 1})
        prompts.keep(third, 3)


def test_caches_grow_and_free_slots_are_reused(model: Florence2, decoder: ResidentDecoder) -> None:
    decoder.allocate(2, ENCODER_LENGTH)
    prompts = Prompts(model, decoder, seed=1)
    batch_index, other = prompts.add(), prompts.add()
    prompts.step({batch_index: 2, other: 2})
    prompts.branch(batch_index, 3)
    prompts.branch(other, 2)
    for _ in range(20):
        prompts.step({batch_index: 4, other: 1})
    assert decoder.capacity == 4 * FIRST_CAPACITY, "three rows of eighty tokens do not fit 64 slots"
    for _ in range(4):  # one of three rows is continued: the slots of the others become free
        prompts.branch(batch_index, 1)
        prompts.branch(batch_index, 3)
        prompts.step({batch_index: 20, other: 1})
        prompts.keep(batch_index, 20)
    assert decoder.capacity == 4 * FIRST_CAPACITY


def test_the_batch_grows_beside_prompts_in_flight(model: Florence2, decoder: ResidentDecoder) -> None:
    decoder.allocate(1, ENCODER_LENGTH)
    prompts = Prompts(model, decoder, seed=2)
    first = prompts.add()
    prompts.step({first: 2})
    prompts.branch(first, 3)
    prompts.step({first: 1})
    decoder.grow_batch(4)
    second, third = prompts.add(), prompts.add()
    for _ in range(2):
        prompts.step({first: 1, second: 2, third: 1})


def test_prompts_of_other_lengths(model: Florence2, decoder: ResidentDecoder) -> None:
    """A prompt that fills the encoder, after short ones have left."""
    decoder.allocate(1, ENCODER_LENGTH)
    prompts = Prompts(model, decoder, seed=3)
    prompts.remove(prompts.add())
    sizes = model._bundle.sizes
    room = sizes.max_positions - sizes.num_image_tokens
    features: Any = np.zeros((sizes.num_image_tokens, sizes.width))
    assert decoder.padded_length(np.zeros(room, dtype=np.int64), features) == sizes.max_positions
    decoder.allocate(2, sizes.max_positions)
    batch_index = prompts.add(room)
    prompts.add(2)
    prompts.step({batch_index: 2, 1 - batch_index: 1})


def test_top_k_tokens_are_those_of_the_logits(model: Florence2) -> None:
    decoder = new_decoder(model)
    decoder.allocate(2, ENCODER_LENGTH)
    prompts = Prompts(model, decoder, seed=4)
    batch_indices = [prompts.add(), prompts.add()]
    prompts.step(dict.fromkeys(batch_indices, 2))
    prompts.branch(batch_indices[1], 3)
    for batch_index, scores in prompts.step({batch_indices[0]: 2, batch_indices[1]: 1}).items():
        logits = np.stack(
            [
                [scores.logits(row, at) for at in range(scores.num_tokens)]
                for row in range(len(prompts.rows[batch_index]))
            ]
        )
        np.testing.assert_array_equal(scores._values, -np.sort(-logits)[..., :32])
        np.testing.assert_array_equal(np.take_along_axis(logits, scores._ids, axis=-1), scores._values)
        sums = np.log(np.exp(logits - logits.max(axis=-1, keepdims=True)).sum(axis=-1))
        np.testing.assert_allclose(scores._log_sums, sums, rtol=1e-5)


def test_a_batch_that_cannot_grow_goes_on_unchanged(model: Florence2, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without memory for a larger batch, the prompts in flight go on as before."""
    decoder = new_decoder(model)
    decoder.allocate(1, ENCODER_LENGTH)
    prompts = Prompts(model, decoder, seed=5)
    batch_index = prompts.add()
    prompts.step({batch_index: 2})

    def refuse(*_: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(type(decoder._memory), "allocate", refuse)
        with pytest.raises(MemoryError):
            decoder.grow_batch(8)
    assert decoder.batch_size == 1
    prompts.step({batch_index: 1})
