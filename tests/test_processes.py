"""Models, encoded images and predictions in other processes, and copies."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from florence_onnx import BundleError, EncodedImage, Florence2, FlorenceError, InputError, Prediction, tasks
from florence_onnx import model as model_module

SAMPLES = sorted((Path(tasks.__file__).parent / "demo" / "samples").glob("*.png"))
OPTIONS: dict[str, Any] = {"device": "cpu", "session_options": {"intra_op_num_threads": 1}}


@pytest.fixture(scope="module", params=[0, 2], ids=["host", "continuous batching"])
def model(request: pytest.FixtureRequest) -> Florence2:
    return Florence2.from_pretrained("demo", **OPTIONS, max_batch=request.param)


@pytest.fixture(autouse=True)
def _nothing_unpickled() -> Iterator[None]:
    yield
    model_module._load_pickled.cache_clear()


def test_a_pickled_model_is_small_and_loads_with_its_options(model: Florence2) -> None:
    content = pickle.dumps(model)
    assert len(content) < 20_000
    loaded = pickle.loads(content)
    assert loaded is not model
    assert loaded.info() == model.info()
    assert loaded._load_options == model._load_options
    assert loaded.run(tasks.OBJECT_DETECTION, SAMPLES[0]) == model.run(tasks.OBJECT_DETECTION, SAMPLES[0])


def test_a_process_keeps_the_model_that_it_has_unpickled(model: Florence2) -> None:
    content = pickle.dumps(model)
    assert pickle.loads(content) is pickle.loads(content)


def test_a_copy_is_the_model_itself(model: Florence2) -> None:
    assert copy.copy(model) is model
    assert copy.deepcopy({"model": model})["model"] is model


def test_a_model_that_was_composed_by_hand_says_what_to_do(model: Florence2) -> None:
    by_hand = Florence2(model._bundle, model._vision_encoder, model._text_model, "CPUExecutionProvider")
    with pytest.raises(InputError, match="from_pretrained or from_bundle; load it in each process"):
        pickle.dumps(by_hand)


def test_a_bundle_that_is_not_there_any_more_is_a_typed_error(tmp_path: Path) -> None:
    import shutil

    folder = shutil.copytree(Path(tasks.__file__).parent / "demo" / "bundle", tmp_path / "bundle")
    content = pickle.dumps(Florence2.from_pretrained(folder, **OPTIONS))
    shutil.rmtree(folder)
    with pytest.raises(BundleError, match="missing"):
        pickle.loads(content)


def test_encoded_images_and_predictions_are_pickled_whole(model: Florence2) -> None:
    encoded = model.encode(SAMPLES[0])
    again: EncodedImage = pickle.loads(pickle.dumps(encoded))
    assert isinstance(again.stored, np.ndarray)
    assert np.array_equal(again.image_features, encoded.image_features)
    assert again.source_image.tobytes() == encoded.source_image.tobytes()
    prediction = model.run(tasks.OBJECT_DETECTION, again)
    assert prediction == model.run(tasks.OBJECT_DETECTION, encoded)
    found: Prediction[Any] = pickle.loads(pickle.dumps(prediction))
    assert found == prediction
    assert found.source_image.tobytes() == prediction.source_image.tobytes()


def test_errors_keep_their_type_and_message(model: Florence2) -> None:
    with pytest.raises(FlorenceError) as caught:
        model.run(tasks.CAPTION, "nowhere.png")
    again = pickle.loads(pickle.dumps(caught.value))
    assert (type(again), str(again)) == (type(caught.value), str(caught.value))


def _run(model: Florence2, image: Path | EncodedImage) -> tuple[Prediction[Any], int]:
    return model.run(tasks.OBJECT_DETECTION, image), model_module._load_pickled.cache_info().misses


def test_a_spawned_pool_is_handed_a_model() -> None:
    model = Florence2.from_pretrained("demo", **OPTIONS)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        given = [SAMPLES[0], SAMPLES[1], model.encode(SAMPLES[2])]
        found = list(pool.map(_run, [model] * 3, given, timeout=240))
    assert [prediction for prediction, _ in found] == model.run_batch(tasks.OBJECT_DETECTION, SAMPLES[:3])
    assert [loads for _, loads in found] == [1, 1, 1]
