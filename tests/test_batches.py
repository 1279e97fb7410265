"""`run_batch` in portions: the same answers, images read when they are due, and errors with the place of their image."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from florence_onnx import (
    EncodedImage,
    Florence2,
    FlorenceError,
    GenerationOptions,
    ImageDecodeError,
    ImageDownloadError,
    ImageNotFoundError,
    InputError,
    Prediction,
    ProviderError,
    Region,
    TextInputError,
    UnknownTaskError,
    tasks,
)
from florence_onnx.images import decoding, preprocessing

SAMPLES = sorted((Path(tasks.__file__).parent / "demo" / "samples").glob("*.png"))
REGION = Region(217, 475, 377, 648)
OPTIONS = GenerationOptions(num_beams=1, max_new_tokens=40)
MIXED: list[tuple[Any, ...]] = [
    ("object-detection", SAMPLES[0], None, None),
    ("<OCR>", SAMPLES[1], None, None),
    ("open-vocabulary-detection", SAMPLES[2], "a red circle", None),
    ("region-to-category", SAMPLES[0], None, REGION),
    ("caption-to-phrase-grounding", SAMPLES[0], "a red circle and a green square", None),
    ("object-detection", SAMPLES[2], None, None),
    ("caption", SAMPLES[0], None, None),
]


@pytest.fixture(scope="module", params=[0, 2], ids=["host", "continuous batching"])
def model(request: pytest.FixtureRequest) -> Florence2:
    options = {"intra_op_num_threads": 1}
    return Florence2.from_pretrained("demo", device="cpu", session_options=options, max_batch=request.param)


@pytest.fixture
def encoded(model: Florence2, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The sizes of the images that are loaded, in order."""
    from florence_onnx.images import decoding

    loaded: list[tuple[int, int]] = []
    load = decoding.load

    def count(image: Any, **options: Any) -> Any:
        found = load(image, **options)
        loaded.append(found.size)
        return found

    monkeypatch.setattr(decoding, "load", count)
    return loaded


def run_mixed(model: Florence2, **more: Any) -> list[Any]:
    names, images, texts, regions = zip(*MIXED, strict=True)
    return model.run_batch(names, images, text_inputs=texts, regions=regions, options=OPTIONS, **more)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 64, None])
def test_portions_of_any_size_give_the_answers_of_single_runs(
    model: Florence2, encoded: list[tuple[int, int]], batch_size: int | None
) -> None:
    found = run_mixed(model, batch_size=batch_size)
    assert len(encoded) == 3  # each image once, in whatever portions it occurs
    expected = [
        model.run(task, image, text_input=text, region=region, options=OPTIONS) for task, image, text, region in MIXED
    ]
    assert found == expected


def test_no_more_prompts_than_batch_size_are_decoded_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Florence2.from_pretrained("demo", device="cpu", session_options={"intra_op_num_threads": 1}, max_batch=0)
    sizes: list[int] = []
    start = model._text_model.start

    def count(input_ids: Any, *rest: Any) -> Any:
        sizes.append(len(input_ids))
        return start(input_ids, *rest)

    monkeypatch.setattr(model._text_model, "start", count)
    model.run_batch(tasks.OCR, [SAMPLES[0]] * 11, options=OPTIONS, batch_size=4)
    model.run_batch(tasks.OCR, [SAMPLES[0]] * 17, options=OPTIONS)
    assert sizes == [4, 4, 3, 8, 8, 1]


def test_an_iterator_is_read_no_further_than_needed(model: Florence2) -> None:
    read: list[Path] = []

    def images() -> Iterator[Path]:
        for image in SAMPLES[:5]:
            read.append(image)
            yield image

    each = model.run_each(tasks.OBJECT_DETECTION, images(), options=OPTIONS, batch_size=2)
    assert read == []
    first = next(each)
    assert len(read) == 2
    assert first == model.run(tasks.OBJECT_DETECTION, SAMPLES[0], options=OPTIONS)
    next(each)
    assert len(read) == 2
    assert len(list(each)) == 3
    assert len(read) == 5


def test_an_image_that_an_iterator_repeats_at_once_is_encoded_once(
    model: Florence2, encoded: list[tuple[int, int]]
) -> None:
    images = (image for image in [SAMPLES[0]] * 5)
    assert len(model.run_batch((t for t in ["<OD>"] * 5), images, options=OPTIONS, batch_size=2)) == 5
    assert len(encoded) == 1


def test_columns_of_another_length_than_an_iterator_of_images(model: Florence2) -> None:
    with pytest.raises(InputError, match="tasks has 1 entries for more images"):
        model.run_batch(["<OD>"], iter(SAMPLES[:2]), options=OPTIONS)
    with pytest.raises(InputError, match="regions has more entries than the 1 images"):
        model.run_batch("<OD>", iter(SAMPLES[:1]), regions=[None, None], options=OPTIONS)


@pytest.mark.parametrize("value", [0, -1, True, 2.0, "8"])
def test_a_wrong_batch_size_is_refused_before_anything_is_read(model: Florence2, value: Any) -> None:
    with pytest.raises(InputError, match="batch_size must be a whole number of at least 1"):
        model.run_each("<OD>", iter(SAMPLES), batch_size=value)


def test_a_wrong_on_error_is_refused(model: Florence2) -> None:
    with pytest.raises(InputError, match='on_error must be "raise" or "return"'):
        model.run_batch("<OD>", SAMPLES[:1], on_error="ignore")  # type: ignore[call-overload]


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.fixture
def broken(tmp_path: Path) -> list[Any]:
    damaged = tmp_path / "damaged.png"
    damaged.write_bytes(SAMPLES[0].read_bytes()[:300])
    return [damaged, "nowhere.png", "http://127.0.0.1:9/refused.png"]


KINDS = (ImageDecodeError, ImageNotFoundError, ImageDownloadError)


@pytest.mark.parametrize("at", [0, 1, 2])
def test_an_error_names_the_place_of_its_image(model: Florence2, broken: list[Any], at: int) -> None:
    images = [SAMPLES[0]] * 4 + [broken[at]] + [SAMPLES[1]] * 2
    with pytest.raises(KINDS[at], match=r"^image 5 of 7: ") as caught:
        model.run_batch(tasks.OBJECT_DETECTION, images, options=OPTIONS, batch_size=3)
    assert caught.value.index == 4
    again = pickle.loads(pickle.dumps(caught.value))
    assert (again.index, str(again)) == (4, str(caught.value))
    with pytest.raises(KINDS[at], match=r"^image 5: "):  # how many there are is not known
        model.run_batch(tasks.OBJECT_DETECTION, iter(images), options=OPTIONS)


def test_the_error_of_a_single_run_names_no_place(model: Florence2) -> None:
    with pytest.raises(ImageNotFoundError) as caught:
        model.run(tasks.CAPTION, "nowhere.png")
    assert caught.value.index is None
    assert not str(caught.value).startswith("image 1")


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_errors_take_the_place_of_predictions(model: Florence2, broken: list[Any], batch_size: int) -> None:
    images = [broken[0], SAMPLES[0], broken[1], broken[1], SAMPLES[1], broken[2]]
    found = model.run_batch(tasks.OBJECT_DETECTION, images, options=OPTIONS, batch_size=batch_size, on_error="return")
    kinds = [type(each) for each in found]
    assert kinds == [KINDS[0], Prediction, KINDS[1], KINDS[1], Prediction, KINDS[2]]
    errors = [each for each in found if isinstance(each, FlorenceError)]
    assert [error.index for error in errors] == [0, 2, 3, 5]
    assert [str(error)[:12] for error in errors] == [f"image {at} of 6" for at in (1, 3, 4, 6)]
    assert found[1] == model.run(tasks.OBJECT_DETECTION, SAMPLES[0], options=OPTIONS)
    assert found[4] == model.run(tasks.OBJECT_DETECTION, SAMPLES[1], options=OPTIONS)


def test_arguments_of_single_requests_have_a_place_too(model: Florence2) -> None:
    names = ["<OD>", "<NONSENSE>", "open-vocabulary-detection", "caption-to-phrase-grounding"]
    texts = [None, None, None, "word " * 5000]
    found = model.run_batch(names, [SAMPLES[0]] * 4, text_inputs=texts, options=OPTIONS, on_error="return")
    assert [type(each) for each in found] == [Prediction, UnknownTaskError, TextInputError, TextInputError]
    assert [getattr(each, "index", None) for each in found] == [None, 1, 2, 3]
    with pytest.raises(UnknownTaskError, match="image 2 of 4"):
        model.run_batch(names, ["never read.png"] * 4, text_inputs=texts, options=OPTIONS)


def test_an_image_of_another_model_has_a_place(model: Florence2) -> None:
    right = model.encode(SAMPLES[0])
    wrong = EncodedImage(right.image_features[:, :-1], right.source_image)
    with pytest.raises(InputError, match="image 2 of 2: this image was encoded by another model"):
        model.run_batch("<OD>", [right, wrong], options=OPTIONS)
    found = model.run_batch("<OD>", [right, wrong], options=OPTIONS, on_error="return")
    assert [type(each) for each in found] == [Prediction, InputError]


def test_a_failing_encoder_has_a_place(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Florence2.from_pretrained("demo", device="cpu", session_options={"intra_op_num_threads": 1})
    run = model._vision_encoder.run
    second = preprocessing.preprocess(decoding.load(SAMPLES[1]), size=model.image_sizes[0])[0]

    def fail_second(feeds: Any) -> Any:
        """Alone or in a batch: small images are encoded several at a time."""
        is_second = any(np.array_equal(pixels, second) for pixels in feeds["pixel_values"])
        return run({"pixel_values": feeds["pixel_values"][:, :2]} if is_second else feeds)

    monkeypatch.setattr(model._vision_encoder, "run", fail_second)
    with pytest.raises(ProviderError, match="image 2 of 3: CPUExecutionProvider failed while running"):
        model.run_batch("<OD>", SAMPLES[:3], options=OPTIONS)
    found = model.run_batch("<OD>", SAMPLES[:3], options=OPTIONS, on_error="return")
    assert [type(each) for each in found] == [Prediction, ProviderError, Prediction]


def test_when_decoding_fails_the_others_are_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Florence2.from_pretrained("demo", device="cpu", session_options={"intra_op_num_threads": 1})
    start = model._text_model.start
    failing = model._tokenizer.encode([tasks.OCR.format_prompt()])[0][0].tolist()

    def fail_on_ocr(input_ids: Any, mask: Any, features: Any) -> Any:
        if failing in [row[: len(failing)].tolist() for row in input_ids]:
            raise ProviderError("the device failed")
        return start(input_ids, mask, features)

    monkeypatch.setattr(model._text_model, "start", fail_on_ocr)
    names = ["<OD>", "<OCR>", "<OD>"]
    found = model.run_batch(names, SAMPLES[:3], options=OPTIONS, on_error="return")
    assert [type(each) for each in found] == [Prediction, ProviderError, Prediction]
    assert str(found[1]) == "image 2 of 3: the device failed"
    with pytest.raises(ProviderError, match=r"^the device failed$"):
        model.run_batch(names, SAMPLES[:3], options=OPTIONS)
