"""Writes a trained model as a checkpoint folder that transformers 4.57 and later load.

`python -m export.demo.finalize --state DIR/state.pt --tokenizer DIR/tokenizer --out DIR/checkpoint` writes the averaged
weights from the saved state of an unfinished run.
"""

import argparse
import copy
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoTokenizer,
    CLIPImageProcessor,
    Florence2ForConditionalGeneration,
    Florence2Processor,
    GenerationConfig,
)

from florence_onnx.answers.postprocess import BANNED_PHRASES

from ..checkpoints.json_files import write_json
from .architecture import GRID, IMAGE_MEAN, IMAGE_SIZE, IMAGE_STD, build_model

NUM_IMAGE_TOKENS = GRID * GRID + 1
QUAD_PATTERN = r"(.+?)" + r"<loc_(\d+)>" * 8


def make_processor(tokenizer_directory: Path) -> Florence2Processor:
    """Makes the processor of the demo model: 128 pixels, 65 image tokens, Florence-2's post-processing."""
    return Florence2Processor(
        image_processor=CLIPImageProcessor(**_preprocessor_config()),
        tokenizer=AutoTokenizer.from_pretrained(tokenizer_directory),
        post_processor_config=post_processor_config(),
    )


def post_processor_config() -> dict[str, dict[str, object]]:
    """Returns the parsing rules in the form that `Florence2PostProcessor` reads."""
    plain = (
        "pure_text",
        "description_with_bboxes",
        "description_with_polygons",
        "polygons",
        "bboxes",
        "description_with_bboxes_or_polygons",
    )
    return {
        **{rule: {} for rule in plain},
        "ocr": {"pattern": QUAD_PATTERN, "area_threshold": 0.0},
        "phrase_grounding": {"banned_grounding_tokens": sorted(BANNED_PHRASES)},
    }


def save_checkpoint(model: Florence2ForConditionalGeneration, tokenizer_directory: Path, directory: Path) -> None:
    """Writes float16 weights, configs and tokenizer."""
    directory.mkdir(parents=True, exist_ok=True)
    model = copy.deepcopy(model).half()
    model.generation_config = GenerationConfig(
        bos_token_id=0,
        pad_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=2,
        forced_bos_token_id=0,
        forced_eos_token_id=2,
        num_beams=3,
        no_repeat_ngram_size=3,
        early_stopping=True,
    )
    model.save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer_directory / name, directory / name)
    write_json(directory / "preprocessor_config.json", _preprocessor_config())
    write_json(directory / "processor_config.json", _processor_config())
    (directory / "model.safetensors").chmod(0o644)


def _preprocessor_config() -> dict[str, Any]:
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    return {
        "image_processor_type": "CLIPImageProcessor",
        "processor_class": "Florence2Processor",
        "image_seq_length": NUM_IMAGE_TOKENS,
        "do_convert_rgb": True,
        "do_resize": True,
        "size": size,
        "resample": 3,
        "do_center_crop": False,
        "crop_size": size,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(IMAGE_MEAN),
        "image_std": list(IMAGE_STD),
    }


def _processor_config() -> dict[str, object]:
    """Returns the processor's config. transformers 4.57 reads its image processor from another file, 5.x from here."""
    return {
        "processor_class": "Florence2Processor",
        "image_processor": _preprocessor_config(),
        "num_additional_image_tokens": 0,
        "post_processor_config": post_processor_config(),
    }


def main() -> None:
    """Command line: writes a checkpoint from a state file."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--state", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    model = build_model()
    model.load_state_dict({**model.state_dict(), **torch.load(arguments.state)["average"]})
    save_checkpoint(model, arguments.tokenizer, arguments.out)


if __name__ == "__main__":
    main()
