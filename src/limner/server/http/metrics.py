"""Prometheus metrics of a server, read from its parts at each scrape."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

from limner.engine.protocol import Backend
from limner.server.jobs.runner import JobRunner
from limner.server.jobs.store import JobStore

__all__ = ["Metrics"]

_ENGINE_COUNTERS = (
    "accepted",
    "finished",
    "failed",
    "cancelled",
    "refused",
    "batches",
    "images",
    "prefills",
    "busy_seconds",
    "waited_seconds",
)
_OF_REFERENCES = ("limner_references_", "limner_prefill_", "limner_engine_prefills")


class _Found(Collector):
    """Metrics that were collected."""

    def __init__(self, metrics: Iterable[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> Iterable[Metric]:
        return self._metrics


class Metrics(Collector):
    """The metrics of one server, in a registry of its own, so that several servers may share a process."""

    def __init__(self, *, engine: Backend, jobs: JobStore, runner: JobRunner) -> None:
        self._engine = engine
        self._jobs = jobs
        self._runner = runner
        self._registry = CollectorRegistry()
        self._requests = Histogram(
            "limner_http_request_seconds",
            "Seconds of HTTP requests",
            ("method", "route", "status"),
            buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300),
            registry=self._registry,
        )
        self._registry.register(self)

    def request(self, *, method: str, route: str, status: int, seconds: float) -> None:
        """Count one HTTP request."""
        self._requests.labels(method, route, str(status)).observe(seconds)

    def text(self, *, with_references: bool) -> tuple[bytes, str]:
        """Return the Prometheus text and its content type; those of references tell whether any caller's were cached."""
        found = [m for m in self._registry.collect() if with_references or not m.name.startswith(_OF_REFERENCES)]
        return generate_latest(_Found(found)), CONTENT_TYPE_LATEST

    def collect(self) -> Iterator[Metric]:
        engine, store = self._engine.stats(), self._engine.store_stats()
        values = asdict(engine)
        for name in _ENGINE_COUNTERS:
            yield _counter(f"limner_engine_{name}", f"Engine: {name.replace('_', ' ')}", values[name])
        yield GaugeMetricFamily("limner_engine_waiting", "Requests in the queue", engine.waiting)
        yield GaugeMetricFamily("limner_engine_running", "Requests on the device", engine.running)
        yield GaugeMetricFamily("limner_jobs_live", "Accepted jobs that have not ended", self._runner.num_live)
        yield GaugeMetricFamily(
            "limner_pictures_bytes", "Bytes of processed pictures in memory", self._jobs.picture_bytes
        )
        jobs = GaugeMetricFamily("limner_jobs", "Jobs that are known, by status", labels=["status"])
        for status, count in self._jobs.counts().items():
            jobs.add_metric([status], count)
        yield jobs
        hits = CounterMetricFamily("limner_references_hits", "References found, by tier", labels=["tier"])
        nbytes = GaugeMetricFamily("limner_references_bytes", "Bytes of kept references, by tier", labels=["tier"])
        evictions = CounterMetricFamily("limner_references_evictions", "Evictions, by tier", labels=["tier"])
        for tier in store.hits:
            hits.add_metric([tier], store.hits[tier])
        for tier in store.nbytes:
            nbytes.add_metric([tier], store.nbytes[tier])
            evictions.add_metric([tier], store.evictions[tier])
        yield from (hits, nbytes, evictions)
        yield _counter("limner_references_misses", "References that had to be computed", store.misses)
        yield _counter("limner_prefill_seconds", "Seconds spent on prefills", store.prefill_seconds)
        yield _counter(
            "limner_prefill_seconds_saved", "Seconds of prefills saved", max(0.0, store.prefill_seconds_saved)
        )


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(name, text, value)
