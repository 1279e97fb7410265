"""The table of tasks, and prompts."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from florence_onnx import tasks
from florence_onnx.answers import postprocess
from florence_onnx.answers.locations import Region
from florence_onnx.errors import InputError, RegionError, TextInputError, UnknownTaskError
from florence_onnx.tasks import TASKS, Task
from tests.shared_data import rows

REGION = Region(52, 332, 932, 774)
INPUTS = list(itertools.product([None, "", " \n", 7, "cat"], [None, (1, 2, 3, 4), REGION]))
FAL_ENDPOINTS = [
    "object-detection",
    "dense-region-caption",
    "region-proposal",
    "open-vocabulary-detection",
    "caption-to-phrase-grounding",
    "ocr-with-region",
    "referring-expression-segmentation",
    "region-to-segmentation",
    "caption",
    "detailed-caption",
    "more-detailed-caption",
    "ocr",
    "region-to-category",
    "region-to-description",
]


def _arguments(task: Task[object]) -> dict[str, object]:
    return {"text": {"text_input": "a red kite"}, "region": {"region": REGION}, "nothing": {}}[task.needs]


def test_text_with_invalid_unicode_is_refused() -> None:
    with pytest.raises(TextInputError, match="not valid Unicode"):
        tasks.CAPTION_TO_PHRASE_GROUNDING.format_prompt(text_input="caf\udce9")


def test_tasks_are_fals_endpoints_and_region_to_ocr() -> None:
    assert list(TASKS) == [*FAL_ENDPOINTS, "region-to-ocr"]
    assert all(task.slug == slug for slug, task in TASKS.items())


def test_every_task_is_one_constant() -> None:
    constants = [value for value in vars(tasks).values() if isinstance(value, Task)]
    assert sorted(task.slug for task in constants) == sorted(TASKS)


def test_tasks_with_geometry_have_an_image_as_at_fal() -> None:
    text_parser = postprocess.pure_text
    assert all(task.has_image == (task.parser is not text_parser) for task in TASKS.values())
    assert sum(task.has_image for task in TASKS.values()) == 8


@pytest.mark.parametrize("task", TASKS.values(), ids=list(TASKS))
def test_constant_slug_and_token_are_the_same_task(task: Task[object]) -> None:
    assert tasks.get(task) is task
    assert tasks.get(task.slug) is task
    assert tasks.get(task.token) is task


@pytest.mark.parametrize("task", TASKS.values(), ids=list(TASKS))
def test_prompts_equal_those_of_transformers(task: Task[object]) -> None:
    module = pytest.importorskip(
        "transformers.models.florence2.processing_florence2", reason="compares prompts with transformers"
    )
    processor = object.__new__(module.Florence2Processor)
    source = _prompt_tables(module)
    processor.task_prompts_without_inputs, processor.task_prompts_with_input = source
    given_input = {"text": "  a red kite ", "region": REGION.location_tokens, "nothing": ""}[task.needs]
    arguments = {"text": {"text_input": "  a red kite "}}.get(task.needs, _arguments(task))
    assert processor._construct_prompts(task.token + given_input) == [task.format_prompt(**arguments)]  # type: ignore[arg-type]


def _prompt_tables(module: object) -> tuple[dict[str, str], dict[str, str]]:
    """The prompts that the constructor of the processor sets before it fails for want of a tokenizer."""
    processor = object.__new__(module.Florence2Processor)  # type: ignore[attr-defined]
    with pytest.raises(AttributeError):
        processor.__init__()
    return processor.task_prompts_without_inputs, processor.task_prompts_with_input


def test_recorded_prompts() -> None:
    recorded = {prompt for prompt, _ in rows("tokenizer/prompt_ids.jsonl")}
    plain = {task.prompt for task in TASKS.values() if task.needs == "nothing"}
    assert plain <= recorded


def test_text_is_stripped_and_put_into_the_prompt() -> None:
    assert tasks.OPEN_VOCABULARY_DETECTION.format_prompt(" a {red} kite\n") == "Locate a {red} kite in the image."


def test_region_is_put_into_the_prompt() -> None:
    expected = "What is the polygon mask of region <loc_52><loc_332><loc_932><loc_774>"
    assert tasks.REGION_TO_SEGMENTATION.format_prompt(region=REGION) == expected


@given(st.text().filter(str.strip))
def test_any_text_is_kept_as_it_is(text: str) -> None:
    prompt = tasks.REFERRING_EXPRESSION_SEGMENTATION.format_prompt(text)
    assert prompt == "Locate " + text.strip() + " in the image with mask"


@pytest.mark.parametrize("task", TASKS.values(), ids=list(TASKS))
@pytest.mark.parametrize(("text", "region"), INPUTS)
def test_exactly_what_a_task_needs_is_accepted(task: Task[object], text: object, region: object) -> None:
    is_text_right = text == "cat" if task.needs == "text" else text is None
    is_region_right = region is REGION if task.needs == "region" else region is None
    if is_text_right and is_region_right:
        assert "{" not in task.format_prompt(text, region)  # type: ignore[arg-type]
        return
    with pytest.raises(RegionError if is_text_right else TextInputError):
        task.format_prompt(text, region)  # type: ignore[arg-type]


def test_errors_say_what_to_pass() -> None:
    with pytest.raises(TextInputError, match="needs text: pass text_input="):
        tasks.OPEN_VOCABULARY_DETECTION.format_prompt()
    with pytest.raises(RegionError, match=r"Region\.from_pixels"):
        tasks.REGION_TO_OCR.format_prompt()
    with pytest.raises(TextInputError, match="'caption' takes no text_input, got 'cat'; leave it out"):
        tasks.CAPTION.format_prompt("cat")
    with pytest.raises(RegionError, match="'ocr' takes no region"):
        tasks.OCR.format_prompt(region=REGION)


def test_the_error_for_an_unknown_task_lists_all_tasks() -> None:
    with pytest.raises(UnknownTaskError) as caught:
        tasks.get("detection of objects")
    assert all(task.slug in str(caught.value) and task.token in str(caught.value) for task in TASKS.values())


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("OD", "<OD>"),
        ("<od>", "<OD>"),
        ("object_detection", "object-detection"),
        ("Object Detection", "object-detection"),
        ("objekt-detection", "object-detection"),
        ("ocr_with_regions", "ocr-with-region"),
        ("segmentation", "region-to-segmentation"),
    ],
)
def test_the_error_for_an_unknown_task_suggests_the_nearest_name(wrong: str, meant: str) -> None:
    with pytest.raises(UnknownTaskError, match=f'did you mean "{meant}"'):
        tasks.get(wrong)


@pytest.mark.parametrize("wrong", ["", "<VQA>", None, 7, ["<OD>"], "x" * 100_000, "<loc_1>"])
def test_any_argument_that_is_no_task_is_refused(wrong: object) -> None:
    with pytest.raises(UnknownTaskError, match="unknown task"):
        tasks.get(wrong)  # type: ignore[arg-type]


def test_a_custom_task() -> None:
    vqa = Task("vqa", "<VQA>", "<VQA>{input}", needs="text", parser=postprocess.pure_text, has_image=False)
    assert tasks.get(vqa) is vqa
    assert vqa.format_prompt(text_input=" how many? ") == "<VQA>how many?"
    assert tasks.parse(vqa, "</s><s>two</s>", (640, 480)) == "two"


@pytest.mark.parametrize(
    ("prompt", "needs"), [("no placeholder", "text"), ("{input}{input}", "text"), ("{input}", "nothing")]
)
def test_a_prompt_must_fit_what_the_task_needs(prompt: str, needs: tasks.Needs) -> None:
    with pytest.raises(InputError, match=r"\{input\}"):
        Task("mine", "<MINE>", prompt, needs=needs, parser=postprocess.pure_text, has_image=False)


def test_a_task_must_need_something_known() -> None:
    with pytest.raises(InputError, match=r'"nothing", "text", "region" or "text\+region", got \'image\''):
        Task("mine", "<MINE>", "q", needs="image", parser=postprocess.pure_text, has_image=False)  # type: ignore[arg-type]


def test_tasks_are_frozen_and_hashable() -> None:
    assert len({*TASKS.values(), *TASKS.values()}) == 15
    with pytest.raises(dataclasses.FrozenInstanceError):
        tasks.OCR.slug = "x"  # type: ignore[misc]
