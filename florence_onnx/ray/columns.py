"""Batches of Ray Data to items, and their other columns to the answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np

from florence_onnx import errors
from florence_onnx.batch.cells import image_of, region_of, text_of
from florence_onnx.batch.items import Item, failed
from florence_onnx.errors import ImageError, InputError

if TYPE_CHECKING:
    import pyarrow


@dataclass(frozen=True)
class Columns:
    """Names of the columns of a data set."""

    image: str = "image"
    """Encoded images: bytes, Hugging Face's `{bytes, path}`, or a path or URL that every node can read."""
    id: str = "id"
    """Unique in the data set."""
    source: str | None = None
    """Where an image comes from; None for its id."""
    text: str | None = None
    """Texts for tasks that take one; null for the predictor's."""
    region: str | None = None
    """Regions for tasks that take one, as location tokens or four bins from 0 to 999; null for the predictor's."""
    error: str | None = None
    """Why an image could not be read, where its reader knows: `{type, message}`, the type a name in `florence_onnx.errors`."""
    keep: tuple[str, ...] = ()
    """Other columns that go into the answer as they are, once for each task."""

    @property
    def read(self) -> tuple[str, ...]:
        """All that must be there."""
        named = (getattr(self, field.name) for field in fields(self) if field.name != "keep")
        return tuple(dict.fromkeys([*(name for name in named if name is not None), *self.keep]))


def to_items(batch: Any, columns: Columns) -> list[Item]:
    """The items of a batch, in order; a cell that cannot be used makes its item an error.

    Args:
        batch: A `pyarrow.Table`, or a dict of N-long arrays: the batch formats `"pyarrow"` and `"numpy"` of Ray Data.
        columns: Their names.

    Raises:
        InputError: It is of another form, or has no such column.
    """
    names = _names_of(batch)
    missing = [name for name in columns.read if name not in names]
    if missing:
        raise InputError(
            f"the data set has no column {missing[0]!r}; it has {', '.join(names)}: name the columns by Columns"
        )
    cells = {name: _cells_of(batch, name) for name in columns.read}
    images = cells[columns.image]
    _check_encoded(images)
    return [_item({name: values[row] for name, values in cells.items()}, columns) for row in range(len(images))]


def _check_encoded(images: Sequence[Any]) -> None:
    """Raises InputError for decoded images: that is no fault of a row, and the whole data set would be errors."""
    decoded = next((each for each in images if isinstance(each, np.ndarray | list)), None)
    if decoded is not None:
        raise InputError(
            f"images must be encoded, got an array {np.shape(decoded)}: read them by ray.data.read_binary_files or as bytes, "
            "because decoded images fill the object store, and the predictor decodes by itself"
        )


def _names_of(batch: Any) -> list[str]:
    """Names of the columns of a batch.

    Raises:
        InputError: It is neither a table nor a dict.
    """
    if isinstance(batch, Mapping):
        return list(batch)
    if hasattr(batch, "column_names"):
        return list(batch.column_names)
    raise InputError(f'batch_format must be "pyarrow" or "numpy", got a batch that is a {type(batch).__name__}')


def _cells_of(batch: Any, name: str) -> list[Any]:
    """A column as Python's objects; arrays of several dimensions stay arrays."""
    return list(batch[name]) if isinstance(batch, Mapping) else list(batch.column(name).to_pylist())


def _item(cells: Mapping[str, Any], columns: Columns) -> Item:
    given = cells[columns.id]
    item_id = "" if given is None else str(given)
    source = item_id if columns.source is None else str(cells[columns.source] or item_id)
    try:
        if given is None:
            raise ImageError(f"the row has no {columns.id!r}")
        if columns.error is not None and cells[columns.error] is not None:
            raise _error(cells[columns.error])
        text = None if columns.text is None else text_of(cells[columns.text])
        region = None if columns.region is None else region_of(cells[columns.region])
        return Item(item_id, source, image_of(cells[columns.image]), text, region)
    except InputError as error:
        return failed(item_id, source, error if isinstance(error, ImageError) else ImageError(str(error)))


def _error(cell: Mapping[str, str]) -> ImageError:
    kind = getattr(errors, cell["type"], ImageError)
    is_image_error = isinstance(kind, type) and issubclass(kind, ImageError)
    return kind(cell["message"]) if is_image_error else ImageError(cell["message"])


def with_kept(table: pyarrow.Table, batch: Any, keep: Sequence[str], num_tasks: int) -> pyarrow.Table:
    """Adds columns of a batch of N rows to its answers.

    Args:
        table: N x `num_tasks` rows, those of an image together.
        batch: As for `to_items`.
        keep: Names of the columns.
        num_tasks: Rows of an image.
    """
    import pyarrow

    for name in keep:
        column = pyarrow.array(batch[name]) if isinstance(batch, Mapping) else batch.column(name)
        repeated = column.take(pyarrow.array(np.repeat(np.arange(len(column)), num_tasks)))
        table = table.append_column(name, repeated)
    return table
