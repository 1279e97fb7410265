"""Constrained answers: transformers' `prefix_allowed_tokens_fn`, and automata over token ids."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, note, settings
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
@settings(max_examples=150, deadline=None)
def test_a_function_gives_the_tokens_of_transformers(given: dict[str, Any], seed: int, size: int) -> None:
    table, function = make_tables(1, seed, 0.0)[0], allowed_after(seed, size)
    expected = table_generate(
        table,
        {**given, "do_sample": False, "prefix_allowed_tokens_fn": lambda row, prefix: function(prefix.tolist())},
    )
    note(repr(expected))
    assert our_answers(table, constrained(given, function)) == expected
