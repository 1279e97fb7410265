"""Constrained answers: transformers' `prefix_allowed_tokens_fn`, and automata over token ids."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, note, settings
from hypothesis import strategies as st

from florence_onnx import OptionsError
from florence_onnx.generation.automaton import END, Arc, Automaton
from florence_onnx.generation.constraints import PrefixFunction, without
from florence_onnx.generation.generate import generate, new_search
from florence_onnx.generation.options import SearchConfig
from florence_onnx.generation.scores import AllScores
from tests.generation.test_generation import BOS, EOS, START, VOCAB, TableSession, VerifyingTableSession, make_tables
from tests.generation.test_scores import cases, top_scores
from tests.generation.test_settings import PROMPT, our_answers, our_config, table_generate


def allowed_after(seed: int, size: int) -> Callable[[list[int]], list[int]]:
    """A function of the tokens so far that allows `size` tokens, drawn anew after each prefix; the end token is mostly one."""

    @functools.cache
    def drawn(prefix: tuple[int, ...]) -> list[int]:
        random = np.random.default_rng([seed, *prefix])
        found = random.choice(np.arange(3, VOCAB), size, replace=False).tolist()
        return [*found, EOS] if random.random() < 0.7 else found

    return lambda prefix: drawn(tuple(prefix))


def constrained(given: dict[str, Any], function: Any) -> SearchConfig:
    return dataclasses.replace(our_config(given), constrain=PrefixFunction(function, VOCAB))


plain_settings = st.fixed_dictionaries(
    {"num_beams": st.integers(1, 4), "max_new_tokens": st.integers(3, 14)},
    optional={
        "length_penalty": st.sampled_from([-1.0, 0.0, 2.0]),
        "early_stopping": st.sampled_from([True, False, "never"]),
        "forced_bos_token_id": st.just(BOS),
        "forced_eos_token_id": st.just(EOS),
        "repetition_penalty": st.sampled_from([0.7, 1.5]),
        "sequence_bias": st.just([[[5], 2.0], [[6, 7], -3.0]]),
        "renormalize_logits": st.just(True),
    },
)


@given(plain_settings, st.integers(0, 10**6), st.integers(1, 6))
@settings(max_examples=50, deadline=None)
def test_a_function_gives_the_tokens_of_transformers(given: dict[str, Any], seed: int, size: int) -> None:
    table, function = make_tables(1, seed, 0.0)[0], allowed_after(seed, size)
    expected = table_generate(
        table,
        {**given, "do_sample": False, "prefix_allowed_tokens_fn": lambda row, prefix: function(prefix.tolist())},
    )
    note(repr(expected))
    assert our_answers(table, constrained(given, function)) == expected


@given(st.sampled_from([1, 3]), st.booleans(), st.integers(0, 10**6), st.integers(1, 4))
@settings(max_examples=30, deadline=None)
def test_a_function_means_the_same_in_batches_with_drafts_and_with_scores_of_a_device(
    num_beams: int, is_dense: bool, seed: int, size: int
) -> None:
    tables = make_tables(3, seed, 0.0)
    given = {"num_beams": num_beams, "max_new_tokens": 12, "no_repeat_ngram_size": 2}
    config = constrained({**given, **({"repetition_penalty": 1.5} if is_dense else {})}, allowed_after(seed, size))
    alone = [our_answers(table, config)[0] for table in tables]
    for session in (TableSession(tables), VerifyingTableSession(tables)):
        drafts = [[*PROMPT, *answer, *PROMPT] for answer in alone]
        answers = generate(session, 3, config, drafts, [PROMPT] * 3)
        assert [answer.token_ids for answer in answers] == alone
    for count in (4 * num_beams, VOCAB):
        search, session = new_search(3, config, None, [PROMPT] * 3), TableSession(tables)
        step = search.start()
        while (following := search.advance(top_scores(session.step(step)[:, None], count))) is not None:
            session.reorder(following.rows, following.prompts)
            step = following.token_ids
        assert [answer.token_ids for answer in search.results()] == alone


def test_an_answer_holds_only_what_was_allowed_though_bans_would_leave_nothing() -> None:
    """The bans give way: here every repetition of 5 is banned, and nothing but 5 and the end is allowed."""
    table = make_tables(1, 3, -50.0)[0]
    for chosen in ({"num_beams": 1}, {"num_beams": 3}, {"num_beams": 1, "repetition_penalty": 1.1}):
        config = constrained({**chosen, "no_repeat_ngram_size": 1, "max_new_tokens": 6}, lambda prefix: [5])
        assert our_answers(table, config) == [(START, 5, 5, 5, 5, 5, 5)]
    config = constrained({"num_beams": 1, "bad_words_ids": [[5]], "max_new_tokens": 4}, lambda prefix: [5, 6])
    assert our_answers(table, config) == [(START, 6, 6, 6, 6)]
    assert without(np.array([3, 5]), [3]).tolist() == [5] and without(np.array([3, 5]), [3, 5]).tolist() == [3, 5]


@settings(deadline=None, max_examples=200)
@given(case=cases(), data=st.data())
def test_allowed_tokens_have_the_same_scores_from_a_device(case: dict[str, Any], data: st.DataObject) -> None:
    """Of all logits and of the top 32, as of a full sort, and the model's own distribution stays what it was."""
    logits, k = case["logits"], min(case["k"], case["logits"].size // 3)
    vocab = logits.shape[-1]
    drawn = st.lists(st.integers(0, vocab - 1), min_size=1, max_size=vocab, unique=True)
    allowed = [np.array(sorted(data.draw(drawn))) for _ in range(3)]
    found = []
    for scores in (AllScores().read(logits.copy()), top_scores(logits.copy(), min(32, vocab))):
        log_probs = scores.log_probs(k)
        for row, ids in enumerate(allowed):
            log_probs.allow(row, ids)
        found.append(log_probs.top_k(0, case["beams"], k, is_shared=False))
        for row in range(3):
            own = logits[row, 0].astype(np.float64)
            token = int(own.argmax())
            expected = own[token] - np.log(np.exp(own).sum())
            assert log_probs.distribution(row).log_prob(token) == pytest.approx(expected, abs=1e-4)
    for row, ids in enumerate(allowed):
        best = int(ids[logits[row, 0, ids].argmax()])
        for scores in (AllScores().read(logits.copy()), top_scores(logits.copy(), min(32, vocab))):
            assert scores.best_allowed_token(row, 0, ids) == best
    (values, beams, tokens), (others, other_beams, other_tokens) = found
    possible = np.isfinite(values)
    np.testing.assert_allclose(values, others, atol=1e-5)
    if not np.array_equal(logits, np.round(logits)):  # sums of equal logits round differently
        np.testing.assert_array_equal(beams[possible], other_beams[possible])
        np.testing.assert_array_equal(tokens[possible], other_tokens[possible])
    assert possible.sum() == min(k, sum(map(len, allowed)))
    for beam, token in zip(beams[possible], tokens[possible], strict=True):
        assert token in allowed[beam]


# ------------------------------------------------------------------------------------------------------------ automata


def ids(*tokens: int) -> Any:
    return np.array(tokens)


def number_pairs() -> Automaton:
    """`(a (n n n)+)*` with the third n of each at least the first, where a is 5, and n from 10 to 19."""
    numbers = np.arange(10, 20)
    return Automaton(
        {
            0: [Arc(ids(EOS), END), Arc(ids(5), 1)],
            1: [Arc(numbers, 2)],
            2: [Arc(numbers, 3)],
            3: [Arc(numbers, 4, is_ordered=True)],
            4: [Arc(ids(EOS), END), Arc(ids(5), 1), Arc(numbers, 2)],
        },
        first=0,
        after_bos=0,
        end_tokens=[EOS],
    )


def test_an_automaton_leaves_room_to_end() -> None:
    automaton = number_pairs()
    state = automaton.start([START])
    assert automaton.allowed(state, None).tolist() == [EOS, 5]
    assert automaton.allowed(state, 5).tolist() == [EOS, 5] and automaton.allowed(state, 4).tolist() == [EOS]
    for token in (5, 13, 17):
        state = automaton.extend(state, token)
    assert automaton.allowed(state, None).tolist() == list(range(13, 20)), "at least the one two places before"
    state = automaton.extend(state, 19)
    assert automaton.allowed(state, 1).tolist() == [EOS] and EOS in automaton.allowed(state, 40)
    assert automaton.allowed(automaton.extend(state, EOS), 3).tolist() == [EOS]
    assert automaton.allowed(automaton.extend(state, 7), 3).tolist() == [EOS], "not allowed: nothing follows any more"
    with pytest.raises(OptionsError, match="at least 1 tokens"):
        automaton.check(0, has_bos=False)
