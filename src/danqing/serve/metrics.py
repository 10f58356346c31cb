"""Figures for Prometheus: requests, queue, seconds of stages, pictures, memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from danqing.generation import Picture
    from danqing.serve.jobs import Job

MEDIA_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500)


@dataclass(frozen=True, kw_only=True)
class Gauges:
    """Figures of one moment.

    Attributes:
        queue: jobs that wait.
        running: jobs under way.
        memory: bytes by device and kind.
    """

    queue: int
    running: int
    memory: Mapping[str, Mapping[str, int]]


class Metrics:
    """The figures of one server."""

    def __init__(self) -> None:
        """Begin at zero."""
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "danqing_requests", "Answered HTTP requests.", ["route", "status"],
            registry=self.registry,
        )  # fmt: skip
        self._jobs = Counter("danqing_jobs", "Jobs that ended.", ["state"], registry=self.registry)
        self._pictures = Counter(
            "danqing_pictures", "Finished images.", ["model"], registry=self.registry
        )
        self._stages = Histogram(
            "danqing_stage_seconds", "Seconds of a stage.", ["stage"], buckets=_SECONDS,
            registry=self.registry,
        )  # fmt: skip
        self._waits = Histogram(
            "danqing_wait_seconds", "Seconds a job waited.", buckets=_SECONDS,
            registry=self.registry,
        )  # fmt: skip

    def watch(self, gauges: Callable[[], Gauges]) -> None:
        """Report these figures, too, when figures are asked for."""
        self.registry.register(_Watch(gauges))

    def answered(self, route: str, status: int) -> None:
        """Count an HTTP request."""
        self._requests.labels(route, str(status)).inc()

    def painted(self, model: str, picture: Picture) -> None:
        """Count a picture and its stages; one that was reused cost nothing."""
        self._pictures.labels(model).inc()
        for stage in picture.stages:
            if not stage.reused:
                self._stages.labels(stage.name).observe(stage.seconds)

    def ended(self, job: Job) -> None:
        """Count a job."""
        self._jobs.labels(job.state).inc()
        if job.started is not None:
            self._waits.observe(max(0.0, job.started - job.accepted))

    def text(self) -> bytes:
        """Return all figures in Prometheus' text format."""
        return generate_latest(self.registry)


class _Watch(Collector):
    def __init__(self, gauges: Callable[[], Gauges]) -> None:
        self._gauges = gauges

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Yield the figures of this moment."""
        now = self._gauges()
        yield GaugeMetricFamily("danqing_queue_depth", "Jobs that wait.", now.queue)
        yield GaugeMetricFamily("danqing_running", "Jobs under way.", now.running)
        memory = GaugeMetricFamily(
            "danqing_device_memory_bytes", "Memory of a device.", labels=["device", "kind"]
        )
        for device, kinds in now.memory.items():
            for kind, count in kinds.items():
                memory.add_metric([device, kind], count)
        yield memory
