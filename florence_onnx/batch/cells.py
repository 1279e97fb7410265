"""Cells of tables: an image, a text, a region."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from florence_onnx.answers.locations import Region
from florence_onnx.batch.items import ImageSource
from florence_onnx.errors import ImageError, InputError
from florence_onnx.images import url


def image_of(cell: Any, folder: Path | None = None) -> ImageSource:
    """An image: bytes, a path, a URL, Hugging Face's `{bytes, path}`, or a list of one of these.

    Args:
        cell: The cell.
        folder: Where paths begin; None for this process's folder.

    Raises:
        ImageError: It is something else, or empty.
    """
    if isinstance(cell, Mapping):
        cell = cell.get("bytes") or cell.get("path")
    if isinstance(cell, list) and len(cell) == 1:
        return image_of(cell[0], folder)
    if not isinstance(cell, str | bytes) or not cell:
        raise ImageError(f"an image must be a path, a URL, bytes or {{bytes, path}}, got {cell!r:.80}")
    is_path = isinstance(cell, str) and not url.is_url(cell) and not url.is_data_uri(cell)
    return str(folder / cell) if is_path and folder is not None else cell  # type: ignore[operator]


def text_of(cell: Any) -> str | None:
    """A text, or None; InputError for anything else."""
    if cell is None or isinstance(cell, str):
        return cell
    raise InputError(f"a text must be a string, got {cell!r:.80}")


def region_of(cell: Any) -> Region | None:
    """A region as location tokens or four bins, or None.

    Raises:
        InputError: It is something else.
    """
    if cell is None:
        return None
    if isinstance(cell, str):
        return Region.from_text(cell)
    bins = np.asarray(cell)
    if bins.shape == (4,) and np.issubdtype(bins.dtype, np.integer):
        return Region(*bins.tolist())
    raise InputError(f"a region must be location tokens or four bins from 0 to 999, got {cell!r:.80}")
