"""Checkpoint folders that a test may spoil."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def native_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Complete checkpoints in the native layout, written once."""
    from tests import checkpoints

    root = tmp_path_factory.mktemp("native")
    return {
        "tiny": checkpoints.build_checkpoint(root / "tiny", checkpoints.tiny_config()),
        "odd": checkpoints.build_checkpoint(root / "odd", checkpoints.odd_config(), seed=1),
    }


@pytest.fixture
def folder(native_folders: dict[str, Path], tmp_path: Path) -> Path:
    """A native checkpoint that a test may spoil."""
    return Path(shutil.copytree(native_folders["tiny"], tmp_path / "checkpoint"))


@pytest.fixture
def microsoft(native_folders: dict[str, Path], tmp_path: Path) -> Path:
    """The same in Microsoft's layout."""
    from tests.microsoft_layout import write_microsoft

    return write_microsoft(native_folders["tiny"], tmp_path / "microsoft")


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def edit_weights(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")
