"""What others know, as figures: engines, breakers, the router's pictures of the fleet and of the rotation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Protocol

from serve_app.domain.breaker import Circuit
from serve_app.domain.fleet import FleetView
from serve_app.domain.rotation_view import RotationView
from serve_app.telemetry.metrics import Labels, Metric, counter, gauge


class Counts(Protocol):
    """What an engine counts (:class:`serve_app.engines.base.Counters`)."""

    @property
    def finished(self) -> int: ...
    @property
    def failed(self) -> int: ...
    @property
    def cancelled(self) -> int: ...
    @property
    def completion_tokens(self) -> int: ...
    @property
    def tokens_after_cancel(self) -> int: ...


def engine_figures(counts: Counts, model: str) -> Iterator[Metric]:
    """What one replica has done since it came up."""
    labels = (("model", model),)
    outcomes = {"finished": counts.finished, "failed": counts.failed, "cancelled": counts.cancelled}
    yield counter(
        "rotunda_engine_requests",
        "Requests that engines have ended.",
        {(*labels, ("outcome", outcome)): float(count) for outcome, count in outcomes.items()},
    )
    yield counter("rotunda_engine_tokens", "Tokens that engines have made.", {labels: float(counts.completion_tokens)})
    yield counter(
        "rotunda_tokens_after_cancel",
        "Tokens that engines made for requests that nobody wanted any more.",
        {labels: float(counts.tokens_after_cancel)},
    )


def memory_figures(model: str, replica: str, node: str, resident: int, gpu: int | None) -> Iterator[Metric]:
    """Memory of one replica: of its process, and of the GPUs when it uses any."""
    labels = (("model", model), ("replica", replica), ("node", node))
    yield gauge("rotunda_replica_memory_bytes", "Proportional set size of a replica.", {labels: float(resident)})
    if gpu is not None:
        yield gauge("rotunda_replica_gpu_memory_bytes", "GPU memory that a replica holds.", {labels: float(gpu)})


def breaker_figures(states: Mapping[str, Circuit]) -> Iterator[Metric]:
    """Ways to models and providers that are not closed, by how many ingresses see them so."""
    yield gauge(
        "rotunda_breakers",
        "Ingresses that hold the way to a model or provider for broken (open) or try it (half_open).",
        {(("way", way), ("state", state.value)): 1.0 for way, state in states.items()},
    )


_DEPARTURES = {
    "room for ": "room",
    " has waited for ": "waited",
    "it was idle": "idle",
    "memory is short": "memory",
    "its load failed": "load_failed",
    "an operator": "operator",
    "its files have changed": "changed",
}
"""Why models leave memory: from the rotation's words, which name models and times, to a few that can be counted."""


def departure(reason: str) -> str:
    """The kind of a reason that the rotation gave for a retirement; "other" for one that is not known here."""
    return next((kind for words, kind in _DEPARTURES.items() if words in reason), "other")


def fleet_figures(view: FleetView) -> Iterator[Metric]:
    """What the replicas said last: states, work, measured memory."""
    states = Counter(status.state.value for status in view.models)
    yield gauge(
        "rotunda_models", "Models by state.", {(("state", state),): float(count) for state, count in states.items()}
    )
    running: dict[Labels, float] = {}
    waiting: dict[Labels, float] = {}
    measured: dict[Labels, float] = {}
    for status in view.models:
        labels = (("model", status.name), ("provider", status.entry.provider))
        if status.reports:
            running[labels], waiting[labels] = status.total("running"), status.total("waiting")
            measured[labels] = status.total("memory_bytes")
    yield gauge("rotunda_requests_running", "Requests that a model works on.", running)
    yield gauge("rotunda_requests_waiting", "Requests that wait in a model's own queue.", waiting)
    yield gauge("rotunda_model_memory_measured_bytes", "Memory that the replicas of a model hold.", measured)


def rotation_figures(view: RotationView) -> Iterator[Metric]:
    """Who waits for which model, and what is counted for those that hold memory."""
    queue = Counter(waiting.model for waiting in view.queue)
    yield gauge(
        "rotunda_queue_depth",
        "Requests that wait for a model to come into memory.",
        {(("model", model),): float(count) for model, count in queue.items()},
    )
    declared: dict[Labels, float] = {(("model", each.model),): each.held.memory for each in view.residents}
    yield gauge("rotunda_model_memory_declared_bytes", "Memory that is counted for a model.", declared)
    free: dict[Labels, float] = {(("place", node.name),): node.free.memory for node in view.nodes}
    yield gauge("rotunda_room_free_bytes", "Memory that models may still be given, by place.", free)
    warned: dict[Labels, float] = {(("kind", kind),): float(count) for kind, count in view.counts.items()}
    yield counter("rotunda_rotation_warnings", "Failed loads, and thresholds of memory that were crossed.", warned)


def thresholds(levels: Mapping[str, float]) -> Metric:
    """The fractions of a node's memory from which something is done."""
    values: dict[Labels, float] = {(("level", level),): value for level, value in levels.items()}
    return gauge("rotunda_memory_threshold_ratio", "Memory thresholds of rotation.", values)
