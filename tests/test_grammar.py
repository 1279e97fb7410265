"""Grammars and choices: what they become as tokens, and answers that cannot be malformed."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from florence_onnx import Choice, Florence2, GenerationOptions, Grammar, OptionsError, Prediction, tasks
from florence_onnx.bundles.bundle import DEMO_DIRECTORY
from florence_onnx.generation.generate import drive, new_search
from florence_onnx.generation.options import SearchConfig
from florence_onnx.generation.scores import TopScores
from florence_onnx.generation.search import Search
from florence_onnx.tasks import Task
from tests.conftest import Exported
from tests.generation.test_scores import top_scores

SAMPLES = sorted((DEMO_DIRECTORY.parent / "samples").glob("*.png"))
REGION = "<loc_430><loc_367><loc_591><loc_537>"
LABELS = ("red circle", "yellow star", "yellow starfish", "Kite", "naïve ☂")

# Written by hand, and not from the automata: text between marks, and groups of locations.
_LABEL = r"(?P<label>(?!\s*<)[^<\n]+)"
_LOC = r"<loc_\d+>"
_BOX, _QUAD = rf"(?:{_LOC}){{4}}", rf"(?:{_LOC}){{8}}"
_OUTLINE = rf"(?:(?:{_LOC}){{2}}){{3,}}"
_OUTLINES = rf"{_OUTLINE}(?:<sep>{_OUTLINE})*"
_MARKED = rf"(?:<poly>{_OUTLINES}</poly>)+"
_FORMS: dict[str, str] = {
    "boxes": rf"(?:{_LABEL}(?:{_BOX})+)*",
    "bare boxes": rf"(?:{_BOX})*",
    "quads": rf"(?:{_LABEL}{_QUAD})*",
    "polygons": rf"(?:{_OUTLINES}|{_MARKED})?",
    "labelled polygons": rf"(?:{_LABEL}{_MARKED})*",
    "boxes or polygons": rf"(?:{_LABEL}(?:{_BOX})+)*|(?:{_LABEL}{_MARKED})*",
    "text": r"(?s:(?!.*<(?:loc_\d+|poly|/poly|sep|pad|unk|mask)>).*\S.*)",
    "text and region": rf"(?s:[^<]*[^<\s][^<]*)(?:{_BOX})?",
}
GRAMMARS: dict[str, tuple[str, Grammar]] = {
    "any boxes": ("boxes", Grammar.boxes()),
    "boxes of labels": ("boxes", Grammar.boxes(LABELS)),
    "bare boxes": ("bare boxes", Grammar.boxes([])),
    "any quads": ("quads", Grammar.quads()),
    "quads of a lexicon": ("quads", Grammar.quads(LABELS)),
    "polygons": ("polygons", Grammar.polygons()),
    "polygons of labels": ("labelled polygons", Grammar.polygons(LABELS)),
    "polygons of any": ("labelled polygons", Grammar.polygons(None)),
    "boxes or polygons": ("boxes or polygons", Grammar.for_task(tasks.OPEN_VOCABULARY_DETECTION, LABELS)),
    "text": ("text", Grammar.text()),
    "text and region": ("text and region", Grammar.text(has_region=True)),
}


def is_well_formed(name: str, text: str) -> bool:
    """Whether a decoded answer has the form of a grammar, and ends."""
    form, grammar = GRAMMARS[name]
    if not text.startswith("</s>") or not text.endswith("</s>") or "\N{REPLACEMENT CHARACTER}" in text:
        return False
    body = text.removeprefix("</s>").removeprefix("<s>").removesuffix("</s>")
    pattern = re.sub(r"\?P<label>", "?:", _FORMS[form])
    if not re.fullmatch(pattern, body):
        return False
    labels = [piece for piece in re.split(r"<[^<>]+>", body) if piece]
    if grammar.labels and not set(labels) <= set(grammar.labels):
        return False
    if ("box" in form and "<poly>" not in body) or "region" in form:
        bins = [int(number) for number in re.findall(r"<loc_(\d+)>", body)]
        return all(x1 <= x2 and y1 <= y2 for x1, y1, x2, y2 in zip(*[iter(bins)] * 4, strict=True))
    return True


def test_the_check_itself_finds_malformed_answers() -> None:
    box = "<loc_1><loc_2><loc_3><loc_4>"
    for name, body in {
        "any boxes": f"a{box}",
        "bare boxes": box * 2,
        "any quads": f"a{box}{box}",
        "polygons": f"{box}<loc_1><loc_2><sep>{box}{box}",
        "boxes or polygons": f"Kite<poly>{box}{box}</poly>",
        "text": "a < b",
        "text and region": f"word{box}",
    }.items():
        assert is_well_formed(name, f"</s><s>{body}</s>"), name
        for broken in (body + "<loc_1>", body + "<sep>", "<loc_9>" + body, f"{body}b<poly></poly>"):
            assert not is_well_formed(name, f"</s><s>{broken}</s>"), (name, broken)
        assert not is_well_formed(name, f"</s><s>{body}")
    assert not is_well_formed("bare boxes", "</s><loc_3><loc_2><loc_1><loc_4></s>")
    assert not is_well_formed("boxes of labels", f"</s>yellow{box}</s>")


# ------------------------------------------------------------------------------------- random scores, no model at all


class RandomSession:
    """A decoder whose logits are drawn anew at every step, so that nothing but the grammar gives an answer its form."""

    def __init__(self, num_prompts: int, vocab_size: int, seed: int) -> None:
        self._random = np.random.default_rng(seed)
        self._rows, self._vocab_size = num_prompts, vocab_size

    def step(self, token_ids: np.ndarray) -> np.ndarray:
        return 4 * self._random.standard_normal((self._rows, self._vocab_size), dtype=np.float32)

    def reorder(self, rows: np.ndarray, prompts: np.ndarray) -> None:
        self._rows = len(rows)


SEARCHES: dict[str, dict[str, Any]] = {
    "greedy": {"num_beams": 1},
    "beams": {"num_beams": 3, "num_return_sequences": 3},
    "sampling": {"num_beams": 1, "do_sample": True, "temperature": 2.0, "top_k": 0, "seed": 5},
    "sampling beams": {"num_beams": 2, "do_sample": True, "top_p": 0.9, "seed": 6},
    "no repetition": {"num_beams": 1, "no_repeat_ngram_size": 1, "bad_words_ids": [[n] for n in range(400, 900)]},
    "no repetition with beams": {"num_beams": 3, "no_repeat_ngram_size": 1, "early_stopping": False},
    "no forced tokens": {"num_beams": 3, "forced_bos_token_id": -1, "forced_eos_token_id": -1},
    "a minimum": {"num_beams": 1, "min_new_tokens": 20},
    "penalties": {"num_beams": 1, "repetition_penalty": 9.0, "exponential_decay_length_penalty": (3, 0.5)},
    "suppressed": {"num_beams": 3, "suppress_tokens": list(range(4, 1300)), "remove_invalid_values": True},
}


@pytest.fixture(scope="module")
def demo() -> Florence2:
    return Florence2.from_pretrained("demo", device="cpu", session_options={"intra_op_num_threads": 1})


@pytest.fixture(scope="module")
def batching() -> Florence2:
    return Florence2.from_pretrained("demo", device="cpu", max_batch=4, session_options={"intra_op_num_threads": 1})


def texts_of(model: Florence2, config: SearchConfig, count: int, seed: int) -> list[str]:
    session = RandomSession(count, model._bundle.sizes.vocab_size, seed)
    answers = drive(session, new_search(count, config, None))
    return [model._tokenizer.decode(one.token_ids) for found in answers for one in (found, *found.alternatives)]


@pytest.mark.parametrize("search", SEARCHES)
def test_no_answer_of_1000_is_malformed(demo: Florence2, search: str) -> None:
    """10 answers of each grammar by each search, and those that beams find beside them."""
    for number, name in enumerate(GRAMMARS):
        for limit, count in ((30, 5), (9, 3), (14, 2)):
            options = GenerationOptions(max_new_tokens=limit, constrain=GRAMMARS[name][1], **SEARCHES[search])
            if (options.min_new_tokens or 0) > limit:
                continue
            found = texts_of(demo, demo._resolve(options), count, 100 * number + limit)
            assert found
            for text in found:
                assert is_well_formed(name, text), (name, limit, text)


# -------------------------------------------------------------------------------------------------------- real models


@pytest.fixture(scope="module")
def tiny_model(tiny: Exported) -> Florence2:
    return Florence2.from_pretrained(tiny.bundle, device="cpu", session_options={"intra_op_num_threads": 1})


@pytest.mark.parametrize("search", ["greedy", "beams", "sampling"])
def test_no_answer_of_random_weights_is_malformed(
    tiny_model: Florence2, photographs: list[Image.Image], search: str
) -> None:
    encoded = [tiny_model.encode(image) for image in photographs]
    free = tiny_model.run_batch("<OD>", encoded, options=GenerationOptions(max_new_tokens=20, **SEARCHES[search]))
    assert not any(is_well_formed("any boxes", answer.text) for answer in free)
    for name, (_, grammar) in GRAMMARS.items():
        options = GenerationOptions(max_new_tokens=20, constrain=grammar, **SEARCHES[search])
        for answer in tiny_model.run_batch("<OD>", encoded, options=options):
            assert is_well_formed(name, answer.text), (name, answer.text)


def test_an_answer_that_is_well_formed_anyway_stays_the_same(demo: Florence2) -> None:
    """The same tokens by all searches, though a constraint takes another way through the scores."""
    asked: list[tuple[Task[Any], str | None, str | None]] = [
        (tasks.OBJECT_DETECTION, None, None),
        (tasks.OCR_WITH_REGION, None, None),
        (tasks.REGION_PROPOSAL, None, None),
        (tasks.REFERRING_EXPRESSION_SEGMENTATION, "red circle", None),
        (tasks.REGION_TO_CATEGORY, None, REGION),
        (tasks.CAPTION, None, None),
    ]
    for task, text, region in asked:
        for num_beams in (1, 3):
            free = demo.run(task, SAMPLES[0], text_input=text, region=region, options=GenerationOptions(num_beams))
            options = GenerationOptions(num_beams, constrain=Grammar.for_task(task), scores=True)
            bound = demo.run(task, SAMPLES[0], text_input=text, region=region, options=options)
            assert bound.token_ids == free.token_ids and bound.truncated == free.truncated


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 1},
        {"num_beams": 1, "prompt_lookup_num_tokens": 0},
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 3, "length_penalty": 0.0},
        {"num_beams": 1, "do_sample": True, "seed": 8, "num_return_sequences": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["boxes of labels", "any quads", "polygons", "function"])
def test_answers_are_the_same_in_continuous_batches(
    demo: Florence2, batching: Florence2, options: dict[str, Any], name: str
) -> None:
    """Through the 32 best tokens and drafts there, through all logits here."""
    constrain = (lambda prefix: [2, *range(600, 640)]) if name == "function" else GRAMMARS[name][1]
    given = GenerationOptions(max_new_tokens=18, constrain=constrain, scores=True, **options)
    expected = [demo.run("<OD>", image, options=given) for image in SAMPLES[:3]]
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda image: batching.run("<OD>", image, options=given), SAMPLES[:3]))
    for one, other in zip(expected, found, strict=True):
        assert one.token_ids == other.token_ids and one.truncated == other.truncated
        assert [each.token_ids for each in one.alternatives] == [each.token_ids for each in other.alternatives]


def test_drafts_change_nothing(demo: Florence2) -> None:
    caption = "the red circle, the green circle and the red circle"
    task = tasks.CAPTION_TO_PHRASE_GROUNDING
    for grammar in (Grammar.boxes(), Grammar.boxes(["the red circle", "the green circle", "red"]), Grammar.quads()):
        answers = {
            demo.run(
                task,
                SAMPLES[0],
                text_input=caption,
                options=GenerationOptions(1, constrain=grammar, prompt_lookup_num_tokens=count, max_new_tokens=40),
            ).token_ids
            for count in (0, 1, 4, 9)
        }
        assert len(answers) == 1


def test_scores_are_those_of_the_model(demo: Florence2, batching: Florence2) -> None:
    """Of each token the log-probability by teacher forcing, however few tokens were allowed."""
    for model in (demo, batching):
        for num_beams in (1, 3):
            options = GenerationOptions(
                num_beams, constrain=Grammar.boxes(["kite", "star"]), scores=True, max_new_tokens=12
            )
            answer = model.run("<OD>", SAMPLES[0], options=options)
            logits = demo.score_tokens("<OD>", SAMPLES[0], answer.token_ids).astype(np.float64)
            expected = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
            chosen = expected[np.arange(len(logits)), answer.token_ids[1:]]
            assert answer.token_logprobs is not None
            np.testing.assert_allclose(answer.token_logprobs[2:], chosen[1:], atol=1e-3)


def test_an_answer_that_had_to_end_is_truncated(demo: Florence2) -> None:
    whole = demo.run("<OD>", SAMPLES[0], options=GenerationOptions(constrain=Grammar.boxes()))
    assert not whole.truncated and len(whole.results.bboxes) == 3
    for num_beams in (1, 3):
        options = GenerationOptions(num_beams, max_new_tokens=len(whole.token_ids) - 4, constrain=Grammar.boxes())
        cut = demo.run("<OD>", SAMPLES[0], options=options)
        assert cut.truncated and len(cut.results.bboxes) == 2 and is_well_formed("any boxes", cut.text)
        exactly = dataclasses.replace(options, max_new_tokens=len(whole.token_ids) - 1)
        assert demo.run("<OD>", SAMPLES[0], options=exactly) == whole or num_beams == 1


# ------------------------------------------------------------------------------------------------------------ choices

CHOICES = ("a star", "a circle", "a circle and a star", "Two circles, a star and the word ROCKET.", "A", "A circle")


@pytest.mark.parametrize("device", ["host", "batches"])
def test_all_choices_have_their_exact_log_probability(
    demo: Florence2, batching: Florence2, tiny_model: Florence2, device: str
) -> None:
    """Those of teacher forcing, choice by choice: of float32 weights to 1e-4, of int8 ones to what their scales vary."""
    model, reference, bound = (tiny_model, tiny_model, 1e-6) if device == "host" else (batching, demo, 1e-3)
    options = GenerationOptions(constrain=Choice(CHOICES), num_return_sequences=2, num_beams=2, scores=True)
    answers = model.run_batch("<CAPTION>", SAMPLES[:3], options=options)
    for answer, image in zip(answers, SAMPLES, strict=False):
        found = answer.choice_logprobs
        assert found is not None and set(found) == set(CHOICES)
        assert list(found.values()) == sorted(found.values(), reverse=True)
        assert [answer.results, answer.alternatives[0].results] == list(found)[:2]
        assert answer.sequence_logprob == pytest.approx(found[answer.results], abs=1e-6)
        for choice, log_prob in found.items():
            tokens = [2, 0, *reference._tokenizer.encode_text(choice), 2]
            logits = reference.score_tokens("<CAPTION>", image, tokens).astype(np.float64)[1:]
            each = logits[np.arange(len(logits)), tokens[2:]] - np.log(np.exp(logits).sum(axis=1))
            assert log_prob == pytest.approx(each.sum(), abs=1e-4, rel=bound)
    assert device == "host" or answers[0].results == "Two circles, a star and the word ROCKET."


def test_more_choices_than_a_pass_has_rows(demo: Florence2, batching: Florence2) -> None:
    words = [f"{color} {shape}" for color in ("red", "green", "blue", "pink", "odd") for shape in range(30)]
    expected = None
    for model in (demo, batching):
        answer = model.run("<CAPTION>", SAMPLES[0], options=GenerationOptions(constrain=Choice(words)))
        assert answer.choice_logprobs is not None and set(answer.choice_logprobs) == set(words)
        few = model.run("<CAPTION>", SAMPLES[0], options=GenerationOptions(constrain=Choice(words[140:])))
        assert few.choice_logprobs is not None
        for word, log_prob in few.choice_logprobs.items():
            assert log_prob == pytest.approx(answer.choice_logprobs[word], abs=2e-3)
        assert answer.results == next(iter(answer.choice_logprobs)) == (expected or answer.results)
        expected = answer.results


def test_choices_about_a_region(demo: Florence2) -> None:
    choice = Choice(["circle", "star", "square"], has_region=True)
    answer = demo.run("<REGION_TO_CATEGORY>", SAMPLES[0], region=REGION, options=GenerationOptions(constrain=choice))
    assert answer.results == "circle" and answer.choice_logprobs is not None
    assert answer.choice_logprobs["circle"] > -0.1, (
        "what the model says of its own accord, without the region behind it"
    )
    drawn = demo.run_batch(
        "<REGION_TO_CATEGORY>",
        SAMPLES[:1] * 3,
        regions=[REGION] * 3,
        options=GenerationOptions(
            num_beams=1, do_sample=True, temperature=1e4, seed=4, num_return_sequences=3, constrain=choice
        ),
    )
    for each in drawn:
        assert sorted([each.results, *(other.results for other in each.alternatives)]) == ["circle", "square", "star"]


def test_a_bad_image_among_choices_fails_alone(demo: Florence2, batching: Florence2, tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"no image")
    images = [SAMPLES[0], tmp_path / "bad.png", SAMPLES[1]]
    options = GenerationOptions(constrain=Choice([str(number) for number in range(70)]))
    for model in (demo, batching):
        first, bad, last = model.run_batch("<CAPTION>", images, options=options, on_error="return")
        assert isinstance(first, Prediction) and isinstance(last, Prediction)
        assert not isinstance(bad, Prediction) and bad.index == 1  # type: ignore[attr-defined]


# ------------------------------------------------------------------------------------------------ labels and mistakes


def test_what_a_label_becomes(demo: Florence2) -> None:
    """As answers spell it: stripped, in its own case, without a blank in front."""
    tokens = demo._tokenizer
    compiled = demo._grammars.compile(
        demo._bundle.generation.resolve(GenerationOptions(constrain=Grammar.boxes([" car ", "Car"])))
    )
    first = compiled.allowed(compiled.start([2, 0]), None).tolist()  # type: ignore[union-attr]
    assert set(first) == {2, tokens.encode_text("car")[0], tokens.encode_text("Car")[0]}
    assert tokens.encode_text(" car")[0] not in first


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"boxes": {"labels": ["car"]}}, None),
        ({"task": "<OD>"}, None),
        ({"task": {"name": "object-detection", "labels": ["car"]}}, None),
        ({"choices": ["yes", "no"]}, None),
        ({"choices": {"choices": ["yes"], "has_region": True}}, None),
        ({"text": {"has_region": True}}, None),
        ({}, None),
        ("boxes", "constrain must be a Grammar"),
        ({"boxes": {}, "quads": {}}, "constrain must be a Grammar"),
        ({"masks": {}}, "constrain has boxes, quads, polygons, text, task or choices"),
        ({"boxes": {"label": ["car"]}}, "boxes takes an object with labels"),
        ({"boxes": {"labels": "car"}}, "labels must be a list of strings"),
        ({"boxes": {"labels": ["car", " car"]}}, "'car' is given twice"),
        ({"boxes": {"labels": ["a<b"]}}, "neither < nor a line break"),
        ({"boxes": {"labels": [7]}}, "text that is not blank"),
        ({"boxes": {"labels": ["x" * 1001]}}, "at most 1000 characters"),
        ({"quads": {"labels": []}}, "quads need text"),
        ({"choices": []}, "at least one"),
        ({"choices": ["<loc_1>"]}, "cannot spell"),
        ({"choices": ["a\ud800"]}, "not valid Unicode"),
        ({"choices": {"has_region": True}}, "choices takes an object with choices and has_region"),
        ({"choices": ["x y z " * 40]}, "takes 241 tokens, but max_new_tokens is 30"),
        ({"text": {"has_region": 1}}, "true or false"),
        ({"task": "<ODD>"}, "unknown task"),
        ({"task": {"name": "caption", "labels": ["car"]}}, "text without labels"),
        ({"task": {"name": "region-proposal", "labels": ["car"]}}, "has no labels"),
        ({"task": {"name": "object-detection", "labels": []}}, "none is given"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_the_option_in_json(demo: Florence2, value: Any, said: str | None) -> None:
    options = GenerationOptions(max_new_tokens=30, constrain=value)
    if said is None:
        demo.check_options(options)
    else:
        with pytest.raises(OptionsError, match=re.escape(said)) as raised:
            demo.check_options(options)
        assert str(raised.value).startswith("constrain")


def test_too_little_room_for_any_answer(demo: Florence2) -> None:
    with pytest.raises(OptionsError, match="at least 3 tokens for an answer, but max_new_tokens is 2"):
        demo.check_options(GenerationOptions(max_new_tokens=2, constrain=Grammar.text()))


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (lambda prefix: [], "allows nothing after [2, 0]"),
        (lambda prefix: ["a"], "must return token ids"),
        (lambda prefix: [10**6], "must return token ids"),
        (lambda prefix: 1 / 0, "ZeroDivisionError"),
    ],
)
def test_a_function_that_fails_ends_its_own_call(
    demo: Florence2, batching: Florence2, function: Callable[[list[int]], Any], said: str
) -> None:
    with pytest.raises(OptionsError, match=re.escape(said)):
        demo.run("<CAPTION>", SAMPLES[0], options=GenerationOptions(constrain=function))
    with ThreadPoolExecutor(2) as pool:
        good = pool.submit(batching.run, "<OD>", SAMPLES[0])
        with pytest.raises(OptionsError, match=re.escape(said)):
            batching.run("<CAPTION>", SAMPLES[0], options=GenerationOptions(constrain=function))
        assert len(good.result().results.bboxes) == 3


def test_logits_are_fetched_only_where_the_best_tokens_do_not_decide(demo: Florence2) -> None:
    """A device sends 32 tokens a row: they suffice where the best of them are allowed."""
    config = demo._resolve(GenerationOptions(1, constrain=Grammar.boxes(["star"]), max_new_tokens=8))
    session = RandomSession(1, demo._bundle.sizes.vocab_size, 0)
    for is_listed in (True, False):
        search: Search = new_search(1, config, None)
        logits = session.step(search.start())[:, None]
        best = demo._tokenizer.encode_text("star")[0]
        logits[..., best] = 90.0 if is_listed else -90.0
        logits[..., 2] = -80.0 if is_listed else -91.0
        scores: TopScores = top_scores(logits, 32)
        step = search.advance(scores)
        assert step is not None and step.token_ids.tolist() == [[best]]
        assert scores.was_fetched is not is_listed
