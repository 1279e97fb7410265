"""A copy of the demo bundle that carries tasks of its own, each with a prompt that the demo model knows under another name.

So every one of them must answer exactly as the task of Florence-2 does that stands beside it in `SAME_AS`.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from florence_onnx import Region, tasks
from florence_onnx.bundles.bundle import DEMO_DIRECTORY
from florence_onnx.tasks import Task

REGION = Region(430, 364, 592, 539)
"""The red circle of scene-1."""
TOKENS = "<loc_430><loc_364><loc_592><loc_539>"

ENTRIES: list[dict[str, Any]] = [
    {
        "slug": "find-shapes",
        "token": "<FIND_SHAPES>",
        "prompt": "Locate the objects with category name in the image.",
        "needs": "nothing",
        "parser": "description_with_bboxes",
        "description": "Finds drawn shapes.",
    },
    {
        "slug": "find-phrases",
        "token": "<FindPhrases>",
        "prompt": "Locate the phrases in the caption: {input}",
        "needs": "text",
        "parser": "phrase_grounding",
    },
    {
        "slug": "outline",
        "token": "<OUTLINE>",
        "prompt": "What is the polygon mask of region {input}",
        "needs": "region",
        "parser": "polygons",
    },
    {
        "slug": "ask-region",
        "token": "<ASK_REGION>",
        "prompt": "{text} the region {region}?",
        "needs": "text+region",
        "parser": "pure_text",
    },
    {
        "slug": "read-lines",
        "token": "<READ_LINES>",
        "prompt": "What is the text in the image, with regions?",
        "needs": "nothing",
        "parser": "ocr",
    },
]
SAME_AS: dict[str, tuple[Task[Any], dict[str, Any], dict[str, Any]]] = {
    "find-shapes": (tasks.OBJECT_DETECTION, {}, {}),
    "find-phrases": (tasks.CAPTION_TO_PHRASE_GROUNDING, *2 * ({"text_input": "a red circle"},)),
    "outline": (tasks.REGION_TO_SEGMENTATION, *2 * ({"region": REGION},)),
    "ask-region": (tasks.REGION_TO_CATEGORY, {"text_input": " What is ", "region": REGION}, {"region": REGION}),
    "read-lines": (tasks.OCR_WITH_REGION, {}, {}),
}
"""By slug: a task of Florence-2 with the same prompt, the input of the own task, and that of the other."""


def copy_demo(folder: Path, entries: list[dict[str, Any]] | None = None) -> Path:
    """Copies the demo bundle and writes a `tasks.json` beside its description.

    Args:
        folder: Where to.
        entries: The tasks; `ENTRIES` by default.
    """
    shutil.copytree(DEMO_DIRECTORY, folder)
    content = {"tasks": ENTRIES if entries is None else entries}
    (folder / "tasks.json").write_text(json.dumps(content), encoding="utf-8")
    return folder
