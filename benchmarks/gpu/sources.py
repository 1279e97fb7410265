"""The models that are measured: the package's demo model, and Florence-2-base and -large, made from their skeletons."""

from __future__ import annotations

import tarfile
from pathlib import Path

from benchmarks.gpu import skeleton
from benchmarks.models import ROOT
from florence_onnx.bundles import bundle as bundles

DEMO = bundles.DEMO
DEMO_CHECKPOINT = ROOT / "export" / "demo" / "checkpoint"
MODELS = "models.tar.xz"
"""All skeletons in one archive, since their tokenizers and graphs compress well together."""
PLAIN = "plain"
"""The layout of transformers.js, in fp16."""


class MissingError(Exception):
    """Something that a step needs is not on this machine, and the step is skipped; the message says what."""


class Sources:
    """Finds models, and makes missing ones from their skeletons."""

    def __init__(self, carried: Path, work: Path) -> None:
        """Takes the folders of skeletons and bundles.

        Args:
            carried: The folder that `benchmarks.gpu.prepare` wrote.
            work: Folder for the bundles; they are reused.
        """
        self._carried = carried
        self._work = work

    def bundle(self, size: str, kind: str) -> Path:
        """Returns the directory of a bundle.

        Args:
            size: `demo`, `base` or `large`.
            kind: `fp32`, `fp16` or `plain`.

        Raises:
            MissingError: Neither the bundle nor its skeleton is here.
        """
        if (size, kind) == (DEMO, "fp16"):
            return bundles.DEMO_DIRECTORY
        path = self._work / f"{size}-{kind}"
        if path.is_dir():
            return path
        name = f"{size}-{kind}.tar"
        if name not in self._packed():
            raise MissingError(f"{name} was not carried: python -m benchmarks.gpu.prepare makes it")
        self._work.mkdir(parents=True, exist_ok=True)
        with tarfile.open(self._carried / MODELS) as archive:
            archive.extract(name, self._work, filter="data")
        return skeleton.fill(self._work / name, path, checkpoint=DEMO_CHECKPOINT if size == DEMO else None)

    def has(self, size: str, kind: str) -> bool:
        """Whether `bundle` would find a bundle."""
        is_there = (size, kind) == (DEMO, "fp16") or (self._work / f"{size}-{kind}").is_dir()
        return is_there or f"{size}-{kind}.tar" in self._packed()

    def _packed(self) -> list[str]:
        path = self._carried / MODELS
        if not path.is_file():
            return []
        with tarfile.open(path) as archive:
            return archive.getnames()

    def checkpoint(self, size: str) -> Path:
        """Returns a folder with the configs of a checkpoint; the demo's has weights too."""
        return DEMO_CHECKPOINT if size == DEMO else self.bundle(size, "fp16") / skeleton.CHECKPOINT
