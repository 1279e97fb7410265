"""Which downloads run: so many at a time, and so many from one host."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from urllib.parse import urlsplit

from florence_onnx.fal.jobs import Job


class Downloads:
    """The jobs whose image is being downloaded, or is downloaded and waits to be decoded. Not thread-safe."""

    def __init__(self, most: int, most_per_host: int) -> None:
        """Starts with none.

        Args:
            most: Most downloads at a time.
            most_per_host: Most of them from one host, by the name in the URL.
        """
        self._most = most
        self._most_per_host = most_per_host
        self._host_of: dict[Job, str] = {}

    def take(self, candidates: Sequence[Job]) -> Job | None:
        """Returns the first candidate that may start, which counts from now on; None if none may.

        Args:
            candidates: Jobs whose `needs_download` is set.
        """
        if len(self._host_of) >= self._most:
            return None
        counts = Counter(self._host_of.values())
        for job in candidates:
            host = host_of(job.arguments.image_url)
            if job not in self._host_of and counts[host] < self._most_per_host:
                self._host_of[job] = host
                return job
        return None

    def remove(self, job: Job) -> None:
        """Ends a download."""
        self._host_of.pop(job, None)


def host_of(url: str) -> str:
    """The host of a URL in lower case, without a trailing dot; the empty string for a URL that is malformed."""
    try:
        return (urlsplit(url).hostname or "").rstrip(".")
    except ValueError:
        return ""
