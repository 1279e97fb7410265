"""Prompts of any wording, and regions as location tokens: token ids against transformers' processor, answers against the tasks'."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from florence_onnx import Florence2, InputError, Region, RegionError, TextInputError, fal, tasks
from florence_onnx.answers.postprocess import PARSERS, bboxes
from florence_onnx.bundles import bundle as bundles
from florence_onnx.bundles.own_tasks import gather
from florence_onnx.bundles.task_presets import PRESETS
from florence_onnx.loading import load_tokenizer
from florence_onnx.prompts import expand, to_task
from tests.conftest import Exported
from tests.own_tasks import REGION, TOKENS

SAMPLE = Path(tasks.__file__).parent / "demo" / "samples" / "scene-1.png"
LITERAL = [
    *(task.format_prompt("What is the date?" if task.takes_text else None) for task in gather(list(PRESETS)).values()),
    "<DocVQA> What is the date?",
    "<GENERATE_TAGS> ",
    "Is there a car?",
    "<DOCVQA>",
    "<VQA>Où est <loc_5>?",
    "  two  spaces",
]
"""What reaches the tokenizer as it stands."""
KNOWN = [
    "<OD>",
    "<CAPTION>",
    f"<REGION_TO_CATEGORY>{TOKENS}",
    f"<REGION_TO_OCR> {TOKENS} ",
    "<OPEN_VOCABULARY_DETECTION>a car",
]
"""What becomes the sentence of a task."""


@pytest.fixture(scope="module")
def model() -> Florence2:
    return Florence2.from_pretrained("demo", device="cpu", session_options={"intra_op_num_threads": 1})


def test_the_ids_of_prompts_are_those_of_transformers(tiny: Exported) -> None:
    from tests import checkpoints

    prompts = [*LITERAL, *KNOWN]
    theirs = checkpoints.build_processor(tiny.checkpoint.config)
    expected = theirs(text=prompts, images=[Image.new("RGB", (64, 64))] * len(prompts))["input_ids"]
    ours = load_tokenizer(bundles.read(tiny.bundle))
    for prompt, ids in zip(prompts, expected, strict=True):
        found, _ = ours.encode([to_task(prompt).format_prompt()])
        assert found[0].tolist() == list(ids[tiny.checkpoint.num_image_tokens :]), prompt
    assert [expand(prompt) for prompt in LITERAL] == LITERAL
    assert not any(expand(prompt).startswith("<") for prompt in KNOWN)


@pytest.mark.parametrize(
    ("prompt", "slug", "more"),
    [
        ("<OD>", "object-detection", {}),
        (f"<REGION_TO_CATEGORY>{TOKENS}", "region-to-category", {"region": REGION}),
        ("<CAPTION_TO_PHRASE_GROUNDING> a red circle", "caption-to-phrase-grounding", {"text_input": "a red circle"}),
    ],
)
def test_a_prompt_with_a_known_token_is_answered_as_its_task(
    model: Florence2, prompt: str, slug: str, more: dict[str, Any]
) -> None:
    found, expected = model.run_prompt(prompt, SAMPLE), model.run(slug, SAMPLE, **more)
    assert (found.text, found.results) == (expected.text, expected.results)
    assert found.task.slug == slug and found.to_transformers() == expected.to_transformers()


def test_a_literal_prompt_is_answered_with_text_or_as_its_parser_reads_it(model: Florence2) -> None:
    sentence = tasks.OBJECT_DETECTION.prompt
    answer = model.run_prompt(sentence, SAMPLE)
    expected = model.run("object-detection", SAMPLE)
    assert answer.text == expected.text and isinstance(answer.results, str)
    parsed = model.run_prompt(sentence, SAMPLE, parser="description_with_bboxes")
    assert parsed.results == expected.results and parsed.image is not None
    plain = model.run_prompt("<GENERATE_TAGS>", SAMPLE)
    assert isinstance(plain.results, str) and list(plain.to_transformers()) == ["<GENERATE_TAGS>"]


def test_another_parser_may_be_named_for_a_known_task() -> None:
    assert to_task("<OD>").parser is tasks.OBJECT_DETECTION.parser
    changed = to_task("<OD>", "bboxes")
    assert changed.parser is bboxes and changed.prompt == tasks.OBJECT_DETECTION.prompt
    assert not to_task("<OD>", "pure_text").has_image


@pytest.mark.parametrize(
    ("prompt", "parser", "error", "said"),
    [
        ("", None, TextInputError, "a prompt is text such as"),
        (" \n", None, TextInputError, "a prompt is text such as"),
        (7, None, TextInputError, "got 7"),
        ("caf\udce9", None, TextInputError, "not valid Unicode"),
        ("<VQA>{input}", None, TextInputError, "put the text in the place of"),
        ("<OD> cars", None, InputError, "must be the whole prompt"),
        ("<VQA>what", "json", InputError, f"unknown parser 'json'; the parsers are: {', '.join(PARSERS)}"),
    ],
)
def test_wrong_prompts_are_refused(prompt: Any, parser: str | None, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        to_task(prompt, parser)


# ------------------------------------------------------------------------------------------------------------- regions

bins = st.integers(0, 999)


@given(bins, bins, bins, bins)
def test_a_region_as_text_is_the_region_without_rounding(a: int, b: int, c: int, d: int) -> None:
    region = Region(min(a, c), min(b, d), max(a, c), max(b, d))
    assert Region.from_text(region.location_tokens) == region
    assert Region.from_text(f" {region.location_tokens}\n") == region
    for task in (tasks.REGION_TO_CATEGORY, tasks.REGION_TO_SEGMENTATION):
        expected = task.format_prompt(region=region)
        assert task.format_prompt(region=region.location_tokens) == expected
        assert task.format_prompt(region.location_tokens) == expected
        assert task.format_prompt(task.token + region.location_tokens) == expected
        assert expand(task.token + region.location_tokens) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "52,332,932,774",
        "<loc_52><loc_332><loc_932>",
        "<loc_52><loc_332><loc_932><loc_774><loc_5>",
        "<loc_52><loc_332><loc_932><loc_1000>",
        "<loc_52><loc_332><loc_932><loc_0774>",
        "<loc_52><loc_332><loc_932><loc_-1>",
        "<loc_52><loc_332><loc_932><loc_٣>",
        "<loc_52> <loc_332> <loc_932> <loc_774>",
        "<loc_932><loc_332><loc_52><loc_774>",
        "<REGION_TO_OCR><loc_52><loc_332><loc_932><loc_774>",
        "<loc_" + "9" * 5000 + "><loc_1><loc_2><loc_3>",
    ],
)
def test_what_is_not_a_region_is_refused(text: str) -> None:
    with pytest.raises(RegionError) as caught:
        tasks.REGION_TO_CATEGORY.format_prompt(region=text)
    assert len(str(caught.value)) < 300


def test_a_region_as_text_is_taken_by_every_call(model: Florence2) -> None:
    image = model.encode(SAMPLE)
    expected = model.run("region-to-category", image, region=REGION)
    assert model.run("region-to-category", image, region=TOKENS).token_ids == expected.token_ids
    assert model.run("region-to-category", image, text_input=TOKENS).token_ids == expected.token_ids
    batch = model.run_batch("region-to-category", [image, image], regions=[TOKENS, REGION])
    assert [each.token_ids for each in batch] == [expected.token_ids] * 2
    scored = [
        model.score_tokens("region-to-category", image, expected.token_ids, region=given) for given in (TOKENS, REGION)
    ]
    assert (scored[0] == scored[1]).all()
    with pytest.raises(InputError, match="regions must be a list"):
        model.run_batch("region-to-category", [image], regions=TOKENS)
    with pytest.raises(TextInputError, match="takes no text_input"):
        model.run("region-to-category", image, text_input="a circle", region=REGION)


def test_fals_form_takes_a_region_as_text(model: Florence2) -> None:
    fal.configure(model)
    url = fal.encode_file(SAMPLE)
    endpoint = "fal-ai/florence-2-large/region-to-category"
    bins = {"x1": 430, "y1": 364, "x2": 592, "y2": 539}
    expected = fal.run(endpoint, {"image_url": url, "region": bins})
    for given_input in ({"region": TOKENS}, {"text_input": TOKENS}, {"text_input": f"<REGION_TO_CATEGORY>{TOKENS}"}):
        assert fal.run(endpoint, {"image_url": url, **given_input}) == expected
    with pytest.raises(fal.FalClientHTTPError, match="four location tokens") as caught:
        fal.run(endpoint, {"image_url": url, "region": "<loc_1>"})
    assert caught.value.status_code == 422
    with pytest.raises(fal.FalClientHTTPError, match="Field required"):
        fal.run(endpoint, {"image_url": url, "text_input": "a circle"})
    fal.configure()
