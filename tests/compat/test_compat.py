"""The classes of `florence_onnx.compat` against transformers' own, and the call sequences of tools, written from their behaviour."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from florence_onnx import Florence2, GenerationOptions, InputError, OptionsError, Region, tasks
from florence_onnx.compat import (
    AutoModelForCausalLM,
    AutoProcessor,
    BatchFeature,
    Florence2ForConditionalGeneration,
    Florence2Processor,
)
from florence_onnx.compat.names import resolve_name
from tests.conftest import NO_TORCH, Exported

SAMPLES = sorted((Path(tasks.__file__).parent / "demo" / "samples").glob("*.png"))
PROMPTS = {
    "nothing": "{token}",
    "text": "{token} a red car",
    "region": "{token}<loc_52><loc_332><loc_932><loc_774>",
}


@pytest.fixture(scope="module")
def processor() -> Florence2Processor:
    return AutoProcessor.from_pretrained("demo", trust_remote_code=True)


@pytest.fixture(scope="module")
def model() -> Florence2ForConditionalGeneration:
    return AutoModelForCausalLM.from_pretrained("demo", trust_remote_code=True, torch_dtype="auto", device="cpu").eval()


# ------------------------------------------------------------------------------------------------ against transformers


@pytest.fixture(scope="module")
def theirs(tiny: Exported) -> Any:
    """transformers' processor of the tiny checkpoint."""
    from tests import checkpoints

    return checkpoints.build_processor(tiny.checkpoint.config)


def test_the_processor_gives_the_ids_and_pixels_of_transformers(
    tiny: Exported, theirs: Any, photographs: list[Image.Image]
) -> None:
    ours = AutoProcessor.from_pretrained(tiny.bundle)
    prompts = [PROMPTS[task.needs].format(token=task.token) for task in tasks.TASKS.values()] + ["Is there a car?"]
    images = [photographs[i % len(photographs)].convert("RGB") for i in range(len(prompts))]
    found = ours(text=prompts, images=images, return_tensors="pt")
    expected = theirs(text=prompts, images=images, return_tensors="np", padding=True)
    assert np.array_equal(found["pixel_values"], expected["pixel_values"])
    num_image_tokens = tiny.checkpoint.num_image_tokens
    assert np.array_equal(found.input_ids, expected["input_ids"][:, num_image_tokens:])
    assert np.array_equal(found.attention_mask, expected["attention_mask"][:, num_image_tokens:])


@pytest.mark.parametrize("options", [{"num_beams": 1}, {"num_beams": 3, "early_stopping": False}])
def test_generate_gives_the_tokens_of_transformers(
    options: dict[str, Any], tiny: Exported, theirs: Any, photographs: list[Image.Image]
) -> None:
    pytest.importorskip("torch", reason=NO_TORCH)
    from export.verification import reference

    ours = AutoModelForCausalLM.from_pretrained(tiny.bundle, device="cpu")
    prompts = ["<OD>", "<CAPTION_TO_PHRASE_GROUNDING> a car and a tree", "<CAPTION>"]
    images = [image.convert("RGB") for image in photographs]
    given = theirs(text=prompts, images=images, return_tensors="np", padding=True)
    found = ours.generate(
        input_ids=given["input_ids"],  # with image tokens in front, as transformers' own processor writes them
        pixel_values=given["pixel_values"],
        attention_mask=given["attention_mask"],
        max_new_tokens=20,
        do_sample=False,
        **options,
    )
    task_prompts = [theirs._construct_prompts(prompt)[0] for prompt in prompts]
    wanted = GenerationOptions(max_new_tokens=20, **options)
    expected = reference.generate(tiny.checkpoint, given["pixel_values"], task_prompts, wanted)
    pad = tiny.checkpoint.config.text_config.pad_token_id
    for row, tokens in zip(found.tolist(), expected, strict=True):
        assert tuple(row[: len(tokens)]) == tokens
        assert set(row[len(tokens) :]) <= {pad}
    texts = theirs.tokenizer.batch_decode(found.numpy(), skip_special_tokens=False)
    processor = AutoProcessor.from_pretrained(tiny.bundle)
    assert processor.batch_decode(found, skip_special_tokens=False) == texts
    assert processor.batch_decode(found, skip_special_tokens=True) == theirs.tokenizer.batch_decode(
        found.numpy(), skip_special_tokens=True
    )


@pytest.mark.parametrize("num_beams", [1, 3])
def test_allowed_tokens_are_those_of_transformers(
    num_beams: int, tiny: Exported, theirs: Any, photographs: list[Image.Image]
) -> None:
    """Of two prompts in one call, each with sets of its own that depend on the answer so far."""
    torch = pytest.importorskip("torch", reason=NO_TORCH)
    ours = AutoModelForCausalLM.from_pretrained(tiny.bundle, device="cpu")

    def allowed(batch_id: int, ids: Any) -> list[int]:
        ends = {2} if len(ids) > 7 else set()
        return sorted(ends | {3 + (int(ids[-1]) * 7 + batch_id * 131 + step * 37) % 900 for step in range(9)})

    prompts = ["<OD>", "<CAPTION_TO_PHRASE_GROUNDING> a car and a tree"]
    given = theirs(
        text=prompts, images=[each.convert("RGB") for each in photographs[:2]], return_tensors="np", padding=True
    )
    options = {"max_new_tokens": 12, "num_beams": num_beams, "do_sample": False, "prefix_allowed_tokens_fn": allowed}
    found = ours.generate(**given, **options)
    tensors = {name: torch.from_numpy(value) for name, value in given.items()}
    expected = tiny.checkpoint.model.generate(**tensors, **options)
    assert found.tolist() == expected.tolist()
    assert len({tuple(row) for row in found.tolist()}) == 2
    with pytest.raises(OptionsError, match="allows nothing"):
        ours.generate(**given, max_new_tokens=4, prefix_allowed_tokens_fn=lambda batch_id, ids: [])


# ----------------------------------------------------------------------------------------------------- how tools call


def ask(model: Any, processor: Any, prompt: str, image: Image.Image, **options: Any) -> str:
    inputs = processor(text=prompt, images=image, return_tensors="pt").to("cuda", "float16")
    ids = model.generate(input_ids=inputs["input_ids"], pixel_values=inputs["pixel_values"], **options)
    return str(processor.batch_decode(ids, skip_special_tokens=False)[0])


def test_x_anylabeling_asks_every_task(model: Any, processor: Any) -> None:
    """Beams 3, 1024 tokens; task and input in one string; the dict of the reference, keyed by the token."""
    image = Image.open(SAMPLES[0]).convert("RGB")
    direct = Florence2.from_pretrained("demo", device="cpu")
    for task in tasks.TASKS.values():
        prompt = PROMPTS[task.needs].format(token=task.token)
        text = ask(
            model, processor, prompt, image, max_new_tokens=1024, early_stopping=False, do_sample=False, num_beams=3
        )
        found = processor.post_process_generation(text, task=task.token, image_size=(image.width, image.height))
        given: dict[str, Any] = {
            "nothing": {},
            "text": {"text_input": "a red car"},
            "region": {"region": Region(52, 332, 932, 774)},
        }[task.needs]
        options = GenerationOptions(num_beams=3, early_stopping=False)
        assert found == direct.run(task, image, options=options, **given).to_transformers()


def test_omniparser_captions_a_batch_of_crops(model: Any, processor: Any) -> None:
    """Crops in one batch, 20 tokens, greedy, special tokens skipped, stripped."""
    screenshot = Image.open(SAMPLES[1]).convert("RGB")
    crops = [screenshot.crop((x, y, x + 100, y + 100)) for x in (0, 80, 160) for y in (0, 80)]
    inputs = processor(images=crops, text=["<CAPTION>"] * len(crops), return_tensors="pt", do_resize=True)
    inputs = inputs.to(device="cpu", dtype=None)
    ids = model.generate(
        input_ids=inputs["input_ids"],
        pixel_values=inputs["pixel_values"],
        max_new_tokens=20,
        num_beams=1,
        do_sample=False,
    )
    captions = [text.strip() for text in processor.batch_decode(ids, skip_special_tokens=True)]
    direct = Florence2.from_pretrained("demo", device="cpu")
    options = GenerationOptions(num_beams=1, max_new_tokens=20)
    assert captions == [prediction.results for prediction in direct.run_batch("<CAPTION>", crops, options=options)]


def test_mcp_florence2_reads_text(model: Any, processor: Any) -> None:
    """Keyword arguments of the processor's dict splatted into `generate`."""
    image = Image.open(SAMPLES[2]).convert("RGB")
    inputs = processor(text="<OCR>", images=image, return_tensors="pt").to("cpu")
    ids = model.generate(**inputs, max_new_tokens=1024, num_beams=3)
    text = processor.batch_decode(ids, skip_special_tokens=False)[0]
    parsed = processor.post_process_generation(text, task="<OCR>", image_size=image.size)
    assert parsed["<OCR>"] == Florence2.from_pretrained("demo", device="cpu").run("<OCR>", image).results


def test_comfyui_prompts_with_text_behind_the_task(model: Any, processor: Any) -> None:
    image = Image.open(SAMPLES[0]).convert("RGB")
    text = ask(model, processor, "<CAPTION_TO_PHRASE_GROUNDING> a red circle.", image, max_new_tokens=1024, num_beams=3)
    found = processor.post_process_generation(
        text, task="<CAPTION_TO_PHRASE_GROUNDING>", image_size=(image.width, image.height)
    )["<CAPTION_TO_PHRASE_GROUNDING>"]
    assert found["labels"] and len(found["bboxes"]) == len(found["labels"])


def test_supervision_reads_the_dict(model: Any, processor: Any) -> None:
    supervision = pytest.importorskip("supervision", reason="pip install -e '.[supervision]'")
    image = Image.open(SAMPLES[0]).convert("RGB")
    text = ask(model, processor, "<OD>", image, max_new_tokens=1024, num_beams=3)
    answer = processor.post_process_generation(text, task="<OD>", image_size=image.size)
    detections = supervision.Detections.from_vlm("florence_2", answer, resolution_wh=image.size)
    expected = Florence2.from_pretrained("demo", device="cpu").run("<OD>", image).results
    assert detections["class_name"].tolist() == [box.label for box in expected.bboxes]
    np.testing.assert_allclose(
        detections.xyxy, [[box.x, box.y, box.x + box.w, box.y + box.h] for box in expected.bboxes], atol=1
    )


# ---------------------------------------------------------------------------------------------------------- mistakes


def test_published_checkpoints_lead_to_their_onnx_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_name("microsoft/Florence-2-large-ft") == "onnx-community/Florence-2-large-ft"
    assert resolve_name("somebody/else") == "somebody/else"
    monkeypatch.chdir(tmp_path)
    Path("microsoft/Florence-2-base").mkdir(parents=True)
    assert resolve_name("microsoft/Florence-2-base") == "microsoft/Florence-2-base"


def test_what_would_change_the_answer_is_refused_by_name(model: Any, processor: Any) -> None:
    image = Image.open(SAMPLES[0]).convert("RGB")
    inputs = processor(text="<CAPTION>", images=image)
    with pytest.raises(OptionsError, match="guidance_scale=2"):
        model.generate(**inputs, guidance_scale=2)
    with pytest.raises(InputError, match="do_resize cannot be changed"):
        processor(text="<CAPTION>", images=image, do_resize=False)
    with pytest.raises(InputError, match="the processor does not take max_slices"):
        processor(text="<CAPTION>", images=image, max_slices=2)
    with pytest.raises(InputError, match="from_pretrained does not take quantization_config"):
        AutoModelForCausalLM.from_pretrained("demo", quantization_config={})
    with pytest.raises(InputError, match="must be the whole prompt"):
        processor(text="<CAPTION> more", images=image)
    with pytest.raises(InputError, match="2 images and 1 prompts"):
        processor(text="<CAPTION>", images=[image, image])
    with pytest.raises(InputError, match="needs text, images or both"):
        processor()
    with pytest.raises(InputError, match=r"pixel_values must be \(B, 3,"):
        model.generate(input_ids=inputs["input_ids"], pixel_values=np.zeros((1, 3, 64, 64)))
    with pytest.raises(InputError, match="one row an image"):
        model.generate(input_ids=np.zeros((2, 4)), pixel_values=inputs["pixel_values"])
    with pytest.raises(InputError, match="from 0 to"):
        model.generate(input_ids=np.full((1, 4), 10**6), pixel_values=inputs["pixel_values"])
    with pytest.raises(InputError, match="attention_mask must be"):
        model.generate(**{**inputs, "attention_mask": np.array([[0] * inputs["input_ids"].shape[1]])})
    for arguments in ({"text": "a"}, {"task": "<OD>"}, {"text": "a", "sequence": [1], "task": "<OD>"}):
        with pytest.raises(InputError, match="needs a task"):
            processor.post_process_generation(**arguments)
    with pytest.raises(InputError, match="needs image_size"):
        processor.post_process_generation("a", task="<OD>")


def test_post_processing_knows_tasks_of_fine_tunes_as_text(processor: Any) -> None:
    assert processor.post_process_generation("</s><s>two</s>", task="<DocVQA>") == {"<DocVQA>": "two"}


def test_features_can_be_copied_pickled_and_read_as_attributes(processor: Any) -> None:
    inputs = processor(text="<CAPTION>", images=Image.open(SAMPLES[0]))
    for other in (copy.deepcopy(inputs), pickle.loads(pickle.dumps(inputs))):
        assert isinstance(other, BatchFeature)
        assert np.array_equal(other.pixel_values, inputs["pixel_values"])
    with pytest.raises(AttributeError, match="not labels"):
        inputs.labels  # noqa: B018 - the access is the test
