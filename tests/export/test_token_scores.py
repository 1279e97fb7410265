"""Log-probabilities of generated tokens against transformers' logits, for every search and on a device loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image

from florence_onnx import Florence2, GenerationOptions, tasks
from florence_onnx.prediction import Prediction
from tests.conftest import NO_TORCH, Exported

pytest.importorskip("torch", reason=NO_TORCH)
pytest.importorskip("transformers", reason=NO_TORCH)
from export.verification import reference
from tests.export.test_parity import pixel_values

OPTIONS: dict[str, GenerationOptions] = {
    "greedy": GenerationOptions(1),
    "greedy without drafts": GenerationOptions(1, prompt_lookup_num_tokens=0),
    **{f"{beams} beams": GenerationOptions(beams) for beams in (2, 3, 4, 5)},
    "banned and forced": GenerationOptions(1, no_repeat_ngram_size=2, forced_eos_token_id=2),
    "banned and forced, beams": GenerationOptions(3, no_repeat_ngram_size=2, forced_eos_token_id=2),
    "whole rows": GenerationOptions(1, repetition_penalty=1.3),
    "whole rows, beams": GenerationOptions(3, repetition_penalty=1.3),
    "drawn": GenerationOptions(1, do_sample=True, seed=4),
    "drawn beams": GenerationOptions(3, do_sample=True, seed=4),
}


@pytest.fixture(scope="module")
def model(tiny: Exported) -> Florence2:
    return Florence2.from_pretrained(tiny.bundle, device="cpu")


@pytest.fixture(scope="module")
def device_loop(tiny: Exported) -> Florence2:
    return Florence2.from_pretrained(tiny.bundle, device="cpu", max_batch=2)


def run(model: Florence2, image: Image.Image, options: GenerationOptions) -> Prediction[Any]:
    asked = GenerationOptions(**{**vars(options), "max_new_tokens": 16, "scores": True})
    return model.run(tasks.OBJECT_DETECTION, image, options=asked)


def expected(tiny: Exported, model: Florence2, image: Image.Image, token_ids: tuple[int, ...]) -> np.ndarray:
    """Log-probabilities `(L - 1, V)` by transformers."""
    prompt = tasks.OBJECT_DETECTION.format_prompt()
    encoded = reference.encode(tiny.checkpoint, pixel_values(model, [image]), [prompt])
    logits = reference.score(tiny.checkpoint, encoded, token_ids).astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    found: np.ndarray = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return found


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("loop", ["host", "device"])
def test_log_probabilities_are_those_of_transformers(
    name: str, loop: str, tiny: Exported, model: Florence2, device_loop: Florence2, photographs: list[Image.Image]
) -> None:
    answer = run(model if loop == "host" else device_loop, photographs[0], OPTIONS[name])
    assert answer.token_logprobs is not None
    log_probs = expected(tiny, model, photographs[0], answer.token_ids)
    own = [log_probs[place, token] for place, token in enumerate(answer.token_ids[1:])]
    assert answer.token_logprobs[:2] == (0.0, 0.0)  # the start token and the forced first one
    np.testing.assert_allclose(answer.token_logprobs[2:], own[1:], atol=1e-4)
    for other in answer.alternatives:
        assert other.token_logprobs is not None and len(other.token_logprobs) == len(other.token_ids)


@pytest.mark.parametrize("beams", [1, 3])
def test_the_probability_near_a_coordinate(
    beams: int, tiny: Exported, model: Florence2, photographs: list[Image.Image]
) -> None:
    first = model._tokenizer.encode_text("<loc_0>")[0]
    allowed = {first + number for number in range(1000)}
    # random weights choose no location by themselves; 0 to 3 are the special tokens
    others = [token for token in range(4, model._bundle.sizes.vocab_size) if token not in allowed]
    options = GenerationOptions(beams, suppress_tokens=others, min_new_tokens=15)
    answer = run(model, photographs[0], options)
    probabilities = np.exp(expected(tiny, model, photographs[0], answer.token_ids))
    (sequence,) = model.generate_tokens(
        [model.encode(photographs[0])],
        model._tokenizer.encode([tasks.OBJECT_DETECTION.format_prompt()])[0],
        options=GenerationOptions(**{**vars(options), "max_new_tokens": 16, "scores": True}),
    )
    assert sequence.token_ids == answer.token_ids and sequence.scores is not None
    found = 0
    for place, (token, near) in enumerate(zip(sequence.token_ids, sequence.scores.near, strict=True)):
        if place < 2 or token not in allowed:
            assert np.isnan(near)
            continue
        low, high = max(first, token - 2), min(first + 999, token + 2)
        assert near == pytest.approx(probabilities[place - 1, low : high + 1].sum(), rel=1e-3)
        found += 1
    assert found > 5


def test_alternatives_are_scored_too(model: Florence2, photographs: list[Image.Image]) -> None:
    answer = run(model, photographs[0], GenerationOptions(3, num_return_sequences=3))
    assert len(answer.alternatives) == 2
    for each in (answer, *answer.alternatives):
        logits = model.score_tokens(tasks.OBJECT_DETECTION, photographs[0], each.token_ids).astype(np.float64)
        log_probs = logits - logits.max(axis=1, keepdims=True)
        log_probs -= np.log(np.exp(log_probs).sum(axis=1, keepdims=True))
        own = [log_probs[place, token] for place, token in enumerate(each.token_ids[1:])]
        assert each.token_logprobs is not None
        np.testing.assert_allclose(each.token_logprobs[2:], own[1:], atol=1e-4)


def test_the_layout_of_transformers_js_gives_the_same(
    export_of: Callable[[str, str], Exported], model: Florence2, photographs: list[Image.Image]
) -> None:
    other = Florence2.from_pretrained(export_of("tiny", "transformers-js-fp32").bundle, device="cpu")
    for beams in (1, 3):
        ours, theirs = (run(each, photographs[0], GenerationOptions(beams)) for each in (model, other))
        assert ours.token_ids == theirs.token_ids
        np.testing.assert_allclose(np.array(ours.token_logprobs), np.array(theirs.token_logprobs), atol=1e-4)
