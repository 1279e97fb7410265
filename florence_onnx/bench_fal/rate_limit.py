"""Time: the clock that everything here reads, and the least time between two calls to fal."""

from __future__ import annotations

import datetime
import time
from typing import Protocol


class Clock(Protocol):
    """What tells the time; a test brings its own."""

    def monotonic(self) -> float:
        """Seconds from some moment on, never going back."""
        ...

    def now(self) -> datetime.datetime:
        """The date and time, UTC."""
        ...

    def sleep(self, seconds: float) -> None:
        """Waits."""
        ...


class SystemClock:
    """The machine's own."""

    def monotonic(self) -> float:
        """Seconds, at the finest resolution there is."""
        return time.perf_counter()

    def now(self) -> datetime.datetime:
        """The date and time, UTC."""
        return datetime.datetime.now(datetime.timezone.utc)

    def sleep(self, seconds: float) -> None:
        """Waits."""
        time.sleep(seconds)


class Pace:
    """Lets calls begin no closer together than a rate allows."""

    def __init__(self, calls_per_minute: float, clock: Clock, last: datetime.datetime | None = None) -> None:
        """Starts after the calls of an earlier process.

        Args:
            calls_per_minute: Most calls a minute, above 0.
            clock: Tells the time.
            last: When the last call before this process began.
        """
        self.interval = 60.0 / calls_per_minute
        """Seconds between the beginnings of two calls."""
        self._clock = clock
        self._next = clock.monotonic()
        if last is not None:  # a wall clock may have been set in between: never longer than one interval
            elapsed = (clock.now() - last).total_seconds()
            self._next += min(max(self.interval - elapsed, 0.0), self.interval)

    def wait(self) -> None:
        """Returns when the next call may begin, and takes it for begun."""
        while (left := self._next - self._clock.monotonic()) > 0:
            self._clock.sleep(left)
        self._next = self._clock.monotonic() + self.interval
