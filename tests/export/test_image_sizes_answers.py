"""Answers at several image sizes from one bundle, against transformers with as many image tokens; OmniParser's job."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from florence_onnx import BundleFormatError, Florence2, GenerationOptions, InputError, Region, tasks
from florence_onnx.images import preprocessing
from florence_onnx.inference import answering
from florence_onnx.inference.vision_encoders import VisionEncoders
from tests import descriptions
from tests.conftest import NO_TORCH, Exported
from tests.exported_bundles import SIZES

pytest.importorskip("torch", reason=NO_TORCH)
pytest.importorskip("transformers", reason=NO_TORCH)
from export.verification import reference

NUM_CROPS = 128
GREEDY = GenerationOptions(num_beams=1, max_new_tokens=20)
PROMPTS = {tasks.CAPTION: {}, tasks.REGION_TO_CATEGORY: {"region": Region(52, 332, 932, 774)}}


@pytest.fixture(scope="module")
def model(sized: Exported) -> Florence2:
    return Florence2.from_pretrained(sized.bundle, device="cpu")


@pytest.fixture(scope="module")
def crops(photographs: list[Image.Image]) -> list[Image.Image]:
    """What OmniParser's detector cuts out of a screen: small images of any size and aspect."""
    random = np.random.default_rng(0)
    found = []
    for at in range(NUM_CROPS):
        image = photographs[at % len(photographs)].convert("RGB")
        width, height = (int(side) for side in random.integers(12, 90, 2))
        left, top = (
            int(random.integers(0, whole - side)) for whole, side in zip(image.size, (width, height), strict=True)
        )
        found.append(image.crop((left, top, left + width, top + height)))
    return found


def expected_tokens(
    sized: Exported,
    images: Sequence[Image.Image],
    size: tuple[int, int],
    prompt: str,
    options: GenerationOptions,
) -> list[tuple[int, ...]]:
    """transformers' answers, fed with images of that size and as many image tokens as they have there."""
    checkpoint = sized.checkpoint.resized([size])
    pixels = np.concatenate([preprocessing.preprocess(image, size=size) for image in images])
    return reference.generate(checkpoint, pixels, [prompt] * len(images), options)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("num_beams", [1, 3])
def test_tokens_are_those_of_transformers_at_every_size(
    sized: Exported, model: Florence2, photographs: list[Image.Image], size: tuple[int, int], num_beams: int
) -> None:
    images = [image.convert("RGB") for image in photographs]
    options = GenerationOptions(num_beams=num_beams, max_new_tokens=24)
    for task, arguments in PROMPTS.items():
        prompt = task.format_prompt(**arguments)
        expected = expected_tokens(sized, images, size, prompt, options)
        regions = [arguments.get("region")] * len(images)
        found = model.run_batch(task, images, regions=regions, image_size=size, options=options)
        assert [each.token_ids for each in found] == expected
        single = model.run(task, images[0], **arguments, image_size=size, options=options)
        assert single.token_ids == expected[0]


def test_omniparsers_job(sized: Exported, crops: list[Image.Image]) -> None:
    """128 crops, `<CAPTION>`, 20 tokens, greedy: tokens are those of transformers with 64 x 64 pixels and five image tokens."""
    model = Florence2.from_pretrained(sized.bundle, device="cpu", image_size=64)
    expected = expected_tokens(sized, crops, (64, 64), tasks.CAPTION.prompt, GREEDY)
    assert len(set(expected)) > 8, "the crops have answers of their own"
    before = model._vision_encoder.num_runs
    found = model.run_batch("<CAPTION>", crops, options=GREEDY)
    assert [each.token_ids for each in found] == expected
    num_runs = NUM_CROPS * 64 * 64 // answering.BATCH_PIXELS
    assert model._vision_encoder.num_runs - before == num_runs <= NUM_CROPS // 8, "many crops in one run"
    assert all(len(each.token_ids) <= 21 for each in found)


def test_a_batch_gives_the_features_of_single_images(model: Florence2, crops: list[Image.Image]) -> None:
    few = crops[:5]
    batch = model.encode_batch([*few, few[0]], image_size=64, fit="pad")
    assert batch[0] is batch[5], "the same object is encoded once"
    for image, each in zip(few, batch, strict=False):
        alone = model.encode(image, image_size=64, fit="pad")
        assert each.num_image_tokens == 5 and each.is_padded and each.placement == alone.placement
        np.testing.assert_allclose(each.image_features, alone.image_features, atol=1e-4)
        assert each.image_features.base is None, "no image keeps the others' features in memory"
    assert model.encode_batch(batch) == batch
    with pytest.raises(InputError, match="must be a list"):
        model.encode_batch(few[0])  # type: ignore[arg-type]


@pytest.mark.parametrize("max_batch", [0, 3])
def test_images_of_several_sizes_in_one_batch(sized: Exported, photographs: list[Image.Image], max_batch: int) -> None:
    """Through the host and in the device's loop, whose buffers have prompts with 5, 16 and 17 image tokens side by side."""
    model = Florence2.from_pretrained(sized.bundle, device="cpu", max_batch=max_batch)
    images = [image.convert("RGB") for image in photographs]
    sizes = [SIZES[at % 3] for at in range(7)]
    expected = {
        (at, size): expected_tokens(sized, [images[at % 3]], size, tasks.OBJECT_DETECTION.prompt, GREEDY)[0]
        for at, size in enumerate(sizes)
    }
    for order in (range(7), reversed(range(7))):
        chosen = list(order)
        encoded = [model.encode(images[at % 3], image_size=sizes[at]) for at in chosen]
        found = model.run_batch("<OD>", encoded, options=GREEDY)
        assert [each.token_ids for each in found] == [expected[at, sizes[at]] for at in chosen]
    long = model.run_batch("<OD>", [images[0]] * 3, image_size=64, options=GREEDY)
    assert [each.token_ids for each in long] == expected_tokens(
        sized, [images[0]] * 3, (64, 64), tasks.OBJECT_DETECTION.prompt, GREEDY
    )


def test_vision_encoders_are_loaded_when_they_are_used(sized: Exported, crops: list[Image.Image]) -> None:
    model = Florence2.from_pretrained(sized.bundle, device="cpu", image_size=64)

    def loaded() -> list[tuple[int, int]]:
        return [each["image_size"] for each in model.info()["image_sizes"] if each["is_loaded"]]

    assert loaded() == [(64, 64)] and model.image_sizes == SIZES
    assert model.info()["model"]["num_image_tokens"] == 5
    model.warm_up()
    assert loaded() == [(64, 64)]
    assert model.encode(crops[0], image_size=(160, 96)).num_image_tokens == 16
    assert loaded() == [(64, 64), (160, 96)]
    options = [
        model._encoders.get(size)._session.get_session_options().get_session_config_entry("session.disable_prepacking")
        for size in loaded()[1:]
    ]
    assert options == ["1"], "its weights stay in the file, which the first has mapped as well"


def test_a_pickled_model_keeps_its_image_size(sized: Exported, crops: list[Image.Image]) -> None:
    model = Florence2.from_pretrained(sized.bundle, device="cpu", image_size=64)
    again: Florence2 = pickle.loads(pickle.dumps(model))
    assert again is not model and again.info() == model.info()
    assert again.encode(crops[0]).num_image_tokens == 5


def test_a_graph_of_another_size_than_described_is_refused_when_it_is_loaded(
    sized: Exported, crops: list[Image.Image], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(sized.bundle, tmp_path / "bundle"))
    entries = descriptions.read(folder)["image_sizes"]
    entries[1]["num_image_tokens"] = 6
    descriptions.change(folder, image_sizes=entries)
    model = Florence2.from_pretrained(folder, device="cpu")
    assert model.encode(crops[0]).num_image_tokens == 17
    said = r"says num_image_tokens 6, but .*vision_encoder_64x64\.onnx has 5 there"
    with pytest.raises(BundleFormatError, match=said):
        model.encode(crops[0], image_size=64)
    with pytest.raises(BundleFormatError, match=said):
        Florence2.from_pretrained(folder, device="cpu", image_size=64)


def test_engines_of_one_size_refuse_others(model: Florence2) -> None:
    """As those of TensorRT, which are built for the shapes of one size."""
    alone = VisionEncoders(model._bundle, model._vision_encoder)
    assert alone.get((128, 128)) is model._vision_encoder
    with pytest.raises(InputError, match=r"loaded for images of \(128, 128\) pixels only; .*image_size=\(64, 64\)"):
        alone.get((64, 64))


def test_memory_is_forecast_for_each_size(model: Florence2) -> None:
    found = {each["image_size"]: each for each in model.info()["image_sizes"]}
    totals = {size: each["device_memory"][-1]["total"] for size, each in found.items()}
    assert totals[64, 64] < totals[160, 96] < totals[128, 128]
    assert found[128, 128]["device_memory"] == model.info()["device_memory"]


def test_unknown_sizes_are_refused_by_name(sized: Exported, model: Florence2, crops: list[Image.Image]) -> None:
    known = "reads images of 128x128, 64x64, 160x96 pixels, not 96x160"
    for call in (
        lambda: model.encode(crops[0], image_size=(96, 160)),
        lambda: model.run("<OD>", crops[0], image_size=(96, 160)),
        lambda: model.run_batch("<OD>", crops[:2], image_size=(96, 160)),
        lambda: model.encode_batch(crops[:2], image_size=(96, 160)),
        lambda: Florence2.from_pretrained(sized.bundle, device="cpu", image_size=(96, 160)),
    ):
        with pytest.raises(InputError, match=known):
            call()
    wrong: Any
    for wrong in ("64", 64.0, (64,), (0, 64), True):
        with pytest.raises(InputError, match="a number of pixels or"):
            model.encode(crops[0], image_size=wrong)
    with pytest.raises(InputError, match="fit must be"):
        model.run("<OD>", crops[0], fit="crop")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"pixel_values must be \(B, 3, 128, 128\) or \(B, 3, 64, 64\)"):
        model.encode_pixels(np.zeros((1, 3, 96, 96), dtype=np.float32))
    features = model.encode(crops[0], image_size=64)
    other = Florence2.from_pretrained("demo", device="cpu")
    with pytest.raises(InputError, match="encoded by another model"):
        other.run("<OD>", features)


def test_pixels_choose_the_size(model: Florence2, crops: list[Image.Image]) -> None:
    pixels = np.concatenate([preprocessing.preprocess(image, size=(160, 96)) for image in crops[:2]])
    found = model.encode_pixels(pixels)
    expected = [model.encode(image, image_size=(160, 96)) for image in crops[:2]]
    for each, other in zip(found, expected, strict=True):
        assert each.source_image.size == (160, 96)
        np.testing.assert_array_equal(each.image_features, other.image_features)


def test_a_long_prompt_fits_beside_a_small_image(model: Florence2, crops: list[Image.Image]) -> None:
    """The room for text is what the image tokens of the call leave."""
    sizes = model._bundle.sizes
    num_words = sizes.max_positions - sizes.num_image_tokens
    prompts = {
        count: tasks.CAPTION_TO_PHRASE_GROUNDING.format_prompt("a" * count)
        for count in range(num_words // 2, num_words + 40)
    }
    lengths = {count: model._tokenizer.encode([prompt])[0].shape[1] for count, prompt in prompts.items()}
    fitting = next(
        count for count, length in lengths.items() if sizes.max_positions - 17 < length <= sizes.max_positions - 5
    )
    arguments: dict[str, Any] = {"text_input": "a" * fitting, "options": GREEDY}
    assert model.run("caption-to-phrase-grounding", crops[0], image_size=64, **arguments).token_ids
    with pytest.raises(InputError, match="beside 17 image tokens"):
        model.run("caption-to-phrase-grounding", crops[0], **arguments)
