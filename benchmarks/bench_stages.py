"""Time per stage and per task: `pytest benchmarks/bench_stages.py --bundle BUNDLE --picture car.jpg`."""

from __future__ import annotations

from typing import Any

import pytest
from PIL import Image

from florence_onnx import Florence2, GenerationOptions, image, tasks


def test_preprocess(benchmark: Any, model: Florence2, picture: Image.Image) -> None:
    width, height = model.info()["model"]["image_size"]
    pixel_values = benchmark(image.preprocess, picture, size=(width, height))
    assert pixel_values.shape == (1, 3, height, width)


def test_encode(benchmark: Any, model: Florence2, picture: Image.Image) -> None:
    encoded = benchmark(model.encode, picture)
    assert encoded.size == picture.size


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("num_tokens", [1, 64])
def test_answer_of_an_encoded_picture(
    benchmark: Any, model: Florence2, picture: Image.Image, num_beams: int, num_tokens: int
) -> None:
    """One token: text encoder and prefill. The difference to 64, over 63, is the time of a decode step."""
    encoded = model.encode(picture)
    options = GenerationOptions(num_beams=num_beams, max_new_tokens=num_tokens, min_new_tokens=num_tokens - 1)
    prediction = benchmark(model.run, tasks.OBJECT_DETECTION, encoded, options=options)
    assert prediction.token_ids[-1] == 2


@pytest.mark.parametrize("slug", ["object-detection", "ocr", "caption"])
def test_end_to_end(benchmark: Any, model: Florence2, picture: Image.Image, slug: str) -> None:
    prediction = benchmark(model.run, slug, picture)
    assert not prediction.truncated
