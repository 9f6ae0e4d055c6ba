"""Remote providers as their upstream replicas describe them: what they offer, what is in memory, what is wrong."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from serve_app.domain.catalog import Entry, ModelInfo, ModelState
from serve_app.domain.fleet import REPORT_TTL_S, ProviderStatus, Report

UPSTREAM_DEPLOYMENT = "upstream"


@dataclass
class Use:
    """What one replica has forwarded to one model since it started."""

    running: int = 0
    requests: int = 0
    failed: int = 0
    cancelled: int = 0
    busy_seconds: float = 0.0
    last_used_at: float | None = None


@dataclass(frozen=True, slots=True)
class UpstreamReport:
    """One heartbeat of an upstream replica.

    ``models`` is None when they are those of ``revision``, which the router knows already. ``residents`` are the bytes
    of each model in the server's memory, None when it does not say. ``error``: why its models cannot be asked, as
    ``RotundaError.to_dict`` gives it.
    """

    provider: str
    kind: str
    application: str
    replica_id: str
    pid: int
    revision: str = ""
    models: tuple[ModelInfo, ...] | None = None
    residents: Mapping[str, int] | None = None
    uses: Mapping[str, Use] = field(default_factory=dict)
    error: Mapping[str, Any] | None = None

    def state_of(self, model: str) -> ModelState:
        """Where a model is in its life, as far as this replica knows."""
        resident = self.residents is None or model in self.residents
        if model in self.uses and self.uses[model].running:
            return ModelState.BUSY if resident else ModelState.LOADING
        return ModelState.READY if resident else ModelState.COLD

    def of(self, entry: Entry) -> Report:
        """This replica's report of one model, as a local model's replica gives it."""
        use = self.uses.get(entry.id, Use())
        return Report(
            application=entry.unit,
            replica_id=self.replica_id,
            state=self.state_of(entry.id),
            pid=self.pid,
            engine=self.kind,
            running=use.running,
            requests=use.requests,
            failed=use.failed,
            cancelled=use.cancelled,
            busy_seconds=use.busy_seconds,
            memory_bytes=(self.residents or {}).get(entry.id),
            last_used_at=use.last_used_at,
        )


def put_up_and_take_down(
    wanted: Mapping[str, str], standing: Mapping[str, str], running: Collection[str], declared: Collection[str]
) -> tuple[set[str], set[str]]:
    """Which applications of providers must be put up, anew where their arguments have changed, and which must go.

    Args:
        wanted: applications that ought to stand, each with its arguments.
        standing: those that this router or an earlier one put up, with the arguments of then.
        running: what Serve runs.
        declared: applications that somebody else put up; never touched.
    """
    missing = {name for name, args in wanted.items() if name not in running or standing.get(name, args) != args}
    return missing - set(declared), standing.keys() & set(running) - wanted.keys() - set(declared)


@dataclass
class Upstreams:
    """The last report of every upstream replica, and the models of every provider. One writer: the router."""

    _reports: dict[tuple[str, str], tuple[float, UpstreamReport]] = field(default_factory=dict)
    _models: dict[str, tuple[str, tuple[ModelInfo, ...]]] = field(default_factory=dict)

    def hear(self, report: UpstreamReport, now: float) -> bool:
        """Take a report; the answer says whether its list of models is known, else the next one must hold it."""
        self._reports[report.application, report.replica_id] = (now, report)
        if report.models is not None:
            self._models[report.application] = (report.revision, report.models)
        return self._models.get(report.application, ("", ()))[0] == report.revision

    def forget(self, application: str, replica_id: str) -> None:
        self._reports.pop((application, replica_id), None)

    def of(self, application: str, now: float) -> list[UpstreamReport]:
        """The reports of the replicas that are alive."""
        return [
            report
            for (name, _), (at, report) in self._reports.items()
            if name == application and now - at <= REPORT_TTL_S
        ]

    def problem(self, application: str, now: float) -> str | None:
        """Why no model of the provider can be asked right now; None when one replica at least finds nothing wrong."""
        reports = self.of(application, now)
        if not reports:
            return "its upstream application does not answer (yet)"
        if any(report.error is None for report in reports):
            return None
        return str((reports[0].error or {}).get("message"))

    def entries(self, provider: str, application: str, declared: bool, now: float) -> Iterator[Entry]:
        """The models of a provider. Those it had stay, with the reason, when it cannot be asked."""
        reason = self.problem(application, now)
        for info in self._models.get(application, ("", ()))[1]:
            yield Entry(info.id, provider, application, UPSTREAM_DEPLOYMENT, info, declared, reason=reason, shared=True)

    def status(self, provider: str, kind: str, application: str, now: float) -> ProviderStatus:
        reason = self.problem(application, now)
        count = 0 if reason else len(self._models.get(application, ("", ()))[1])
        return ProviderStatus(provider, kind, "error" if reason else "ok", count, reason)

    def model_reports(self, entries: Iterable[Entry], application: str, now: float) -> Iterator[Report]:
        """What the replicas of one provider say of each of its models."""
        reports = self.of(application, now)
        for entry in entries:
            if entry.application == application:
                yield from (report.of(entry) for report in reports)


def resident_reports(reports: Iterable[UpstreamReport], entry: Entry) -> Report | None:
    """What the replicas of a provider say together of a model in its server's memory; None when it is not there.

    The server is one, however many replicas forward to it.
    """
    known = [report for report in reports if report.residents is not None]
    if not any(entry.id in (report.residents or {}) for report in known):
        return None
    each = [report.of(entry) for report in known]
    running = sum(report.running for report in each)
    memory = max((report.memory_bytes or 0 for report in each), default=0)
    state = ModelState.BUSY if running else ModelState.READY
    return Report(entry.unit, entry.application, state, running=running, memory_bytes=memory)
