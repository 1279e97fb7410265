"""The accuracy of the built-in demo model on scenes that it was not trained on."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from PIL import Image

from florence_onnx import EncodedImage, Florence2, GenerationOptions, Region, tasks
from florence_onnx.bundles import bundle

pytest.importorskip("matplotlib", reason="the scenes' fonts come with matplotlib: pip install -e '.[test]'")
from export.demo import metrics
from florence_onnx.answers import matching

UNSEEN_SEED = 20250817
"""A seed that neither the training nor any published figure uses."""
NUM_SCENES = 120
GREEDY = GenerationOptions(num_beams=1)
SAMPLES = bundle.DEMO_DIRECTORY.parent / "samples"

FLOORS = {
    "<OD>": {"recall": 0.95, "mean_iou": 0.88},
    "<OCR>": {"exact": 0.90},
    "<OCR_WITH_REGION>": {"exact_and_placed": 0.88},
    "<REFERRING_EXPRESSION_SEGMENTATION>": {"mean_iou": 0.85},
    "<REGION_TO_SEGMENTATION>": {"mean_iou": 0.85},
    "<REGION_TO_CATEGORY>": {"exact": 0.97},
    "<DETAILED_CAPTION>": {"exact": 0.85},
    "<DENSE_REGION_CAPTION>": {"recall": 0.90},
    "<REGION_PROPOSAL>": {"recall": 0.90},
    "<CAPTION_TO_PHRASE_GROUNDING>": {"recall": 0.90},
    "<OPEN_VOCABULARY_DETECTION>": {"recall": 0.88},
    "<REGION_TO_DESCRIPTION>": {"exact": 0.90},
    "<REGION_TO_OCR>": {"exact": 0.88},
    "<CAPTION>": {"exact": 0.85},
    "<MORE_DETAILED_CAPTION>": {"exact": 0.80},
}


@pytest.fixture(scope="module")
def demo() -> Florence2:
    return Florence2.from_pretrained("demo", device="cpu")


@pytest.fixture(scope="module")
def scenes() -> list[Any]:
    return metrics.make_scenes(UNSEEN_SEED, NUM_SCENES)


@pytest.fixture(scope="module")
def encoded(demo: Florence2, scenes: list[Any]) -> dict[int, EncodedImage]:
    """The scenes' images after the vision encoder, which all tasks share, by the image's id."""
    return {id(scene.image): demo.encode(scene.image) for scene in scenes}


def ask(model: Florence2, image: EncodedImage, token: str, given: str, options: GenerationOptions | None) -> Any:
    task = tasks.get(token)
    arguments: dict[str, Any] = {}
    if task.needs == "region":
        arguments["region"] = Region(*map(int, re.findall(r"\d+", given)))
    elif task.needs == "text":
        arguments["text_input"] = given
    return metrics.from_results(model.run(task, image, **arguments, options=options).results)


@pytest.mark.parametrize("token", list(FLOORS))
def test_floors_on_unseen_scenes(
    token: str, demo: Florence2, scenes: list[Any], encoded: dict[int, EncodedImage]
) -> None:
    def predict(image: Image.Image, task: str, given: str) -> Any:
        return ask(demo, encoded[id(image)], task, given, GREEDY)

    figures = metrics.evaluate(predict, scenes, [token])[token]
    print(token, figures)
    missed = {name: figures[name] for name, floor in FLOORS[token].items() if not figures[name] >= floor}
    assert not missed, f"{token}: {figures}"
    assert figures.get("invented_words", 0) == 0


TRUTHS = json.loads((SAMPLES / "samples.json").read_text())


@pytest.mark.parametrize("truth", TRUTHS, ids=[truth["file"] for truth in TRUTHS])
def test_the_sample_scenes_are_answered_correctly_by_default(truth: dict[str, Any], demo: Florence2) -> None:
    """With the checkpoint's three beams and the image files, as in the README."""
    image = demo.encode(SAMPLES / truth["file"])
    found = demo.run(tasks.OBJECT_DETECTION, image).results.bboxes
    assert sorted(box.label for box in found) == sorted(shape["label"] for shape in truth["objects"])
    for shape in truth["objects"]:
        box = next(box for box in found if box.label == shape["label"])
        assert matching.box_iou((box.x, box.y, box.x + box.w, box.y + box.h), shape["box"]) > 0.7
    word = truth["word"]["text"] if truth["word"] else ""
    text = demo.run(tasks.OCR, image).results
    assert text == word
    assert [box.label for box in demo.run(tasks.OCR_WITH_REGION, image).results.quad_boxes] == ([word] if word else [])


@pytest.mark.parametrize("batched", [False, True])
def test_prompt_lookup_gives_the_same_tokens_in_fewer_calls(batched: bool, demo: Florence2, scenes: list[Any]) -> None:
    """For every task, one by one and as a batch, whose rows accept different numbers of drafted tokens."""
    decoder = demo._text_model._decoder  # type: ignore[attr-defined]
    calls: dict[int, dict[str, int]] = {0: {}, 4: {}}
    answers: dict[int, dict[str, list[tuple[int, ...]]]] = {0: {}, 4: {}}
    for token in FLOORS:
        asked = metrics.collect_questions(scenes[:6], token)
        task = tasks.get(token)
        images = [demo.encode(scene.image) for scene, _ in asked]
        texts = [question.text for _, question in asked]
        regions = [question.region for _, question in asked]
        for length in (0, 4):
            options = GenerationOptions(num_beams=1, prompt_lookup_num_tokens=length)
            before = decoder.num_runs
            if batched:
                found = demo.run_batch(task, images, text_inputs=texts, regions=regions, options=options)
            else:
                found = [
                    demo.run(task, image, text_input=text, region=region, options=options)
                    for image, text, region in zip(images, texts, regions, strict=True)
                ]
            calls[length][token] = decoder.num_runs - before
            answers[length][token] = [each.token_ids for each in found]
    assert answers[0] == answers[4]
    for token in ("<CAPTION_TO_PHRASE_GROUNDING>", "<OPEN_VOCABULARY_DETECTION>"):
        # a batch takes as many calls as its slowest row, in which every draft may be rejected
        assert calls[4][token] < calls[0][token] + batched
    for token in ("<OD>", "<CAPTION>", "<REGION_PROPOSAL>"):
        assert calls[4][token] == calls[0][token], "nothing to draft from"
