"""Every generation setting against transformers' `generate`, on table models and on a tiny checkpoint."""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from hypothesis import given, note, settings
from hypothesis import strategies as st
from PIL import Image

from florence_onnx import Florence2, GenerationOptions, OptionsError, tasks
from florence_onnx.bundles.bundle import DEMO_DIRECTORY
from florence_onnx.generation import dense_processors
from florence_onnx.generation.dense_processors import DenseProcessors
from florence_onnx.generation.generate import generate, new_search
from florence_onnx.generation.logits_processors import LogitsProcessors
from florence_onnx.generation.option_names import _IGNORED, _REFUSED, parse_options
from florence_onnx.generation.options import OPTION_NAMES, GenerationDefaults, SearchConfig
from florence_onnx.generation.sampling import draw_without_replacement
from tests.conftest import NO_TORCH, Exported
from tests.generation.test_generation import (
    EOS,
    PERIOD,
    START,
    VOCAB,
    TableSession,
    VerifyingTableSession,
    greedy_config,
    make_tables,
)
from tests.generation.test_scores import top_scores

PROMPT = (7, 8, 9, 8, 7, 10, EOS)
"""What the text encoder was fed."""


@functools.cache
def table_model() -> Any:
    """An encoder-decoder of transformers whose decoder is the table in its attribute `table`."""
    torch = pytest.importorskip("torch", reason=NO_TORCH)
    transformers = pytest.importorskip("transformers", reason=NO_TORCH)
    from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput

    class Encoder(torch.nn.Module):  # type: ignore[misc, name-defined]
        main_input_name = "input_ids"

        def forward(self, input_ids: Any, **_: Any) -> BaseModelOutput:
            return BaseModelOutput(last_hidden_state=torch.zeros(*input_ids.shape, 1))

    class TableModel(transformers.PreTrainedModel, transformers.GenerationMixin):  # type: ignore[misc, name-defined]
        config_class = transformers.PretrainedConfig
        main_input_name = "input_ids"

        def __init__(self) -> None:
            super().__init__(transformers.PretrainedConfig(vocab_size=VOCAB, is_encoder_decoder=True))
            self.anchor = torch.nn.Parameter(torch.zeros(1))
            self.encoder = Encoder()

        def get_encoder(self) -> Any:
            return self.encoder

        def forward(self, decoder_input_ids: Any = None, **_: Any) -> Seq2SeqLMOutput:
            length = decoder_input_ids.shape[1]
            return Seq2SeqLMOutput(logits=self.table[length % PERIOD, decoder_input_ids[:, -1:]])

    transformers.logging.set_verbosity_error()
    return TableModel()


def table_generate(table: np.ndarray, given: dict[str, Any]) -> list[tuple[int, ...]]:
    """transformers' answers, `num_return_sequences` of them."""
    model = table_model()
    import torch

    model.table = torch.from_numpy(table)
    fixed = {"decoder_start_token_id": START, "pad_token_id": 1, "use_cache": False, "eos_token_id": EOS}
    ids = torch.tensor([PROMPT])
    found = model.generate(ids, attention_mask=torch.ones_like(ids), **{**fixed, **given})
    ends = given.get("eos_token_id", EOS)
    return [until_end(row, ends if isinstance(ends, list) else [ends]) for row in found.tolist()]


def until_end(row: list[int], ends: list[int]) -> tuple[int, ...]:
    length = next((place + 1 for place, token in enumerate(row) if place and token in ends), len(row))
    return tuple(row[:length])


def our_config(given: dict[str, Any]) -> SearchConfig:
    return GenerationDefaults(START, EOS, 64, VOCAB).resolve(parse_options(given))


def our_answers(table: np.ndarray, config: SearchConfig) -> list[tuple[int, ...]]:
    (answer,) = generate(TableSession(table[None]), 1, config, None, [PROMPT])
    return [answer.token_ids, *(other.token_ids for other in answer.alternatives)]


token = st.integers(0, VOCAB - 1)
words = st.lists(st.lists(token, min_size=1, max_size=3), min_size=1, max_size=6)
SETTINGS: dict[str, st.SearchStrategy[Any]] = {
    "eos_token_id": st.lists(token, min_size=1, max_size=3, unique=True),
    "min_length": st.integers(1, 5),
    "min_new_tokens": st.integers(1, 4),
    "repetition_penalty": st.sampled_from([0.7, 1.3, 2.5]),
    "encoder_repetition_penalty": st.sampled_from([0.6, 1.5, 3.0]),
    "encoder_no_repeat_ngram_size": st.integers(1, 3),
    "no_repeat_ngram_size": st.integers(1, 3),
    "bad_words_ids": words,
    "suppress_tokens": st.lists(token, min_size=1, max_size=22),
    "begin_suppress_tokens": st.lists(token, min_size=1, max_size=22),
    "sequence_bias": words.map(
        lambda found: [[word, (-1.0) ** n * (n + 0.7)] for n, word in enumerate(found) if 0 not in word] or [[[5], 1.0]]
    ),
    # not 2.0: score + |score| * (2 - 1) is exactly 0 for every end token of a beam, and torch.topk takes equals in any order
    "exponential_decay_length_penalty": st.tuples(st.integers(0, 5), st.sampled_from([0.9, 1.2, 1.9, 2.5])),
    "remove_invalid_values": st.just(True),
    "renormalize_logits": st.just(True),
    "forced_bos_token_id": st.sampled_from([0, 5]),
    "forced_eos_token_id": st.sampled_from([EOS, [EOS, 4]]),
    "length_penalty": st.sampled_from([-1.0, 2.0]),
    "early_stopping": st.sampled_from([True, "never"]),
}


@st.composite
def some_settings(draw: st.DrawFn) -> dict[str, Any]:
    names = draw(st.lists(st.sampled_from(list(SETTINGS)), min_size=1, max_size=5, unique=True))
    found = {name: draw(SETTINGS[name]) for name in names}
    if "exponential_decay_length_penalty" in found:
        # transformers makes NaN of a banned end token, and what follows from NaN is nobody's intention
        found = {
            name: value
            for name, value in found.items()
            if not name.startswith(("min_", "bad", "supp", "begin", "no_", "enc"))
        }
    forced = {found.get("forced_bos_token_id"), *np.ravel(found.get("forced_eos_token_id", -1))}
    if not forced.isdisjoint(found.get("suppress_tokens", [])) or not forced.isdisjoint(
        found.get("begin_suppress_tokens", [])
    ):
        found = {
            name: value for name, value in found.items() if not name.startswith("forced")
        }  # nothing would be possible
    num_beams = draw(st.sampled_from([1, 3]))
    if num_beams > 1 and isinstance(found.get("forced_eos_token_id"), list):
        found["forced_eos_token_id"] = EOS  # several are equally good, and torch.topk takes equals in any order
    return {**found, "num_beams": num_beams, "max_new_tokens": draw(st.integers(4, 14))}


@given(some_settings(), st.integers(0, 2**31), st.sampled_from([0.0, 2.0]))
@settings(max_examples=120, deadline=None, print_blob=False)
def test_any_settings_give_the_tokens_of_transformers(chosen: dict[str, Any], seed: int, end_bias: float) -> None:
    table = make_tables(1, seed, end_bias)[0]
    note(repr(chosen))
    assert our_answers(table, our_config(chosen)) == table_generate(table, {**chosen, "do_sample": False})


@given(some_settings(), st.integers(0, 2**31), st.sampled_from([0.0, 2.0]))
@settings(max_examples=60, deadline=None)
def test_settings_mean_the_same_in_batches_with_drafts_and_with_scores_of_a_device(
    chosen: dict[str, Any], seed: int, end_bias: float
) -> None:
    tables = make_tables(3, seed, end_bias)
    config = our_config(chosen)
    alone = [our_answers(table, config)[0] for table in tables]
    for session in (TableSession(tables), VerifyingTableSession(tables)):
        answers = generate(session, 3, config, [PROMPT] * 3, [PROMPT] * 3)
        assert [answer.token_ids for answer in answers] == alone
    search = new_search(3, config, None, [PROMPT] * 3)
    session = TableSession(tables)
    step = search.start()
    while True:
        following = search.advance(top_scores(session.step(step)[:, None], 12))
        if following is None:
            break
        session.reorder(following.rows, following.prompts)
        step = following.token_ids
    assert [answer.token_ids for answer in search.results()] == alone


# ------------------------------------------------------------------------------------------------- a real checkpoint

SINGLE: dict[str, dict[str, Any]] = {
    "several end tokens": {"eos_token_id": [2, 100, 101, 102, 103, 900]},
    "suppressed": {"suppress_tokens": [10, 20, 30, 40], "begin_suppress_tokens": [100, 2]},
    "many suppressed": {"suppress_tokens": list(range(4, 1300, 2))},
    "bad words": {"bad_words_ids": [[n] for n in range(50, 400, 3)] + [[n, n + 1] for n in range(400)]},
    "minimum length": {"min_length": 12},
    "repetition": {"repetition_penalty": 1.7},
    "repetition of the prompt": {"encoder_repetition_penalty": 2.5},
    "n-grams of the prompt": {"encoder_no_repeat_ngram_size": 1},
    "bias": {"sequence_bias": [[[20], 3.0], [[21, 22], -4.0], [[500], 2.5]]},
    "decay": {"exponential_decay_length_penalty": (3, 1.3)},
    "renormalized": {"renormalize_logits": True, "repetition_penalty": 1.3, "remove_invalid_values": True},
    "forced ends": {"forced_eos_token_id": [2, 5], "eos_token_id": [2, 5]},
}


@pytest.fixture(scope="module")
def tiny_model(tiny: Exported) -> Florence2:
    return Florence2.from_pretrained(tiny.bundle, device="cpu", session_options={"intra_op_num_threads": 1})


def checkpoint_answers(
    exported: Exported, model: Florence2, image: Image.Image, prompt: str, given: dict[str, Any]
) -> list[tuple[int, ...]]:
    """transformers' answers to one prompt, from pixels and ids as its users pass them."""
    import torch

    from florence_onnx.images import preprocessing

    sizes, checkpoint = model._bundle.sizes, exported.checkpoint
    pixels = preprocessing.preprocess(
        image.convert("RGB"), size=sizes.image_size, mean=sizes.image_mean, std=sizes.image_std
    )
    image_ids = [checkpoint.model.config.image_token_id] * checkpoint.num_image_tokens
    ids = torch.tensor([image_ids + checkpoint.tokenizer.encode(prompt).ids])
    with torch.inference_mode():
        found = checkpoint.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=torch.from_numpy(pixels), **given
        )
    ends = given.get("eos_token_id", 2)
    return [until_end(row, ends if isinstance(ends, list) else [ends]) for row in found.tolist()]


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("name", SINGLE)
def test_a_mixed_batch_gives_the_tokens_of_transformers(
    name: str, num_beams: int, tiny: Exported, tiny_model: Florence2, photographs: list[Image.Image]
) -> None:
    chosen = {**SINGLE[name], "num_beams": num_beams, "max_new_tokens": 16}
    asked = [tasks.CAPTION, tasks.OBJECT_DETECTION, tasks.OCR_WITH_REGION]
    answers = tiny_model.run_batch(asked, photographs, options=parse_options(chosen))
    for task, image, answer in zip(asked, photographs, answers, strict=True):
        expected = checkpoint_answers(tiny, tiny_model, image, task.format_prompt(), chosen)
        assert answer.token_ids == expected[0]


def test_several_answers_are_those_of_transformers(
    tiny: Exported, tiny_model: Florence2, photographs: list[Image.Image]
) -> None:
    chosen = {"num_beams": 4, "num_return_sequences": 3, "max_new_tokens": 12}
    answer = tiny_model.run(tasks.CAPTION, photographs[0], options=parse_options(chosen))
    expected = checkpoint_answers(tiny, tiny_model, photographs[0], tasks.CAPTION.format_prompt(), chosen)
    assert [answer.token_ids, *(other.token_ids for other in answer.alternatives)] == expected
    assert answer.alternatives[0].results == answer.alternatives[0].text.replace("<s>", "").replace("</s>", "")


# ----------------------------------------------------------------------------------------------------------- sampling

WARPERS: dict[str, tuple[dict[str, Any], Callable[[Any, int], Any]]] = {
    "temperature": ({"temperature": 0.7}, lambda process, least: process.TemperatureLogitsWarper(0.7)),
    "top_k": ({"top_k": 5}, lambda process, least: process.TopKLogitsWarper(5, min_tokens_to_keep=least)),
    "top_p": ({"top_p": 0.8}, lambda process, least: process.TopPLogitsWarper(0.8, min_tokens_to_keep=least)),
    "min_p": ({"min_p": 0.1}, lambda process, least: process.MinPLogitsWarper(0.1, min_tokens_to_keep=least)),
    "typical_p": (
        {"typical_p": 0.6},
        lambda process, least: process.TypicalLogitsWarper(0.6, min_tokens_to_keep=least),
    ),
    "epsilon": (
        {"epsilon_cutoff": 0.02},
        lambda process, least: process.EpsilonLogitsWarper(0.02, min_tokens_to_keep=least),
    ),
    "eta": ({"eta_cutoff": 0.1}, lambda process, least: process.EtaLogitsWarper(0.1, min_tokens_to_keep=least)),
}


@pytest.mark.parametrize("least", [1, 3])
@pytest.mark.parametrize("name", WARPERS)
def test_what_can_be_drawn_is_what_transformers_lets_be_drawn(name: str, least: int) -> None:
    torch = pytest.importorskip("torch", reason=NO_TORCH)
    process = pytest.importorskip("transformers.generation.logits_process", reason=NO_TORCH)
    options, make = WARPERS[name]
    random = np.random.default_rng(4)
    config = greedy_config(**{"top_k": 0, **options})
    (warp,) = dense_processors.warpers(config, least)
    for size, spread in ((30, 2.0), (30, 8.0), (1000, 1.0), (51289, 3.0)):
        for with_bans in (False, True):
            scores = random.normal(0, spread, size).astype(np.float32)
            if with_bans:
                scores[random.integers(0, size, size // 2)] = -np.inf
            expected = make(process, least)(torch.zeros(1, 1, dtype=torch.long), torch.from_numpy(scores[None].copy()))
            np.testing.assert_array_equal(warp(scores.copy()), expected[0].numpy())


def sampled(tables: np.ndarray, **options: Any) -> list[Any]:
    config = our_config({"do_sample": True, "max_new_tokens": 8, "top_k": 0, **options})
    return generate(TableSession(tables), len(tables), config, None, [PROMPT] * len(tables))


def chi_squared(counts: np.ndarray, probabilities: np.ndarray) -> float:
    """How far counts are from their expectation, in standard deviations of chi squared."""
    expected = probabilities * counts.sum()
    is_usual = expected >= 5
    groups = np.append(counts[is_usual], counts[~is_usual].sum())
    wanted = np.append(expected[is_usual], expected[~is_usual].sum())
    groups, wanted = groups[wanted > 0], wanted[wanted > 0]
    freedom = len(wanted) - 1
    return float((((groups - wanted) ** 2 / wanted).sum() - freedom) / np.sqrt(2 * freedom))


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.5}, {"top_k": 6, "temperature": 1.5}, {"repetition_penalty": 2.0}]
)
def test_tokens_are_drawn_with_the_probabilities_of_softmax(options: dict[str, Any]) -> None:
    table = make_tables(1, 9, 0.0)[0]
    config = our_config({"do_sample": True, "top_k": 0, **options})
    bans = LogitsProcessors(config, [START])
    scores = DenseProcessors(config, bans, PROMPT)([START], table[1, START].copy())
    counts = np.zeros(VOCAB)
    for start in range(0, 4000, 50):
        (answer,) = sampled(table[None], num_return_sequences=50, max_new_tokens=1, seed=start, **options)
        for each in (answer, *answer.alternatives):
            counts[each.token_ids[1]] += 1
    assert counts.sum() == 4000
    assert abs(chi_squared(counts, dense_processors.softmax(scores).astype(float))) < 4


def test_beams_draw_without_replacement_as_torch_does() -> None:
    """First two places of 5000 draws, against the exact probabilities of drawing one after the other."""
    scores = np.random.default_rng(1).normal(0, 1.5, 8).astype(np.float32)
    random = np.random.default_rng(7)
    p = dense_processors.softmax(scores).astype(float)
    expected = np.array([[0 if i == j else p[i] * p[j] / (1 - p[i]) for j in range(8)] for i in range(8)])
    counts = np.zeros((8, 8))
    for _ in range(5000):
        first, second, *others = draw_without_replacement(random, scores, 5)
        assert len({first, second, *others}) == 5
        counts[first, second] += 1
    assert abs(chi_squared(counts.ravel(), expected.ravel())) < 4
    blocked = np.array([0, -np.inf, 1, -np.inf], dtype=np.float32)
    assert sorted(draw_without_replacement(random, blocked, 3)[:2]) == [0, 2]


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"num_return_sequences": 3}, {"num_beams": 3, "num_return_sequences": 2}]
)
def test_the_same_seed_gives_the_same_answer_in_any_batch(options: dict[str, Any]) -> None:
    tables = make_tables(4, 5, 1.0)
    batch = sampled(tables, seed=11, **options)
    assert batch == [sampled(tables[i : i + 1], seed=11, **options)[0] for i in range(4)]
    assert all(len(each.alternatives) == options.get("num_return_sequences", 1) - 1 for each in batch)
    assert batch != sampled(tables, seed=12, **options)
    assert sampled(tables, **options) != sampled(tables, **options), "without a seed, draws are new"
    if options == {"num_return_sequences": 3}:
        assert [(a.token_ids, a.truncated) for a in sampled(tables, seed=11)] == [
            (a.token_ids, a.truncated) for a in batch
        ]
        assert batch[0].alternatives[0] != batch[0].alternatives[1]


SEEDED = {"do_sample": True, "seed": 3, "temperature": 3.0}


@pytest.mark.parametrize(
    "options",
    [
        SEEDED,
        {**SEEDED, "num_beams": 3},
        {**SEEDED, "num_return_sequences": 3},
        {"num_beams": 1, "repetition_penalty": 1.8, "bad_words_ids": [[1000], [5, 6]], "eos_token_id": [2, 30]},
        {"num_beams": 3, "sequence_bias": [[[100], 3.0]], "encoder_no_repeat_ngram_size": 2, "num_return_sequences": 2},
    ],
)
def test_answers_are_the_same_on_the_host_and_in_continuous_batches(options: dict[str, Any]) -> None:
    given = GenerationOptions(max_new_tokens=12, **options)
    images = sorted((DEMO_DIRECTORY.parent / "samples").glob("*.png"))[:3]
    threads = {"intra_op_num_threads": 1}
    plain = Florence2.from_pretrained("demo", device="cpu", session_options=threads)
    batching = Florence2.from_pretrained("demo", device="cpu", session_options=threads, max_batch=2)
    expected = [plain.run(tasks.CAPTION, image, options=given) for image in images]
    assert len({answer.text for answer in expected}) > 1
    with ThreadPoolExecutor(3) as pool:
        in_threads = list(pool.map(lambda image: batching.run(tasks.CAPTION, image, options=given), images))
    for found in (plain.run_batch(tasks.CAPTION, images, options=given), in_threads):
        for answer, wanted in zip(found, expected, strict=True):
            assert answer.token_ids == wanted.token_ids
            assert [x.token_ids for x in answer.alternatives] == [x.token_ids for x in wanted.alternatives]


def test_a_sampled_answer_says_whether_the_limit_cut_it_off() -> None:
    (cut,) = sampled(make_tables(1, 0, -100.0), seed=0)
    assert cut.truncated and len(cut.token_ids) == 9
    (whole,) = sampled(make_tables(1, 0, 100.0), seed=0)
    assert not whole.truncated and whole.token_ids == (START, EOS)


# ------------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("chosen", "said"),
    [
        ({"num_beam_groups": 3}, "num_beam_groups=3 is not possible: diverse beam search"),
        ({"diversity_penalty": 0.5}, "diverse beam search"),
        ({"force_words_ids": [[5]]}, "constrained beam search"),
        ({"constraints": [1]}, "constrained beam search"),
        ({"penalty_alpha": 0.6}, "contrastive search"),
        ({"dola_layers": "low"}, "DoLa"),
        ({"guidance_scale": 2.0}, "guidance"),
        ({"watermarking_config": {"bias": 1}}, "watermarks"),
        ({"stop_strings": ["."]}, "eos_token_id"),
        ({"max_time": 3.0}, "max_new_tokens"),
        ({"token_healing": True}, "heal"),
        ({"low_memory": True}, "refuses it too"),
        ({"temprature": 0.5}, "there is no option 'temprature'; did you mean temperature"),
        ({"zzz": 1}, "there is no option 'zzz'; there are num_beams, "),
        ({"temperature": 0.0}, "temperature must be a number above 0, .* set do_sample to False"),
        ({"top_p": 1.5}, "top_p must be a number from 0 to 1, got 1.5"),
        ({"top_k": -1}, "top_k"),
        ({"typical_p": 0}, "typical_p"),
        ({"do_sample": 1}, "do_sample must be True or False"),
        ({"repetition_penalty": 0}, "repetition_penalty must be a number above 0"),
        ({"bad_words_ids": [5]}, "bad_words_ids must be a list of lists"),
        ({"bad_words_ids": [[]]}, "bad_words_ids"),
        ({"suppress_tokens": [VOCAB]}, "each token of suppress_tokens must be a whole number from 0 to 29"),
        ({"suppress_tokens": 5}, "suppress_tokens must be a list"),
        ({"sequence_bias": [[5, 1.0]]}, "sequence_bias"),
        ({"sequence_bias": [[[5], "x"]]}, "sequence_bias must be a number"),
        ({"exponential_decay_length_penalty": [3]}, "exponential_decay_length_penalty"),
        ({"eos_token_id": []}, "eos_token_id"),
        ({"min_length": 60, "max_new_tokens": 4}, "min_length must be a whole number from 0 to 5"),
        ({"seed": -2}, "seed"),
        ({"num_return_sequences": 2}, "greedy search finds one answer"),
        ({"num_return_sequences": 4, "num_beams": 3}, "raise num_beams"),
    ],
)
def test_what_is_not_possible_is_refused_by_name(chosen: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionsError, match=said):
        our_config(chosen)


def test_every_setting_of_transformers_is_an_option_or_refused_or_ignored() -> None:
    transformers = pytest.importorskip("transformers", reason=NO_TORCH)
    ours = {"decoder_start_token_id"} | set(OPTION_NAMES) | set(_REFUSED) | _IGNORED
    assert set(vars(transformers.GenerationConfig())) <= ours
    neutral = {name: value for name, value in vars(transformers.GenerationConfig()).items() if name not in OPTION_NAMES}
    del neutral["decoder_start_token_id"]
    assert parse_options(neutral) == GenerationOptions()


def test_options_clear_what_a_checkpoint_says() -> None:
    own = GenerationOptions(bad_words_ids=[[5]], suppress_tokens=[4], do_sample=True, seed=5, repetition_penalty=2.0)
    defaults = GenerationDefaults(START, (EOS, 5), 64, VOCAB, own)
    assert defaults.resolve(None).end_tokens == (EOS, 5) and defaults.resolve(None).is_dense
    cleared = defaults.resolve(
        GenerationOptions(
            bad_words_ids=[], suppress_tokens=[], do_sample=False, seed=-1, repetition_penalty=1.0, eos_token_id=EOS
        )
    )
    plain = GenerationDefaults(START, EOS, 64, VOCAB).resolve(None)
    assert cleared == plain and not plain.is_dense
