"""Exports of random-weight checkpoints that several processes share, each made once under a lock.

Tests take them from the fixtures of `tests.conftest`. For the environments that have no PyTorch
`python -m tests.exported_bundles OUT` writes all of `FOR_OTHERS` and prints their paths, separated as in PATH.

```text
OUT/tiny/checkpoint            what was exported
OUT/tiny/fp32                  a bundle
OUT/tiny/transformers-js-fp32  the same in the layout of transformers.js
OUT/tiny/published             that, and the files of other precisions that repositories have
OUT/tiny/sizes-fp32            a bundle with a vision encoder for each of SIZES
OUT/tiny/….steps               what the export said that it does, one step a line
```
"""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from export.bundles.writer import export_bundle
from export.checkpoints.checkpoint import load_checkpoint
from export.transformers_js.writer import export_transformers_js
from tests import checkpoints, hub_files

CONFIGS = {"tiny": checkpoints.tiny_config, "odd": checkpoints.odd_config}
"""The smallest regular model, and one of which every size is unusual."""

FOR_OTHERS = (
    ("tiny", "fp32"),
    ("tiny", "fp16"),
    ("odd", "fp32"),
    ("tiny", "transformers-js-fp32"),
    ("tiny", "transformers-js-fp16"),
)
"""Model and kind of what the environments without PyTorch look at."""

_TRANSFORMERS_JS = "transformers-js-"
_SIZES = "sizes-"

SIZES = ((128, 128), (64, 64), (160, 96))
"""Image sizes of the bundles for several: the checkpoint's own, OmniParser's, and a rectangle."""


def made_once(path: Path, make: Callable[[Path], object]) -> Path:
    """A folder that one process makes while the others wait for it.

    Args:
        path: Where it belongs.
        make: Writes it to the place that it is given, beside `path`.

    Returns:
        `path`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        if not path.exists():
            partial = path.with_name(f"{path.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            make(partial)
            partial.rename(path)
    return path


def checkpoint(folder: Path, model: str) -> Path:
    """The checkpoint of a model of `CONFIGS` below the shared folder."""
    return made_once(folder / model / "checkpoint", lambda path: checkpoints.build_checkpoint(path, CONFIGS[model]()))


def bundle(folder: Path, model: str, kind: str) -> Path:
    """An export of a model below the shared folder.

    Args:
        folder: What processes share.
        model: A key of `CONFIGS`.
        kind: A precision, or one behind `transformers-js-` or `sizes-`.
    """
    source = checkpoint(folder, model)

    def export(path: Path) -> None:
        said: list[str] = []
        if kind.startswith(_TRANSFORMERS_JS):
            precision = kind.removeprefix(_TRANSFORMERS_JS)
            export_transformers_js(load_checkpoint(source), path, precision=precision, progress=said.append)
        elif kind.startswith(_SIZES):
            resized = load_checkpoint(source).resized(SIZES)
            export_bundle(resized, path, precision=kind.removeprefix(_SIZES), progress=said.append)
        else:
            export_bundle(load_checkpoint(source), path, precision=kind, progress=said.append)
        (folder / model / f"{kind}.steps").write_text("\n".join(said), encoding="utf-8")

    return made_once(folder / model / kind, export)


def published(folder: Path) -> Path:
    """The model `tiny` as a repository has it: in fp32 and in the precisions of `hub_files`, below the shared folder."""
    source = bundle(folder, "tiny", f"{_TRANSFORMERS_JS}fp32")

    def publish(path: Path) -> None:
        hub_files.publish(Path(shutil.copytree(source, path)), *hub_files.PRECISIONS)

    return made_once(folder / "tiny" / "published", publish)


def steps(exported: Path) -> list[str]:
    """What an export of `bundle` said that it does."""
    return exported.with_name(f"{exported.name}.steps").read_text(encoding="utf-8").splitlines()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out.resolve()
    print(os.pathsep.join(str(bundle(out, model, kind)) for model, kind in FOR_OTHERS))
