"""Parquet files in a folder. Needs the extra `batch`."""

from __future__ import annotations

from pathlib import Path

from florence_onnx.batch.arrow import to_table
from florence_onnx.batch.items import Item
from florence_onnx.batch.outputs.json_lines import JsonLines
from florence_onnx.batch.outputs.synced import replace
from florence_onnx.batch.rows import Key, Row
from florence_onnx.errors import MissingExtraError


class Parquet:
    """A folder of `part-00000.parquet`, …; rows wait in `_rows.jsonl` until there are enough for a part."""

    def __init__(self, path: Path, shard_rows: int) -> None:
        try:
            import pyarrow.parquet  # noqa: F401
        except ImportError as error:
            raise MissingExtraError("pyarrow", "batch") from error
        self._path, self._shard_rows = path, shard_rows
        self._journal = JsonLines(path / "_rows.jsonl")
        self._waiting: list[Row] = []
        self._number = 0

    def repair(self) -> set[Key]:
        import pyarrow.parquet

        for part in self._path.glob("*.tmp"):
            part.unlink()
        parts = sorted(self._path.glob("part-*.parquet"))
        done: set[Key] = set()
        for part in parts:
            table = pyarrow.parquet.read_table(part, columns=["id", "task"])
            done |= set(zip(table["id"].to_pylist(), table["task"].to_pylist(), strict=True))
        self._number = int(parts[-1].stem.removeprefix("part-")) + 1 if parts else 0
        # rows of a part that was finished just before the end may still be in the journal
        self._waiting = [row for row in self._journal.read() if row.key not in done]
        return done | {row.key for row in self._waiting}

    def write(self, row: Row, item: Item | None = None) -> None:
        self._journal.write(row)
        self._waiting.append(row)
        if len(self._waiting) >= self._shard_rows:
            self._finish_part()

    def _finish_part(self) -> None:
        import pyarrow.parquet

        part = self._path / f"part-{self._number:05}.parquet"
        pyarrow.parquet.write_table(to_table(self._waiting), part.with_suffix(".tmp"))
        replace(part.with_suffix(".tmp"), part)
        self._number += 1
        self._waiting = []
        self._journal.clear()

    def close(self) -> None:
        if self._waiting:
            self._path.mkdir(parents=True, exist_ok=True)
            self._finish_part()
        self._journal.close()
        (self._path / "_rows.jsonl").unlink(missing_ok=True)
