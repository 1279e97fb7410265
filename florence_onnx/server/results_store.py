"""The requests of the queue by id, until their results expire."""

from __future__ import annotations

import time
from collections import OrderedDict

from florence_onnx import forks
from florence_onnx.fal import problems
from florence_onnx.fal.jobs import Job
from florence_onnx.server.fair_store import FairStore


class ResultsStore:
    """Thread-safe and bounded in number, bytes and age. A request in flight is never dropped.

    Where there are too many results, the oldest one of the owner who has the most goes.
    """

    def __init__(self, max_ended: int, seconds: float, max_bytes: int) -> None:
        """Starts empty.

        Args:
            max_ended: Most requests that have ended to keep.
            seconds: How long to keep one, counted from its submission.
            max_bytes: Most bytes of the answers of all requests together.
        """
        self._max_ended = max_ended
        self._seconds = seconds
        self._max_bytes = max_bytes
        self._in_flight: OrderedDict[str, tuple[float, Job]] = OrderedDict()
        self._ended: FairStore[tuple[float, Job]] = FairStore()
        self._lock = forks.Lock()

    def add(self, job: Job) -> None:
        """Adds a request."""
        with self._lock:
            self._in_flight[job.id] = time.monotonic(), job
            self._drop_old()

    def get(self, request_id: str) -> Job:
        """Returns a request.

        Raises:
            RequestError: 404, the id is unknown or the result has expired.
        """
        with self._lock:
            self._drop_old()
            found = self._in_flight.get(request_id) or self._ended.get(request_id)
        # requests do not end in the order in which they were submitted, so `_drop_old` may have left it
        if found is None or (found[1].future.done() and time.monotonic() - found[0] > self._seconds):
            raise problems.unknown_request(request_id)
        return found[1]

    def num_unfetched(self) -> int:
        """Returns the number of requests whose result was not fetched."""
        with self._lock:
            return sum(not job.was_fetched for _, job in (*self._in_flight.values(), *self._ended))

    def _drop_old(self) -> None:
        for key in [key for key, (_, job) in self._in_flight.items() if job.future.done()]:
            submitted, job = self._in_flight.pop(key)
            self._ended.add(key, (submitted, job), job.owner, job.num_answer_bytes)
        now = time.monotonic()
        while (oldest := self._ended.oldest()) is not None and now - oldest[1][0] > self._seconds:
            self._ended.pop(oldest[0])
        while self._ended.num_bytes > self._max_bytes:
            self._ended.pop_excess(by_bytes=True)
        while len(self._ended) > self._max_ended:
            self._ended.pop_excess()
