"""The synthetic scenes of the demo model, their questions and the metrics; without torch and transformers."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("matplotlib", reason="the drawn words use matplotlib's bundled fonts")

from export.demo import metrics
from export.demo.questions import TASK_TOKENS, ask, bins, caption, detailed_caption, more_detailed_caption
from export.demo.samples import DEFAULT_DIRECTORY, SPECS, describe, draw_sample, write_samples
from export.demo.scenes import COLOURS, Scene, Shape, Word, draw_mask, make_scene, unit_outline
from florence_onnx import tasks
from florence_onnx.answers import matching

BLANK = Image.new("RGB", (200, 100))
SHAPES = (
    Shape("diamond", "red", "small", (0.1, 0.1, 0.2, 0.3)),
    Shape("star", "blue", "large", (0.6, 0.1, 0.9, 0.5)),
    Shape("diamond", "green", "small", (0.1, 0.7, 0.2, 0.9)),
)
WORD = Word("MAP", (0.6, 0.75, 0.9, 0.85), "white", "DejaVuSans.ttf", 20, (0.65, 0.75, 0.85))
SCENE = Scene((200, 100), "dark", SHAPES, WORD, BLANK)
WORDLESS = Scene((200, 100), "dark", SHAPES[:1], None, BLANK)


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return metrics.make_scenes(seed=2_000_003, num_scenes=40)


def perfect(image: Any, task: str, text_input: str, scenes: list[Scene]) -> Any:
    """A model that gives the right answer to every question, parsed by the runtime's own parser."""
    scene = next(scene for scene in scenes if scene.image is image)
    asked = metrics.collect_questions(scenes, task)
    question = next(question for owner, question in asked if owner is scene)
    assert question.text_input == text_input
    return metrics.from_results(tasks.parse(task, f"</s><s>{question.answer}</s>", scene.size))


def test_the_same_seed_draws_the_same_scene() -> None:
    first, second = (make_scene(random.Random(11)) for _ in range(2))
    assert (first.size, first.background, first.shapes, first.word) == (
        second.size,
        second.background,
        second.shapes,
        second.word,
    )
    assert np.array_equal(np.asarray(first.image), np.asarray(second.image))


def test_another_seed_draws_another_scene() -> None:
    assert make_scene(random.Random(11)).shapes != make_scene(random.Random(12)).shapes


def test_scenes_are_drawn_without_torch_and_transformers() -> None:
    code = "import sys, export.demo.metrics, export.demo.samples; print({'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_things_lie_inside_the_canvas_in_cells_of_their_own(scenes: list[Scene]) -> None:
    for scene in scenes:
        boxes = [thing.box for thing in scene.things()]
        assert all(0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1 for x0, y0, x1, y1 in boxes)
        cells = [thing.cell for thing in scene.things()]
        assert cells == sorted(set(cells))
        assert len({shape.colour for shape in scene.shapes}) == len(scene.shapes)
        assert scene.image.size == scene.size


def test_scenes_have_one_to_four_shapes_with_and_without_words(scenes: list[Scene]) -> None:
    assert {len(scene.shapes) for scene in scenes} == {1, 2, 3, 4}
    assert {scene.word is None for scene in scenes} == {True, False}
    repeated = [scene for scene in scenes if len({shape.kind for shape in scene.shapes}) < len(scene.shapes)]
    assert len(repeated) > len(scenes) / 4


def test_number_of_shapes_can_be_chosen() -> None:
    scene = make_scene(random.Random(3), 128, num_shapes=4, word_probability=0)
    assert len(scene.shapes) == 4
    assert scene.word is None
    assert max(scene.size) == 128


def test_drawn_pixels_are_where_the_truth_says(scenes: list[Scene]) -> None:
    """Inside a shape the image differs from its surroundings by more than noise."""
    for scene in scenes:
        pixels = np.asarray(scene.image, np.float32)
        for shape in scene.shapes:
            mask = draw_mask(shape, scene.size)
            x0, y0, x1, y1 = (int(v) for v in metrics.to_pixels(shape.box, scene.size))
            outside = pixels[max(0, y0 - 3) : y1 + 3, max(0, x0 - 3) : x1 + 3][[0, -1]].reshape(-1, 3)
            assert np.abs(pixels[mask].mean(0) - outside.mean(0)).max() > 20


@pytest.mark.parametrize("kind", ["circle", "square", "triangle", "star", "diamond"])
def test_outline_covers_the_drawn_mask(kind: str) -> None:
    shape = Shape(kind, "red", "large", (0.2, 0.3, 0.6, 0.8))
    size = (400, 300)
    flat = [value for x, y in shape.outline() for value in (x * size[0], y * size[1])]
    assert matching.mask_iou(matching.draw_polygons([flat], size), draw_mask(shape, size)) > 0.9
    xs, ys = zip(*unit_outline(kind), strict=True)
    assert (min(xs), max(xs), min(ys), max(ys)) == pytest.approx((0, 1, 0, 1))


def test_captions() -> None:
    assert caption(SCENE) == "Two diamonds, a star and the word MAP."
    assert caption(WORDLESS) == "A diamond."
    assert detailed_caption(SCENE) == (
        "The image shows three shapes: red diamond, blue star and green diamond on a dark background with the word MAP."
    )
    assert more_detailed_caption(WORDLESS) == (
        "There is a small red diamond at the top left. All on a dark background."
    )


def test_answers_use_the_grammars_of_florence_2() -> None:
    def answer(task: str) -> str:
        question = ask(SCENE, task, random.Random(0))
        assert question
        return question.answer

    assert answer("<OD>").startswith("red diamond<loc_100><loc_100><loc_200><loc_300>blue star<loc_600>")
    assert answer("<OCR>") == "MAP"
    assert answer("<OCR_WITH_REGION>") == (
        "MAP<loc_600><loc_750><loc_900><loc_750><loc_900><loc_850><loc_600><loc_850>"
    )
    assert answer("<REGION_PROPOSAL>").count("<loc_") == 16


def test_scene_without_a_word_is_answered_with_nothing() -> None:
    for task in ("<OCR>", "<OCR_WITH_REGION>"):
        question = ask(WORDLESS, task, random.Random(0))
        assert question
        assert question.answer == ""
    assert ask(WORDLESS, "<REGION_TO_OCR>", random.Random(0)) is None


def test_every_task_has_questions() -> None:
    assert sorted(TASK_TOKENS) == sorted(task.token for task in tasks.TASKS.values())


def test_prompt_is_the_runtimes_prompt() -> None:
    question = ask(SCENE, "<REGION_TO_CATEGORY>", random.Random(1))
    assert question
    assert question.prompt == f"What is the region {question.text_input}?"
    assert question.text_input.count("<loc_") == 4


@pytest.mark.parametrize("task", TASK_TOKENS)
def test_right_answers_parse_to_the_truth(task: str, scenes: list[Scene]) -> None:
    report = metrics.evaluate(lambda image, token, text: perfect(image, token, text, scenes), scenes, [task])[task]
    for name in ("precision", "recall", "exact", "exact_and_placed", "over_half", "exact_repeated"):
        assert report.get(name, 1.0) == 1.0
    assert report.get("mean_iou", 1.0) > 0.9
    assert report.get("invented_words", 0) == 0
    assert report["n"] > 0


def test_region_inputs_are_jittered_within_the_bins() -> None:
    exact = ask(SCENE, "<REGION_TO_OCR>", random.Random(2), jitter=0)
    assert exact
    assert exact.text_input == "".join(f"<loc_{v}>" for v in bins(WORD.box))
    moved = {
        question.text_input for seed in range(9) if (question := ask(SCENE, "<REGION_TO_OCR>", random.Random(seed)))
    }
    assert len(moved) == 9


def test_box_iou() -> None:
    assert matching.box_iou((0, 0, 2, 2), (0, 0, 2, 2)) == 1
    assert matching.box_iou((0, 0, 2, 2), (1, 0, 3, 2)) == pytest.approx(1 / 3)
    assert matching.box_iou((0, 0, 1, 1), (2, 2, 3, 3)) == 0
    assert matching.box_iou((1, 1, 1, 1), (1, 1, 1, 1)) == 0


def test_match_boxes_pairs_each_box_once_and_only_equal_labels() -> None:
    true = [("a", (0, 0, 10, 10)), ("b", (20, 0, 30, 10))]
    predicted = [("a", (0, 0, 10, 10)), ("a", (0, 0, 10, 9)), ("c", (20, 0, 30, 10))]
    assert metrics.match_boxes(predicted, true) == metrics.Match(1, 3, 2, 1.0)
    assert metrics.match_boxes([], true) == metrics.Match(0, 0, 2, 0)


def test_mask_iou() -> None:
    left, all_of_it = np.zeros((4, 4), bool), np.ones((4, 4), bool)
    left[:, :2] = True
    assert matching.mask_iou(left, all_of_it) == 0.5
    assert matching.mask_iou(~all_of_it, ~all_of_it) == 0


def test_draw_polygons_skips_what_is_no_polygon() -> None:
    assert not matching.draw_polygons([[1, 1, 5, 5]], (8, 8)).any()
    assert matching.draw_polygons([[0, 0, 7, 0, 7, 7, 0, 7]], (8, 8)).all()


def test_quad_to_box() -> None:
    assert matching.quad_to_box([1, 2, 5, 1, 6, 8, 0, 9]) == (0, 1, 6, 9)


def test_invented_words_are_counted() -> None:
    task = "<OCR_WITH_REGION>"
    nothing, word = (ask(scene, task, random.Random(0)) for scene in (WORDLESS, SCENE))
    assert nothing
    assert word
    invented = {"labels": ["CAT"], "quad_boxes": [[0, 0, 9, 0, 9, 9, 0, 9]]}
    read = metrics.from_results(tasks.parse(task, word.answer, SCENE.size))
    report = metrics.score_answers(task, [WORDLESS, SCENE], [nothing, word], [invented, read])
    assert report["invented_words"] == 1
    assert report["exact"] == 1


def test_samples_are_written(tmp_path: Path) -> None:
    write_samples(tmp_path)
    names = sorted(path.name for path in DEFAULT_DIRECTORY.iterdir())
    assert names == sorted(path.name for path in tmp_path.iterdir())
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 600_000


def test_shipped_samples_are_what_the_script_draws() -> None:
    """Only scenes without a word: the width of a word depends on the version of FreeType."""
    for truth, spec in zip(shipped_truths(), SPECS, strict=True):
        if not spec.has_word:
            assert {**describe(draw_sample(spec), truth["file"]), "seed": spec.seed} == truth


def test_shipped_images_show_what_their_truth_says() -> None:
    for truth in shipped_truths():
        image = Image.open(DEFAULT_DIRECTORY / truth["file"]).convert("RGB")
        assert list(image.size) == truth["size"]
        for thing in truth["objects"]:
            x0, y0, x1, y1 = thing["box"]
            pixel = image.getpixel((int((x0 + x1) / 2), int((y0 + y1) / 2)))
            assert isinstance(pixel, tuple)
            colour = COLOURS[thing["label"].split()[0]]
            assert max(abs(a - b) for a, b in zip(pixel, colour, strict=True)) < 45


def shipped_truths() -> list[dict[str, Any]]:
    truths: list[dict[str, Any]] = json.loads((DEFAULT_DIRECTORY / "samples.json").read_text(encoding="utf-8"))
    return truths


def test_sample_truth_is_in_pixels() -> None:
    truth = describe(draw_sample(SPECS[0]), "scene-1.png")
    width, height = truth["size"]
    for thing in truth["objects"]:
        x0, y0, x1, y1 = thing["box"]
        assert 0 <= x0 < x1 <= width
        assert 0 <= y0 < y1 <= height
