"""The models that are measured: the demo model of the package, and Florence-2-base and -large made of their skeletons."""

from __future__ import annotations

from pathlib import Path

from benchmarks.gpu import skeleton
from benchmarks.models import ROOT
from florence_onnx import bundle as bundles

DEMO = bundles.DEMO
DEMO_CHECKPOINT = ROOT / "export" / "demo" / "checkpoint"
PLAIN = "plain"
"""The layout of transformers.js, in fp16."""


class MissingError(Exception):
    """What a step needs is not on this machine, and so it is skipped; the message says what."""


class Sources:
    """Finds models, and makes those that are missing."""

    def __init__(self, carried: Path, work: Path) -> None:
        """Args:
        carried: What `benchmarks.gpu.prepare` wrote.
        work: Where bundles are made; they are used again.
        """
        self._carried = carried
        self._work = work

    def bundle(self, size: str, kind: str) -> Path:
        """Directory of a bundle.

        Args:
            size: `demo`, `base` or `large`.
            kind: `fp32`, `fp16` or `plain`.

        Raises:
            MissingError: There is no skeleton of it.
        """
        if (size, kind) == (DEMO, "fp16"):
            return bundles.DEMO_DIRECTORY
        path = self._work / f"{size}-{kind}"
        if path.is_dir():
            return path
        packed = self._carried / f"{size}-{kind}.tar.xz"
        if not packed.is_file():
            raise MissingError(f"{packed.name} was not carried: python -m benchmarks.gpu.prepare makes it")
        return skeleton.fill(packed, path, checkpoint=DEMO_CHECKPOINT if size == DEMO else None)

    def has(self, size: str, kind: str) -> bool:
        """Whether `bundle` would find it."""
        is_there = (size, kind) == (DEMO, "fp16") or (self._work / f"{size}-{kind}").is_dir()
        return is_there or (self._carried / f"{size}-{kind}.tar.xz").is_file()

    def checkpoint(self, size: str) -> Path:
        """Folder with the configs of a checkpoint; that of the demo has its weights too."""
        return DEMO_CHECKPOINT if size == DEMO else self.bundle(size, "fp16") / skeleton.CHECKPOINT
