"""Reads the rows of an output, finished or not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from florence_onnx.batch import rows
from florence_onnx.batch.arrow import from_table
from florence_onnx.batch.outputs.webdataset import samples
from florence_onnx.batch.rows import Key, Row
from florence_onnx.errors import InputError, MissingExtraError


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of an output, finished or not; nothing is repaired.

    Raises:
        InputError: There is none, or it is something else.
        MissingExtraError: pyarrow is not installed.
    """
    if path.is_file():
        yield from (_read_part(path) if path.suffix.lower() == ".parquet" else _read_lines(path))
        return
    files = sorted(path.iterdir()) if path.is_dir() else []
    known = [each for each in files if each.name.startswith(("part-", "shard-", "_rows")) and each.suffix != ".tmp"]
    if not known:
        raise InputError(f"{path} has no rows of a batch job")
    seen: set[Key] = set()
    for each in sorted(known, key=lambda file: file.name.startswith("_")):
        for row in _read_file(each):
            if row.key not in seen:  # those of a part may still be in the journal
                seen.add(row.key)
                yield row


def _read_file(path: Path) -> Iterator[Row]:
    """The rows of a file of a folder; a job that is running may finish the file, or empty its journal, meanwhile."""
    if path.suffix == ".parquet":
        yield from _read_part(path)
    elif path.suffix == ".jsonl":
        yield from _read_lines(path) if path.exists() else ()
    else:
        try:
            yield from (row for row, _ in samples(path))
        except FileNotFoundError:  # when it is opened, so before its first row
            yield from (row for row, _ in samples(path.with_suffix("")))


def _read_lines(path: Path) -> Iterator[Row]:
    number = 0
    try:
        with path.open(encoding="utf-8-sig") as lines:
            for line in lines:
                number += 1
                if line.endswith("\n") and line.strip():
                    yield rows.from_dict(json.loads(line))
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} has no rows of a batch job (line {number}): {error}") from error


def _read_part(path: Path) -> Iterator[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingExtraError("pyarrow", "batch") from error
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
            yield from map(rows.from_dict, from_table(batch))
    except (pyarrow.ArrowException, KeyError, OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} has no rows of a batch job: {error}") from error
