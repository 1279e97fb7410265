"""The slot cache: after rows are reordered and dropped and drafts rejected, logits are those of a fresh session."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from florence_onnx import Florence2
from florence_onnx.inference import decoder
from florence_onnx.inference.decoder import CachedDecoder
from florence_onnx.runtime.engine import OnnxEngine

START = [2, 0]


@pytest.fixture(scope="module")
def model() -> Florence2:
    return Florence2.from_pretrained("demo", device="cpu", session_options={"intra_op_num_threads": 1})


class Session:
    """A cached decoder, with the tokens that each of its rows should have been fed."""

    def __init__(self, model: Florence2, num_prompts: int, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        sizes = model._bundle.sizes
        self.features = self.random.normal(0, 1, (num_prompts, sizes.num_image_tokens, sizes.width)).astype(np.float32)
        self.input_ids = self.random.integers(3, 300, (num_prompts, 9))
        self.mask = np.ones_like(self.input_ids)
        self.mask[0, 6:] = 0
        self.model = model._text_model
        self.tested = self.start(range(num_prompts))
        self.rows = [(prompt, list[int]()) for prompt in range(num_prompts)]

    def start(self, prompts: Any) -> CachedDecoder:
        chosen = list(prompts)
        found = self.model.start(self.input_ids[chosen], self.mask[chosen], self.features[chosen])
        assert isinstance(found, CachedDecoder)
        return found

    def feed(self, tokens: np.ndarray) -> None:
        """Feeds every row and compares the logits after each token with those of a fresh session."""
        found = self.tested.verify(tokens).copy()
        for (prompt, history), new, logits in zip(self.rows, tokens.tolist(), found, strict=True):
            history += new
            expected = self.start([prompt]).verify(np.array([history]))[0, -len(new) :]
            # the demo model is fp16: sums in another order differ by some units in the last place
            np.testing.assert_allclose(logits, expected, atol=0.02 * np.abs(expected).max())

    def draw(self, count: int) -> np.ndarray:
        return self.random.integers(3, 1500, (len(self.rows), count))

    def keep(self, num_fed: int) -> None:
        counts = self.random.integers(1, num_fed + 1, len(self.rows))
        self.tested.keep(counts)
        for (_, history), count in zip(self.rows, counts, strict=True):
            del history[len(history) - num_fed + count :]

    def reorder(self, width: int, *, drop: bool) -> None:
        present = sorted({prompt for prompt, _ in self.rows})
        old_width = len(self.rows) // len(present)
        kept = np.arange(len(present))
        if drop:
            kept = np.delete(kept, self.random.integers(len(kept)))
        rows = np.concatenate([prompt * old_width + self.random.integers(0, old_width, width) for prompt in kept])
        self.tested.reorder(rows, kept)
        self.rows = [(self.rows[row][0], list(self.rows[row][1])) for row in rows]


@pytest.mark.parametrize("first_capacity", [4, 16, 64])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_beams_share_a_cache_without_attending_each_other(
    model: Florence2, seed: int, first_capacity: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoder, "FIRST_CAPACITY", first_capacity)
    session = Session(model, 3, seed)
    session.feed(np.tile(START, (3, 1)))
    for step in range(14):
        session.reorder(3, drop=step in (5, 9))
        session.feed(session.draw(1))


@pytest.mark.parametrize("width", [1, 2])
@pytest.mark.parametrize("first_capacity", [4, 64])
def test_rejected_tokens_are_forgotten(
    model: Florence2, width: int, first_capacity: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows keep different numbers of tokens, and prompts leave in between."""
    monkeypatch.setattr(decoder, "FIRST_CAPACITY", first_capacity)
    session = Session(model, 3, seed=5)
    session.feed(np.tile(START, (3, 1)))
    for step, count in enumerate((3, 1, 5, 2, 5, 1, 4)):
        session.reorder(width, drop=step in (3, 5))
        session.feed(session.draw(count))
        session.keep(count)


def test_free_slots_are_reused(model: Florence2) -> None:
    session = Session(model, 2, seed=7)
    session.tested.step(np.tile(START, (2, 1)))
    session.tested.reorder(np.array([0, 0, 0, 1, 1, 1]), np.arange(2))
    for _ in range(180):  # 540 slots a prompt, of which one beam's history of 182 stays
        session.tested.step(np.full((6, 1), 5))
        session.tested.reorder(np.array([2, 2, 2, 4, 4, 4]), np.arange(2))
    assert {cache.shape[2] for cache in session.tested._caches.values()} == {256}
    for _ in range(50):  # 600 more, of which 50 stay: more than three quarters of 256
        session.tested.verify(np.full((6, 4), 5))
        session.tested.keep(np.ones(6, dtype=np.int64))
        session.tested.reorder(np.array([0, 0, 0, 5, 5, 5]), np.arange(2))
    assert {cache.shape[2] for cache in session.tested._caches.values()} == {512}


def test_nothing_is_bound_again_while_shapes_stay(model: Florence2, monkeypatch: pytest.MonkeyPatch) -> None:
    bound: list[OnnxEngine] = []
    bind = OnnxEngine.bind

    def counted(engine: OnnxEngine) -> Any:
        bound.append(engine)
        return bind(engine)

    monkeypatch.setattr(OnnxEngine, "bind", counted)
    session = Session(model, 1, seed=0)
    first = session.tested.step(np.array([START]))
    session.tested.reorder(np.zeros(3, dtype=np.int64), np.zeros(1, dtype=np.int64))
    buffers = set()
    for step in range(20):
        logits = session.tested.step(np.full((3, 1), step + 5))
        assert not np.shares_memory(logits, first)
        buffers.add(logits.ctypes.data)
        session.tested.reorder(np.array([2, 0, 1]), np.zeros(1, dtype=np.int64))
    assert len(bound) == 2 and len(buffers) == 1, "one binding for the opening, one for the beams"


def test_padding_beyond_the_last_position_is_harmless(model: Florence2) -> None:
    limit = model._bundle.sizes.max_positions
    session = Session(model, 2, seed=0)
    session.tested.step(session.draw(limit - 3))
    logits = session.tested.verify(session.draw(8))
    assert np.isfinite(logits[:, :3]).all()
