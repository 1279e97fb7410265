"""Reads the recorded answers in `../shared/data`, which are not part of the project (see its README)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "shared" / "data"
NO_SHARED = "needs ../shared beside the checkout: recorded answers and a tokenizer of others, which are not committed"


def rows(name: str) -> list[Any]:
    """The rows of a JSON lines file; skips the test, saying so, where the folder is absent."""
    path = FOLDER / name
    if not path.is_file():
        pytest.skip(NO_SHARED)
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
