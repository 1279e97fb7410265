"""A cache of image features, so that further requests about an image skip the vision encoder."""

from __future__ import annotations

from collections import OrderedDict

from florence_onnx import forks
from florence_onnx.prediction import EncodedImage


class FeatureCache:
    """An LRU cache from the SHA-256 of an image file to its features, bounded in bytes. Thread-safe."""

    def __init__(self, max_bytes: int) -> None:
        """Starts empty.

        Args:
            max_bytes: Most bytes of features and pixels to keep; 0 disables the cache.
        """
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._kept: OrderedDict[bytes, EncodedImage] = OrderedDict()
        self._lock = forks.Lock()

    def get(self, digest: bytes) -> EncodedImage | None:
        """Returns the features of an image, or None if they are not cached."""
        with self._lock:
            found = self._kept.get(digest)
            if found is not None:
                self._kept.move_to_end(digest)
            return found

    def put(self, digest: bytes, encoded: EncodedImage) -> None:
        """Caches the features of an image and evicts the least recently used; ignores an image larger than the cache."""
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
    # the source image is kept too, because annotated images are drawn on it; Pillow stores RGB as four bytes a pixel
    width, height = encoded.size
    return encoded.stored.nbytes + 4 * width * height
