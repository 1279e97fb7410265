"""Top-k scores from a device lead to the same tokens as all logits, which are fetched where the top-k do not decide."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from florence_onnx.generation.scores import AllScores, TopScores

Floats = npt.NDArray[np.float32]
VOCABULARY = 300


def top_scores(logits: Floats, count: int) -> TopScores:
    """What a device returns: the greatest logits first; equal ones in any order (here the highest token first)."""
    order = np.argsort(logits[..., ::-1], axis=-1, kind="stable")[..., ::-1]
    ids = (logits.shape[-1] - 1 - order)[..., :count]
    values = np.take_along_axis(logits, ids, axis=-1)
    log_sums = np.log(np.exp(logits - logits.max(axis=-1, keepdims=True)).sum(axis=-1))
    return TopScores(values, ids, log_sums.astype(np.float32), logits.shape[-1], lambda: logits)


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    """Logits `(3, 1, V)`, in half of the cases rounded so that many are equal; banned and forced tokens."""
    vocabulary = draw(st.sampled_from([20, 40, VOCABULARY]))
    seed, is_whole = draw(st.integers(0, 10**6)), draw(st.booleans())
    random = np.random.default_rng(seed)
    logits = random.normal(0, 2, (3, 1, vocabulary)).astype(np.float32)
    best = np.argsort(-logits[:, 0], axis=-1)
    return {
        "logits": np.round(logits) if is_whole else logits,
        # banning matters only for tokens among the best
        "banned": [list(map(int, best[row, : draw(st.integers(0, 34))])) for row in range(3)],
        "forced": draw(st.sampled_from([None, None, 0, 7, vocabulary - 1])),
        "beams": np.sort(random.normal(-3, 2, 3).astype(np.float32))[::-1].copy(),
        "is_shared": draw(st.booleans()),
        "k": draw(st.sampled_from([2, 6, 10, 40])),
    }


@settings(deadline=None, max_examples=300)
@given(case=cases())
def test_the_top_k_continuations_are_the_same(case: dict[str, Any]) -> None:
    logits, k = case["logits"], min(case["k"], case["logits"].size // 3)
    results = []
    for scores in (AllScores().read(logits.copy()), top_scores(logits, min(32, logits.shape[-1]))):
        log_probs = scores.log_probs(k)
        for row, banned in enumerate(case["banned"]):
            if case["forced"] is not None and row == 0:
                log_probs.force(row, case["forced"])
            elif banned:
                log_probs.ban(row, banned)
        results.append(log_probs.top_k(0, case["beams"], k, is_shared=case["is_shared"]))
    (expected, beams, tokens), (found, found_beams, found_tokens) = results
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    # log-sums are computed in another order, so neighbours that differ in the last bit may swap
    with np.errstate(invalid="ignore"):  # -inf minus -inf
        certain = np.abs(np.diff(expected, append=-np.inf)) > 1e-4
        certain &= np.abs(np.diff(expected, prepend=np.inf)) > 1e-4
    is_sure = certain & np.isfinite(expected)
    np.testing.assert_array_equal(found_beams[is_sure], beams[is_sure])
    np.testing.assert_array_equal(found_tokens[is_sure], tokens[is_sure])


@settings(deadline=None, max_examples=300)
@given(case=cases())
def test_the_best_token_is_the_same(case: dict[str, Any]) -> None:
    logits = case["logits"]
    every, top = AllScores().read(logits.copy()), top_scores(logits, min(32, logits.shape[-1]))
    for row, banned in enumerate(case["banned"]):
        if len(banned) < logits.shape[-1]:
            assert top.best_token(row, 0, banned) == every.best_token(row, 0, banned)


def test_logits_are_fetched_only_when_the_top_k_do_not_decide() -> None:
    logits = np.random.default_rng(1).normal(0, 2, (3, 1, VOCABULARY)).astype(np.float32)
    best = np.argsort(-logits[0, 0])
    scores = top_scores(logits, 32)
    scores.log_probs(6).top_k(0, np.zeros(3, np.float32), 6, is_shared=False)
    assert scores.best_token(0, 0, best[:20].tolist()) == best[20]
    assert not scores.was_fetched
    assert scores.best_token(0, 0, best[:32].tolist()) == best[32], "all of the top-k are banned"
    assert scores.was_fetched


@pytest.mark.parametrize(("count", "is_fetched"), [(6, False), (33, True)])
def test_more_candidates_than_the_top_k(count: int, is_fetched: bool) -> None:
    logits = np.random.default_rng(2).normal(0, 2, (1, 1, VOCABULARY)).astype(np.float32)
    scores = top_scores(logits, 32)
    _, _, tokens = scores.log_probs(count).top_k(0, np.zeros(1, np.float32), count, is_shared=False)
    np.testing.assert_array_equal(tokens, np.argsort(-logits[0, 0], kind="stable")[:count])
    assert scores.was_fetched is is_fetched


def test_a_tie_with_the_last_of_the_top_k_is_decided_by_all_logits() -> None:
    """Forty tokens are equally likely; the device returns the higher ids, and the lowest must be chosen."""
    logits = np.zeros((1, 1, VOCABULARY), np.float32)
    logits[0, 0, 100:140] = 5
    scores = top_scores(logits, 32)
    assert scores.best_token(0, 0) == 100
    assert scores.was_fetched


def test_the_last_position_of_several() -> None:
    logits = np.random.default_rng(3).normal(0, 2, (2, 3, VOCABULARY)).astype(np.float32)
    last = top_scores(logits, 32).last_position()
    assert last.num_tokens == 1
    np.testing.assert_array_equal(last.logits(1, 0), logits[1, 2])
    assert last.best_token(1, 0) == int(logits[1, 2].argmax())
