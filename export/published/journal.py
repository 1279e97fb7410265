"""The working folder of a check: what was found and downloaded before an interruption."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from florence_onnx import __version__
from florence_onnx.errors import InputError

from .answers import PublishedAnswer
from .rows import Row

_MARK = "florence_onnx_check.json"


class Journal:
    """A folder with the rows of finished checkpoints, and the names of those that the check itself has downloaded."""

    def __init__(self, folder: Path) -> None:
        """Opens or makes the folder.

        Raises:
            InputError: It holds something else, or cannot be made.
        """
        self.folder = folder
        self._file = folder / _MARK
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{folder} cannot be made ({error}); give another folder with --work") from error
        if not self._file.is_file():
            if any(folder.iterdir()):
                raise InputError(f"{folder} is not empty and no check made it; give another folder with --work")
            self._write({"finished": {}, "downloaded": []})

    def rows(self, checkpoint: str, answers: Sequence[PublishedAnswer]) -> list[Row] | None:
        """What was found before with the same version and the same published answers; None if that is not finished."""
        found = self._read()["finished"].get(_key(checkpoint, answers))
        return None if found is None else [Row(**row) for row in found]

    def finish(self, checkpoint: str, answers: Sequence[PublishedAnswer], rows: Sequence[Row]) -> None:
        """Records a checkpoint that need not be tried again."""
        content = self._read()
        content["finished"][_key(checkpoint, answers)] = [asdict(row) for row in rows]
        self._write(content)

    def has_downloaded(self, checkpoint: str) -> bool:
        """Whether the check began to download a checkpoint, so that it may remove it."""
        return checkpoint in self._read()["downloaded"]

    def note_download(self, checkpoint: str) -> None:
        """Records, before it begins, that the check downloads a checkpoint."""
        content = self._read()
        content["downloaded"] = sorted({*content["downloaded"], checkpoint})
        self._write(content)

    def remove(self) -> None:
        """Removes the folder with everything in it."""
        shutil.rmtree(self.folder)

    def _read(self) -> dict[str, Any]:
        try:
            content = json.loads(self._file.read_text(encoding="utf-8"))
            return {"finished": dict(content["finished"]), "downloaded": list(content["downloaded"])}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{self._file} is damaged ({error}); remove {self.folder}") from error

    def _write(self, content: dict[str, Any]) -> None:
        partial = self._file.with_suffix(".partial")
        partial.write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")
        partial.replace(self._file)


def _key(checkpoint: str, answers: Sequence[PublishedAnswer]) -> str:
    content = hashlib.sha256(repr(answers).encode()).hexdigest()[:16]
    return f"{checkpoint} {__version__} {content}"
