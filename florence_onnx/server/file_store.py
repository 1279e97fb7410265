"""Uploads and annotated images on disk, under URLs that cannot be guessed."""

from __future__ import annotations

import re
import secrets
import shutil
import tempfile
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

from florence_onnx.fal import problems

_NAME = re.compile(r"[^A-Za-z0-9._-]+")
_URL = re.compile(r"https?://[^/?#]+/files/([A-Za-z0-9_-]{22})(?:/|$)")
MAX_AGE = 24 * 3600.0
"""Seconds for which a file is kept."""
_MAX_RESERVED = 1000
"""Reserved uploads of which no byte has arrived; the oldest are dropped first."""
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


class FileStore:
    """Files in a temporary folder, bounded in bytes and age. Thread-safe. `close` deletes the folder."""

    def __init__(self, max_bytes: int) -> None:
        """Creates the folder.

        Args:
            max_bytes: Most bytes of all files together.
        """
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._folder = Path(tempfile.mkdtemp(prefix="florence-onnx-files-"))
        self._files: OrderedDict[str, StoredFile] = OrderedDict()
        self._reserved: OrderedDict[str, tuple[str, str]] = OrderedDict()
        self._lock = threading.Lock()

    def put(self, content: bytes | bytearray, name: str, content_type: str, token: str | None = None) -> str:
        """Stores a file; deletes the oldest files if there is no room.

        Args:
            content: The file.
            name: File name of the client; made safe for a URL.
            content_type: MIME type of the client; see `IMAGE_TYPES`.
            token: From `reserve`; None for a new one.

        Returns:
            The path of its URL, `/files/…`.

        Raises:
            RequestError: 413, the file is larger than the whole store may be.
        """
        if len(content) > self._max_bytes:
            raise problems.too_large(self._max_bytes)
        token = token or secrets.token_urlsafe(16)
        path = self._folder / token
        path.write_bytes(content)
        shown = content_type if content_type in IMAGE_TYPES else "application/octet-stream"
        with self._lock:
            self._files[token] = StoredFile(path, safe_name(name), shown, len(content), time.monotonic())
            self._num_bytes += len(content)
            self._drop_old()
        return self._path_of(token, name)

    def reserve(self, name: str, content_type: str) -> tuple[str, str]:
        """Reserves a URL for a file that is uploaded later.

        Returns:
            The token for `put_reserved`, and the path of the URL that the file will have.
        """
        token = secrets.token_urlsafe(16)
        with self._lock:
            self._reserved[token] = name, content_type
            while len(self._reserved) > _MAX_RESERVED:
                self._reserved.popitem(last=False)
        return token, self._path_of(token, name)

    def check_reserved(self, token: str) -> None:
        """Raises RequestError, 404, if a URL was not reserved or has been used."""
        with self._lock:
            is_reserved = token in self._reserved
        if not is_reserved:
            raise problems.not_found(f"storage/upload/{token}")

    def put_reserved(self, token: str, content: bytes | bytearray) -> None:
        """Stores a file under a reserved URL; each can be used once.

        Raises:
            RequestError: 404, the URL was not reserved or has been used.
        """
        with self._lock:
            reserved = self._reserved.pop(token, None)
        if reserved is None:
            raise problems.not_found(f"storage/upload/{token}")
        self.put(content, *reserved, token=token)

    def get(self, token: str) -> StoredFile | None:
        """Returns a file, or None if it is not in the store."""
        with self._lock:
            self._drop_old()
            return self._files.get(token)

    def read_url(self, url: str) -> bytes | None:
        """Returns the content of a file by its absolute URL, or None if it is not in the store.

        The host is not compared, as the server may be reached by several names: the token is what identifies a file.
        """
        match = _URL.match(url)
        stored = self.get(match[1]) if match else None
        if stored is None:
            return None
        try:
            return stored.path.read_bytes()
        except FileNotFoundError:  # deleted in this very moment
            return None

    def close(self) -> None:
        """Deletes all files."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _drop_old(self) -> None:
        now = time.monotonic()
        while self._files:
            token, oldest = next(iter(self._files.items()))
            if self._num_bytes <= self._max_bytes and now - oldest.created < MAX_AGE:
                return
            del self._files[token]
            self._num_bytes -= oldest.num_bytes
            oldest.path.unlink(missing_ok=True)

    def _path_of(self, token: str, name: str) -> str:
        return f"/files/{token}/{safe_name(name)}"


def safe_name(name: str) -> str:
    """Reduces a file name to characters that need no quoting in a URL or a header, at most 100 of them."""
    return _NAME.sub("-", Path(name).name)[-100:].strip("-.") or "file"
