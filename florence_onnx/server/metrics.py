"""Prometheus metrics of one server."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from florence_onnx import forks
from florence_onnx.fal.jobs import Stats

# histogram buckets: cached small models answer in milliseconds, large models on a busy CPU in tens of seconds
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_BATCHES = (1, 2, 4, 8, 16, 32)


class Metrics:
    """The metrics of one server, in a registry of their own: several servers can live in one process."""

    def __init__(self) -> None:
        self._get_stats: Callable[[], Stats] | None = None
        self._start()
        forks.call_in_child(self._start)

    def _start(self) -> None:
        """Begins at zero, with new locks: a forked child counts its own requests."""
        self._registry = CollectorRegistry()
        self._stages = Histogram(
            "florence_stage_seconds",
            "Seconds that a request spends in each stage",
            ["stage"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._batches = Histogram(
            "florence_batch_size", "Requests in a batch", buckets=_BATCHES, registry=self._registry
        )
        self._requests = Counter(
            "florence_requests", "HTTP requests by endpoint and status", ["endpoint", "status"], registry=self._registry
        )
        self._seconds = Histogram(
            "florence_request_seconds",
            "Seconds from the request's headers to the end of its response",
            ["endpoint"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        if self._get_stats is not None:
            self._registry.register(_ServiceCollector(self._get_stats))

    def add_service(self, get_stats: Callable[[], Stats]) -> None:
        """Adds the counts of a service.

        Args:
            get_stats: Returns the current counts; called by every `render`.
        """
        self._get_stats = get_stats
        self._registry.register(_ServiceCollector(get_stats))

    def add_connections(self, get_counts: Callable[[], tuple[int, int]]) -> None:
        """Adds the counts of connections.

        Args:
            get_counts: Returns how many are open, and how many were refused since the start.
        """
        self._registry.register(_ConnectionCollector(get_counts))

    def observe(self, stage: str, value: float) -> None:
        """Records the seconds of a stage, or a `batch_size`."""
        if stage == "batch_size":
            self._batches.observe(value)
        else:
            self._stages.labels(stage).observe(value)

    def count(self, endpoint: str, status: int, seconds: float) -> None:
        """Records an HTTP request that has ended."""
        self._requests.labels(endpoint, str(status)).inc()
        self._seconds.labels(endpoint).observe(seconds)

    def render(self) -> bytes:
        """Returns all metrics in Prometheus' text format."""
        return generate_latest(self._registry)


class _ServiceCollector(Collector):
    """Reads the counts of a service when Prometheus scrapes them."""

    def __init__(self, get_stats: Callable[[], Stats]) -> None:
        self._get_stats = get_stats

    def collect(self) -> Iterator[Metric]:
        stats = self._get_stats()
        yield GaugeMetricFamily("florence_queue_depth", "Requests that wait", value=stats.waiting)
        yield GaugeMetricFamily("florence_in_progress", "Requests that the model is running", value=stats.in_progress)
        yield CounterMetricFamily("florence_batches", "Batches that were started", value=stats.batches)
        ended = CounterMetricFamily("florence_ended", "Requests that ended", labels=["how"])
        ended.add_metric(["answered"], stats.finished)
        ended.add_metric(["failed"], stats.failed)
        yield ended
        images = CounterMetricFamily("florence_images", "Images by the source of their features", labels=["from"])
        images.add_metric(["encoder"], stats.encoded)
        images.add_metric(["cache"], stats.reused)
        yield images


class _ConnectionCollector(Collector):
    """Reads the counts of connections when Prometheus scrapes them."""

    def __init__(self, get_counts: Callable[[], tuple[int, int]]) -> None:
        self._get_counts = get_counts

    def collect(self) -> Iterator[Metric]:
        num_open, num_refused = self._get_counts()
        yield GaugeMetricFamily("florence_connections", "Open connections", value=num_open)
        yield CounterMetricFamily("florence_connections_refused", "Connections that got a 503", value=num_refused)
