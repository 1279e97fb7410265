"""A file with a JSON object a line."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

from florence_onnx.batch import rows
from florence_onnx.batch.items import Item
from florence_onnx.batch.outputs.synced import Synced
from florence_onnx.batch.rows import Key, Row
from florence_onnx.errors import InputError


class JsonLines:
    """A file with a JSON object a line."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: Synced | None = None

    def repair(self) -> set[Key]:
        return {row.key for row in self.read()}

    def read(self) -> Iterator[Row]:
        """The complete rows; the beginning of one behind them is taken away.

        Raises:
            InputError: A line before the last is no row.
        """
        if not self._path.exists():
            return
        end = 0
        with self._path.open("rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    row = rows.from_dict(json.loads(line)) if line.endswith(b"\n") else None
                except (ValueError, InputError) as error:
                    if file.read(1):
                        raise InputError(f"{self._path}, line {number}, is no row of a batch job: {error}") from error
                    row = None
                if row is None:
                    break
                end += len(line)
                yield row
        if end < self._path.stat().st_size:
            os.truncate(self._path, end)

    def write(self, row: Row, item: Item | None = None) -> None:
        if self._file is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = Synced(self._path)
        self._file.write(row.to_json().encode("utf-8", "backslashreplace") + b"\n")

    def clear(self) -> None:
        """Removes all rows."""
        if self._file is not None:
            self._file.clear()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
