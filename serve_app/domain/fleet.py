"""What the replicas said last, and the state of every model that follows from it. No I/O; the clock is passed in."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from serve_app.domain.catalog import RESIDENT, Catalogue, Entry, ModelState
from serve_app.domain.routing import FleetState

REPORT_TTL_S = 5.0
"""A replica that has said nothing for so long is taken for gone."""


@dataclass(frozen=True, slots=True)
class Report:
    """One heartbeat of a replica. Counters grow from its start; ``memory_bytes`` is its proportional set size."""

    application: str
    replica_id: str
    state: ModelState
    pid: int = 0
    node: str = ""
    engine: str | None = None
    reason: str | None = None
    failure: dict[str, Any] | None = None
    """The error that keeps a failed replica from answering, as ``RotundaError.to_dict`` gives it."""
    progress: float | None = None
    running: int = 0
    waiting: int = 0
    requests: int = 0
    failed: int = 0
    cancelled: int = 0
    completion_tokens: int = 0
    tokens_after_cancel: int = 0
    busy_seconds: float = 0.0
    """Sum over the finished requests of the time from request to last token."""
    memory_bytes: int | None = None
    node_used: int = 0
    node_total: int = 0
    """Memory of its node that is in use by whomever, and all of it, in bytes; 0 when it was not measured."""
    loaded_at: float | None = None
    last_used_at: float | None = None
    number: int = 0
    """Counts the replica's reports: two may overtake each other on their way."""


@dataclass(frozen=True, slots=True)
class ModelStatus:
    """One model as the fleet shows it; times are seconds since the epoch."""

    entry: Entry
    name: str
    state: ModelState
    reports: tuple[Report, ...] = ()
    pinned: bool = False
    reason: str | None = None

    @property
    def resident(self) -> bool:
        return self.state in RESIDENT

    def total(self, counter: str) -> Any:
        return sum(getattr(report, counter) or 0 for report in self.reports)

    def to_json(self) -> dict[str, Any]:
        info, reports = self.entry.info, self.reports
        finished = self.total("requests") - self.total("running") - self.total("waiting")
        memory = [report.memory_bytes for report in reports if report.memory_bytes is not None]
        return {
            "name": self.name,
            "id": self.entry.id,
            "provider": self.entry.provider,
            "task": info.task.value if info and info.task else None,
            "architecture": info.architecture if info else None,
            "parameters": info.parameters if info else None,
            "capabilities": sorted(self.entry.capabilities),
            "state": self.state.value,
            "pinned": self.pinned,
            "declared": self.entry.declared,
            "sizeBytes": info.size_bytes if info else None,
            "memoryBytes": sum(memory) if memory else None,
            "contextLength": info.context_length if info else None,
            "quantization": info.quantization if info else None,
            "progress": max((report.progress for report in reports if report.progress is not None), default=None),
            "engine": next((report.engine for report in reports if report.engine), None),
            "loadedAt": min((report.loaded_at for report in reports if report.loaded_at), default=None),
            "lastUsedAt": max((report.last_used_at for report in reports if report.last_used_at), default=None),
            "replicas": sum(report.state in RESIDENT for report in reports),
            "pids": sorted(report.pid for report in reports),
            "running": self.total("running"),
            "waiting": self.total("waiting"),
            "requestCount": self.total("requests"),
            "errorCount": self.total("failed"),
            "cancelledCount": self.total("cancelled"),
            "tokensGenerated": self.total("completion_tokens"),
            "tokensAfterCancel": self.total("tokens_after_cancel"),
            "averageResponseMs": round(1000 * self.total("busy_seconds") / finished, 1) if finished > 0 else None,
            "reason": self.reason,
        }


@dataclass(frozen=True, slots=True)
class ProviderStatus:
    """How the discovery of one provider's models went."""

    name: str
    kind: str
    status: Literal["ok", "error"]
    model_count: int
    error: str | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "kind": self.kind,
            "status": self.status,
            "error": self.error,
            "modelCount": self.model_count,
        }


@dataclass(frozen=True, slots=True)
class FleetView:
    """A picture of the fleet at one moment; ``notes`` are the router's own troubles, in plain words."""

    models: tuple[ModelStatus, ...] = ()
    providers: tuple[ProviderStatus, ...] = ()
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {
            "models": [status.name for status in self.models],
            "count": len(self.models),
            "items": [status.to_json() for status in self.models],
            "providers": [provider.to_json() for provider in self.providers],
        }


@dataclass(frozen=True, slots=True)
class Failed:
    """Why a model cannot be loaded: the error, and the revision of the files for which it holds."""

    revision: str
    error: dict[str, Any]


@dataclass
class Fleet:
    """The last report of every replica. One writer: the router."""

    reports: dict[str, dict[str, tuple[float, Report]]] = field(default_factory=dict)
    """By application (see :attr:`Entry.unit`) and replica: when it came, and what it said."""
    starting: dict[str, float] = field(default_factory=dict)
    """Applications whose first replica was asked for, and when."""
    failed: dict[str, Failed] = field(default_factory=dict)
    """Applications whose model cannot be loaded, until its files change."""

    def hear(self, report: Report, now: float, revision: str = "") -> None:
        """Take a report, unless a later one is known; ``revision`` is that of the model's files right now."""
        replicas = self.reports.setdefault(report.application, {})
        _, known = replicas.get(report.replica_id, (now, report))
        if known.number > report.number:
            return
        replicas[report.replica_id] = (now, report)
        self.starting.pop(report.application, None)
        if report.failure is not None and not report.failure.get("retryable"):
            self.failed[report.application] = Failed(revision, report.failure)
        elif report.state in RESIDENT:
            self.failed.pop(report.application, None)

    def expect(self, application: str, now: float) -> None:
        """A load was asked for: the model counts as loading until a replica speaks or a minute has passed."""
        if not self.of(application, now):
            self.starting.setdefault(application, now)

    def forget(self, application: str, replica_id: str) -> None:
        self.reports.get(application, {}).pop(replica_id, None)

    def prune(self, now: float) -> None:
        """Drop the replicas that fell silent and the loads that nobody heard of again."""
        for name, replicas in list(self.reports.items()):
            self.reports[name] = {key: heard for key, heard in replicas.items() if now - heard[0] <= REPORT_TTL_S}
            if not self.reports[name]:
                del self.reports[name]
        self.starting = {name: since for name, since in self.starting.items() if now - since <= 60}

    def of(self, application: str, now: float) -> tuple[Report, ...]:
        heard = self.reports.get(application, {}).values()
        return tuple(report for at, report in heard if now - at <= REPORT_TTL_S)

    def failure_of(self, entry: Entry) -> dict[str, Any] | None:
        """The error that a call to the model would end with, when that is known: its files are still the same."""
        failed = self.failed.get(entry.unit)
        revision = entry.info.revision if entry.info else ""
        return failed.error if failed is not None and failed.revision == revision else None

    def state_of(self, entry: Entry, now: float) -> tuple[ModelState, str | None]:
        """The model's state and, when there is one to give, the reason for it."""
        if entry.reason is not None:
            return ModelState.UNAVAILABLE, entry.reason
        failure = self.failure_of(entry)
        if failure is not None:
            return ModelState.FAILED, str(failure["message"])
        reports = self.of(entry.unit, now)
        for state in (ModelState.BUSY, ModelState.READY, ModelState.LOADING, ModelState.RETIRING, ModelState.FAILED):
            for report in reports:
                if report.state is state:
                    return state, report.reason
        return (ModelState.LOADING if entry.unit in self.starting else ModelState.COLD), None

    def expected_s(self, entry: Entry, now: float) -> float:
        """See :meth:`serve_app.domain.routing.FleetState.expected_s`."""
        reports = self.of(entry.unit, now)
        outstanding = sum(report.running + report.waiting for report in reports)
        finished = sum(report.requests for report in reports) - outstanding
        busy_s = sum(report.busy_seconds for report in reports)
        return busy_s / finished * (1 + outstanding / len(reports)) if finished > 0 else 0.0

    def at(self, now: float) -> Moment:
        """The fleet as it stands at ``now``, as routing wants it."""
        return Moment(self, now)

    def view(
        self,
        catalogue: Catalogue,
        now: float,
        pinned: frozenset[str] = frozenset(),
        providers: tuple[ProviderStatus, ...] = (),
        notes: tuple[str, ...] = (),
        states: FleetState | None = None,
    ) -> FleetView:
        """The fleet at ``now``; ``states`` knows better than the reports in which state each model is."""
        models = []
        for entry in catalogue.entries:
            state, reason = (states or self.at(now)).state_of(entry)
            reports = self.of(entry.unit, now)
            name = catalogue.name_of(entry)
            models.append(ModelStatus(entry, name, state, reports, entry.full_name in pinned, reason))
        return FleetView(tuple(models), providers, notes)


@dataclass(frozen=True, slots=True)
class Moment:
    """A fleet at a fixed time."""

    fleet: Fleet
    now: float

    def state_of(self, entry: Entry) -> tuple[ModelState, str | None]:
        return self.fleet.state_of(entry, self.now)

    def expected_s(self, entry: Entry) -> float:
        return self.fleet.expected_s(entry, self.now)

    def failure_of(self, entry: Entry) -> dict[str, Any] | None:
        return self.fleet.failure_of(entry)


def state_from_counters(running: int, waiting: int) -> ModelState:
    """Ready or busy, for a replica whose engine is loaded."""
    return ModelState.BUSY if running or waiting else ModelState.READY
