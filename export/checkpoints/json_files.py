"""JSON files: the configs of a checkpoint, and what an export writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from florence_onnx.errors import CheckpointError

_POINTER = b"version https://git-lfs.github.com/spec/"


def refuse_pointer(path: Path) -> None:
    """Refuses a file of a repository that was cloned without git-lfs: a few lines that stand for the real content.

    Raises:
        CheckpointError: It is such a pointer.
    """
    with path.open("rb") as file:
        if file.read(len(_POINTER)) == _POINTER:
            raise CheckpointError(
                f"{path} is a git-lfs pointer, not the file itself: get it with `git lfs install && git lfs pull` in "
                "that folder, or "
                "download the checkpoint by its hub id"
            )


def read_json(folder: Path, name: str) -> dict[str, Any] | None:
    """Reads a JSON object; returns None if there is no such file.

    Raises:
        CheckpointError: The file is not JSON, does not hold an object, or is a git-lfs pointer.
    """
    path = folder / name
    if not path.is_file():
        return None
    refuse_pointer(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not {type(content).__name__}")
    return content


def write_json(path: Path, value: object) -> None:
    """Writes a value as indented JSON in UTF-8."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
