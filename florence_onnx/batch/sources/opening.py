"""Chooses the source by a name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from florence_onnx.batch.items import Source
from florence_onnx.batch.sources import files
from florence_onnx.errors import ImageNotFoundError, InputError
from florence_onnx.images import opening, url

LISTS = frozenset({".txt", ".lst", ".list"})
TABLES = frozenset({".parquet", ".arrow", ".feather", ".ipc"})
VIDEOS = frozenset({".mp4", ".mkv", ".mov", ".webm", ".avi", ".m4v", ".mpg", ".mpeg", ".ts"})


@dataclass(frozen=True)
class SourceOptions:
    """How sources are read."""

    image_column: str | None = None
    text_column: str | None = None
    region_column: str | None = None
    id_column: str | None = None
    fps: float = 1.0
    scenes: bool = False
    dpi: float = 150.0
    max_pixels: int = opening.MAX_PIXELS


def open_sources(names: Sequence[str], options: SourceOptions | None = None) -> list[Source]:
    """Opens sources: paths, folders, globs, URLs, and `-` for standard input.

    Raises:
        ImageNotFoundError: A path does not exist, a folder has no images, or a glob matches nothing.
        InputError: A table has no such column, or a file cannot be read.
        MissingExtraError: What reads such files is not installed.
    """
    if not names:
        raise InputError("give at least one source: a folder, a file, a glob, a URL, or - for standard input")
    return [source for name in names for source in _open(name, options or SourceOptions())]


def _open(name: str, options: SourceOptions) -> list[Source]:
    if name == "-":
        return [files.Lines(None)]
    if url.is_url(name) or url.is_data_uri(name):
        return [files.Files([name])]
    path = Path(name)
    try:
        exists, is_folder = path.exists(), path.is_dir()
    except (OSError, ValueError) as error:
        raise ImageNotFoundError(f"{name[:200]!r} is no path: {error}") from error
    if is_folder:
        return [files.Files(files.images_in(path, recursive=True)[0])]
    if exists:
        return [_open_file(path, options)]
    if any(letter in name for letter in "*?["):
        return [_open_file(Path(each), options) for each in files.matching(name)]
    raise ImageNotFoundError(f"{name} does not exist")


def _open_file(path: Path, options: SourceOptions) -> Source:
    suffix = path.suffix.lower()
    if suffix in LISTS:
        return files.Lines(path)
    if suffix == ".tar":
        from florence_onnx.batch.sources.shards import Shard

        return Shard(path, options.text_column)
    if suffix in TABLES:
        from florence_onnx.batch.sources.tables import Table

        columns = options.image_column, options.text_column, options.region_column, options.id_column
        return Table(path, *columns)
    if suffix in VIDEOS:
        from florence_onnx.batch.sources.videos import Video

        return Video(path, options.fps, scenes=options.scenes, max_pixels=options.max_pixels)
    if suffix == ".pdf":
        from florence_onnx.batch.sources.documents import Document

        return Document(path, options.dpi, options.max_pixels)
    return files.Files([str(path)])
