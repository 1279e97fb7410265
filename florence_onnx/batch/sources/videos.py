"""Frames of videos, by PyAV. Needs the extra `video`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from florence_onnx.batch.items import Item, failed
from florence_onnx.errors import ImageTooLargeError, InputError, MissingExtraError

SCENE_SIZE = (32, 18)
"""Pixels to which frames are reduced to compare them."""
SCENE_CHANGE = 0.12
"""Mean difference of two reduced grey frames, 0 to 1, from which on they are two scenes."""
LEAST_SCENE = 0.5
"""Seconds: shorter scenes are parts of a fade."""


class Video:
    """Frames at a rate, or the first one of every scene."""

    def __init__(self, path: Path, fps: float, *, scenes: bool, max_pixels: int) -> None:
        """Args:
        path: Of the file.
        fps: Frames a second of video; ignored with `scenes`.
        scenes: Whether to take the first frame after each change of scene.
        max_pixels: Videos with larger frames are refused.

        Raises:
            MissingExtraError: PyAV is not installed.
        """
        try:
            import av  # noqa: F401
        except ImportError as error:
            raise MissingExtraError("av", "video") from error
        if not 0 < fps <= 1000:
            raise InputError(f"fps must be above 0 and at most 1000, got {fps!r}")
        self._path, self._fps, self._scenes, self._max_pixels = path, fps, scenes, max_pixels

    @property
    def total(self) -> int | None:
        return None  # the length that a file states may be wrong, or missing

    def __iter__(self) -> Iterator[Item]:
        import av

        last = "start"
        try:
            with av.open(str(self._path)) as container:
                if not container.streams.video:
                    raise InputError(f"{self._path} has no video")
                stream = container.streams.video[0]
                stream.thread_type = "AUTO"
                if stream.codec_context.width * stream.codec_context.height > self._max_pixels:
                    size = f"{stream.codec_context.width} x {stream.codec_context.height}"
                    raise ImageTooLargeError(
                        f"{self._path} has frames of {size} pixels, more than {self._max_pixels:,}"
                    )
                choose = _SceneChanges() if self._scenes else _Rate(self._fps)
                for frame in container.decode(stream):
                    if not choose.wants(frame):
                        continue
                    source = f"{self._path}#t={frame.time or 0:.3f}"
                    yield Item(source, source, frame.to_image())
                    last = f"{frame.time or 0:.3f}"
        except (av.error.FFmpegError, OSError, ValueError, InputError, ImageTooLargeError) as error:
            source = f"{self._path}#after={last}"
            yield failed(source, source, error)


class _Rate:
    def __init__(self, fps: float) -> None:
        self._seconds = 1 / fps
        self._next = 0.0

    def wants(self, frame: Any) -> bool:
        time = frame.time or 0.0
        if time + 1e-6 < self._next:
            return False
        # counted from 0, so that rounding does not add up
        self._next = (int((time + 1e-6) / self._seconds) + 1) * self._seconds
        return True


class _SceneChanges:
    def __init__(self) -> None:
        self._last: Any = None
        self._time = -LEAST_SCENE

    def wants(self, frame: Any) -> bool:
        small = frame.reformat(*SCENE_SIZE, format="gray").to_ndarray().astype(np.float32) / 255
        is_new = self._last is None or float(np.abs(small - self._last).mean()) > SCENE_CHANGE
        self._last = small
        time = frame.time or 0.0
        if not is_new or time - self._time < LEAST_SCENE:
            return False
        self._time = time
        return True
