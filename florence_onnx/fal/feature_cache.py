"""Encoded images, kept for further questions."""

from __future__ import annotations

import threading
from collections import OrderedDict

from florence_onnx.prediction import EncodedImage


class FeatureCache:
    """Encoded images by the digest of their file, the least recently used dropped first. Safe in threads."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._kept: OrderedDict[bytes, EncodedImage] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, digest: bytes) -> EncodedImage | None:
        """What was kept under a digest."""
        with self._lock:
            found = self._kept.get(digest)
            if found is not None:
                self._kept.move_to_end(digest)
            return found

    def put(self, digest: bytes, encoded: EncodedImage) -> None:
        """Keeps an image, if it fits."""
        size = _num_bytes(encoded)
        with self._lock:
            if size > self._max_bytes or digest in self._kept:
                return
            self._kept[digest] = encoded
            self._num_bytes += size
            while self._num_bytes > self._max_bytes:
                _, dropped = self._kept.popitem(last=False)
                self._num_bytes -= _num_bytes(dropped)


def _num_bytes(encoded: EncodedImage) -> int:
    width, height = encoded.size
    return encoded.stored.nbytes + 3 * width * height
