"""The replicas of local models, as the router hears them: heartbeats become events, answers are permits."""

import math
import time
from collections.abc import Callable, Mapping

from deployments.offer import Offer
from serve_app.domain.catalog import RESIDENT, Entry
from serve_app.domain.fleet import Fleet, Report
from serve_app.domain.leasing import Permit
from serve_app.domain.rotation_events import Gone, Heartbeat, LoadFailed, MemoryMeasured, Request, ScaleOut
from serve_app.rotor import Rotor

MEASURE_S = 1.0
"""What replicas say of the memory of their node is believed so often."""
SCALE_S = 1.0
"""A model that wants more replicas than it may have asks again after so long."""


class Replicas:
    """See the module.

    Args:
        offer: which model an application serves.
        rotor: hears the events.
        fleet: keeps the reports.
        node_name: the name of a node, from Ray's id.
    """

    def __init__(self, offer: Offer, rotor: Rotor, fleet: Fleet, node_name: Callable[[str], str]) -> None:
        self._offer = offer
        self._rotor = rotor
        self._fleet = fleet
        self._node_name = node_name
        self._first_heard: dict[tuple[str, str], float] = {}
        self._scaled_at: dict[str, float] = {}
        self._measured_at: dict[str, float] = {}

    def may_load(self, application: str) -> Permit:
        """Whether a replica that has just started may load. One that Serve started by itself has to wait its turn."""
        entry = self._offer.by_application.get(application)
        if entry is None:
            return Permit(0, wait=True)
        permit = self._permit(entry)
        if permit.granted or not self._starts_by_itself(entry):
            return permit
        asked = Request(f"start of {application}", (entry.full_name,), "", lease=False)
        self._rotor.ask(asked)
        permit = self._permit(entry)
        return permit if permit.granted else Permit(0, permit.epoch, wait=True)

    def heard(self, report: Report) -> Permit | None:
        """Take a heartbeat."""
        now = time.time()
        entry = self._offer.behind(report.application)
        self._fleet.hear(report, now, entry.info.revision if entry and entry.info else "")
        self._first_heard.setdefault((report.application, report.replica_id), now)
        if entry is None or entry.full_name not in self._rotor.rotation.state.residency.rows:
            return None
        self._rotor.tell(
            Heartbeat(
                entry.full_name,
                report.replica_id,
                self._node_name(report.node),
                report.state,
                report.running + report.waiting,
                report.memory_bytes,
            )
        )
        if report.node_total and now - self._measured_at.get(report.node, 0.0) >= MEASURE_S:
            self._measured_at[report.node] = now
            self._rotor.tell(MemoryMeasured(self._node_name(report.node), report.node_used, report.node_total))
        if report.failure is not None and self._is_loading(entry):
            self._rotor.tell(LoadFailed(entry.full_name, report.failure))
        self._scale(entry, now)
        return self._permit(entry)

    def gone(self, application: str, replica_id: str) -> None:
        """A replica has ended."""
        self._fleet.forget(application, replica_id)
        self._first_heard.pop((application, replica_id), None)
        entry = self._offer.behind(application)
        if entry is not None:
            self._rotor.tell(Gone(entry.full_name, replica_id))

    def compare(self, listed: Mapping[str, frozenset[str]], asked_at: float) -> None:
        """Miss the replicas that Serve lists no more, and give up models of which it lists none.

        Args:
            listed: the replicas of each application, as Serve said.
            asked_at: when it was asked; it knew nothing of what was heard first after that.
        """
        for (application, replica), first_heard in list(self._first_heard.items()):
            if first_heard < asked_at and replica not in listed.get(application, frozenset()):
                self.gone(application, replica)
        rotation = self._rotor.rotation
        for resident in list(rotation.state.residency.residents.values()):
            entry = self._offer.find(resident.name)
            retirement = resident.retirement
            if entry is None or entry.shared or retirement is None or not retirement.sent:
                continue
            told = any(key[0] == entry.application for key in self._first_heard)
            if not told and retirement.since < asked_at and not listed.get(entry.application):
                self._rotor.tell(Gone(resident.name))

    def unattended(self, attended: set[str]) -> list[str]:
        """Models that load without anybody who waits for it, which is what keeps Serve at it."""
        rotation = self._rotor.rotation
        return [
            resident.name
            for resident in rotation.state.residency.residents.values()
            if resident.loading and resident.name not in attended and resident.name in self._offer.by_name
        ]

    def is_cold(self, application: str) -> bool:
        """Whether nothing of an application is in memory, or wanted there."""
        entry = self._offer.behind(application)
        if any(key[0] == application for key in self._first_heard):
            return False
        state = self._rotor.rotation.state
        name = entry.full_name if entry else ""
        return name not in state.residency.residents and name not in state.line.groups

    def _permit(self, entry: Entry) -> Permit:
        rotation = self._rotor.rotation
        resident = rotation.state.residency.residents.get(entry.full_name)
        epoch = resident.epoch if resident is not None else rotation.state.epoch
        return Permit(rotation.granted(entry.full_name), epoch)

    def _is_loading(self, entry: Entry) -> bool:
        resident = self._rotor.rotation.state.residency.residents.get(entry.full_name)
        return resident is not None and resident.loading

    def _starts_by_itself(self, entry: Entry) -> bool:
        args = self._offer.args_of(entry)
        return args.min_replicas >= 1 or bool(args.initial_replicas)

    def _scale(self, entry: Entry, now: float) -> None:
        """Ask for more replicas when there are more requests than those there should have, or for fewer again."""
        args = self._offer.args_of(entry)
        if args.max_replicas == 1 or now - self._scaled_at.get(entry.full_name, 0.0) < SCALE_S:
            return
        reports = [report for report in self._fleet.of(entry.application, now) if report.state in RESIDENT]
        requests = sum(report.running + report.waiting for report in reports)
        wanted = min(args.max_replicas, max(1, args.min_replicas, math.ceil(requests / args.target_ongoing_requests)))
        granted = self._rotor.rotation.granted(entry.full_name)
        if reports and granted and wanted != granted:
            self._scaled_at[entry.full_name] = now
            self._rotor.tell(ScaleOut(entry.full_name, wanted))
