"""Rows as Arrow tables, and back. Needs the extra `batch`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from florence_onnx.batch.rows import Row
from florence_onnx.errors import MissingExtraError

if TYPE_CHECKING:
    import pyarrow

TYPES = {
    **dict.fromkeys(("id", "source", "task", "prompt"), "string"),
    **dict.fromkeys(("width", "height"), "int64"),
    **dict.fromkeys(("answer", "text"), "string"),
    "score": "float64",
    **dict.fromkeys(("truncated", "error", "error_type"), "string"),
    "milliseconds": "float64",
    "model": "string",
}
"""Arrow types of the columns, of parquet files and of Ray Data: answers, whose form differs between tasks, are JSON, and `truncated`
is `limit`, `deadline` or null."""


def to_table(rows: Iterable[Row]) -> pyarrow.Table:
    """Rows as a table with the columns `TYPES`, however many there are.

    Raises:
        MissingExtraError: pyarrow is not installed.
    """
    try:
        import pyarrow
    except ImportError as error:
        raise MissingExtraError("pyarrow", "batch") from error
    listed = list(rows)
    schema = pyarrow.schema([(name, getattr(pyarrow, kind)()) for name, kind in TYPES.items()])
    return pyarrow.table({name: [_cell(row, name) for row in listed] for name in TYPES}, schema)


def _cell(row: Row, name: str) -> Any:
    value = getattr(row, name)
    if name == "answer":
        return None if value is None else json.dumps(value, ensure_ascii=False)
    if name == "truncated":
        return value if isinstance(value, str) else "limit" if value else None
    # lone surrogates, which an error about a path can have, are no UTF-8
    return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value


def from_table(table: pyarrow.Table) -> Iterator[dict[str, Any]]:
    """The rows of a table of answers as dicts, with `answer` and `truncated` as `Row` has them."""
    for row in table.select(list(TYPES)).to_pylist():
        answer, truncated = row["answer"], row["truncated"]
        row["answer"] = None if answer is None else json.loads(answer)
        row["truncated"] = True if truncated == "limit" else truncated or False
        yield row
