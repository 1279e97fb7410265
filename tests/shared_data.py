"""Reads the recorded answers in `../shared/data`, which are not part of the project (see its README)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "shared" / "data"


def rows(name: str) -> list[Any]:
    """The rows of a JSON lines file; skips the test, saying so, where the folder is absent."""
    path = FOLDER / name
    if not path.is_file():
        pytest.skip(f"{path} is not here: the recorded answers are other people's data and not committed")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
