"""The Prometheus objects of one daemon, built from the catalogue: closed label sets, zeros from the start."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import product
from time import perf_counter

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, GCCollector, Histogram, ProcessCollector

from narses.observe import scrape
from narses.observe.catalogue import LATENCY_SECONDS, UNKNOWN, Kind, Metric, Role, of_role

MAX_WORKER_SERIES = 256
_CLASSES: dict[Kind, type[Counter] | type[Gauge] | type[Histogram]] = {
    "counter": Counter,
    "gauge": Gauge,
    "histogram": Histogram,
    "info": Gauge,
}


class Metrics:
    """What a daemon of `role` exports. Names are the catalogue's; a wrong name, kind, label or value raises ValueError.

    metrics.inc("narses_server_rounds_total", outcome="completed"). Safe from any thread.
    """

    def __init__(self, role: Role, registry: CollectorRegistry | None = None) -> None:
        # _created series would double every counter for a timestamp that nobody reads; the switch is process-wide
        prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
        self.role = role
        self.registry = CollectorRegistry() if registry is None else registry
        ProcessCollector(registry=self.registry)
        GCCollector(registry=self.registry)
        self._metrics = {metric.name: metric for metric in of_role(role)}
        self._families = {metric.name: _family(metric, self.registry) for metric in self._metrics.values()}
        self._declared: dict[str, tuple[str, ...]] = {"worker": (UNKNOWN,)}
        for metric in self._metrics.values():
            self._preset(metric)

    def inc(self, name: str, amount: float = 1.0, /, **labels: str) -> None:
        """Add to a counter, or to a gauge (there `amount` may be negative)."""
        series = self._series(name, ("counter", "gauge"), labels)
        assert isinstance(series, Counter | Gauge)
        series.inc(amount)

    def set(self, name: str, value: float, /, **labels: str) -> None:
        """Set a gauge. With worker="unknown" nothing is set: one value cannot stand for many workers."""
        series = self._series(name, ("gauge",), labels)
        assert isinstance(series, Gauge)
        if labels.get("worker") != UNKNOWN:
            series.set(value)

    def observe(self, name: str, value: float, /, **labels: str) -> None:
        """Add one observation to a histogram."""
        series = self._series(name, ("histogram",), labels)
        assert isinstance(series, Histogram)
        series.observe(value)

    @contextmanager
    def timed(self, name: str, /, **labels: str) -> Iterator[None]:
        """Observe how many seconds the block took, also when it raises."""
        series = self._series(name, ("histogram",), labels)
        assert isinstance(series, Histogram)
        started = perf_counter()
        try:
            yield
        finally:
            series.observe(perf_counter() - started)

    def info(self, name: str, /, **labels: str) -> None:
        """Export the facts `labels` with the value 1, in place of those exported before."""
        series = self._series(name, ("info",), labels)
        assert isinstance(series, Gauge)
        family = self._families[name]
        assert isinstance(family, Gauge)
        family.clear()
        family.labels(**labels).set(1)

    def declare(self, label: str, values: Iterable[str | int]) -> None:
        """Allow `values` for an open label (`worker`, `rule`, `attack`) and export their zeros.

        Values come from one's own roster or configuration, never from a peer. Of a larger roster the first 256 workers
        get series of their own, the others are counted as "unknown".
        """
        affected = [m for m in self._metrics.values() if m.kind != "info" and m.labels.get(label, ()) is None]
        if not affected:
            raise ValueError(f"no metric of a {self.role} has an open label {label!r}")
        wanted = dict.fromkeys((*self._declared.get(label, ()), *map(str, values)))
        limit = MAX_WORKER_SERIES + 1 if label == "worker" else len(wanted)
        self._declared[label] = tuple(wanted)[:limit]
        for metric in affected:
            self._preset(metric)

    def worker(self, worker: int | str) -> str:
        """The `worker` label for an id: itself if it is declared, else "unknown"."""
        label = str(worker)
        return label if label in self._declared["worker"] else UNKNOWN

    def serve(self, host: str, port: int) -> tuple[Callable[[], None], int]:
        """Serve /metrics over HTTP from a thread of its own: (stop, bound port). ConfigError if the address is taken.

        Port 0 lets the system choose. stop() may block for half a second: call it with asyncio.to_thread.
        """
        return scrape.serve(self.registry, host, port)

    def _preset(self, metric: Metric) -> None:
        if not metric.labels or not metric.preset or metric.kind == "info":
            return
        choices = [
            values if values is not None else self._declared.get(label, ()) for label, values in metric.labels.items()
        ]
        for values in product(*choices):
            if metric.kind == "gauge" and UNKNOWN in values:
                continue
            self._families[metric.name].labels(*values)

    def _series(self, name: str, kinds: tuple[Kind, ...], labels: dict[str, str]) -> Counter | Gauge | Histogram:
        metric = self._metrics.get(name)
        if metric is None:
            raise ValueError(f"the catalogue has no metric {name!r} for a {self.role}")
        if metric.kind not in kinds:
            raise ValueError(f"{name} is a {metric.kind}, used as a {' or '.join(kinds)}")
        if labels.keys() != metric.labels.keys():
            raise ValueError(f"{name} has the labels {sorted(metric.labels)}, got {sorted(labels)}")
        family = self._families[name]
        if not labels:
            return family
        if metric.kind == "info":
            return family
        for label, value in labels.items():
            allowed = metric.labels[label]
            if value not in (self._declared.get(label, ()) if allowed is None else allowed):
                raise ValueError(f"{name}: {value!r} is not an allowed value of the label {label}")
        if metric.kind == "gauge" and labels.get("worker") == UNKNOWN:
            return family
        return family.labels(**labels)


def _family(metric: Metric, registry: CollectorRegistry) -> Counter | Gauge | Histogram:
    if metric.kind == "histogram":
        return Histogram(metric.name, metric.help, tuple(metric.labels), registry=registry, buckets=LATENCY_SECONDS)
    return _CLASSES[metric.kind](metric.name, metric.help, tuple(metric.labels), registry=registry)
