"""Florence-2-base and -large at full size, random weights: exported here, all 15 tasks, tokens equal to transformers'.

Run with `pytest -m slow`; base takes minutes and 4 GB, large three times that (`-k base` for the first alone).
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from florence_onnx import Florence2, GenerationOptions, Region, image
from florence_onnx.tasks import TASKS
from tests.conftest import NO_TORCH
from tests.shared_data import FOLDER

pytest.importorskip("torch", reason=NO_TORCH)
pytest.importorskip("transformers", reason=NO_TORCH)

pytestmark = pytest.mark.slow

SIZES: dict[str, dict[str, Any]] = {
    "base": {
        "vision": {"embed_dim": [128, 256, 512, 1024], "num_heads": [4, 8, 16, 32], "num_groups": [4, 8, 16, 32]},
        "text": {"d_model": 768, "heads": 12, "layers": 6, "positions": 1024},
    },
    "large": {
        "vision": {"embed_dim": [256, 512, 1024, 2048], "num_heads": [8, 16, 32, 64], "num_groups": [8, 16, 32, 64]},
        "text": {"d_model": 1024, "heads": 16, "layers": 12, "positions": 4096},
    },
}
"""From the published configs; `depths` (1, 1, 9, 1) and the rest are Florence2Config's defaults."""

VOCABULARY = 51328
"""51290 tokens, padded to a multiple of 64, as transformers' conversion writes it."""
OPTIONS = GenerationOptions(max_new_tokens=16)


def build(path: Path, size: str) -> Path:
    """Writes a checkpoint with Florence-2's real tokenizer."""
    import torch
    from transformers import Florence2Config

    from tests import checkpoints

    vision, text = SIZES[size]["vision"], SIZES[size]["text"]
    width, layers = text["d_model"], text["layers"]
    config = Florence2Config(
        vision_config={**vision, "depths": [1, 1, 9, 1], "projection_dim": width, "drop_path_rate": 0.0},
        text_config={
            "model_type": "bart",
            "vocab_size": VOCABULARY,
            "d_model": width,
            "max_position_embeddings": text["positions"],
            **{f"{side}_layers": layers for side in ("encoder", "decoder")},
            **{f"{side}_attention_heads": text["heads"] for side in ("encoder", "decoder")},
            **{f"{side}_ffn_dim": 4 * width for side in ("encoder", "decoder")},
            **dict.fromkeys(("dropout", "attention_dropout", "activation_dropout"), 0.0),
        },
        image_token_id=51289,
        bos_token_id=0,
        pad_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=2,
    )
    torch.set_num_threads(os.cpu_count() or 1)
    model = checkpoints.build_model(config)
    model.save_pretrained(path)
    preprocessing = {
        "size": {"height": 768, "width": 768},
        "image_mean": image.IMAGE_MEAN,
        "image_std": image.IMAGE_STD,
    }
    (path / "preprocessor_config.json").write_text(json.dumps(preprocessing))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (path / name).write_bytes((FOLDER / "tokenizer" / name).read_bytes())
    return path


@pytest.mark.skipif(not FOLDER.exists(), reason="Florence-2's tokenizer is not beside this checkout")
@pytest.mark.parametrize("size", ["base", "large"])
def test_all_tasks_give_the_tokens_of_transformers(size: str, tmp_path: Path, photographs: list[Image.Image]) -> None:
    from export import reference
    from export.checkpoint import load_checkpoint
    from export.write_bundle import export_bundle

    checkpoint = load_checkpoint(build(tmp_path / "checkpoint", size))
    written = export_bundle(checkpoint, tmp_path / "bundle")
    model = Florence2.from_bundle(written, device="cpu")
    picture = photographs[0]
    encoded = model.encode(picture)
    pixels = image.preprocess(picture)
    features = reference.image_features(checkpoint, pixels).numpy()[0]
    assert np.abs(features - encoded.image_features).max() < 1e-3 * np.abs(features).max()
    extra: dict[str, dict[str, Any]] = {
        "nothing": {},
        "text": {"text_input": "a woman in front of a flag"},
        "region": {"region": Region(52, 332, 932, 774)},
    }
    for task in TASKS.values():
        arguments = extra[task.needs]
        answer = model.run(task, encoded, **arguments, options=OPTIONS)
        expected = reference.generate(checkpoint, pixels, [task.format_prompt(**arguments)], OPTIONS)[0]
        assert answer.token_ids == expected, task.slug
