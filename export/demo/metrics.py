"""Metrics of parsed answers on synthetic scenes, with numpy and Pillow only.

Answers are parsed as by transformers' `post_process_generation`, in pixels of the scene:
`{"bboxes": …, "labels": …}`, `{"quad_boxes": …, "labels": …}`, `{"polygons": …, "labels": …}` or a string.
`from_results` converts the results of `florence_onnx` to this form, so that an exported model can be measured too:
`evaluate(lambda image, task, text: from_results(model.run(task, image, …).results), make_scenes(seed, 100))`.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from florence_onnx.answers.matching import LabelledBox, box_iou, draw_polygons, mask_iou, pair_boxes, quad_to_box
from florence_onnx.answers.results import BoundingBoxes, OCRBoundingBox, PolygonOutput

from .questions import TASK_TOKENS, Question, ask
from .scenes import Box, Scene, draw_mask, make_scene

Predict = Callable[[Image.Image, str, str], Any]  # (image, task token, text input) -> parsed answer
Results = BoundingBoxes | OCRBoundingBox | PolygonOutput | str
QUESTION_SEED = 5
MIN_IOU = 0.5

BOX_TASKS = (
    "<OD>",
    "<DENSE_REGION_CAPTION>",
    "<REGION_PROPOSAL>",
    "<CAPTION_TO_PHRASE_GROUNDING>",
    "<OPEN_VOCABULARY_DETECTION>",
)
MASK_TASKS = ("<REFERRING_EXPRESSION_SEGMENTATION>", "<REGION_TO_SEGMENTATION>")
LABEL_TASKS = ("<REGION_TO_CATEGORY>", "<REGION_TO_DESCRIPTION>")


@dataclass(frozen=True)
class Match:
    """The boxes of an answer against the true boxes of a scene."""

    num_correct: int  # IoU >= 0.5 and the same label
    num_predicted: int
    num_true: int
    sum_iou: float  # over the true boxes; 0 for one without a partner


def match_boxes(predicted: Sequence[LabelledBox], true: Sequence[LabelledBox]) -> Match:
    """Pairs boxes of equal labels one to one, largest overlap first."""
    overlaps = [pair.iou for pair in pair_boxes(predicted, true)]
    num_correct = sum(overlap >= MIN_IOU for overlap in overlaps)
    return Match(num_correct, len(predicted), len(true), sum(overlaps))


def to_pixels(box: Box, size: tuple[int, int]) -> Box:
    """Converts a normalised box to pixels of an image of `size` (width, height)."""
    width, height = size
    return box[0] * width, box[1] * height, box[2] * width, box[3] * height


def from_results(results: Results) -> Any:
    """Converts results of `florence_onnx` to the form of transformers' `post_process_generation`."""
    if isinstance(results, str):
        return results.strip()
    if isinstance(results, BoundingBoxes):
        boxes = [(box.x, box.y, box.x + box.w, box.y + box.h) for box in results.bboxes]
        return {"bboxes": boxes, "labels": [box.label for box in results.bboxes]}
    if isinstance(results, OCRBoundingBox):
        quads = [[value for point in box.quad for value in (point.x, point.y)] for box in results.quad_boxes]
        return {"quad_boxes": quads, "labels": [box.label for box in results.quad_boxes]}
    polygons = [[[value for point in polygon.points for value in (point.x, point.y)]] for polygon in results.polygons]
    return {"polygons": polygons, "labels": [polygon.label for polygon in results.polygons]}


def strip_locations(text: str) -> str:
    """The text before the first location token: `"circle<loc_1>…"` -> `"circle"`."""
    return text.partition("<loc_")[0].strip()


def score_answers(
    task: str, scenes: Sequence[Scene], questions: Sequence[Question], parsed: Sequence[Any]
) -> dict[str, float]:
    """Computes the figures of one task over some scenes.

    Args:
        task: The task token.
        scenes: The scenes.
        questions: One question for each scene.
        parsed: One parsed answer for each question.

    Returns:
        `n` and the figures of the task; all but counts are between 0 and 1.
    """
    if task in BOX_TASKS:
        return _score_boxes(scenes, questions, parsed)
    if task in MASK_TASKS:
        return _score_masks(scenes, questions, parsed)
    if task == "<OCR_WITH_REGION>":
        return _score_words(scenes, questions, parsed)
    if task in LABEL_TASKS:
        parsed = [strip_locations(answer) for answer in parsed]
    return _score_texts(task, scenes, questions, parsed)


def collect_questions(scenes: Sequence[Scene], task: str) -> list[tuple[Scene, Question]]:
    """Makes one question of a task for every scene to which it applies; deterministic."""
    rng = random.Random(QUESTION_SEED)
    asked = ((scene, ask(scene, task, rng)) for scene in scenes)
    return [(scene, question) for scene, question in asked if question]


def make_scenes(seed: int, num_scenes: int, size: int = 256) -> list[Scene]:
    """Makes the scenes of an evaluation seed."""
    rng = random.Random(seed)
    return [make_scene(rng, size) for _ in range(num_scenes)]


def evaluate(
    predict: Predict, scenes: Sequence[Scene], tasks: Sequence[str] = TASK_TOKENS
) -> dict[str, dict[str, float]]:
    """Returns the figures by task of a callable `predict(image, task, text_input) -> parsed answer`."""
    report = {}
    for task in tasks:
        asked = collect_questions(scenes, task)
        parsed = [predict(scene.image, task, question.text_input) for scene, question in asked]
        report[task] = score_answers(task, [s for s, _ in asked], [q for _, q in asked], parsed)
    return report


def _score_boxes(scenes: Sequence[Scene], questions: Sequence[Question], parsed: Sequence[Any]) -> dict[str, float]:
    matches = []
    for scene, question, answer in zip(scenes, questions, parsed, strict=True):
        labels = answer["bboxes_labels"] if "bboxes_labels" in answer else answer["labels"]
        true = [(label, to_pixels(box, scene.size)) for label, box in question.truth.boxes]
        matches.append(match_boxes(list(zip(labels, answer["bboxes"], strict=True)), true))
    correct, predicted, number = (
        sum(getattr(match, name) for match in matches) for name in ("num_correct", "num_predicted", "num_true")
    )
    return {
        "n": len(matches),
        "precision": correct / max(1, predicted),
        "recall": correct / max(1, number),
        "mean_iou": sum(match.sum_iou for match in matches) / max(1, number),
    }


def _score_masks(scenes: Sequence[Scene], questions: Sequence[Question], parsed: Sequence[Any]) -> dict[str, float]:
    overlaps = []
    for scene, question, answer in zip(scenes, questions, parsed, strict=True):
        assert question.truth.shape is not None
        polygons = [polygon for instance in answer["polygons"] for polygon in instance]
        overlaps.append(mask_iou(draw_polygons(polygons, scene.size), draw_mask(question.truth.shape, scene.size)))
    return {
        "n": len(overlaps),
        "mean_iou": float(np.mean(overlaps)),
        "over_half": float(np.mean([overlap >= MIN_IOU for overlap in overlaps])),
    }


def _score_words(scenes: Sequence[Scene], questions: Sequence[Question], parsed: Sequence[Any]) -> dict[str, float]:
    texts, overlaps, invented = [], [], 0
    for scene, question, answer in zip(scenes, questions, parsed, strict=True):
        if not question.truth.boxes:
            invented += len(answer["labels"])
            continue
        ((text, box),) = question.truth.boxes
        is_single = len(answer["labels"]) == 1
        texts.append(is_single and answer["labels"][0] == text)
        overlaps.append(box_iou(quad_to_box(answer["quad_boxes"][0]), to_pixels(box, scene.size)) if is_single else 0.0)
    both = [text and overlap >= MIN_IOU for text, overlap in zip(texts, overlaps, strict=True)]
    return {
        "n": len(texts),
        "exact": float(np.mean(texts)),
        "exact_and_placed": float(np.mean(both)),
        "mean_iou": float(np.mean(overlaps)),
        "invented_words": invented,
    }


def _score_texts(
    task: str, scenes: Sequence[Scene], questions: Sequence[Question], parsed: Sequence[Any]
) -> dict[str, float]:
    """Computes the share of exact texts. OCR counts scenes with a word only; `invented_words` are from the others."""
    right = [question.truth.text == answer for question, answer in zip(questions, parsed, strict=True)]
    with_word = [scene.word is not None for scene in scenes]
    if task == "<OCR>":
        hits = [hit for hit, has_word in zip(right, with_word, strict=True) if has_word]
        return {"n": len(hits), "exact": float(np.mean(hits)), "invented_words": right.count(False) - hits.count(False)}
    figures = {"n": len(right), "exact": float(np.mean(right))}
    if task == "<CAPTION>":
        repeated = [len({shape.kind for shape in scene.shapes}) < len(scene.shapes) for scene in scenes]
        hits = [hit for hit, is_repeated in zip(right, repeated, strict=True) if is_repeated]
        figures |= {"n_repeated": len(hits), "exact_repeated": float(np.mean(hits)) if hits else 1.0}
    return figures
