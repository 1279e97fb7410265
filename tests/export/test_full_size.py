"""Florence-2-base and -large at full size, random weights: exported here, all 15 tasks, tokens equal to transformers'.

Run with `pytest -m slow`; base takes minutes and 4 GB, large three times that (`-k base` for the first alone).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from florence_onnx import Florence2, GenerationOptions, Region
from florence_onnx.images import preprocessing
from florence_onnx.runtime.load_options import LoadOptions
from florence_onnx.tasks import TASKS
from tests.conftest import NO_TORCH
from tests.shared_data import FOLDER, NO_SHARED

pytest.importorskip("torch", reason=NO_TORCH)
pytest.importorskip("transformers", reason=NO_TORCH)

pytestmark = pytest.mark.slow

OPTIONS = GenerationOptions(max_new_tokens=16)


@pytest.mark.skipif(not FOLDER.exists(), reason=NO_SHARED)
@pytest.mark.parametrize("size", ["base", "large"])
def test_all_tasks_give_the_tokens_of_transformers(
    size: str, tmp_path: Path, photographs: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from export.bundles.writer import export_bundle
    from export.checkpoints.checkpoint import load_checkpoint
    from export.verification import reference
    from tests import checkpoints

    torch.set_num_threads(os.cpu_count() or 1)
    source = checkpoints.build_full_size_checkpoint(tmp_path / "checkpoint", size, FOLDER / "tokenizer")
    checkpoint = load_checkpoint(source)
    # kept in the given folder, for environments that test the same graphs without PyTorch
    kept = os.environ.get("FLORENCE_ONNX_KEEP_BUNDLES")
    written = export_bundle(checkpoint, (Path(kept) if kept else tmp_path) / size / "fp32")
    model = Florence2.from_bundle(written, LoadOptions(device="cpu"))
    image = photographs[0]
    encoded = model.encode(image)
    pixels = preprocessing.preprocess(image)
    features = reference.image_features(checkpoint, pixels)
    largest = features.abs().max().item()
    assert np.abs(features.numpy()[0] - encoded.image_features).max() < 1e-3 * largest
    # transformers' own features of these pixels: seconds for each task, and the same every time
    monkeypatch.setattr(checkpoint.reference.model, "get_image_features", lambda pixel_values: features.clone())
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
