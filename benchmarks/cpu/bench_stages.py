"""Time per stage and per task: `pytest benchmarks/cpu/bench_stages.py --bundle BUNDLE --image car.jpg`."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from florence_onnx import Florence2, GenerationOptions, Region, tasks
from florence_onnx.generation.generate import DecoderSession
from florence_onnx.images import preprocessing
from florence_onnx.prediction import EncodedImage
from florence_onnx.tasks import parse

Ids = npt.NDArray[np.int64]

NUM_TOKENS = 64
ARGUMENTS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "text": {"text_input": "a red circle above a green square"},
    "region": {"region": Region(52, 332, 932, 774)},
}
"""Inputs of a task, by its `needs`."""
ANSWERS = {
    "<OD>": "car<loc_52><loc_332><loc_932><loc_774>wheel<loc_100><loc_600><loc_200><loc_700>" * 4,
    "<OCR_WITH_REGION>": "STOP" + "".join(f"<loc_{bin}>" for bin in range(100, 900, 100)),
    "<REGION_TO_SEGMENTATION>": "".join(f"<loc_{bin}>" for bin in range(0, 1000, 8)),
    "<CAPTION>": "a car is parked in front of a house" * 4,
}
"""An answer in each format, by a task that has it."""


def prompt(model: Florence2) -> tuple[Ids, Ids]:
    """Returns `input_ids` and `attention_mask` of an object detection."""
    return model._tokenizer.encode([tasks.OBJECT_DETECTION.format_prompt()])


def start(model: Florence2, encoded: EncodedImage) -> DecoderSession:
    """Runs the text encoder, and returns a decoder session without tokens."""
    return model._text_model.start(*prompt(model), encoded.image_features[None])


def prefill(session: DecoderSession, num_beams: int) -> Ids:
    """Feeds the two tokens that begin every answer, and returns the next token of each of `num_beams` rows."""
    session.step(np.array([[2, 0]]))
    session.reorder(np.zeros(num_beams, dtype=np.int64), np.arange(1))
    return np.full((num_beams, 1), 5, dtype=np.int64)


def test_preprocess(benchmark: Any, model: Florence2, image: Image.Image) -> None:
    width, height = model.info()["model"]["image_size"]
    pixel_values = benchmark(preprocessing.preprocess, image, size=(width, height))
    assert pixel_values.shape == (1, 3, height, width)


def test_vision_encoder(benchmark: Any, model: Florence2, image: Image.Image) -> None:
    size = model.info()["model"]["image_size"]
    pixel_values = preprocessing.preprocess(image, size=size)
    found = benchmark(model._vision_encoder.run, {"pixel_values": pixel_values})
    assert found["image_features"].ndim == 3


def test_encode(benchmark: Any, model: Florence2, image: Image.Image) -> None:
    """Preprocessing and vision encoder, as a caller runs them."""
    encoded = benchmark(model.encode, image)
    assert encoded.size == image.size


def test_text_encoder(benchmark: Any, model: Florence2, encoded: EncodedImage) -> None:
    benchmark(start, model, encoded)


def test_prefill(benchmark: Any, model: Florence2, encoded: EncodedImage) -> None:
    """The first decoder call, without the time to make its session."""
    benchmark.pedantic(prefill, setup=lambda: ((start(model, encoded), 1), {}), rounds=20, warmup_rounds=2)


@pytest.mark.parametrize("num_beams", [1, 3, 5])
def test_step(benchmark: Any, model: Florence2, encoded: EncodedImage, num_beams: int) -> None:
    """`NUM_TOKENS` decode steps in each round, without the search. Divide by `NUM_TOKENS` for one step."""

    def steps(session: DecoderSession, token_ids: Ids) -> npt.NDArray[np.float32]:
        for _ in range(NUM_TOKENS):
            logits = session.step(token_ids)
        return logits

    def fresh() -> tuple[tuple[DecoderSession, Ids], dict[str, Any]]:
        session = start(model, encoded)
        return (session, prefill(session, num_beams)), {}

    logits = benchmark.pedantic(steps, setup=fresh, rounds=5, warmup_rounds=1)
    assert logits.shape[0] == num_beams


@pytest.mark.parametrize("num_beams", [1, 3, 5])
def test_answer_of_an_encoded_image(benchmark: Any, model: Florence2, encoded: EncodedImage, num_beams: int) -> None:
    """Text encoder, prefill, decode steps and search."""
    options = GenerationOptions(num_beams=num_beams, max_new_tokens=NUM_TOKENS, min_new_tokens=NUM_TOKENS - 1)
    prediction = benchmark(model.run, tasks.OBJECT_DETECTION, encoded, options=options)
    assert len(prediction.token_ids) == NUM_TOKENS + 1


@pytest.mark.parametrize("token", list(ANSWERS))
def test_postprocess(benchmark: Any, token: str) -> None:
    benchmark(parse, tasks.get(token), ANSWERS[token], (1024, 768))


@pytest.mark.parametrize("slug", list(tasks.TASKS))
def test_end_to_end(benchmark: Any, model: Florence2, image: Image.Image, slug: str) -> None:
    prediction = benchmark(model.run, slug, image, **ARGUMENTS[tasks.TASKS[slug].needs])
    assert prediction.task.slug == slug
