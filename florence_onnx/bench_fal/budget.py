"""The limit on the number of requests to fal, which cost money."""

from __future__ import annotations

from florence_onnx.bench_fal.journal import Journal
from florence_onnx.bench_fal.plan import Call
from florence_onnx.bench_fal.rate_limit import Clock, RateLimiter
from florence_onnx.errors import FlorenceError


class BudgetSpentError(FlorenceError):
    """The limit on requests to fal is reached."""


class Budget:
    """Admits requests to fal one by one. Each is in the journal before it is sent, so that a crash cannot lose count."""

    def __init__(self, max_calls: int, journal: Journal, rate_limiter: RateLimiter, clock: Clock) -> None:
        """Limits all requests in the journal together, those of earlier processes included.

        Args:
            max_calls: Most requests.
            journal: Counts the requests.
            rate_limiter: Delays the requests.
            clock: Source of the time stamps.
        """
        self.max_calls = max_calls
        self._journal = journal
        self._rate_limiter = rate_limiter
        self._clock = clock

    @property
    def num_left(self) -> int:
        """Requests that may still be sent."""
        return max(0, self.max_calls - self._journal.num_sent)

    def admit(self, call: Call, target: str) -> None:
        """Waits until the rate allows the call, and counts it.

        Raises:
            BudgetSpentError: No request is left.
        """
        if not self.num_left:
            raise BudgetSpentError(f"{self._journal.num_sent} calls were sent to fal, --max-calls is {self.max_calls}")
        self._rate_limiter.wait()
        self._journal.write_sent(call, target, self._clock.now())
