"""A server's temporary folder, which the next server deletes if this one is killed."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import time
from pathlib import Path

from filelock import FileLock, Timeout

_PREFIX = "florence-onnx-files-"
_LOCK = ".lock"
_YOUNG_SECONDS = 60.0
"""A folder without a lock file may be that of a server which is about to create it."""
_log = logging.getLogger("florence_onnx.server")


class StateFolder:
    """A new folder that only this user can read, with a lock inside that ends with the process."""

    def __init__(self, parent: Path | None = None) -> None:
        """Deletes the folders of dead servers of this user, then creates the folder and its lock.

        Args:
            parent: Folder for the folder; None is the system's folder for temporary files.
        """
        parent = parent or Path(tempfile.gettempdir())
        _delete_dead(parent)
        self.path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
        """The folder."""
        self._lock = FileLock(self.path / _LOCK)
        self._lock.acquire(timeout=0)

    def restore(self) -> None:
        """Creates the folder again if something has deleted it, as cleaners of temporary files do."""
        if (self.path / _LOCK).exists():
            return
        self.path.mkdir(mode=0o700, exist_ok=True)
        self._lock.release(force=True)
        self._lock.acquire(timeout=0)

    def close(self) -> None:
        """Deletes the folder."""
        self._lock.release(force=True)
        shutil.rmtree(self.path, ignore_errors=True)


def _delete_dead(parent: Path) -> None:
    for folder in parent.glob(f"{_PREFIX}*"):
        try:
            if _is_dead(folder):
                shutil.rmtree(folder)
                _log.info("deleted the files of a server that was killed: %s", folder)
        except OSError as error:
            _log.warning("cannot delete the files of a server that was killed: %s", error)


def _is_dead(folder: Path) -> bool:
    if folder.is_symlink() or not folder.is_dir() or not _is_own(folder):
        return False
    lock = folder / _LOCK
    if not lock.exists():
        return time.time() - folder.stat().st_mtime > _YOUNG_SECONDS
    try:
        with FileLock(lock).acquire(timeout=0):
            return True
    except Timeout:
        return False


def _is_own(folder: Path) -> bool:
    # the folder for temporary files is everybody's; on Windows it is the user's own
    return not hasattr(os, "getuid") or folder.stat().st_uid == os.getuid()
