"""Tables with a column of images: parquet and Arrow files. Needs the extra `batch`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from florence_onnx.batch.cells import image_of, region_of, text_of
from florence_onnx.batch.items import Item, failed
from florence_onnx.errors import ImageError, InputError, MissingExtraError
from florence_onnx.images import url

IMAGE_COLUMNS = (
    "image",
    "img",
    "images",
    "jpg",
    "jpeg",
    "png",
    "webp",
    "path",
    "file_name",
    "image_path",
    "url",
    "image_url",
)
"""Looked for in this order where no column is named."""
BATCH_ROWS = 64


class Table:
    """The rows of a file."""

    def __init__(
        self,
        path: Path,
        image_column: str | None,
        text_column: str | None,
        region_column: str | None,
        id_column: str | None,
    ) -> None:
        """Reads the schema.

        Raises:
            InputError: The file cannot be read, or has no such column.
            MissingExtraError: pyarrow is not installed.
        """
        try:
            import pyarrow
            import pyarrow.parquet  # noqa: F401
        except ImportError as error:
            raise MissingExtraError("pyarrow", "batch") from error
        self._path = path
        self.total: int | None
        names, self.total = self._describe()
        self._image = _choose(path, names, image_column, IMAGE_COLUMNS)
        self._others = {"text": text_column, "region": region_column, "id": id_column}
        for name in self._others.values():
            if name is not None:
                _choose(path, names, name, ())

    def _describe(self) -> tuple[list[str], int | None]:
        import pyarrow

        try:
            if self._path.suffix.lower() == ".parquet":
                described = pyarrow.parquet.ParquetFile(self._path)
                return list(described.schema_arrow.names), described.metadata.num_rows
            with pyarrow.memory_map(str(self._path)) as source:
                return list(_open_arrow(source).schema.names), None
        except (pyarrow.ArrowException, OSError) as error:
            raise InputError(f"{self._path} cannot be read as a table: {error}") from error

    def __iter__(self) -> Iterator[Item]:
        import pyarrow

        number = 0
        try:
            for batch in self._batches():
                for row in batch.to_pylist():
                    yield self._item(number, row)
                    number += 1
        except (pyarrow.ArrowException, OSError) as error:
            name = f"{self._path}#row={number}"
            yield failed(name, name, error)

    def _batches(self) -> Iterator[Any]:
        import pyarrow

        columns = [self._image, *(name for name in self._others.values() if name is not None)]
        if self._path.suffix.lower() == ".parquet":
            yield from pyarrow.parquet.ParquetFile(self._path).iter_batches(
                BATCH_ROWS, columns=list(dict.fromkeys(columns))
            )
            return
        with pyarrow.memory_map(str(self._path)) as source:
            reader = _open_arrow(source)
            numbers = range(reader.num_record_batches) if hasattr(reader, "num_record_batches") else None
            for batch in reader if numbers is None else map(reader.get_batch, numbers):
                for start in range(0, batch.num_rows, BATCH_ROWS):
                    yield batch.slice(start, BATCH_ROWS).select(list(dict.fromkeys(columns)))

    def _item(self, number: int, row: dict[str, Any]) -> Item:
        source = f"{self._path}#row={number}"
        given = {kind: None if name is None else row[name] for kind, name in self._others.items()}
        item_id = source if given["id"] is None else str(given["id"])
        try:
            image = image_of(row[self._image], self._path.parent)
            text, region = text_of(given["text"]), region_of(given["region"])
            return Item(item_id, source, image, text, region, self._extension(row[self._image]))
        except InputError as error:
            return failed(item_id, source, ImageError(f"{source}: {error}"))

    def _extension(self, value: Any) -> str:
        name = value.get("path") if isinstance(value, dict) else value
        return Path(name).suffix.lower() if isinstance(name, str) and not url.is_data_uri(name) else ".img"


def _open_arrow(source: Any) -> Any:
    """A reader of Arrow's file form, or of its stream form, which Hugging Face writes."""
    import pyarrow

    try:
        return pyarrow.ipc.open_file(source)
    except pyarrow.ArrowInvalid:
        source.seek(0)
        return pyarrow.ipc.open_stream(source)


def _choose(path: Path, names: list[str], wanted: str | None, known: tuple[str, ...]) -> str:
    found = wanted if wanted in names else next((name for name in known if wanted is None and name in names), None)
    if found is None:
        what = f"no column {wanted!r}" if wanted else "no column of images that is known by its name (--image-column)"
        raise InputError(f"{path} has {what}; it has {', '.join(names)}")
    return found
