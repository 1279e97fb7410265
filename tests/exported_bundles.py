"""Bundles for the environments that have no PyTorch: `python -m tests.exported_bundles OUT` writes them and prints their paths.

The smallest regular model and the one of which every size is unusual, both in fp32 and fp16, and the former in the layout of
transformers.js; with `--base` also Florence-2-base with random weights in fp16, which takes minutes.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from export.checkpoint import load_checkpoint
from export.transformers_js import export_transformers_js
from export.write_bundle import export_bundles
from tests import checkpoints
from tests.shared_data import FOLDER

PRECISIONS = ("fp32", "fp16")


def write(out: Path, *, with_base: bool = False) -> list[Path]:
    """Writes the bundles that are not there yet.

    Args:
        out: Folder for all of them.
        with_base: Whether Florence-2-base is among them.
    """
    found = []
    for name, config in (("tiny", checkpoints.tiny_config), ("odd", checkpoints.odd_config)):
        source = out / f"{name}-checkpoint"
        if not source.exists():
            checkpoints.build_checkpoint(source, config())
        if not (out / name).exists():
            export_bundles(load_checkpoint(source), out / name, precisions=PRECISIONS)
        found += [out / name / precision for precision in PRECISIONS]
    layout = out / "tiny-transformers-js"
    if not layout.exists():
        export_transformers_js(load_checkpoint(out / "tiny-checkpoint"), layout)
    found.append(layout)
    if with_base:
        source = out / "base-checkpoint"
        if not source.exists():
            checkpoints.build_full_size_checkpoint(source, "base", FOLDER / "tokenizer")
        if not (out / "base").exists():
            export_bundles(load_checkpoint(source), out / "base", precisions=["fp16"])
        found.append(out / "base" / "fp16")
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--base", action="store_true")
    arguments = parser.parse_args()
    print(os.pathsep.join(map(str, write(arguments.out.resolve(), with_base=arguments.base))))
