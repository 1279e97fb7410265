"""Checkpoints as transformers 5 saves them, and its `generate` as the reference.

The export is verified with transformers 4.57 in the same process. This one asks transformers 5, in an environment of
its own:

    python -m venv .venv-transformers5
    .venv-transformers5/bin/pip install torch==2.13.0 transformers==5.24.0 pillow
    FLORENCE_ONNX_TRANSFORMERS5=.venv-transformers5/bin/python pytest -m slow tests/export/test_transformers5.py
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("torch", reason="needs the export extra")
pytest.importorskip("transformers", reason="needs the export extra")
from export.bundles.writer import export_bundle
from export.checkpoints.checkpoint import load_checkpoint
from florence_onnx import Florence2, GenerationOptions, tasks
from florence_onnx.images import preprocessing
from tests.export.conftest import edit_json
from tests.export.test_checkpoint import assert_same_weights
from tests.export.transformers5 import SEARCHES

PYTHON = "FLORENCE_ONNX_TRANSFORMERS5"
TASKS = (tasks.OCR, tasks.OBJECT_DETECTION, tasks.DETAILED_CAPTION)


@pytest.mark.slow
@pytest.mark.skipif(
    PYTHON not in os.environ, reason=f"{PYTHON} is not set to the Python of an environment with transformers 5"
)
@pytest.mark.parametrize("name", ["tiny", "odd"])
def test_tokens_equal_those_of_transformers_5(
    native_folders: dict[str, Path], name: str, photographs: list[Image.Image], tmp_path: Path
) -> None:
    source, saved = load_checkpoint(native_folders[name]), tmp_path / "saved"
    inputs, image_tokens = source.preprocessing, [source.config.image_token_id] * source.num_image_tokens
    pixels = preprocessing.preprocess(
        photographs[0], size=inputs.image_size, mean=inputs.image_mean, std=inputs.image_std
    )
    prompts = [[*image_tokens, *source.tokenizer.encode(task.format_prompt()).ids] for task in TASKS]
    given = {f"input_ids_{index}": np.array(ids) for index, ids in enumerate(prompts)}
    np.savez(tmp_path / "questions.npz", pixel_values=pixels, **given)  # type: ignore[arg-type]
    script = Path(__file__).with_name("transformers5.py")
    command = [os.environ[PYTHON], str(script), str(native_folders[name]), str(saved), str(tmp_path / "questions.npz")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads((saved / "answers.json").read_text())
    assert report["transformers"].startswith("5.")

    loaded = load_checkpoint(saved)
    assert_same_weights(loaded, source)
    assert (loaded.generation, loaded.preprocessing, loaded.notes) == (source.generation, source.preprocessing, ())
    assert loaded.tokenizer.get_vocab() == source.tokenizer.get_vocab()
    model = Florence2.from_bundle(export_bundle(loaded, tmp_path / "out"))
    for search, options in SEARCHES.items():
        chosen = GenerationOptions(max_new_tokens=24, **options)
        answers = [model.run(task, photographs[0], options=chosen).token_ids for task in TASKS]
        assert answers == [tuple(tokens) for tokens in report["answers"][search]], search


def test_the_files_of_transformers_5(folder: Path) -> None:
    """What 5.24 writes otherwise than 4.57: token ids and types within text_config, nulls, another class of
    tokenizer."""
    expected = load_checkpoint(folder)
    text = {
        "bos_token_id": 0,
        "decoder_start_token_id": 2,
        "dtype": "float32",
        "eos_token_id": 2,
        "forced_eos_token_id": 2,
    }
    text |= {"is_decoder": False, "pad_token_id": 1, "tie_word_embeddings": True}

    def rewrite(config: dict[str, Any]) -> None:
        config["text_config"].update(text)
        config["vision_config"].update(dtype="float32", model_type="florence_vision")
        config.update(tie_word_embeddings=True, transformers_version="5.24.0")

    edit_json(folder / "config.json", rewrite)
    nothing = {"temperature": None, "top_k": None, "do_sample": None, "max_length": None, "num_return_sequences": None}
    edit_json(folder / "generation_config.json", lambda config: config.update(nothing, transformers_version="5.24.0"))
    tokenizer = {"backend": "tokenizers", "tokenizer_class": "TokenizersBackend", "is_local": True}
    edit_json(folder / "tokenizer_config.json", lambda config: config.update(tokenizer))
    processor = {"image_processor": json.loads((folder / "preprocessor_config.json").read_text())}
    (folder / "processor_config.json").write_text(json.dumps(processor))
    (folder / "preprocessor_config.json").unlink()
    loaded = load_checkpoint(folder)
    assert (loaded.generation, loaded.preprocessing, loaded.notes) == (expected.generation, expected.preprocessing, ())
    assert loaded.reference is not loaded.model
    assert loaded.reference.generation_config.num_beams == 3
