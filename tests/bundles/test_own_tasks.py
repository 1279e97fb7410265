"""Tasks that a bundle carries: the file, its checks, and the model that answers them; presets of public fine-tunes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from florence_onnx import BundleFormatError, Florence2, InputError, UnknownTaskError, tasks
from florence_onnx.answers.postprocess import PARSERS, pure_text
from florence_onnx.bundles import bundle as bundles
from florence_onnx.bundles import hub, own_tasks
from florence_onnx.bundles.task_presets import PRESETS
from florence_onnx.tasks import Task
from tests.own_tasks import ENTRIES, REGION, SAME_AS, TOKENS, copy_demo

SAMPLE = Path(tasks.__file__).parent / "demo" / "samples" / "scene-1.png"
GOOD = ENTRIES[0]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_demo(tmp_path_factory.mktemp("own-tasks") / "bundle")


@pytest.fixture(scope="module")
def model(bundle: Path) -> Florence2:
    return Florence2.from_pretrained(bundle, device="cpu", session_options={"intra_op_num_threads": 1})


# --------------------------------------------------------------------------------------------------------------- model


@pytest.mark.parametrize("slug", SAME_AS)
def test_a_model_answers_the_tasks_of_its_bundle(model: Florence2, slug: str) -> None:
    same, own_input, other_input = SAME_AS[slug]
    image = model.encode(SAMPLE)
    found = model.run(slug, image, **own_input)
    expected = model.run(same, image, **other_input)
    assert found.text == expected.text and found.results == expected.results
    assert found.task.slug == slug and found.task.has_image == same.has_image
    assert model.run(found.task.token, image, **own_input).results == found.results
    assert list(found.to_transformers()) == [found.task.token]


def test_own_tasks_run_in_a_batch_with_others_and_are_scored(model: Florence2) -> None:
    first, second = model.run_batch(["find-shapes", "caption"], [SAMPLE, SAMPLE])
    assert first.results == model.run("object-detection", SAMPLE).results
    assert second.results == model.run("caption", SAMPLE).results
    logits = model.score_tokens("find-shapes", SAMPLE, first.token_ids)
    assert len(logits) == len(first.token_ids) - 1


def test_a_model_lists_its_tasks(model: Florence2, bundle: Path) -> None:
    assert list(model.tasks) == [*tasks.TASKS, *SAME_AS]
    assert model.info()["tasks"] == list(SAME_AS)
    assert model.tasks["find-shapes"].description == "Finds drawn shapes."
    assert bundles.read(bundle).tasks == {slug: model.tasks[slug] for slug in SAME_AS}
    assert bundles.read(bundles.DEMO_DIRECTORY).tasks == {}
    with pytest.raises(UnknownTaskError, match=r'did you mean "find-shapes".*find-shapes \(<FIND_SHAPES>\)'):
        model.run("find-shape", SAMPLE)


def test_own_tasks_belong_to_their_model_alone(model: Florence2) -> None:
    assert "find-shapes" in model.tasks
    with pytest.raises(UnknownTaskError, match="find-shapes"):
        Florence2.from_pretrained("demo", device="cpu").run("find-shapes", SAMPLE)


def test_a_text_keeps_what_looks_like_a_placeholder() -> None:
    task = own_tasks.parse({"tasks": ENTRIES})["ask-region"]
    prompt = task.format_prompt("What does {region} or {input} show in", REGION)
    assert prompt == f"What does {{region}} or {{input}} show in the region {TOKENS}?"


# ---------------------------------------------------------------------------------------------------------------- file

NAMES = "must be small letters and digits"
WRONG: list[tuple[Any, str]] = [
    ([GOOD, GOOD], r"tasks\[1\]: slug 'find-shapes' is that of tasks\[0\]"),
    ([GOOD, {**GOOD, "slug": "other"}], r"tasks\[1\]: token '<FIND_SHAPES>' is that of tasks\[0\]"),
    ([{**GOOD, "slug": "ocr"}], r"tasks\[0\]: slug 'ocr' is that of Florence-2's own task ocr"),
    ([{**GOOD, "token": "<OD>"}], r"token '<OD>' is that of Florence-2's own task object-detection"),
    ([{**GOOD, "slug": "requests"}], r"none of prompt, requests; got 'requests'"),
    ([{**GOOD, "slug": "../etc"}], NAMES),
    ([{**GOOD, "slug": "Find"}], NAMES),
    ([{**GOOD, "slug": "a--b"}], NAMES),
    ([{**GOOD, "slug": "a" * 65}], r"tasks\[0\]: slug must be a text of 1 to 64 characters, got 'a+'"),
    ([{**GOOD, "token": "FIND"}], "name in angle brackets"),
    ([{**GOOD, "token": "<loc_5>"}], "no location token"),
    ([{**GOOD, "token": "<a b>"}], "name in angle brackets"),
    ([{**GOOD, "needs": "image"}], r"needs must be one of nothing, text, region, text\+region; got 'image'"),
    ([{**GOOD, "needs": ["text"]}], r"tasks\[0\]: needs must be a text .* got list of 1"),
    ([{**GOOD, "parser": "eval"}], r"parser must be one of pure_text, description_with_bboxes, .*; got 'eval'"),
    ([{**GOOD, "parser": "__class__"}], "parser must be one of"),
    ([{**GOOD, "prompt": "Where is {input}?"}], r"tasks\[0\]: prompt .* must contain \{input\} nowhere"),
    ([{**GOOD, "needs": "text"}], r"must contain \{input\} once"),
    ([{**GOOD, "needs": "text+region", "prompt": "{text}"}], r"must contain \{region\} once"),
    ([{**GOOD, "needs": "text+region", "prompt": "{text}{region}{input}"}], r"must contain \{input\} nowhere"),
    ([{**GOOD, "prompt": ""}], "prompt must be a text of 1 to 2000 characters, got ''"),
    ([{**GOOD, "prompt": 7}], "prompt must be a text of 1 to 2000 characters, got 7"),
    ([{**GOOD, "prompt": "x" * 2001}], "prompt must be a text of 1 to 2000 characters"),
    ([{**GOOD, "prompt": "a\x1b[2J"}], "prompt must have printable characters only"),
    ([{**GOOD, "prompt": "\ud800"}], "prompt must have printable characters only"),
    ([{**GOOD, "description": "two\nlines"}], "description must have printable characters only"),
    ([{**GOOD, "description": None}], "description must be a text of 1 to 300 characters, got None"),
    ([{**GOOD, "has_image": True}], "has an unknown has_image; a task has slug, token, prompt, needs, parser"),
    ([{"slug": "a", "token": "<A>"}], "lacks needs, parser, prompt"),
    (["find-shapes"], r"tasks\[0\] must be an object with slug, .* got 'find-shapes'"),
    ([None], r"tasks\[0\] must be an object"),
    ({}, '"tasks" must be a list of 1 to 64 tasks, got dict of 0'),
    ([], "got list of 0"),
    ([{**GOOD, "slug": f"a{i}", "token": f"<A{i}>"} for i in range(65)], "got list of 65"),
    (None, "got None"),
]


@pytest.mark.parametrize(("entries", "said"), WRONG)
def test_a_wrong_file_is_refused_by_the_name_of_the_entry(entries: Any, said: str, tmp_path: Path) -> None:
    file = tmp_path / "tasks.json"
    file.write_text(json.dumps({"tasks": entries}), encoding="utf-8")
    with pytest.raises(BundleFormatError, match=said) as caught:
        own_tasks.read(tmp_path)
    assert str(file) in str(caught.value) and len(str(caught.value)) < 1200


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\xff\xfe", "cannot be read as JSON"),
        (b'{"tasks": [' + b"[" * 100_000, "cannot be read as JSON"),
        (b'{"tasks": ' + b"9" * 5000 + b"}", "cannot be read as JSON"),
        (b"[]", "must be a JSON object, got list"),
        (b'{"tasks": [], "more": 1}', 'one name, "tasks"; got also more'),
        (b" " * (own_tasks.MAX_BYTES + 1), "has 262145 bytes; a file of tasks has at most 262144"),
    ],
)
def test_a_damaged_or_huge_file_is_refused(content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "tasks.json").write_bytes(content)
    with pytest.raises(BundleFormatError, match=said):
        own_tasks.read(tmp_path)


def test_a_bundle_with_a_wrong_file_does_not_load(tmp_path: Path) -> None:
    copy = copy_demo(tmp_path / "bundle", [{**GOOD, "parser": "none"}])
    with pytest.raises(BundleFormatError, match=r"tasks.json: tasks\[0\]: parser must be one of"):
        Florence2.from_pretrained(copy)


def test_a_file_that_was_written_is_read_again() -> None:
    known = own_tasks.parse({"tasks": ENTRIES})
    assert own_tasks.parse(own_tasks.to_json(known)) == known
    assert own_tasks.to_json(known) == {"tasks": ENTRIES}
    with pytest.raises(InputError, match="parser of its own"):
        own_tasks.to_json({"x": Task("x", "<X>", "x", "nothing", lambda text, size: text, has_image=False)})


def test_nothing_is_downloaded_to_find_the_tasks_of_a_local_model(bundle: Path) -> None:
    assert list(hub.resolve(bundle, local_only=True).tasks) == list(SAME_AS)


# ------------------------------------------------------------------------------------------------------------- presets


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_can_be_written_and_read(name: str) -> None:
    known = own_tasks.gather([name])
    assert own_tasks.parse(own_tasks.to_json(known)) == known
    assert known and all(task.description and task.parser is pure_text for task in known.values())
    assert all("/" in model for model in PRESETS[name].models)


def test_the_prompts_of_presets_are_those_of_the_model_cards() -> None:
    found = own_tasks.gather(list(PRESETS))
    assert {task.slug: task.prompt for task in found.values()} == {
        "generate-prompt": "<GENERATE_PROMPT>",
        "generate-tags": "<GENERATE_TAGS>",
        "mixed-caption": "<MIXED_CAPTION>",
        "analyze": "<ANALYZE>",
        "mixed-caption-plus": "<MIXED_CAPTION_PLUS>",
        "docvqa": "<DocVQA>{input}",
        "description": "<DESCRIPTION>{input}",
        "cog-caption": tasks.MORE_DETAILED_CAPTION.prompt,
        "icon-caption": tasks.CAPTION.prompt,
    }
    assert found["docvqa"].format_prompt("What is the date?") == "<DocVQA>What is the date?"
    assert list(own_tasks.gather(["promptgen-v1.5", "promptgen-v2.0"])) == list(own_tasks.gather(["promptgen-v2.0"]))


def test_a_name_that_is_neither_preset_nor_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"'promptgen' is neither a JSON file of tasks nor a preset.*promptgen-v2\.0"):
        own_tasks.gather(["promptgen"])
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"tasks": [{**GOOD, "slug": "docvqa"}]}), encoding="utf-8")
    with pytest.raises(InputError, match="slug 'docvqa' is that of tasks"):
        own_tasks.gather(["docvqa", str(file)])


def test_parsers_are_named_as_in_microsofts_code() -> None:
    assert {task.parser for task in tasks.TASKS.values()} <= set(PARSERS.values())
    assert all(parser.__name__ == name for name, parser in PARSERS.items())
