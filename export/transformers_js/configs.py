"""The JSON files that transformers.js reads beside the graphs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from florence_onnx import tasks

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.json_files import write_json

_ANSWER_TYPES = {
    "<OCR_WITH_REGION>": "ocr",
    "<OD>": "description_with_bboxes",
    "<DENSE_REGION_CAPTION>": "description_with_bboxes",
    "<CAPTION_TO_PHRASE_GROUNDING>": "phrase_grounding",
    "<REFERRING_EXPRESSION_SEGMENTATION>": "polygons",
    "<REGION_TO_SEGMENTATION>": "polygons",
    "<OPEN_VOCABULARY_DETECTION>": "description_with_bboxes_or_polygons",
    "<REGION_PROPOSAL>": "bboxes",
}
"""Microsoft's names for the format of a task's answer; that of all other tasks is `pure_text`."""


def write_files(checkpoint: Checkpoint, directory: Path) -> None:
    """Writes the configs and the tokenizer.

    Args:
        checkpoint: The checkpoint that is exported.
        directory: The root of the layout, which has the folder `onnx/`.
    """
    write_json(directory / "config.json", _config(checkpoint))
    write_json(directory / "generation_config.json", checkpoint.generation)
    write_json(directory / "preprocessor_config.json", _preprocessor(checkpoint))
    write_json(directory / "tokenizer_config.json", _tokenizer_config(checkpoint))
    checkpoint.tokenizer.save(str(directory / "tokenizer.json"))


def _config(checkpoint: Checkpoint) -> dict[str, Any]:
    config: dict[str, Any] = checkpoint.config.to_dict()
    config.pop("_name_or_path", None)
    config.update(
        model_type="florence2",
        architectures=["Florence2ForConditionalGeneration"],
        is_encoder_decoder=True,
        vocab_size=config["text_config"]["vocab_size"],
        projection_dim=config["vision_config"]["projection_dim"],
        **{key: checkpoint.generation[key] for key in _TOKEN_IDS},
    )
    # transformers.js finds the sizes of the KV cache by this name (or "bart"), so it must be present.
    config["text_config"]["model_type"] = "florence2_language"
    return config


_TOKEN_IDS = ("bos_token_id", "pad_token_id", "eos_token_id", "decoder_start_token_id")


def _preprocessor(checkpoint: Checkpoint) -> dict[str, Any]:
    pixels = checkpoint.preprocessing
    width, height = pixels.image_size
    known = tasks.TASKS.values()
    return {
        "image_processor_type": "CLIPImageProcessor",
        "processor_class": "Florence2Processor",
        "do_resize": True,
        "size": {"height": height, "width": width},
        "crop_size": {"height": height, "width": width},
        "resample": pixels.resample,
        "do_center_crop": False,
        "do_rescale": True,
        "rescale_factor": pixels.rescale_factor,
        "do_normalize": True,
        "image_mean": list(pixels.image_mean),
        "image_std": list(pixels.image_std),
        "image_seq_length": checkpoint.num_image_tokens,
        "tasks_answer_post_processing_type": {task.token: _ANSWER_TYPES.get(task.token, "pure_text") for task in known},
        "task_prompts_without_inputs": {task.token: task.prompt for task in known if task.needs == "nothing"},
        "task_prompts_with_input": {task.token: task.prompt for task in known if task.needs != "nothing"},
    }


def _tokenizer_config(checkpoint: Checkpoint) -> dict[str, Any]:
    return {
        "add_prefix_space": False,
        "bos_token": "<s>",
        "cls_token": "<s>",
        "eos_token": "</s>",
        "sep_token": "</s>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "mask_token": "<mask>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": checkpoint.config.text_config.max_position_embeddings,
        "tokenizer_class": "BartTokenizer",
    }
