"""The requests of the queue by id, until their results expire."""

from __future__ import annotations

import time
from collections import OrderedDict

from florence_onnx import forks
from florence_onnx.fal import problems
from florence_onnx.fal.jobs import Job


class ResultsStore:
    """Thread-safe and bounded in number and age. A request in flight is never dropped."""

    def __init__(self, max_ended: int, seconds: float) -> None:
        """Starts empty.

        Args:
            max_ended: Most requests that have ended to keep.
            seconds: How long to keep one, counted from its submission.
        """
        self._max_ended = max_ended
        self._seconds = seconds
        self._jobs: OrderedDict[str, tuple[float, Job]] = OrderedDict()
        self._lock = forks.Lock()

    def add(self, job: Job) -> None:
        """Adds a request."""
        with self._lock:
            self._drop_old()
            self._jobs[job.id] = time.monotonic(), job

    def get(self, request_id: str) -> Job:
        """Returns a request.

        Raises:
            RequestError: 404, the id is unknown or the result has expired.
        """
        with self._lock:
            self._drop_old()
            found = self._jobs.get(request_id)
        if found is None:
            raise problems.unknown_request(request_id)
        return found[1]

    def num_unfetched(self) -> int:
        """Returns the number of requests whose result was not fetched."""
        with self._lock:
            return sum(not job.was_fetched for _, job in self._jobs.values())

    def _drop_old(self) -> None:
        now = time.monotonic()
        ended = [key for key, (_, job) in self._jobs.items() if job.state == "COMPLETED"]
        for index, key in enumerate(ended):
            if len(ended) - index > self._max_ended or now - self._jobs[key][0] > self._seconds:
                del self._jobs[key]
