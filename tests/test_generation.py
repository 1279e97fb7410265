"""Greedy and beam search against transformers' `generate`, on a language model that is a table."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from florence_onnx import GenerationOptions, OptionsError
from florence_onnx.generation import (
    NoRepeatNGram,
    generate,
    log_softmax,
    top_k,
)
from florence_onnx.options import GenerationDefaults, SearchConfig

START, BOS, EOS, VOCAB, PERIOD = 2, 0, 2, 30, 13


class TableSession:
    """A decoder session whose logits depend on the prompt, the position and the last token."""

    def __init__(self, tables: np.ndarray) -> None:
        """Args: tables `(P, PERIOD, V, V)`."""
        self.tables = tables
        self.owners = np.arange(len(tables))
        self.length = 0
        self.steps = 0

    def step(self, token_ids: np.ndarray) -> np.ndarray:
        self.length += token_ids.shape[1]
        self.steps += 1
        return self.tables[self.owners, self.length % PERIOD, token_ids[:, -1]].copy()

    def reorder(self, rows: np.ndarray, prompts: np.ndarray) -> None:
        kept = self.owners[rows]
        assert set(kept) == set(np.unique(self.owners)[prompts]), "rows must belong to the prompts that stay"
        self.owners = kept


def make_tables(num_prompts: int, seed: int, end_bias: float) -> np.ndarray:
    tables = np.random.default_rng(seed).normal(0, 2, (num_prompts, PERIOD, VOCAB, VOCAB)).astype(np.float32)
    tables[..., EOS] += np.float32(end_bias)
    return tables


def transformers_generate(table: np.ndarray, config: SearchConfig) -> tuple[int, ...]:
    torch = pytest.importorskip("torch", reason="the reference search needs torch")
    transformers = pytest.importorskip("transformers", reason="the reference search is transformers'")
    from transformers.modeling_outputs import CausalLMOutput

    class TableModel(transformers.PreTrainedModel, transformers.GenerationMixin):  # type: ignore[misc, name-defined]
        config_class = transformers.PretrainedConfig
        main_input_name = "input_ids"

        def __init__(self) -> None:
            super().__init__(transformers.PretrainedConfig(vocab_size=VOCAB))
            self.anchor = torch.nn.Parameter(torch.zeros(1))
            self.table = torch.from_numpy(table)

        def forward(self, input_ids: Any, **_: Any) -> CausalLMOutput:
            length = input_ids.shape[1]
            return CausalLMOutput(logits=self.table[length % PERIOD, input_ids[:, -1:]])

    output = (
        TableModel()
        .generate(
            torch.tensor([[START]]),
            attention_mask=torch.ones(1, 1, dtype=torch.long),
            do_sample=False,
            use_cache=False,
            max_new_tokens=config.max_length - 1,
            min_new_tokens=config.min_new_tokens or None,
            num_beams=config.num_beams,
            length_penalty=config.length_penalty,
            early_stopping=config.early_stopping,
            no_repeat_ngram_size=config.no_repeat_ngram_size,
            forced_bos_token_id=config.forced_bos_token_id,
            forced_eos_token_id=config.forced_eos_token_id,
            eos_token_id=EOS,
            pad_token_id=1,
        )[0]
        .tolist()
    )
    end = output.index(EOS, 1) + 1 if EOS in output[1:] else len(output)
    return tuple(output[:end])


configs = st.builds(
    SearchConfig,
    decoder_start_token_id=st.just(START),
    eos_token_id=st.just(EOS),
    max_length=st.integers(2, 14),
    num_beams=st.integers(1, 5),
    length_penalty=st.sampled_from([-1.0, 0.0, 0.6, 1.0, 2.0]),
    early_stopping=st.sampled_from([True, False, "never"]),
    no_repeat_ngram_size=st.integers(0, 3),
    forced_bos_token_id=st.sampled_from([None, BOS]),
    forced_eos_token_id=st.sampled_from([None, EOS]),
)


@st.composite
def configs_with_minimum(draw: st.DrawFn) -> SearchConfig:
    config = draw(configs)
    return dataclasses.replace(config, min_new_tokens=draw(st.integers(0, min(4, config.max_length - 2))))


@given(configs_with_minimum(), st.integers(0, 2**31), st.sampled_from([-2.0, 0.0, 2.0, 4.0]))
@settings(max_examples=150, deadline=None)
def test_tokens_equal_transformers(config: SearchConfig, seed: int, end_bias: float) -> None:
    tables = make_tables(1, seed, end_bias)
    answer = generate(TableSession(tables), 1, config)[0]
    assert answer.token_ids == transformers_generate(tables[0], config)


@given(configs_with_minimum(), st.integers(0, 2**31), st.sampled_from([0.0, 3.0]), st.integers(2, 5))
@settings(max_examples=60, deadline=None)
def test_a_batch_gives_what_single_prompts_give(config: SearchConfig, seed: int, end_bias: float, count: int) -> None:
    tables = make_tables(count, seed, end_bias)
    batch = generate(TableSession(tables), count, config)
    assert batch == [generate(TableSession(tables[i : i + 1]), 1, config)[0] for i in range(count)]


def greedy_config(**changes: Any) -> SearchConfig:
    return SearchConfig(decoder_start_token_id=START, eos_token_id=EOS, max_length=8, **changes)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_truncated_says_whether_the_limit_or_the_model_ended_the_answer(num_beams: int) -> None:
    endless = make_tables(1, 0, end_bias=-100.0)
    forced = greedy_config(num_beams=num_beams, forced_eos_token_id=EOS)
    cut = generate(TableSession(endless), 1, forced)[0]
    assert cut.truncated and cut.token_ids[-1] == EOS and len(cut.token_ids) == 8
    cut = generate(TableSession(endless), 1, greedy_config(num_beams=num_beams))[0]
    assert cut.truncated and cut.token_ids[-1] != EOS

    ends_at_the_limit = endless.copy()
    ends_at_the_limit[:, 7, :, EOS] = 100.0
    whole = generate(TableSession(ends_at_the_limit), 1, forced)[0]
    assert not whole.truncated and len(whole.token_ids) == 8
    early = generate(TableSession(make_tables(1, 0, end_bias=100.0)), 1, forced)[0]
    assert not early.truncated and early.token_ids == (START, EOS)


def test_a_forced_first_token_saves_a_decoder_step() -> None:
    session = TableSession(make_tables(1, 0, -100.0))
    generate(session, 1, greedy_config(forced_bos_token_id=BOS))
    assert session.steps == 6, "8 tokens: two are fed at first, and the last is fed to nobody"


def test_no_repeat_ngram_forbids_exactly_the_repeating_token() -> None:
    scores = np.zeros((2, 6), dtype=np.float32)
    NoRepeatNGram(3)(np.array([[1, 2, 3, 4, 1, 2], [1, 2, 3, 1, 2, 5]]), scores)
    assert np.argwhere(np.isneginf(scores)).tolist() == [[0, 3]]


def test_top_k_is_sorted_and_prefers_the_lower_index_among_equals() -> None:
    assert top_k(np.array([1, 3, 3, 2, 3], dtype=np.float32), 3).tolist() == [1, 2, 4]
    assert top_k(np.array([1, 3], dtype=np.float32), 5).tolist() == [1, 0]


def test_log_softmax_is_a_distribution_even_for_large_logits() -> None:
    values = log_softmax(np.array([[1e4, 1e4 - 1, -1e4]], dtype=np.float32))
    np.testing.assert_allclose(np.exp(values).sum(), 1, rtol=1e-6)
    assert np.isfinite(values).all()


DEFAULTS = GenerationDefaults(
    decoder_start_token_id=2,
    eos_token_id=2,
    max_positions=512,
    vocab_size=1000,
    options=GenerationOptions(num_beams=3, no_repeat_ngram_size=3, forced_bos_token_id=0, early_stopping=True),
)


def test_options_override_the_checkpoint_and_inherit_the_rest() -> None:
    config = DEFAULTS.resolve(GenerationOptions(num_beams=1, forced_bos_token_id=-1, early_stopping=False))
    assert (config.num_beams, config.no_repeat_ngram_size, config.max_length) == (1, 3, 513)
    assert config.forced_bos_token_id is None and config.early_stopping is False
    assert DEFAULTS.resolve(None).num_beams == 3


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (GenerationOptions(num_beams=0), "num_beams must be a whole number from 1"),
        (GenerationOptions(num_beams=2.5), "num_beams"),  # type: ignore[arg-type]
        (GenerationOptions(max_new_tokens=513), "from 1 to 512, got 513"),
        (GenerationOptions(max_new_tokens=True), "max_new_tokens"),
        (GenerationOptions(max_new_tokens=4, min_new_tokens=5), "min_new_tokens"),
        (GenerationOptions(no_repeat_ngram_size=-1), "no_repeat_ngram_size"),
        (GenerationOptions(early_stopping="always"), "early_stopping"),  # type: ignore[arg-type]
        (GenerationOptions(early_stopping=1), "early_stopping"),  # type: ignore[arg-type]
        (GenerationOptions(length_penalty=float("nan")), "length_penalty"),
        (GenerationOptions(length_penalty=1e6), "length_penalty must be a number from -10 to 10"),
        (GenerationOptions(forced_bos_token_id=1000), "forced_bos_token_id must be a whole number from -1 to 999"),
        (GenerationOptions(forced_eos_token_id="a"), "forced_eos_token_id"),  # type: ignore[arg-type]
        ({"num_beams": 1}, "options must be a GenerationOptions, got dict"),
    ],
)
def test_wrong_options_are_named(options: GenerationOptions, said: str) -> None:
    with pytest.raises(OptionsError, match=said):
        DEFAULTS.resolve(options)
