"""Reading the JSON files of a bundle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from florence_onnx.errors import BundleFileMissingError, BundleFormatError


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        BundleFileMissingError: There is no such file.
        BundleFormatError: The file is not a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BundleFileMissingError(f"{path} is missing; export or download the bundle again") from error
    except (OSError, ValueError, RecursionError) as error:
        raise BundleFormatError(
            f"{path} cannot be read as JSON ({error}); export or download the bundle again"
        ) from error
    if not isinstance(value, dict):
        raise BundleFormatError(f"{path} must be a JSON object, got {type(value).__name__}")
    return value
