"""Checkpoints to measure: `python -m benchmarks.checkpoints SOURCE OUT` writes one in transformers' native layout.

SOURCE is `tiny`, `base` or `large` (with random weights, on which times do not depend), or a folder in Microsoft's
layout.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

SIZES = ("tiny", "base", "large")
TOKENIZER = Path(__file__).resolve().parents[2] / "shared" / "data" / "tokenizer"
"""Florence-2's tokenizer, which is not part of the repository; without it the small one of the tests is used."""


def write(source: str, output: Path) -> Path:
    """Writes a checkpoint; the folder appears only when it is complete.

    Args:
        source: A key of `SIZES`, or a folder.
        output: Folder to create.

    Returns:
        `output`.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent) as staging:
        folder = Path(staging) / "checkpoint"
        if source in SIZES:
            _build(source, folder)
        else:
            _convert(Path(source), folder)
        return Path(shutil.move(folder, output))


def _build(size: str, folder: Path) -> None:
    from tests import checkpoints

    if size == "tiny":
        checkpoints.build_checkpoint(folder)
    else:
        has_tokenizer = (TOKENIZER / "tokenizer.json").is_file()
        checkpoints.build_full_size_checkpoint(folder, size, TOKENIZER if has_tokenizer else None)


def _convert(source: Path, folder: Path) -> None:
    from transformers import CLIPImageProcessor

    from export.checkpoints.checkpoint import load_checkpoint

    checkpoint = load_checkpoint(source)
    checkpoint.model.save_pretrained(folder)
    checkpoint.tokenizer.save(str(folder / "tokenizer.json"))
    width, height = checkpoint.preprocessing.image_size
    CLIPImageProcessor(
        size={"height": height, "width": width},
        crop_size={"height": height, "width": width},
        do_center_crop=False,
        resample=checkpoint.preprocessing.resample,
        rescale_factor=checkpoint.preprocessing.rescale_factor,
        image_mean=list(checkpoint.preprocessing.image_mean),
        image_std=list(checkpoint.preprocessing.image_std),
    ).save_pretrained(folder)


if __name__ == "__main__":
    write(sys.argv[1], Path(sys.argv[2]))
