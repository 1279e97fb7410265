"""Prompts to ids and back with Florence-2's real tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from florence_onnx import BundleFileMissingError, Region, tasks
from florence_onnx.bundles import bundle
from florence_onnx.bundles.tokenizer import PromptTokenizer
from tests.shared_data import FOLDER, NO_SHARED, rows

LOC_0 = 50269
"""Id of `<loc_0>` in Florence-2's vocabulary."""


@pytest.fixture(scope="module")
def tokenizer() -> PromptTokenizer:
    path = FOLDER / "tokenizer" / "tokenizer.json"
    if not path.exists():
        pytest.skip(NO_SHARED)
    return PromptTokenizer(path, pad_token_id=1)


INPUTS: dict[str, dict[str, Any]] = {
    "caption-to-phrase-grounding": {"text_input": "A green car parked in front of a yellow building."},
    "referring-expression-segmentation": {"text_input": " a green car "},
    "open-vocabulary-detection": {"text_input": "wheels"},
    "region-to-segmentation": {"region": Region(702, 575, 866, 772)},
    **{f"region-to-{what}": {"region": Region(52, 332, 932, 774)} for what in ("category", "description", "ocr")},
}


def test_prompts_of_all_tasks_have_the_reference_ids(tokenizer: PromptTokenizer) -> None:
    known: list[Any] = rows("tokenizer/prompt_ids.jsonl")
    prompts = {task.format_prompt(**INPUTS.get(task.slug, {})) for task in tasks.TASKS.values()}
    assert len(prompts) == 15 and prompts <= {prompt for prompt, _ in known}
    for prompt, ids in known:
        assert tokenizer.encode([prompt])[0].tolist() == [ids]


def test_a_region_is_four_location_tokens(tokenizer: PromptTokenizer) -> None:
    prompt = tasks.REGION_TO_CATEGORY.format_prompt(region=Region(0, 332, 932, 999))
    ids = tokenizer.encode([prompt])[0][0].tolist()
    start = ids.index(LOC_0)
    assert ids[start : start + 4] == [LOC_0, LOC_0 + 332, LOC_0 + 932, LOC_0 + 999]


def test_recorded_answers_decode_to_their_text(tokenizer: PromptTokenizer) -> None:
    recorded = [row for row in rows("golden.jsonl") if row.get("generated_ids")]
    assert recorded
    for row in recorded:
        assert tokenizer.decode(row["generated_ids"]) == row["raw"]


def test_a_batch_is_padded_on_the_right(tokenizer: PromptTokenizer) -> None:
    short, long = "What is the text in the image?", "Locate the region proposals in the image, and more."
    input_ids, attention_mask = tokenizer.encode([short, long])
    assert input_ids.shape == attention_mask.shape and input_ids.dtype == np.int64
    length = int(attention_mask[0].sum())
    assert input_ids[0, :length].tolist() == tokenizer.encode([short])[0][0].tolist()
    assert set(input_ids[0, length:].tolist()) == {1} and not attention_mask[0, length:].any()


@given(st.text(max_size=40))
def test_any_text_round_trips(text: str) -> None:
    """Byte-level BPE has no unknown text. Uses the demo's tokenizer, which is in the repository."""
    tokenizer = PromptTokenizer(bundle.DEMO_DIRECTORY / bundle.TOKENIZER, pad_token_id=1)
    ids = tokenizer.encode([text])[0][0]
    decoded = tokenizer.decode(ids.tolist())
    assert decoded.startswith("<s>") and decoded.endswith("</s>")
    if "<" not in text:  # special tokens in the text are encoded as such, and <mask> removes the space before it
        assert decoded == f"<s>{text}</s>"


def test_ids_beyond_the_vocabulary_decode_to_nothing(tokenizer: PromptTokenizer) -> None:
    assert tokenizer.decode([2, 0, 51300, 2]) == "</s><s></s>"


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(BundleFileMissingError, match=r"tokenizer\.json"):
        PromptTokenizer(tmp_path / "tokenizer.json", pad_token_id=1)
