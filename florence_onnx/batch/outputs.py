"""Files of rows that can be continued after any end: JSON lines, parquet, webdataset's shards.

What is in a file when its process is killed is found again: complete rows count, a half-written one is taken away. Rows reach
the operating system one by one, and the disk every `SYNC_SECONDS` and at the end.
"""

from __future__ import annotations

import json
import os
import tarfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from florence_onnx.batch import rows
from florence_onnx.batch.items import Item
from florence_onnx.batch.rows import Key, Row
from florence_onnx.errors import InputError, MissingExtraError

SYNC_SECONDS = 2.0
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


class _Synced:
    """A file that is synchronised with the disk from time to time."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab")
        self._synced = time.monotonic()

    def write(self, content: bytes) -> None:
        """Hands content to the operating system at once, whole: a process that is killed later has written it."""
        self._file.write(content)
        self._file.flush()
        if time.monotonic() - self._synced > SYNC_SECONDS:
            self.sync()

    def sync(self) -> None:
        os.fsync(self._file.fileno())
        self._synced = time.monotonic()

    def clear(self) -> None:
        """Makes the file empty."""
        self._file.truncate(0)
        self.sync()

    def close(self) -> None:
        self.sync()
        self._file.close()


class JsonLines:
    """A file with a JSON object a line."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: _Synced | None = None

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
            self._file = _Synced(self._path)
        self._file.write(row.to_json().encode("utf-8", "backslashreplace") + b"\n")

    def clear(self) -> None:
        """Removes all rows."""
        if self._file is not None:
            self._file.clear()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


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
        import pyarrow
        import pyarrow.parquet

        part = self._path / f"part-{self._number:05}.parquet"
        columns = {name: [_column(row, name) for row in self._waiting] for name in rows.NAMES}
        schema = pyarrow.schema([(name, getattr(pyarrow, kind)()) for name, kind in _TYPES.items()])
        pyarrow.parquet.write_table(pyarrow.table(columns, schema), part.with_suffix(".tmp"))
        _replace(part.with_suffix(".tmp"), part)
        self._number += 1
        self._waiting = []
        self._journal.clear()

    def close(self) -> None:
        if self._waiting:
            self._path.mkdir(parents=True, exist_ok=True)
            self._finish_part()
        self._journal.close()
        (self._path / "_rows.jsonl").unlink(missing_ok=True)


_TYPES = {
    **dict.fromkeys(("id", "source", "task", "prompt"), "string"),
    **dict.fromkeys(("width", "height"), "int64"),
    **dict.fromkeys(("answer", "text"), "string"),
    "score": "float64",
    **dict.fromkeys(("truncated", "error", "error_type"), "string"),
    "milliseconds": "float64",
    "model": "string",
}
"""Columns of a part; answers, whose form differs between tasks, are JSON."""


def _column(row: Row, name: str) -> Any:
    value = getattr(row, name)
    if name == "answer":
        return None if value is None else json.dumps(value, ensure_ascii=False)
    if name == "truncated":
        return value if isinstance(value, str) else "limit" if value else None
    return value


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
            yield from (row for row, _ in _samples(path))
        except FileNotFoundError:  # when it is opened, so before its first row
            yield from (row for row, _ in _samples(path.with_suffix("")))


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
            for content in batch.to_pylist():
                answer, truncated = content.get("answer"), content.get("truncated")
                content["answer"] = None if answer is None else json.loads(answer)
                content["truncated"] = True if truncated == "limit" else truncated or False
                yield rows.from_dict(content)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} has no rows of a batch job: {error}") from error


def _replace(temporary: Path, path: Path) -> None:
    """Gives a complete file its name, on the disk too."""
    with temporary.open("rb+") as file:
        os.fsync(file.fileno())
    temporary.replace(path)


class WebDataset:
    """A folder of `shard-00000.tar`, …: for each row its image file, if there is one, a `.txt` and a `.json`, in that order."""

    def __init__(self, path: Path, shard_rows: int) -> None:
        self._path, self._shard_rows = path, shard_rows
        self._number = self._count = 0
        self._total = 0
        self._file: _Synced | None = None

    @property
    def _open_path(self) -> Path:
        return self._path / f"shard-{self._number:05}.tar.part"

    def repair(self) -> set[Key]:
        done: set[Key] = set()
        for shard in sorted(self._path.glob("shard-*.tar")):
            done |= {row.key for row, _ in _samples(shard)}
            self._number = int(shard.name[6:11]) + 1
        self._total = len(done)
        if self._open_path.exists():
            end = 0
            for row, end in _samples(self._open_path):  # noqa: B007 - the end of the last one
                done.add(row.key)
                self._count += 1
            os.truncate(self._open_path, end)
            self._total += self._count
        return done

    def write(self, row: Row, item: Item) -> None:
        if self._file is None:
            self._path.mkdir(parents=True, exist_ok=True)
            self._file = _Synced(self._open_path)
        key = f"{self._total:09}"
        encoded = item.encoded if row.error is None else None
        files = {} if encoded is None else {(item.extension or ".img").lstrip("."): encoded}
        if row.text is not None:
            files["txt"] = row.text.encode("utf-8", "backslashreplace")
        files["json"] = json.dumps(asdict(row), ensure_ascii=False).encode("utf-8", "backslashreplace")
        self._file.write(b"".join(_member(f"{key}.{extension}", content) for extension, content in files.items()))
        self._total += 1
        self._count += 1
        if self._count >= self._shard_rows:
            self._finish_shard()

    def _finish_shard(self) -> None:
        if self._file is not None:
            self._file.write(bytes(2 * tarfile.BLOCKSIZE))
            self._file.close()
            self._file = None
        elif self._open_path.exists():
            with self._open_path.open("ab") as file:
                file.write(bytes(2 * tarfile.BLOCKSIZE))
        _replace(self._open_path, self._open_path.with_suffix(""))
        self._number += 1
        self._count = 0

    def close(self) -> None:
        if self._count:
            self._finish_shard()


def _member(name: str, content: bytes) -> bytes:
    """A file as it stands in a tar archive."""
    header = tarfile.TarInfo(name)
    header.size = len(content)
    padding = -len(content) % tarfile.BLOCKSIZE
    return header.tobuf(tarfile.PAX_FORMAT) + content + bytes(padding)


def _samples(path: Path) -> Iterator[tuple[Row, int]]:
    """The rows of the complete samples of a shard, each with the place behind it; a damaged rest is left out."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        try:
            with tarfile.open(fileobj=file, mode="r:") as archive:
                for member in archive:
                    end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                    if not member.name.endswith(".json") or end > size:
                        continue
                    content = archive.extractfile(member)
                    assert content is not None, "a file"
                    yield rows.from_dict(json.loads(content.read())), end
        except (tarfile.TarError, EOFError, ValueError, InputError):
            return


class CaptionSidecars:
    """`car.txt` beside `car.jpg`, or in a folder, for each answer; beside another output, which says what is done."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._made: dict[Path, str] = {}

    def write(self, row: Row, item: Item) -> None:
        """Writes the text of an answer.

        Raises:
            InputError: Two images would have one file, an image is no file, or the disk refuses.
        """
        if row.text is None:
            return
        path = self._path(item)
        if self._made.setdefault(path, row.id) != row.id:
            raise InputError(f"the texts of {self._made[path]} and {row.id} would both be {path}: give --txt-dir apart")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(path.name + ".tmp")
            temporary.write_text(f"{row.text}\n", encoding="utf-8", errors="backslashreplace")
            temporary.replace(path)
        except OSError as error:
            raise InputError(f"cannot write {path}: {error.strerror or error}") from error

    def _path(self, item: Item) -> Path:
        name = item.source.replace("#", "-") if "#" in item.source else item.source
        if self._folder is None:
            if not isinstance(item.image, str) or not Path(item.image).is_file():
                raise InputError(f"{item.source} is no file that a text could lie beside: give --txt-dir")
            return Path(item.image).with_suffix(".txt")
        stem = Path(name).stem if Path(name).suffix.lower() == item.extension and item.extension else Path(name).name
        return self._folder / f"{stem or 'image'}.txt"
