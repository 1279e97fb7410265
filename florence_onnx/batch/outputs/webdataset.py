"""Shards of webdataset in a folder."""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from florence_onnx.batch import rows
from florence_onnx.batch.items import Item
from florence_onnx.batch.outputs.synced import Synced, replace
from florence_onnx.batch.rows import Key, Row
from florence_onnx.errors import InputError


class WebDataset:
    """A folder of `shard-00000.tar`, …: for each row its image file, if there is one, a `.txt` and a `.json`, in that order."""

    def __init__(self, path: Path, shard_rows: int) -> None:
        self._path, self._shard_rows = path, shard_rows
        self._number = self._count = 0
        self._total = 0
        self._file: Synced | None = None

    @property
    def _open_path(self) -> Path:
        return self._path / f"shard-{self._number:05}.tar.part"

    def repair(self) -> set[Key]:
        done: set[Key] = set()
        for shard in sorted(self._path.glob("shard-*.tar")):
            done |= {row.key for row, _ in samples(shard)}
            self._number = int(shard.name[6:11]) + 1
        self._total = len(done)
        if self._open_path.exists():
            end = 0
            for row, end in samples(self._open_path):  # noqa: B007 - the end of the last one
                done.add(row.key)
                self._count += 1
            os.truncate(self._open_path, end)
            self._total += self._count
        return done

    def write(self, row: Row, item: Item) -> None:
        if self._file is None:
            self._path.mkdir(parents=True, exist_ok=True)
            self._file = Synced(self._open_path)
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
        replace(self._open_path, self._open_path.with_suffix(""))
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


def samples(path: Path) -> Iterator[tuple[Row, int]]:
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
