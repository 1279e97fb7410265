"""The runtime on the four-graph layout of onnx-community/Florence-2-*: the same tokens as from our own graphs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from florence_onnx import BundleFileMissingError, BundleFormatError, Florence2, GenerationOptions, Region, tasks
from florence_onnx.bundles import bundle
from florence_onnx.tasks import TASKS
from tests.conftest import NO_TORCH, Exported

pytest.importorskip("torch", reason=NO_TORCH)
pytest.importorskip("optimum.exporters", reason=NO_TORCH)

SHORT = GenerationOptions(max_new_tokens=24)
EXTRA: dict[str, dict[str, Any]] = {
    "nothing": {},
    "text": {"text_input": "a red car"},
    "region": {"region": Region(52, 332, 932, 774)},
}


@pytest.fixture(scope="module")
def directory(export_of: Callable[[str, str], Exported], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of `tiny` in both precisions of the layout, in one directory as on the hub."""
    output = tmp_path_factory.mktemp("js") / "florence"
    shutil.copytree(export_of("tiny", "transformers-js-fp32").bundle, output)
    half = export_of("tiny", "transformers-js-fp16").bundle
    for path in (half / "onnx").iterdir():
        shutil.copy(path, output / "onnx" / path.name)
    return output


@pytest.fixture(scope="module")
def own(tiny: Exported) -> Florence2:
    return Florence2.from_pretrained(tiny.bundle, device="cpu")


def answers(model: Florence2, images: Sequence[Image.Image], options: GenerationOptions) -> list[tuple[int, ...]]:
    chosen = list(TASKS.values())
    found = model.run_batch(
        chosen,
        [images[i % len(images)] for i in range(len(chosen))],
        text_inputs=[EXTRA[task.needs].get("text_input") for task in chosen],
        regions=[EXTRA[task.needs].get("region") for task in chosen],
        options=options,
    )
    return [each.token_ids for each in found]


@pytest.mark.parametrize("num_beams", [1, 3])
def test_the_layout_gives_the_tokens_of_our_own_graphs(
    num_beams: int, directory: Path, own: Florence2, photographs: list[Image.Image]
) -> None:
    """Those equal the tokens of transformers, see `export/test_parity.py`."""
    model = Florence2.from_pretrained(directory, device="cpu")
    assert model.info()["layout"] == "transformers.js"
    options = GenerationOptions(num_beams=num_beams, max_new_tokens=24)
    assert answers(model, photographs, options) == answers(own, photographs, options)


def test_tokens_are_fed_one_at_a_time(directory: Path, photographs: list[Image.Image]) -> None:
    """As transformers.js does: other exports of this layout may give wrong logits for several tokens at once."""
    model = Florence2.from_pretrained(directory, device="cpu")
    answer = model.run(tasks.OCR, photographs[0], options=GenerationOptions(num_beams=1, max_new_tokens=12))
    decoder = model._text_model._decoder  # type: ignore[attr-defined]
    assert decoder.num_runs == len(answer.token_ids) - 1, "every token but the last is fed"


def test_fp16_files_run_on_the_cpu(directory: Path, own: Florence2, photographs: list[Image.Image]) -> None:
    model = Florence2.from_pretrained(directory, device="cpu", precision="fp16")
    expected = own.encode(photographs[0]).image_features
    difference = np.abs(model.encode(photographs[0]).image_features - expected).max()
    assert 0 < difference < 0.02 * np.abs(expected).max()
    assert model.run(tasks.OCR, photographs[0], options=SHORT).token_ids[:2] == (2, 0)


def test_a_missing_file_or_setting_is_named(directory: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleFileMissingError, match=r"decoder_model_merged_int8|vision_encoder_int8"):
        Florence2.from_pretrained(directory, precision="int8")
    with pytest.raises(BundleFormatError, match="unknown precision 'int3'"):
        Florence2.from_pretrained(directory, precision="int3")
    copy = Path(shutil.copytree(directory, tmp_path / "copy"))
    config = json.loads((copy / "config.json").read_text())
    del config["text_config"]["d_model"]
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(BundleFormatError, match="d_model"):
        bundle.read(copy)


def test_without_a_generation_config_the_text_config_is_used(directory: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(directory, tmp_path / "copy"))
    (copy / "generation_config.json").unlink()
    config = json.loads((copy / "config.json").read_text())
    config["text_config"] |= {
        "num_beams": 3,
        "no_repeat_ngram_size": 3,
        "forced_bos_token_id": 0,
        "early_stopping": True,
    }
    (copy / "config.json").write_text(json.dumps(config))
    options = bundle.read(copy).generation.options
    assert (options.num_beams, options.no_repeat_ngram_size, options.forced_bos_token_id) == (3, 3, 0)
