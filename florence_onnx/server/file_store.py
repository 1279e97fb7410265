"""Uploads and annotated images, under names that cannot be guessed."""

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
_ADDRESS = re.compile(r"https?://[^/?#]+/files/([A-Za-z0-9_-]{22})(?:/|$)")
MAX_AGE = 24 * 3600.0
"""Seconds that a file is kept."""
IMAGE_TYPES = ("image/png", "image/jpeg", "image/gif", "image/webp", "image/bmp", "image/tiff", "image/avif")
"""Served as what they are. Everything else is served as bytes: an uploaded page must not run in our origin."""


@dataclass(frozen=True)
class StoredFile:
    """One file."""

    path: Path
    name: str
    content_type: str
    num_bytes: int
    created: float
    """`time.monotonic`."""


class FileStore:
    """Files in a temporary folder that is removed by `close`. Safe in threads."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._folder = Path(tempfile.mkdtemp(prefix="florence-onnx-files-"))
        self._files: OrderedDict[str, StoredFile] = OrderedDict()
        self._expected: OrderedDict[str, tuple[str, str]] = OrderedDict()
        self._lock = threading.Lock()

    def put(self, content: bytes, name: str, content_type: str, token: str | None = None) -> str:
        """Keeps a file; the oldest make room.

        Returns:
            Its path on the server, `/files/…`.

        Raises:
            RequestError: 413, it alone is larger than all files may be.
        """
        if len(content) > self._max_bytes:
            raise problems.too_large(self._max_bytes)
        token = token or secrets.token_urlsafe(16)
        path = self._folder / token
        path.write_bytes(content)
        shown = content_type if content_type in IMAGE_TYPES else "application/octet-stream"
        with self._lock:
            self._files[token] = StoredFile(path, plain_name(name), shown, len(content), time.monotonic())
            self._num_bytes += len(content)
            self._drop_old()
        return self._address(token, name)

    def expect(self, name: str, content_type: str) -> tuple[str, str]:
        """Announces a file that is sent later: its token, and the path that it will have."""
        token = secrets.token_urlsafe(16)
        with self._lock:
            self._expected[token] = name, content_type
            while len(self._expected) > 1000:
                self._expected.popitem(last=False)
        return token, self._address(token, name)

    def receive(self, token: str, content: bytes) -> None:
        """Keeps an announced file, once.

        Raises:
            RequestError: 404, it was not announced.
        """
        with self._lock:
            announced = self._expected.pop(token, None)
        if announced is None:
            raise problems.not_found(f"storage/upload/{token}")
        self.put(content, *announced, token=token)

    def get(self, token: str) -> StoredFile | None:
        """A file that is still kept."""
        with self._lock:
            self._drop_old()
            return self._files.get(token)

    def find(self, address: str) -> bytes | None:
        """The content of a file by its whole address, whatever name we are reached by."""
        match = _ADDRESS.match(address)
        stored = self.get(match[1]) if match else None
        if stored is None:
            return None
        try:
            return stored.path.read_bytes()
        except FileNotFoundError:  # dropped this very moment
            return None

    def close(self) -> None:
        """Removes everything."""
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

    def _address(self, token: str, name: str) -> str:
        return f"/files/{token}/{plain_name(name)}"


def plain_name(name: str) -> str:
    """A file name that needs no quoting anywhere."""
    return _NAME.sub("-", Path(name).name)[-100:].strip("-.") or "file"
