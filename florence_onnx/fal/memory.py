"""One budget of memory for decoded images, by which a service admits them."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

from florence_onnx.errors import ImageTooLargeError

_LOOK_EVERY = 0.5


class NotWantedError(Exception):
    """A request that waited for memory has ended."""


class MemoryBudget:
    """Bytes that may be taken at a time, in the order in which they were asked for. Thread-safe."""

    def __init__(self, max_bytes: int) -> None:
        """Starts with all of them free.

        Args:
            max_bytes: Most bytes taken at a time.
        """
        self.max_bytes = max_bytes
        self._taken = 0
        self._queue: deque[object] = deque()
        # reentrant: the garbage collector may call `give` in a thread that is inside another method
        self._condition = threading.Condition(threading.RLock())

    @property
    def taken(self) -> int:
        """Bytes that are taken now."""
        return self._taken

    def take(self, num_bytes: int, is_wanted: Callable[[], bool]) -> None:
        """Takes bytes; waits until there are that many, and until those who asked before have theirs.

        Args:
            num_bytes: How many.
            is_wanted: Called now and then while it waits.

        Raises:
            ImageTooLargeError: There will never be that many.
            NotWantedError: `is_wanted` returned False.
        """
        if num_bytes > self.max_bytes:
            raise ImageTooLargeError(
                f"the image takes {num_bytes / 2**20:,.0f} MiB to decode, allowed are {self.max_bytes / 2**20:,.0f} MiB; "
                "make it smaller, or save it as PNG or baseline JPEG, which take least"
            )
        ticket = object()
        with self._condition:
            self._queue.append(ticket)
            try:
                while self._queue[0] is not ticket or self._taken + num_bytes > self.max_bytes:
                    if not is_wanted():
                        raise NotWantedError
                    self._condition.wait(_LOOK_EVERY)
                self._taken += num_bytes
            finally:
                self._queue.remove(ticket)
                self._condition.notify_all()

    def give(self, num_bytes: int) -> None:
        """Gives bytes back."""
        with self._condition:
            self._taken -= num_bytes
            self._condition.notify_all()

    def look(self) -> None:
        """Makes those who wait look whether they are still wanted."""
        with self._condition:
            self._condition.notify_all()
