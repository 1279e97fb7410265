"""`Prediction.to_transformers` against transformers' own `post_process_generation`, and against recorded answers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from florence_onnx import Prediction, tasks
from florence_onnx.answers import postprocess
from florence_onnx.tasks import TASKS, parse
from tests.answers.test_postprocess import PARSERS, generated_texts
from tests.shared_data import rows


def predict(token: str, text: str, size: tuple[int, int]) -> Prediction[Any]:
    task = tasks.get(token)
    return Prediction(parse(task, text, size), task, text, (), False, Image.new("RGB", (1, 1)))


def reference_processor() -> Any:
    """transformers' post-processing without a tokenizer, which it needs for token ids only."""
    module = pytest.importorskip(
        "transformers.models.florence2.processing_florence2", reason="compares with transformers' post-processing"
    )
    grammars: dict[str, Any] = {name: {} for name in PARSERS}
    grammars["phrase_grounding"] = {"banned_grounding_tokens": list(postprocess.BANNED_PHRASES)}
    post_processor = module.Florence2PostProcessor(grammars, SimpleNamespace(all_special_tokens=[]))
    kinds = {
        task.token: next(name for name, parser in PARSERS.items() if parser is task.parser) for task in TASKS.values()
    }
    this = SimpleNamespace(tasks_answer_post_processing_type=kinds, post_processor=post_processor)
    return lambda **arguments: module.Florence2Processor.post_process_generation(this, **arguments)


@given(generated_texts, st.tuples(st.integers(1, 5000), st.integers(1, 5000)))
@settings(max_examples=300, deadline=None)
@example("</s><s>car<loc_1><loc_2><loc_3><loc_4><loc_5><loc_6><loc_7><loc_8></s>", (640, 480))
@example("caf\u00e9<poly><loc_1><loc_2><loc_3><loc_4><sep><loc_5><loc_6></poly><poly><loc_7><loc_8></poly>", (100, 100))
def test_every_task_gives_the_dict_of_transformers(text: str, size: tuple[int, int]) -> None:
    post_process = reference_processor()
    for task in TASKS.values():
        expected = post_process(text=text, task=task.token, image_size=size)
        assert predict(task.token, text, size).to_transformers() == expected


def test_recorded_answers_with_microsofts_floats() -> None:
    compared = 0
    for row in rows("transformers_post_cases.jsonl"):
        known = row["task"] in {task.token for task in TASKS.values()} and "raw" in row and row["image_size"]
        if not known or not isinstance(row["ms_parsed"], dict) or "</s>" in str(row["ms_parsed"]):
            continue  # text, or an end token that Microsoft's code leaves in a label
        if row["kind"] == "hand:seg_loc_sep3":
            continue  # Microsoft's code and transformers differ in structure; to_transformers follows the latter
        found = predict(row["task"], row["raw"], tuple(row["image_size"])).to_transformers(integers=False)
        labels = {key: value for key, value in row["ms_parsed"].items() if "labels" in key}
        if all(label == label.strip() and label.isascii() for names in labels.values() for label in names):
            assert found == {row["task"]: row["ms_parsed"]}, row
            compared += 1
    assert compared > 200


def test_outlines_of_one_object_stay_together() -> None:
    text = "<poly><loc_0><loc_0><loc_9><loc_9><sep><loc_1><loc_1><loc_5><loc_5></poly><poly><loc_7><loc_7><loc_8><loc_8></poly>"
    found = predict("<REFERRING_EXPRESSION_SEGMENTATION>", text, (1000, 1000))
    assert [polygon.instance for polygon in found.results.polygons] == [0, 0, 1]
    parts = found.to_transformers()["<REFERRING_EXPRESSION_SEGMENTATION>"]["polygons"]
    assert parts == [[[0, 0, 9, 9], [1, 1, 5, 5]], [[7, 7, 8, 8]]]
    assert "instance" not in str(found.to_dict())
