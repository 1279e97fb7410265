"""Uploads and annotated images on disk, under URLs that cannot be guessed."""

from __future__ import annotations

import errno
import logging
import re
import secrets
import time
from dataclasses import dataclass
from pathlib import Path

from florence_onnx import forks
from florence_onnx.fal import problems
from florence_onnx.server.fair_store import FairStore
from florence_onnx.server.state_folder import StateFolder

_NAME = re.compile(r"[^A-Za-z0-9._-]+")
_URL = re.compile(r"https?://[^/?#]+/files/([A-Za-z0-9_-]{22})(?:/|$)")
_FULL = (errno.ENOSPC, errno.EDQUOT)
_log = logging.getLogger("florence_onnx.server")
MAX_AGE = 24 * 3600.0
"""Seconds for which a file is kept."""
MAX_FILES = 10_000
"""Most files that are kept; a file of a few bytes takes a block of the disk and an inode, too."""
_MAX_RESERVED = 1000
"""Reserved uploads of which no byte has arrived."""
IMAGE_TYPES = ("image/png", "image/jpeg", "image/gif", "image/webp", "image/bmp", "image/tiff", "image/avif")
"""Content types that are served unchanged. All others become `application/octet-stream`, so that an uploaded HTML page
cannot run in the origin of this server."""


@dataclass(frozen=True)
class StoredFile:
    """A file of the store."""

    path: Path
    name: str
    content_type: str
    num_bytes: int
    created: float
    """Value of `time.monotonic`."""


@dataclass(frozen=True)
class _Reserved:
    name: str
    content_type: str
    owner: str


class FileStore:
    """Files in a temporary folder, bounded in bytes, number and age. Thread-safe. `close` deletes the folder.

    Where there is no room for a file, the oldest one of the owner who holds the most goes.
    """

    def __init__(self, max_bytes: int, max_files: int = MAX_FILES, parent: Path | None = None) -> None:
        """Creates the folder, and deletes those of servers that were killed.

        Args:
            max_bytes: Most bytes of all files together.
            max_files: Most files.
            parent: Folder for the folder; None is the system's folder for temporary files.
        """
        self._max_bytes = max_bytes
        self._max_files = max_files
        self._state = StateFolder(parent)
        self._files: FairStore[StoredFile] = FairStore()
        self._reserved: FairStore[_Reserved] = FairStore()
        self._lock = forks.Lock()
        self.is_full = False
        """Whether the last file could not be stored because the disk was full."""
        self._forks = forks.count()

    @property
    def folder(self) -> Path:
        """The folder of the files."""
        return self._state.path

    def put(
        self, content: bytes | bytearray, name: str, content_type: str, owner: str = "", token: str | None = None
    ) -> str:
        """Stores a file.

        Args:
            content: The file.
            name: File name of the client; made safe for a URL.
            content_type: MIME type of the client; see `IMAGE_TYPES`.
            owner: The client, whose files are the first to go if it holds the most.
            token: From `reserve`; None for a new one.

        Returns:
            The path of its URL, `/files/…`.

        Raises:
            RequestError: 413, the file is larger than the whole store may be; 507, the disk is full, and stays so after
                the files were deleted that would have had to go for this one.
            OSError: The file cannot be written for another reason.
        """
        if len(content) > self._max_bytes:
            raise problems.too_large(self._max_bytes)
        token = token or secrets.token_urlsafe(16)
        self._write(token, content)
        name = safe_name(name)
        stored = StoredFile(self.folder / token, name, _safe_type(content_type), len(content), time.monotonic())
        with self._lock:
            self._files.add(token, stored, owner, len(content))
            self._drop_old()
        return _path_of(token, name)

    def reserve(self, name: str, content_type: str, owner: str = "") -> tuple[str, str]:
        """Reserves a URL for a file that is uploaded later.

        Returns:
            The token for `put_reserved`, and the path of the URL that the file will have.
        """
        token = secrets.token_urlsafe(16)
        name = safe_name(name)
        with self._lock:
            self._reserved.add(token, _Reserved(name, _safe_type(content_type), owner), owner)
            while len(self._reserved) > _MAX_RESERVED:
                self._reserved.pop_excess()
        return token, _path_of(token, name)

    def is_reserved(self, token: str) -> bool:
        """Whether a file can be stored under a token."""
        with self._lock:
            return self._reserved.get(token) is not None

    def check_reserved(self, token: str) -> None:
        """Raises RequestError, 404, if a URL was not reserved or has been used."""
        if not self.is_reserved(token):
            raise problems.not_found(f"storage/upload/{token}")

    def put_reserved(self, token: str, content: bytes | bytearray) -> None:
        """Stores a file under a reserved URL. Each can be used once; it can be tried again after an error.

        Raises:
            RequestError: 404, the URL was not reserved or has been used; else as `put`.
        """
        with self._lock:
            reserved = self._reserved.pop(token)
        if reserved is None:
            raise problems.not_found(f"storage/upload/{token}")
        try:
            self.put(content, reserved.name, reserved.content_type, reserved.owner, token)
        except BaseException:
            with self._lock:
                self._reserved.add(token, reserved, reserved.owner)
            raise

    def get(self, token: str) -> StoredFile | None:
        """Returns a file, or None if it is not in the store."""
        with self._lock:
            self._drop_old()
            return self._files.get(token)

    def find_url(self, url: str) -> Path | None:
        """Returns the path of a file by its absolute URL, or None if it is not in the store.

        The host is not compared, as the server may be reached by several names: the token is what identifies a file.
        """
        match = _URL.match(url)
        stored = self.get(match[1]) if match else None
        return None if stored is None else stored.path

    def close(self) -> None:
        """Deletes all files, except in a forked child: the process that made the folder and its other children need it."""
        if forks.count() == self._forks:
            self._state.close()

    def _write(self, token: str, content: bytes | bytearray) -> None:
        try:
            self._write_twice(token, content)
        except OSError as error:
            if error.errno not in _FULL:
                raise
            if not self.is_full:
                _log.error("the disk of %s is full: uploads and annotated images are not stored", self.folder)
            self.is_full = True
            raise problems.storage_full() from None
        self.is_full = False

    def _write_twice(self, token: str, content: bytes | bytearray) -> None:
        try:
            self._write_once(token, content)
        except FileNotFoundError:
            self._state.restore()
            self._write_once(token, content)
        except OSError as error:
            if error.errno not in _FULL:
                raise
            self._make_room(len(content))
            self._write_once(token, content)

    def _write_once(self, token: str, content: bytes | bytearray) -> None:
        partial = self.folder / f"{token}.part"
        try:
            partial.write_bytes(content)
            partial.rename(self.folder / token)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise

    def _make_room(self, num_bytes: int) -> None:
        """Deletes as many bytes of files as a new one takes."""
        with self._lock:
            limit = max(0, self._files.num_bytes - num_bytes)
            while len(self._files) and self._files.num_bytes > limit:
                self._drop_excess(by_bytes=True)

    def _drop_old(self) -> None:
        now = time.monotonic()
        while (oldest := self._files.oldest()) is not None and now - oldest[1].created >= MAX_AGE:
            self._files.pop(oldest[0])
            oldest[1].path.unlink(missing_ok=True)
        while self._files.num_bytes > self._max_bytes:
            self._drop_excess(by_bytes=True)
        while len(self._files) > self._max_files:
            self._drop_excess(by_bytes=False)

    def _drop_excess(self, *, by_bytes: bool) -> None:
        dropped = self._files.pop_excess(by_bytes=by_bytes)
        if dropped is not None:
            dropped.path.unlink(missing_ok=True)


def _path_of(token: str, name: str) -> str:
    return f"/files/{token}/{name}"


def _safe_type(content_type: str) -> str:
    return content_type if content_type in IMAGE_TYPES else "application/octet-stream"


def safe_name(name: str) -> str:
    """Reduces a file name to characters that need no quoting in a URL or a header, at most 100 of them."""
    last = name[-400:].replace("\\", "/").rpartition("/")[2]  # cut first: a name may be as long as a body
    return _NAME.sub("-", last)[-100:].strip("-.") or "file"
