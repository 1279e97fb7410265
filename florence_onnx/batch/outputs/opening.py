"""Chooses the output by its name or form."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from florence_onnx.batch.items import Item
from florence_onnx.batch.outputs.json_lines import JsonLines
from florence_onnx.batch.outputs.parquet import Parquet
from florence_onnx.batch.outputs.webdataset import WebDataset
from florence_onnx.batch.rows import Key, Row
from florence_onnx.errors import InputError

SHARD_ROWS = 1000
FORMS = ("jsonl", "parquet", "webdataset")


class Output(Protocol):
    """Where rows go."""

    def repair(self) -> set[Key]:
        """Takes away what is half-written, and returns the rows that are there."""

    def write(self, row: Row, item: Item) -> None:
        """Adds a row; `item` is what it is about."""

    def close(self) -> None:
        """Finishes the files."""


def open_output(path: Path, form: str | None, shard_rows: int) -> Output:
    """Opens an output; nothing is written or read yet.

    Args:
        path: A file for JSON lines, a folder for the others.
        form: One of `FORMS`; None for that of the name: `.jsonl`, `.parquet`; others need a form.
        shard_rows: Rows (of webdataset samples) of a file in a folder.

    Raises:
        InputError: The form is unknown.
        MissingExtraError: pyarrow is not installed.
    """
    by_suffix = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
    chosen = form or by_suffix.get(path.suffix.lower())
    if chosen not in FORMS:
        raise InputError(
            f"--out must end with .jsonl or .parquet, or --form must be one of {', '.join(FORMS)}; got {path}"
        )
    if shard_rows < 1:
        raise InputError(f"rows of a shard must be at least 1, got {shard_rows}")
    if chosen == "jsonl":
        return JsonLines(path)
    return Parquet(path, shard_rows) if chosen == "parquet" else WebDataset(path, shard_rows)
