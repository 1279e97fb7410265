"""The clock of a comparison, and the rate limit of calls to fal."""

from __future__ import annotations

import datetime
import time
from typing import Protocol


class Clock(Protocol):
    """A source of time, which tests replace."""

    def monotonic(self) -> float:
        """Returns seconds since an arbitrary moment; never decreases."""
        ...

    def now(self) -> datetime.datetime:
        """Returns the date and time in UTC."""
        ...

    def sleep(self, seconds: float) -> None:
        """Waits for some seconds."""
        ...


class SystemClock:
    """The clock of this machine."""

    def monotonic(self) -> float:
        """Returns `time.perf_counter`, the clock of the highest resolution."""
        return time.perf_counter()

    def now(self) -> datetime.datetime:
        """Returns the date and time in UTC."""
        return datetime.datetime.now(datetime.timezone.utc)

    def sleep(self, seconds: float) -> None:
        """Waits for some seconds."""
        time.sleep(seconds)


class RateLimiter:
    """Keeps a minimum interval between the starts of two calls."""

    def __init__(self, calls_per_minute: float, clock: Clock, last: datetime.datetime | None = None) -> None:
        """Continues where an earlier process ended.

        Args:
            calls_per_minute: Most calls per minute, above 0.
            clock: Source of time.
            last: Start of the last call of an earlier process, None if there was none.
        """
        self.interval = 60.0 / calls_per_minute
        """Least seconds between the starts of two calls."""
        self._clock = clock
        self._next = clock.monotonic()
        if last is not None:  # the wall clock may have been set back since: wait for one interval at most
            elapsed = (clock.now() - last).total_seconds()
            self._next += min(max(self.interval - elapsed, 0.0), self.interval)

    def wait(self) -> None:
        """Waits until the next call may start; the caller must start it then."""
        while (left := self._next - self._clock.monotonic()) > 0:
            self._clock.sleep(left)
        self._next = self._clock.monotonic() + self.interval
