"""The figures of one process, and how those of many become one page for Prometheus.

Counters and histograms are added up over all processes, those that are gone included: they never fall. Gauges are those
of the living. Names are OpenTelemetry's where it has one, written as Prometheus wants them; labels likewise.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.core import Metric as Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from serve_app.domain.generation import Timing, Usage
from serve_app.telemetry import semconv

Labels = tuple[tuple[str, str], ...]
"""The labels of a sample, each a pair of name and value."""
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
NODE_WIDE = "rotunda_node_"
"""Gauges that every process of a node reports alike: they are not added up."""
_REPLY = (semconv.OPERATION, semconv.PROVIDER, semconv.REQUEST_MODEL, semconv.RESPONSE_MODEL)


def label(name: str) -> str:
    """An attribute's name as a label's."""
    return name.replace(".", "_")


def metric(name: str, unit: str) -> str:
    """A metric's name as Prometheus writes it."""
    return f"{label(name)}_{unit}"


class Metrics:
    """The counters and histograms of a process, and what it is asked for when somebody wants to know."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        labels = [label(name) for name in _REPLY]
        self._duration = self._histogram(
            metric(semconv.REQUEST_DURATION, "seconds"),
            "From the request for a reply to its end.",
            [*labels, label(semconv.ERROR_TYPE)],
            semconv.DURATION_BUCKETS,
        )
        self._first_token = self._histogram(
            metric(semconv.TIME_TO_FIRST_TOKEN, "seconds"),
            "From the request for a reply to its first text.",
            labels,
            semconv.FIRST_TOKEN_BUCKETS,
        )
        self._per_token = self._histogram(
            metric(semconv.TIME_PER_OUTPUT_TOKEN, "seconds"),
            "Mean time from one token of a reply to the next.",
            labels,
            semconv.PER_TOKEN_BUCKETS,
        )
        self._tokens = self._counter(
            "rotunda_tokens", "Tokens that requests brought and replies were made of.", ["type", "model", "provider"]
        )
        self._sessions = self._counter("rotunda_sessions", "Stream sessions that have ended.", ["status", "reason"])
        self._loads = self._counter("rotunda_loads", "Loads of models.", ["model", "outcome"])
        self._load_time = self._histogram(
            "rotunda_load_duration_seconds",
            "From a replica's start to its readiness.",
            ["model"],
            (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640),
        )
        self._evictions = self._counter("rotunda_evictions", "Models that left memory.", ["model", "reason"])
        self._spans_lost = self._counter("rotunda_spans_lost", "Spans that nobody will see.", ["reason"])

    def _counter(self, name: str, text: str, labels: Sequence[str]) -> Counter:
        return Counter(name, text, labels, registry=self._registry)

    def _histogram(self, name: str, text: str, labels: Sequence[str], buckets: Sequence[float]) -> Histogram:
        return Histogram(name, text, labels, registry=self._registry, buckets=buckets)

    def watch(self, look: Callable[[], Iterable[Metric]]) -> None:
        """Ask ``look`` for figures whenever a snapshot is taken; see :func:`gauge` and :func:`counter`."""
        self._registry.register(_Watched(look))

    def reply(
        self, about: Mapping[str, Any], timing: Timing, usage: Usage | None, error: str | None, whole: bool
    ) -> None:
        """A reply has ended, whole or not: the convention wants the times of those that succeeded only.

        Args:
            about: the attributes of its span.
            timing: where its time went.
            usage: its tokens, of one that broke off those that there were; None when the model never had it.
            error: the same error type as on the span.
            whole: whether it came to its own end.
        """
        values = [str(about.get(name) or "") for name in _REPLY]
        self._duration.labels(*values, error or "").observe(timing.total_s)
        if usage is None:
            return
        model, provider = values[3], values[1]
        self._tokens.labels("input", model, provider).inc(usage.prompt_tokens)
        self._tokens.labels("output", model, provider).inc(usage.completion_tokens)
        if whole and timing.ttft_s is not None:
            self._first_token.labels(*values).observe(timing.ttft_s)
        if whole and usage.completion_tokens > 1:
            self._per_token.labels(*values).observe(timing.decode_s / (usage.completion_tokens - 1))

    def session_ended(self, status: str, reason: str = "") -> None:
        self._sessions.labels(status, reason).inc()

    def loaded(self, model: str, seconds: float, error: str | None) -> None:
        """A load has ended, well or with an error type."""
        self._loads.labels(model, error or "ok").inc()
        if error is None:
            self._load_time.labels(model).observe(seconds)

    def evicted(self, model: str, reason: str) -> None:
        self._evictions.labels(model, reason).inc()

    def spans_lost(self, count: int, reason: str) -> None:
        self._spans_lost.labels(reason).inc(count)

    def snapshot(self) -> bytes:
        """All figures as they stand, for :class:`Totals`."""
        return pickle.dumps([_family(found) for found in self._registry.collect()], pickle.HIGHEST_PROTOCOL)


class _Watched(Collector):
    def __init__(self, look: Callable[[], Iterable[Metric]]) -> None:
        self._look = look

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterable[Metric]:
        return self._look()


def gauge(name: str, text: str, values: Mapping[Labels, float]) -> Metric:
    """A figure that rises and falls; ``values`` by their labels."""
    return _filled(GaugeMetricFamily(name, text), name, values)


def counter(name: str, text: str, values: Mapping[Labels, float]) -> Metric:
    """A figure that only rises while the process lives."""
    return _filled(CounterMetricFamily(name, text), f"{name}_total", values)


def _filled(family: Metric, name: str, values: Mapping[Labels, float]) -> Metric:
    for labels, value in values.items():
        family.add_sample(name, dict(labels), value)
    return family


NOTHING = pickle.dumps([])
"""The snapshot of a process of which nothing is known."""
Key = tuple[str, Labels]
"""A sample: its name and its labels."""


@dataclass(slots=True)
class Family:
    """One metric with all its samples."""

    name: str
    kind: str
    text: str
    samples: dict[Key, float] = field(default_factory=dict)

    def add(self, other: Family) -> None:
        """Take in the same metric of another process."""
        keep_one = self.name.startswith(NODE_WIDE)
        for key, value in other.samples.items():
            self.samples[key] = value if keep_one else self.samples.get(key, 0.0) + value


def _family(found: Metric) -> tuple[str, str, str, list[tuple[str, tuple[tuple[str, str], ...], float]]]:
    samples = [
        (sample.name, tuple(sorted(sample.labels.items())), sample.value)
        for sample in found.samples
        if not sample.name.endswith("_created")
    ]
    return found.name, found.type, found.documentation, samples


@dataclass
class Totals:
    """The figures of all processes, the last snapshot of each. One writer: the router.

    A process is away when it said farewell, or nothing for ``silence_s``; then its gauges count no more. After
    ``fold_s`` it cannot come back, and its counters become part of one sum.
    """

    silence_s: float = 15.0
    fold_s: float = 3600.0
    _heard: dict[str, tuple[float, bytes]] = field(default_factory=dict)
    _left: set[str] = field(default_factory=set)
    _folded: dict[str, Family] = field(default_factory=dict)

    def hear(self, process: str, snapshot: bytes | None, now: float, leaves: bool = False) -> None:
        """A process reports; without a snapshot its last one still stands."""
        known = self._heard.get(process, (0.0, NOTHING))[1]
        self._heard[process] = (now, known if snapshot is None else snapshot)
        (self._left.add if leaves else self._left.discard)(process)

    def away(self, process: str, now: float) -> bool:
        heard = self._heard.get(process)
        return process in self._left or heard is None or now - heard[0] > self.silence_s

    def page(self, now: float) -> bytes:
        """Everything, in Prometheus' text format (https://prometheus.io/docs/instrumenting/exposition_formats/)."""
        self._fold(now)
        total = {
            name: Family(known.name, known.kind, known.text, dict(known.samples))
            for name, known in self._folded.items()
        }
        for process, (_, snapshot) in sorted(self._heard.items(), key=lambda item: item[1][0]):
            _add(total, snapshot, counters_only=self.away(process, now))
        return bytes(generate_latest(_Page(total)))

    def _fold(self, now: float) -> None:
        for process in [process for process, (at, _) in self._heard.items() if now - at > self.fold_s]:
            _add(self._folded, self._heard.pop(process)[1], counters_only=True)
            self._left.discard(process)

    def to_rows(self) -> list[tuple[str, float, bool, bytes]]:
        """For a router that takes over: process, when it was heard, whether it left, snapshot."""
        return [(process, at, process in self._left, data) for process, (at, data) in self._heard.items()]


def _add(total: dict[str, Family], snapshot: bytes, counters_only: bool) -> None:
    for name, kind, text, samples in pickle.loads(snapshot):
        if counters_only and kind not in ("counter", "histogram"):
            continue
        family = Family(name, kind, text, {(sample, labels): value for sample, labels, value in samples})
        if name in total:
            total[name].add(family)
        else:
            total[name] = family


class _Page:
    """What the library's writer reads."""

    def __init__(self, families: Mapping[str, Family]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        for family in sorted(self._families.values(), key=lambda family: family.name):
            made = Metric(family.name, family.text, family.kind)
            made.samples = [Sample(name, dict(labels), value) for (name, labels), value in family.samples.items()]
            yield made
