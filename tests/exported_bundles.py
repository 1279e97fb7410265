"""Bundles for the environments that have no PyTorch: `python -m tests.exported_bundles OUT` writes them and prints their paths.

The smallest regular model in fp32 and fp16, both also in the layout of transformers.js, and the one of which every size is unusual in fp32.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from export.bundles.writer import export_bundle
from export.checkpoints.checkpoint import load_checkpoint
from export.transformers_js.writer import export_transformers_js
from tests import checkpoints


def write(out: Path) -> list[Path]:
    """Writes the bundles that are not there yet into a folder for all of them."""
    found = []
    for name, config, precisions in (
        ("tiny", checkpoints.tiny_config, ["fp32", "fp16"]),
        ("odd", checkpoints.odd_config, ["fp32"]),
    ):
        source = out / f"{name}-checkpoint"
        if not source.exists():
            checkpoints.build_checkpoint(source, config())
        for precision in precisions:
            if not (out / name / precision).exists():
                export_bundle(load_checkpoint(source), out / name / precision, precision=precision)
            found.append(out / name / precision)
    for precision in ("fp32", "fp16"):
        layout = out / "tiny-transformers-js" / precision
        if not layout.exists():
            export_transformers_js(load_checkpoint(out / "tiny-checkpoint"), layout, precision=precision)
        found.append(layout)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    print(os.pathsep.join(map(str, write(parser.parse_args().out.resolve()))))
