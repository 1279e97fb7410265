"""One budget of bytes for everything that was accepted and is not answered yet."""

from __future__ import annotations

import threading

from florence_onnx.fal import problems


class ByteBudget:
    """Counts bytes that are held in memory for callers. Thread-safe."""

    def __init__(self, max_bytes: int) -> None:
        """Starts with nothing held.

        Args:
            max_bytes: Most bytes of all charges together.
        """
        self.max_bytes = max_bytes
        self._num_bytes = 0
        self._lock = threading.Lock()

    @property
    def num_bytes(self) -> int:
        """Bytes that are held now."""
        return self._num_bytes

    def charge(self, num_bytes: int = 0) -> Charge:
        """Returns a new charge of `num_bytes`.

        Raises:
            RequestError: 429, the budget is used up.
        """
        charge = Charge(self)
        charge.grow(num_bytes)
        return charge

    def take(self, num_bytes: int) -> None:
        """Adds to what is held; called by `Charge`.

        Raises:
            RequestError: 429, the budget is used up; nothing was added.
        """
        with self._lock:
            if num_bytes > 0 and self._num_bytes + num_bytes > self.max_bytes:
                raise problems.out_of_budget(self.max_bytes)
            self._num_bytes += num_bytes

    def give_back(self, num_bytes: int) -> None:
        """Subtracts from what is held; called by `Charge`."""
        with self._lock:
            self._num_bytes -= num_bytes


class Charge:
    """The bytes that are held for one request or body. Thread-safe."""

    def __init__(self, budget: ByteBudget) -> None:
        self._budget = budget
        self._num_bytes = 0
        self._is_released = False
        self._lock = threading.Lock()

    def grow(self, num_bytes: int) -> None:
        """Adds bytes; after `release`, nothing is added.

        Raises:
            RequestError: 429, the budget is used up; nothing was added.
        """
        with self._lock:
            if not self._is_released:
                self._budget.take(num_bytes)
                self._num_bytes += num_bytes

    def shrink(self, num_bytes: int) -> None:
        """Gives bytes back until at most `num_bytes` are held."""
        with self._lock:
            excess = max(0, self._num_bytes - num_bytes)
            self._num_bytes -= excess
            self._budget.give_back(excess)

    def release(self) -> None:
        """Gives everything back, once and for all."""
        with self._lock:
            self._is_released = True
        self.shrink(0)
