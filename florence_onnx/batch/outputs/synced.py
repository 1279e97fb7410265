"""Files that keep what was written to them, however their process ends."""

from __future__ import annotations

import os
import time
from pathlib import Path

SYNC_SECONDS = 2.0


class Synced:
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


def replace(temporary: Path, path: Path) -> None:
    """Gives a complete file its name, on the disk too."""
    with temporary.open("rb+") as file:
        os.fsync(file.fileno())
    temporary.replace(path)
