"""Answers about an image with margins: on a canvas that was padded by hand the model gives the same tokens, and the mapped
coordinates are those of that canvas less its margins."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from florence_onnx import (
    EncodedImage,
    Florence2,
    GenerationOptions,
    ImageNotFoundError,
    InputError,
    Point,
    Prediction,
    Region,
    tasks,
)
from florence_onnx.answers.locations import from_tokens
from florence_onnx.answers.placed import text_to_input, to_source
from florence_onnx.answers.results import (
    BoundingBox,
    BoundingBoxes,
    OCRBoundingBox,
    OCRBoundingBoxSingle,
    Polygon,
    PolygonOutput,
)
from florence_onnx.bundles.bundle import DEMO_DIRECTORY
from florence_onnx.images.placement import Placement
from florence_onnx.tasks import Task

SCENE = DEMO_DIRECTORY.parent / "samples" / "scene-1.png"
WIDE = Placement((200, 100), (100, 100), "pad")
"""The image fills the rows 25 to 75 of its input, at half its size."""
GREEDY = GenerationOptions(num_beams=1)


@pytest.fixture(scope="module")
def model() -> Florence2:
    return Florence2.from_pretrained("demo", device="cpu")


@pytest.fixture(scope="module")
def wide() -> Image.Image:
    """The upper part of a scene, more than twice as wide as high, with its objects."""
    return Image.open(SCENE).convert("RGB").crop((0, 40, 384, 240))


@pytest.fixture(scope="module")
def canvas(wide: Image.Image) -> Image.Image:
    """What `fit="pad"` shows the demo model, made by hand: 128 x 128 pixels with margins above and below."""
    found = Image.new("RGB", (128, 128), (124, 116, 104))
    found.paste(wide.resize((128, 67), Image.Resampling.BICUBIC), (0, 30))
    return found


def to_wide(x: float, y: float) -> tuple[float, float]:
    """A pixel of the canvas in the wide image, clipped."""
    return float(np.clip(x * 384 / 128, 0, 384)), float(np.clip((y - 30) * 200 / 67, 0, 200))


@pytest.mark.parametrize("task", [tasks.OBJECT_DETECTION, tasks.DENSE_REGION_CAPTION])
def test_boxes(model: Florence2, wide: Image.Image, canvas: Image.Image, task: Task[Any]) -> None:
    expected = model.run(task, canvas, options=GREEDY)
    found = model.run(task, wide, fit="pad", options=GREEDY)
    assert found.token_ids == expected.token_ids
    assert found.source_image.size == wide.size
    assert len(found.results.bboxes) == len(expected.results.bboxes) > 1
    for box, other in zip(found.results.bboxes, expected.results.bboxes, strict=True):
        corners = [to_wide(other.x, other.y), to_wide(other.x + other.w, other.y + other.h)]
        assert [(box.x, box.y), (box.x + box.w, box.y + box.h)] == [pytest.approx(corner) for corner in corners]
        assert box.label == other.label


def test_quads(model: Florence2, wide: Image.Image, canvas: Image.Image) -> None:
    expected = model.run(tasks.OCR_WITH_REGION, canvas, options=GREEDY)
    found = model.run(tasks.OCR_WITH_REGION, wide, fit="pad", options=GREEDY)
    assert found.token_ids == expected.token_ids and found.results.quad_boxes
    for box, other in zip(found.results.quad_boxes, expected.results.quad_boxes, strict=True):
        corners = [to_wide(point.x, point.y) for point in other.quad]
        assert [(point.x, point.y) for point in box.quad] == [pytest.approx(corner) for corner in corners]
        assert (box.x, box.y) == pytest.approx((min(x for x, _ in corners), min(y for _, y in corners)))


def test_polygons(model: Florence2, wide: Image.Image, canvas: Image.Image) -> None:
    arguments: dict[str, Any] = {"text_input": "green circle", "options": GREEDY}
    expected = model.run(tasks.REFERRING_EXPRESSION_SEGMENTATION, canvas, **arguments)
    found = model.run(tasks.REFERRING_EXPRESSION_SEGMENTATION, wide, fit="pad", **arguments)
    assert found.token_ids == expected.token_ids
    points = [(point.x, point.y) for polygon in found.results.polygons for point in polygon.points]
    others = [to_wide(point.x, point.y) for polygon in expected.results.polygons for point in polygon.points]
    assert points == [pytest.approx(other) for other in others] and len(points) > 2


@pytest.mark.parametrize("is_encoded", [True, False])
def test_regions_are_given_in_the_image(
    model: Florence2, wide: Image.Image, canvas: Image.Image, is_encoded: bool
) -> None:
    """A region of the image is the region of the canvas that shows the same pixels, also beside images without one."""
    region = Region.from_pixels(57, 94, 173, 189, wide.size)
    shown = Region.from_pixels(57 / 3, 30 + 94 * 0.335, 173 / 3, 30 + 189 * 0.335, (128, 128))
    expected = model.run(tasks.REGION_TO_CATEGORY, canvas, region=shown, options=GREEDY)
    image = model.encode(wide, fit="pad") if is_encoded else wide
    asked = [tasks.OBJECT_DETECTION, tasks.REGION_TO_CATEGORY]
    found = model.run_batch(asked, [wide, image], regions=[None, region], fit="pad", options=GREEDY)[1]
    assert found.text.split("<loc_")[0] == expected.text.split("<loc_")[0]
    moved = Region.from_text(text_to_input(region.location_tokens, Placement(wide.size, (128, 128), "pad")))
    for name in ("x1", "y1", "x2", "y2"):
        assert abs(getattr(moved, name) - getattr(shown, name)) <= 3, "a bin of the image is up to 0.4 pixels"
    echoed = from_tokens(found.results)
    assert all(abs(a - b) <= 3 for a, b in zip(echoed, [region.x1, region.y1, region.x2, region.y2], strict=False))


@pytest.fixture(scope="module")
def continuous() -> Florence2:
    return Florence2.from_pretrained("demo", device="cpu", max_batch=2)


def test_location_tokens_of_texts_and_prompts_are_mapped_as_regions(model: Florence2, wide: Image.Image) -> None:
    task, region = tasks.REGION_TO_CATEGORY, Region.from_pixels(57, 94, 173, 189, wide.size)
    tokens = region.location_tokens
    encoded = model.encode(wide, fit="pad")
    expected = model.run(task, encoded, region=region, options=GREEDY)
    assert model.run(task, encoded, text_input=tokens, options=GREEDY) == expected
    assert model.run(task, wide, region=tokens, fit="pad", options=GREEDY) == expected
    for image in (encoded, wide):
        found = model.run_prompt(f"{task.token}{tokens}", image, fit="pad", options=GREEDY)
        assert (found.token_ids, found.results) == (expected.token_ids, expected.results)
    stretched = model.run_prompt(f"{task.token}{tokens}", wide, options=GREEDY)
    assert stretched.token_ids == model.run(task, wide, region=region, options=GREEDY).token_ids != expected.token_ids


@pytest.mark.parametrize("max_batch", [0, 2])
def test_portions_of_images_with_margins(
    model: Florence2, continuous: Florence2, wide: Image.Image, max_batch: int
) -> None:
    """Images that occur in several portions, with regions and without, in a list and from an iterator."""
    used = continuous if max_batch else model
    region = Region.from_pixels(57, 94, 173, 189, wide.size)
    other = wide.crop((0, 0, 300, 100))
    asked = [
        (tasks.OBJECT_DETECTION, wide, None),
        (tasks.REGION_TO_CATEGORY, other, region),
        (tasks.REGION_TO_CATEGORY, wide, region),
        (tasks.REGION_TO_CATEGORY, wide, region.location_tokens),
        (tasks.OBJECT_DETECTION, other, None),
    ]
    expected = [model.run(task, image, region=given, fit="pad", options=GREEDY) for task, image, given in asked]
    names, images, regions = ([each[at] for each in asked] for at in range(3))
    for given in (images, iter(images)):
        found = used.run_each(names, given, regions=regions, fit="pad", batch_size=2, options=GREEDY)
        assert list(found) == expected


@pytest.mark.parametrize("max_batch", [0, 2])
def test_an_image_that_fails_has_its_place_beside_regions(
    model: Florence2, continuous: Florence2, wide: Image.Image, max_batch: int
) -> None:
    used = continuous if max_batch else model
    region = Region.from_pixels(57, 94, 173, 189, wide.size)
    names = [tasks.OBJECT_DETECTION, tasks.REGION_TO_CATEGORY, tasks.REGION_TO_CATEGORY, tasks.OBJECT_DETECTION]
    arguments: dict[str, Any] = {"regions": [None, region, region, None], "fit": "pad", "options": GREEDY}
    found = used.run_batch(names, [wide, "missing.png", wide, "missing.png"], on_error="return", **arguments)
    assert [type(each) for each in found] == [Prediction, ImageNotFoundError, Prediction, ImageNotFoundError]
    assert [str(found[at])[:14] for at in (1, 3)] == ["image 2 of 4: ", "image 4 of 4: "]
    with pytest.raises(ImageNotFoundError, match="image 2 of 4: "):
        used.run_batch(names, [wide, "missing.png", wide, "missing.png"], **arguments)
    with pytest.raises(ImageNotFoundError, match="image 2 of 2: "):
        used.encode_batch([wide, "missing.png"], fit="pad")


def test_scores_are_those_of_the_canvas(model: Florence2, wide: Image.Image, canvas: Image.Image) -> None:
    """The tokens are the same, so the scores are, on boxes and quads whose coordinates were mapped."""
    options = GenerationOptions(num_beams=1, scores=True)
    for task in (tasks.OBJECT_DETECTION, tasks.OCR_WITH_REGION):
        expected = model.run(task, canvas, options=options)
        found = model.run(task, wide, fit="pad", options=options)
        assert found.token_logprobs == pytest.approx(expected.token_logprobs, abs=1e-5)
        assert found.results == model.run(task, wide, fit="pad", options=GREEDY).results, "in pixels of the image"
        boxes, others = _items(found), _items(expected)
        assert boxes and [each.score for each in boxes] == [pytest.approx(each.score) for each in others]
        assert all(0 < each.score <= 1 and each.score_parts.coordinates for each in boxes)
    region = Region.from_pixels(57, 94, 173, 189, wide.size)
    answer = model.run(tasks.REGION_TO_CATEGORY, wide, region=region, fit="pad", options=options)
    assert answer.text_score is not None and answer.sequence_logprob is not None


def _items(prediction: Prediction[Any]) -> list[Any]:
    return list(getattr(prediction.results, "bboxes", ()) or getattr(prediction.results, "quad_boxes", ()))


def test_a_pickled_image_keeps_its_placement(model: Florence2, wide: Image.Image) -> None:
    encoded = model.encode(wide, fit="pad")
    again: EncodedImage = pickle.loads(pickle.dumps(encoded))
    assert again.placement == encoded.placement == Placement(wide.size, (128, 128), "pad")
    assert model.run("<OD>", again, options=GREEDY) == model.run("<OD>", encoded, options=GREEDY)


def test_a_pickled_model_keeps_its_fit(wide: Image.Image) -> None:
    padding = Florence2.from_pretrained("demo", device="cpu", fit="pad")
    again: Florence2 = pickle.loads(pickle.dumps(padding))
    assert again is not padding and again.info() == padding.info()
    assert again.encode(wide).is_padded


def test_logits_of_a_region_are_those_of_the_answer(model: Florence2, wide: Image.Image) -> None:
    region = Region.from_pixels(57, 94, 173, 189, wide.size)
    encoded = model.encode(wide, fit="pad")
    found = model.run(tasks.REGION_TO_CATEGORY, encoded, region=region, options=GREEDY)
    logits = model.score_tokens(tasks.REGION_TO_CATEGORY, encoded, found.token_ids, region=region)
    assert logits[1:-1].argmax(axis=1).tolist() == list(found.token_ids[2:-1])


def test_every_kind_of_result_is_mapped() -> None:
    boxes = BoundingBoxes((BoundingBox(10.0, 30.0, 20.0, 40.0, "a"),), (Polygon((Point(0.0, 75.0),), "b"),))
    assert to_source(boxes, WIDE) == BoundingBoxes(
        (BoundingBox(20.0, 10.0, 40.0, 80.0, "a"),), (Polygon((Point(0.0, 100.0),), "b"),)
    )
    quad = (Point(10.0, 0.0), Point(20.0, 0.0), Point(20.0, 50.0), Point(10.0, 50.0))
    ocr = OCRBoundingBox((OCRBoundingBoxSingle(10.0, 0.0, 10.0, 50.0, "x", quad),))
    mapped = (Point(20.0, 0.0), Point(40.0, 0.0), Point(40.0, 50.0), Point(20.0, 50.0))
    assert to_source(ocr, WIDE).quad_boxes[0] == OCRBoundingBoxSingle(20.0, 0.0, 20.0, 50.0, "x", mapped)
    outline = PolygonOutput((Polygon((Point(50.0, 50.0), Point(100.0, 100.0)), "", 3),))
    assert to_source(outline, WIDE).polygons[0].points == (Point(100.0, 50.0), Point(200.0, 100.0))
    assert to_source(outline, WIDE).polygons[0].instance == 3
    assert to_source("cat<loc_500><loc_900>", WIDE) == "cat<loc_500><loc_999>"
    assert to_source("cat<loc_500><loc_0><loc_999>", WIDE) == "cat<loc_500><loc_0><loc_999>"
    assert to_source("no places", WIDE) == "no places"


def test_results_of_another_type_are_refused(model: Florence2) -> None:
    count = Task("count", "<OD>", tasks.OBJECT_DETECTION.prompt, "nothing", lambda text, size: {"n": len(text)}, False)
    assert model.run(count, Path(SCENE)).results["n"] > 0
    with pytest.raises(InputError, match='fit="pad" cannot map a dict back'):
        model.run(count, Path(SCENE), fit="pad")
    found = model.run_batch([count, "<OD>"], [Path(SCENE)] * 2, fit="pad", options=GREEDY, on_error="return")
    assert [type(each) for each in found] == [InputError, Prediction]
