"""The number of requests to fal that must never be exceeded."""

from __future__ import annotations

from florence_onnx.bench_fal.journal import Journal
from florence_onnx.bench_fal.plan import Call
from florence_onnx.bench_fal.rate_limit import Clock, Pace
from florence_onnx.errors import FlorenceError


class BudgetSpentError(FlorenceError):
    """As many requests as allowed were sent to fal."""


class Budget:
    """Admits requests to fal one by one; what was admitted is in the journal before it is sent."""

    def __init__(self, max_calls: int, journal: Journal, pace: Pace, clock: Clock) -> None:
        """Limits all requests that the journal knows of, those of earlier processes included.

        Args:
            max_calls: Most requests.
            journal: Counts them.
            pace: Spaces them.
            clock: Tells when.
        """
        self.max_calls = max_calls
        self._journal = journal
        self._pace = pace
        self._clock = clock

    @property
    def num_left(self) -> int:
        """Requests that may still be sent."""
        return max(0, self.max_calls - self._journal.num_sent)

    def admit(self, call: Call, target: str) -> None:
        """Waits for the call's turn and counts it.

        Raises:
            BudgetSpentError: None is left.
        """
        if not self.num_left:
            raise BudgetSpentError(f"{self._journal.num_sent} calls were sent to fal, --max-calls is {self.max_calls}")
        self._pace.wait()
        self._journal.write_sent(call, target, self._clock.now())
