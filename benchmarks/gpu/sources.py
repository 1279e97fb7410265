"""The models that are measured: the demo model of the package, and Florence-2-base and -large made of their skeletons."""

from __future__ import annotations

import tarfile
from pathlib import Path

from benchmarks.gpu import skeleton
from benchmarks.models import ROOT
from florence_onnx.bundles import bundle as bundles

DEMO = bundles.DEMO
DEMO_CHECKPOINT = ROOT / "export" / "demo" / "checkpoint"
MODELS = "models.tar.xz"
"""The skeletons in one archive: tokenizer and graphs of one are much like those of the next."""
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
        name = f"{size}-{kind}.tar"
        if name not in self._packed():
            raise MissingError(f"{name} was not carried: python -m benchmarks.gpu.prepare makes it")
        self._work.mkdir(parents=True, exist_ok=True)
        with tarfile.open(self._carried / MODELS) as archive:
            archive.extract(name, self._work, filter="data")
        return skeleton.fill(self._work / name, path, checkpoint=DEMO_CHECKPOINT if size == DEMO else None)

    def has(self, size: str, kind: str) -> bool:
        """Whether `bundle` would find it."""
        is_there = (size, kind) == (DEMO, "fp16") or (self._work / f"{size}-{kind}").is_dir()
        return is_there or f"{size}-{kind}.tar" in self._packed()

    def _packed(self) -> list[str]:
        path = self._carried / MODELS
        if not path.is_file():
            return []
        with tarfile.open(path) as archive:
            return archive.getnames()

    def checkpoint(self, size: str) -> Path:
        """Folder with the configs of a checkpoint; that of the demo has its weights too."""
        return DEMO_CHECKPOINT if size == DEMO else self.bundle(size, "fp16") / skeleton.CHECKPOINT
