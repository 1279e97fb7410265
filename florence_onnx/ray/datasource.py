"""The sources of a batch job as a data source of Ray: `ray.data.read_datasource(Items(…))`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

import ray.data
from PIL import Image

from florence_onnx.batch.items import Item, Source
from florence_onnx.batch.sources import SourceOptions, open_sources
from florence_onnx.batch.sources.files import Files, Lines
from florence_onnx.errors import FlorenceError
from florence_onnx.prediction import encode_png
from florence_onnx.ray.columns import Columns

if TYPE_CHECKING:
    import pyarrow

COLUMNS = Columns(source="source", text="text", region="region", error="error")
"""Of the blocks that are read."""
BLOCK_BYTES = 32 * 2**20
"""Encoded images of a block; one more image may lie above it."""


class Items(ray.data.Datasource):  # type: ignore[misc]
    """Reads sources in tasks all over the cluster.

    Files and URLs go on as names, which the actors open. The images of shards, tables, videos and documents are read by a task
    for each file and go on encoded; frames and pages as PNG.
    """

    def __init__(self, names: Sequence[str], options: SourceOptions) -> None:
        """Opens the sources.

        Args:
            names: As for `open_sources`, on paths that every node has.
            options: How they are read.

        Raises:
            InputError: As for `open_sources`.
        """
        super().__init__()
        sources = open_sources(names, options)
        listed = [source for source in sources if isinstance(source, Files | Lines)]
        # an image that is named twice is answered once
        self._files = list({item.id: item for source in listed for item in source}.values())
        self._others = [source for source in sources if not isinstance(source, Files | Lines)]

    def estimate_inmemory_data_size(self) -> int | None:
        """Unknown: it would take reading everything."""
        return None

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
    ) -> list[ray.data.ReadTask]:
        """A task for each file that holds several images, and some for the single ones."""
        size = max(1, -(-len(self._files) // max(1, parallelism)))
        parts: list[Iterable[Item]] = [self._files[start : start + size] for start in range(0, len(self._files), size)]
        parts += self._others
        return [_read_task(part, per_task_row_limit) for part in parts]


def _read_task(part: Iterable[Item] | Source, limit: int | None) -> ray.data.ReadTask:
    from ray.data.block import BlockMetadata

    count = len(part) if isinstance(part, list) else None
    metadata = BlockMetadata(num_rows=count, size_bytes=None, input_files=None, exec_stats=None)
    return ray.data.ReadTask(lambda: _blocks(islice(part, limit)), metadata)


def _blocks(items: Iterable[Item]) -> Iterator[pyarrow.Table]:
    """Items as tables of about `BLOCK_BYTES`."""
    waiting: list[dict[str, Any]] = []
    num_bytes = 0
    for item in items:
        row = _to_row(item)
        waiting.append(row)
        num_bytes += len(row["image"]["bytes"] or b"")
        if num_bytes > BLOCK_BYTES:
            yield _table(waiting)
            waiting, num_bytes = [], 0
    if waiting:
        yield _table(waiting)


def _to_row(item: Item) -> dict[str, Any]:
    image, encoded, path, error = item.image, None, None, None
    if isinstance(image, FlorenceError):
        error = {"type": type(image).__name__, "message": str(image)}
    elif isinstance(image, Image.Image):
        encoded = encode_png(image)
    elif isinstance(image, bytes):
        encoded = image
    else:
        path = image
    region = None if item.region is None else item.region.location_tokens
    return {
        "id": item.id,
        "source": item.source,
        "image": {"bytes": encoded, "path": path},
        "text": item.text,
        "region": region,
        "error": error,
    }


def _table(rows: list[dict[str, Any]]) -> pyarrow.Table:
    import pyarrow as pa

    string = pa.string()
    schema = pa.schema(
        [
            ("id", string),
            ("source", string),
            ("image", pa.struct([("bytes", pa.large_binary()), ("path", string)])),
            ("text", string),
            ("region", string),
            ("error", pa.struct([("type", string), ("message", string)])),
        ]
    )
    return pa.Table.from_pylist(rows, schema)
