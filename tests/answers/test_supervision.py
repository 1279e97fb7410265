"""`Prediction.to_supervision`, with the real library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from florence_onnx import Florence2, InputError, Prediction, tasks
from florence_onnx.tasks import parse

supervision = pytest.importorskip("supervision", reason="pip install -e '.[supervision]'")

SAMPLE = Path(tasks.__file__).parent / "demo" / "samples" / "scene-1.png"


def predict(token: str, text: str, size: tuple[int, int] = (100, 50)) -> Prediction[Any]:
    task = tasks.get(token)
    return Prediction(parse(task, text, size), task, text, (), False, Image.new("RGB", size))


def test_boxes_of_the_demo_become_detections_that_annotators_draw() -> None:
    prediction = Florence2.from_pretrained("demo", device="cpu").run("<OD>", SAMPLE)
    found = prediction.to_supervision()
    assert found["class_name"].tolist() == [box.label for box in prediction.results.bboxes]
    names = sorted({box.label for box in prediction.results.bboxes})
    assert [names[number] for number in found.class_id] == found["class_name"].tolist()
    expected = [[box.x, box.y, box.x + box.w, box.y + box.h] for box in prediction.results.bboxes]
    np.testing.assert_allclose(found.xyxy, expected)
    image = np.asarray(prediction.source_image)
    assert (supervision.BoxAnnotator().annotate(image.copy(), found) != image).any()


def test_class_ids_follow_the_given_classes() -> None:
    text = "cat<loc_0><loc_0><loc_99><loc_99>dog<loc_5><loc_5><loc_9><loc_9>cow<loc_5><loc_5><loc_9><loc_9>"
    found = predict("<OD>", text).to_supervision(["dog", "cat"])
    assert found.class_id.tolist() == [1, 0, -1]
    assert len(found[found.class_id >= 0]) == 2


def test_quads_keep_their_corners() -> None:
    text = "A B<loc_100><loc_200><loc_300><loc_210><loc_290><loc_400><loc_90><loc_390>"
    found = predict("<OCR_WITH_REGION>", text).to_supervision()
    assert found.data["xyxyxyxy"].shape == (1, 4, 2)
    np.testing.assert_allclose(
        found.xyxy[0], [*found.data["xyxyxyxy"][0].min(axis=0), *found.data["xyxyxyxy"][0].max(axis=0)]
    )
    assert found["class_name"].tolist() == ["A B"]


@pytest.mark.parametrize("token", ["<REFERRING_EXPRESSION_SEGMENTATION>", "<OPEN_VOCABULARY_DETECTION>"])
def test_polygons_become_one_mask_an_object(token: str) -> None:
    outline = "<loc_100><loc_100><loc_400><loc_100><loc_400><loc_800><loc_100><loc_800>"
    other = "<loc_600><loc_100><loc_800><loc_100><loc_800><loc_800><loc_600><loc_800>"
    text = f"thing<poly>{outline}<sep>{other}</poly><poly>{other}</poly>"
    found = predict(token, text).to_supervision()
    assert found.mask.shape == (2, 50, 100)
    both, right = found.mask
    assert both[20, 25] and both[20, 70] and not both[20, 50]
    assert right[20, 70] and not right[20, 25]
    np.testing.assert_allclose(found.xyxy[0], [10.05, 5.025, 80.05, 40.025], atol=1e-3)


def test_empty_answers_are_empty_detections_and_text_is_refused() -> None:
    for token in ("<OD>", "<OCR_WITH_REGION>", "<REGION_TO_SEGMENTATION>"):
        assert len(predict(token, "</s>").to_supervision()) == 0
    with pytest.raises(InputError, match="the answer is text"):
        predict("<CAPTION>", "a cat").to_supervision()
