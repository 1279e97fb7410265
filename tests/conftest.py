"""Bundles exported once per test run from random-weight checkpoints, and real photographs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

if TYPE_CHECKING:
    from export.checkpoints.checkpoint import Checkpoint

NO_TORCH = "needs torch and transformers: pip install -e '.[export]'"


@pytest.fixture(scope="session")
def photographs() -> list[Image.Image]:
    """Photographs of other sizes and aspects, from scikit-image's wheel."""
    data = pytest.importorskip("skimage.data", reason="the photographs come with scikit-image")
    return [Image.fromarray(np.asarray(image)) for image in (data.astronaut(), data.chelsea(), data.coffee())]


@pytest.fixture(autouse=True, scope="session")
def _one_thread_for_small_models() -> None:
    """Two thread pools that wait for each other actively make tiny models many times slower on a shared machine."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


class Exported:
    """A random-weight checkpoint and its export."""

    def __init__(self, checkpoint: Checkpoint, bundle: Path) -> None:
        self.checkpoint = checkpoint
        self.bundle = bundle


def _export(directory: Path, config_name: str, precision: str = "fp32") -> Exported:
    pytest.importorskip("torch", reason=NO_TORCH)
    pytest.importorskip("optimum.exporters", reason=NO_TORCH)
    from export.bundles.writer import export_bundle
    from export.checkpoints.checkpoint import load_checkpoint
    from tests import checkpoints

    source = directory / "checkpoint"
    if not source.exists():
        checkpoints.build_checkpoint(source, getattr(checkpoints, config_name)())
    checkpoint = load_checkpoint(source)
    output = directory / f"bundle-{precision}"
    export_bundle(checkpoint, output, precision=precision)
    return Exported(checkpoint, output)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """The smallest regular model, in fp32."""
    return _export(tmp_path_factory.mktemp("tiny"), "tiny_config")


@pytest.fixture(scope="session")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Every size unusual, in fp32."""
    return _export(tmp_path_factory.mktemp("odd"), "odd_config")


@pytest.fixture(scope="session")
def tiny_fp16(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """The smallest regular model, in fp16."""
    return _export(tmp_path_factory.mktemp("tiny16"), "tiny_config", "fp16")
