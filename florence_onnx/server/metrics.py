"""Figures for Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from florence_onnx.fal.jobs import Figures

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_BATCHES = (1, 2, 4, 8, 16, 32)


class Metrics:
    """One registry a server."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._stages = Histogram(
            "florence_stage_seconds",
            "Seconds of a request in each stage",
            ["stage"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._batches = Histogram(
            "florence_batch_size", "Requests that ran together", buckets=_BATCHES, registry=self._registry
        )
        self._requests = Counter(
            "florence_requests", "Requests by endpoint and status", ["endpoint", "status"], registry=self._registry
        )
        self._seconds = Histogram(
            "florence_request_seconds",
            "Seconds from a request's head to the end of its answer",
            ["endpoint"],
            buckets=_SECONDS,
            registry=self._registry,
        )

    def watch(self, figures: Callable[[], Figures]) -> None:
        """Adds what a service is doing."""
        self._registry.register(_ServiceCollector(figures))

    def observe(self, stage: str, value: float) -> None:
        """Notes a stage's seconds, or a `batch_size`."""
        if stage == "batch_size":
            self._batches.observe(value)
        else:
            self._stages.labels(stage).observe(value)

    def count(self, endpoint: str, status: int, seconds: float) -> None:
        """Notes a request that was answered."""
        self._requests.labels(endpoint, str(status)).inc()
        self._seconds.labels(endpoint).observe(seconds)

    def render(self) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self._registry)


class _ServiceCollector(Collector):
    def __init__(self, figures: Callable[[], Figures]) -> None:
        self._figures = figures

    def collect(self) -> Iterator[Metric]:
        found = self._figures()
        yield GaugeMetricFamily("florence_queue_depth", "Requests that wait", value=found.waiting)
        yield GaugeMetricFamily("florence_in_progress", "Requests that the model is at", value=found.in_progress)
        yield CounterMetricFamily("florence_batches", "Batches that ran", value=found.batches)
        ended = CounterMetricFamily("florence_ended", "Requests that ended", labels=["how"])
        ended.add_metric(["answered"], found.finished)
        ended.add_metric(["failed"], found.failed)
        yield ended
        images = CounterMetricFamily("florence_images", "Images by where their features came from", labels=["from"])
        images.add_metric(["encoder"], found.encoded)
        images.add_metric(["cache"], found.reused)
        yield images
