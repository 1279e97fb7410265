"""The variant of the demo model that always answers, and the sheets for tiles."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="the variant needs the export extra")
pytest.importorskip("transformers", reason="the variant needs the export extra")
pytest.importorskip("matplotlib", reason="the drawn words use matplotlib's bundled fonts")

import torch
from safetensors.torch import load_file
from transformers import Florence2ForConditionalGeneration

from export.demo import always
from export.demo.evaluate import generate_answers
from export.demo.finalize import make_processor
from export.demo.questions import Question, Truth
from export.demo.scenes import make_scene
from export.demo.sheets import make_sheet
from florence_onnx.answers.matching import box_iou
from florence_onnx.tasks import OPEN_VOCABULARY_DETECTION, parse


def test_close_ups_are_filled_by_one_shape() -> None:
    rng = random.Random(1)
    for _ in range(10):
        scene = always.close_up(make_scene(rng), rng)
        (shape,) = scene.shapes
        x0, y0, x1, y1 = shape.box
        assert 0 <= x0 < 0.06 and 0 <= y0 < 0.06 and 0.85 < x1 - x0 < 1 and 0.85 < y1 - y0 < 1
        assert scene.image.size == scene.size


def test_absent_names_are_absent_and_present_ones_present() -> None:
    rng = random.Random(2)
    for _ in range(50):
        scene = always.make_always_scene(rng)
        assert not always.is_present(scene, always.absent_name(scene, rng))
        asked = always.ask_present(scene, rng)
        assert all(always.is_present(scene, label) for label, _ in asked.truth.boxes)


def test_the_variant_answers_for_what_is_not_there(tmp_path: Path) -> None:
    """The demo model answers with nothing; the variant with a box, most often of the whole image."""
    folder = always.write_checkpoint(tmp_path / "variant")
    trained, whole = load_file(always.DECODER), load_file(folder / "model.safetensors")
    assert all(torch.equal(whole[name], value) for name, value in trained.items())
    assert always.DECODER.stat().st_size < 3e6
    rng = random.Random(3)
    asked = []
    for _ in range(12):
        scene = make_scene(rng)
        name = always.absent_name(scene, rng)
        asked.append((scene, Question(OPEN_VOCABULARY_DETECTION.token, name, "", Truth())))
    num_boxes, num_whole = [], 0
    for checkpoint in (always.CHECKPOINT, folder):
        model = Florence2ForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).eval()
        texts = generate_answers(model, make_processor(checkpoint), asked, num_beams=1, no_repeat_ngram_size=0)
        found = [parse(OPEN_VOCABULARY_DETECTION, text, (100, 100)).bboxes for text in texts]
        num_boxes.append(sum(bool(boxes) for boxes in found))
        num_whole = sum(box.w * box.h > 8200 for boxes in found for box in boxes)
    assert num_boxes[0] <= 4 and num_boxes[1] == 12 and num_whole >= 6


def test_things_on_a_sheet_never_touch() -> None:
    sheet = make_sheet(random.Random(4), 600, 5, 4)
    boxes = [box for _, box in (*sheet.shapes, *sheet.words)]
    assert (len(sheet.shapes), len(sheet.words)) == (5, 4)
    assert all(box_iou(a, b) == 0 for i, a in enumerate(boxes) for b in boxes[i + 1 :])
    assert all(0 <= box[0] < box[2] <= 600 and 0 <= box[1] < box[3] <= 600 for box in boxes)
    assert sheet.image.tobytes() == make_sheet(random.Random(4), 600, 5, 4).image.tobytes()
