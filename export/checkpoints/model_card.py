"""What a checkpoint's own model card says about its licence and its origin."""

from __future__ import annotations

from pathlib import Path
from typing import Any

MODEL_CARD = "README.md"
FACTS = ("license", "base_model")
"""The metadata that are carried over into a bundle."""


def read_facts(folder: Path) -> dict[str, str | None]:
    """Reads `FACTS` from the metadata of a model card; None where they are not stated or cannot be read.

    Of a list, the first is taken.
    """
    metadata = _read_metadata(folder / MODEL_CARD)
    return {name: _first(metadata.get(name)) for name in FACTS}


def _read_metadata(path: Path) -> dict[str, Any]:
    import yaml
    from huggingface_hub import metadata_load

    if not path.is_file():
        return {}
    try:
        return metadata_load(path) or {}
    except (ValueError, yaml.YAMLError):  # a card that nobody can read is no reason not to export
        return {}


def _first(value: object) -> str | None:
    found = value[0] if isinstance(value, list) and value else value
    return found if isinstance(found, str) else None
