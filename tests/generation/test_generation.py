"""Greedy and beam search against transformers' `generate`, on a language model that is a table of logits."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from florence_onnx import GenerationOptions, OptionsError
from florence_onnx.generation.generate import generate
from florence_onnx.generation.logits_processors import NoRepeatNGram
from florence_onnx.generation.options import DEFAULT_PROMPT_LOOKUP, GenerationDefaults, SearchConfig
from florence_onnx.generation.scores import BlockedLogProbs

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


class VerifyingTableSession(TableSession):
    """A session that verifies several tokens in one call; its rows may have different lengths."""

    def __init__(self, tables: np.ndarray) -> None:
        super().__init__(tables)
        self.lengths = np.zeros(len(tables), dtype=int)
        self.fed: list[np.ndarray] = []

    def step(self, token_ids: np.ndarray) -> np.ndarray:
        return self.verify(token_ids)[:, -1]

    def verify(self, token_ids: np.ndarray) -> np.ndarray:
        self.steps += 1
        self.fed.append(token_ids)
        after = self.lengths[:, None] + np.arange(1, token_ids.shape[1] + 1)
        self.lengths = self.lengths + token_ids.shape[1]
        return self.tables[self.owners[:, None], after % PERIOD, token_ids].copy()

    def keep(self, counts: np.ndarray) -> None:
        assert counts.min() >= 1 and counts.max() <= self.fed[-1].shape[1]
        self.lengths = self.lengths - self.fed[-1].shape[1] + counts

    def reorder(self, rows: np.ndarray, prompts: np.ndarray) -> None:
        super().reorder(rows, prompts)
        self.lengths = self.lengths[rows]


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
    return SearchConfig(**{"decoder_start_token_id": START, "eos_token_id": EOS, "max_length": 8, **changes})


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
    assert session.steps == 6, "8 tokens: two are fed in the first call, and the last is never fed"


@given(configs_with_minimum(), st.integers(0, 2**31), st.sampled_from([0.0, 3.0]), st.integers(1, 4), st.data())
@settings(max_examples=300, deadline=None)
def test_drafts_change_no_token(
    config: SearchConfig, seed: int, end_bias: float, count: int, data: st.DataObject
) -> None:
    """Right drafts, copied from the answer, wrong ones, and some that run past the end or the limit."""
    config = dataclasses.replace(config, num_beams=1)
    tables = make_tables(count, seed, end_bias)
    expected = generate(TableSession(tables), count, config)
    tokens = st.lists(st.integers(0, VOCAB - 1), max_size=6)
    prompts = []
    for answer in expected:
        start = data.draw(st.integers(0, len(answer.token_ids)))
        prompts.append([*data.draw(tokens), *answer.token_ids[start:], *data.draw(tokens)])
    drafting = dataclasses.replace(config, prompt_lookup_num_tokens=data.draw(st.integers(1, 7)))
    session = VerifyingTableSession(tables)
    assert generate(session, count, drafting, prompts) == expected


def test_a_prompt_that_holds_the_answer_saves_decoder_steps() -> None:
    tables = make_tables(1, 3, -100.0)
    config = greedy_config(no_repeat_ngram_size=3)
    plain, drafting = VerifyingTableSession(tables), VerifyingTableSession(tables)
    (answer,) = generate(plain, 1, config)
    assert plain.steps == 7
    with_lookup = dataclasses.replace(config, prompt_lookup_num_tokens=4)
    assert generate(drafting, 1, with_lookup, [answer.token_ids]) == [answer]
    assert drafting.steps == 3, "the start token, then one token with four drafts, then the rest"
    for silent_config, prompts in ((config, [answer.token_ids]), (with_lookup, None)):
        silent = VerifyingTableSession(tables)
        assert generate(silent, 1, silent_config, prompts) == [answer] and silent.steps == 7


def test_wrong_drafts_are_given_up() -> None:
    """A prompt in which every token of the answer is followed by a wrong one."""
    config = greedy_config(max_length=60, prompt_lookup_num_tokens=3)
    tables = make_tables(1, 5, -100.0)
    (answer,) = generate(TableSession(tables), 1, config)
    session = VerifyingTableSession(tables)
    wrong = [x for token in dict.fromkeys(answer.token_ids[1:]) for x in (token, EOS + 1 if token != 3 else 4, 1)]
    assert generate(session, 1, config, [wrong]) == [answer]
    drafted = sum(fed.shape[1] > 1 for fed in session.fed)
    assert 1 <= drafted <= 12 and session.steps <= 59


def reference_banned(tokens: list[int], size: int) -> set[int]:
    """The banned tokens, found by scanning the row as transformers does."""
    start = len(tokens) - size + 1
    starts = range(len(tokens) - size + 1) if start >= 0 else ()
    return {tokens[i + size - 1] for i in starts if tokens[i : i + size - 1] == tokens[start:]}


@given(st.integers(1, 4), st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3)), max_size=40))
@settings(max_examples=300, deadline=None)
def test_no_repeat_ngram_bans_exactly_the_repeating_tokens(size: int, choices: list[tuple[int, int]]) -> None:
    """Three rows share one index and replace each other, as beams do."""
    ngrams = NoRepeatNGram(size)
    rows: list[list[int]] = [[], [], []]
    for parent, token in choices:
        rows = [[*rows[(parent * i) % 3], (token + i) % 4] for i in range(3)]
        for row in rows:
            ngrams.add(row)
        for row in rows:
            assert set(ngrams.banned(row)) == reference_banned(row, size)


def reference_top_k(log_probs: np.ndarray, scores: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    total = (log_probs + scores[:, None]).reshape(-1)
    order = np.argsort(-total, kind="stable")[:k]
    return total[order], order


@given(
    st.integers(1, 5),
    st.integers(2, 90),
    st.integers(1, 9),
    st.integers(0, 2**31),
    st.booleans(),
    st.sampled_from([0.0, 0.5, 4.0]),
    st.data(),
)
@settings(max_examples=300, deadline=None)
def test_the_top_k_continuations_are_those_of_a_full_sort(
    k: int, vocab: int, block: int, seed: int, is_shared: bool, rounding: float, data: st.DataObject
) -> None:
    """With ties (rounded logits), banned and forced tokens, unreachable beams, and vocabularies of any size."""
    random = np.random.default_rng(seed)
    logits = random.normal(0, 3, (1 if is_shared else k, vocab)).astype(np.float32)
    if rounding:
        logits = np.round(logits / np.float32(rounding)) * np.float32(rounding)
    scores = random.choice(np.float32([0, -1, -2.5, -1e9]), k)
    log_probs = logits - logits.max(axis=1, keepdims=True)
    log_probs -= np.log(np.exp(log_probs).sum(axis=1, keepdims=True))
    found = BlockedLogProbs(block)
    found.read(logits.copy())
    for row in range(len(logits)):
        tokens = data.draw(st.lists(st.integers(0, vocab - 1), max_size=4))
        if data.draw(st.booleans()) and tokens:
            log_probs[row] = -np.inf
            log_probs[row, tokens[0]] = 0
            found.force(row, tokens[0])
        else:
            log_probs[row, tokens] = -np.inf
            found.ban(row, tokens)
    expected, keys = reference_top_k(
        np.repeat(log_probs, k, axis=0) if is_shared else log_probs, scores, min(2 * k, vocab)
    )
    best, beams, tokens_found = found.top_k(0, scores, min(2 * k, vocab), is_shared=is_shared)
    np.testing.assert_array_equal(best, expected)
    assert (beams * vocab + tokens_found).tolist() == keys.tolist()


def test_log_probabilities_are_a_distribution_even_for_large_logits() -> None:
    found = BlockedLogProbs(2)
    found.read(np.array([[1e4, 1e4 - 1, -1e4]], dtype=np.float32))
    scores, _, tokens = found.top_k(0, np.zeros(1, dtype=np.float32), 3, is_shared=False)
    assert tokens.tolist() == [0, 1, 2]
    np.testing.assert_allclose(np.exp(scores).sum(), 1, rtol=1e-6)
    assert np.isfinite(scores).all()


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
    assert DEFAULTS.resolve(None).prompt_lookup_num_tokens == DEFAULT_PROMPT_LOOKUP
    assert DEFAULTS.resolve(GenerationOptions(prompt_lookup_num_tokens=0)).prompt_lookup_num_tokens == 0


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
        (
            GenerationOptions(prompt_lookup_num_tokens=65),
            "prompt_lookup_num_tokens must be a whole number from 0 to 64",
        ),
        (GenerationOptions(prompt_lookup_num_tokens=-1), "prompt_lookup_num_tokens"),
        (GenerationOptions(forced_bos_token_id=1000), "forced_bos_token_id must be a whole number from -1 to 999"),
        (GenerationOptions(forced_eos_token_id="a"), "forced_eos_token_id"),  # type: ignore[arg-type]
        ({"num_beams": 1}, "options must be a GenerationOptions, got dict"),
    ],
)
def test_wrong_options_are_named(options: GenerationOptions, said: str) -> None:
    with pytest.raises(OptionsError, match=said):
        DEFAULTS.resolve(options)
