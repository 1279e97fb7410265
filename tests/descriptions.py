"""Changes a bundle's description as an export would write it: with the digest of what it says then."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from florence_onnx.bundles import bundle
from florence_onnx.bundles.description import DIGEST, sealed


def read(path: Path) -> dict[str, Any]:
    """The description in a bundle's folder."""
    content: dict[str, Any] = json.loads((path / bundle.DESCRIPTION).read_text(encoding="utf-8"))
    return content


def change(path: Path, **changes: object) -> None:
    """Changes top-level keys of the description in a folder."""
    write(path, sealed({**read(path), **changes}))


def change_model(path: Path, **changes: object) -> None:
    """Changes sizes of the model."""
    change(path, model={**read(path)["model"], **changes})


def forget_digest(path: Path) -> None:
    """Makes it the description of an older version, which had no digest."""
    write(path, {name: value for name, value in read(path).items() if name != DIGEST})


def write(path: Path, described: dict[str, Any]) -> None:
    """Writes a description as it is."""
    (path / bundle.DESCRIPTION).write_text(json.dumps(described), encoding="utf-8")
