"""How residents leave: leases are revoked first, replicas are retired when nobody can call them any more.

A single late call to a retiring model would wake it and take the memory back, so :class:`Retire` goes out only when
every holder has acknowledged or its lease has surely ended.
"""

from __future__ import annotations

from serve_app.domain.residency import Resident, Retirement
from serve_app.domain.rotation_effects import Extend, Retire, Revoke
from serve_app.domain.rotation_events import Acknowledged, LeaseReleased, LeaseRenewed
from serve_app.domain.rotation_state import State
from serve_app.domain.routing import Lease

IN_FLIGHT_S = 1.0
"""How long a holder's word that its calls still run counts; the heartbeats of the replica say the same by then."""


class Departures:
    """Leases and retirements."""

    def __init__(self, state: State) -> None:
        self._state = state

    def lease(self, resident: Resident, holder: str) -> Lease:
        """Give ``holder`` the right to call the model."""
        limits = self._state.limits
        resident.leases[holder] = self._state.now + limits.lease_ttl_s + limits.lease_slack_s
        return Lease(resident.name, resident.epoch, limits.lease_ttl_s)

    def promise(self, resident: Resident, ticket: str) -> None:
        """Keep the model for a request that was granted, until its holder comes for that: as long as for a lease."""
        limits = self._state.limits
        resident.promised[ticket] = self._state.now + limits.lease_ttl_s + limits.lease_slack_s

    def use(self, resident: Resident) -> None:
        """Requests were let in to the model just now."""
        resident.used_until = self._state.now + self._state.limits.settle_s
        self._state.residency.rows[resident.name].last_used = self._state.now

    def begin(self, resident: Resident, reason: str, drain: bool = False, wanted_by: str | None = None) -> None:
        """Start to retire a resident: from now on nobody gets a lease on it."""
        state = self._state
        resident.drop_expired(state.now)
        revoked, resident.epoch = resident.epoch, state.next_epoch()
        resident.retirement = Retirement(reason, state.now, revoked, drain, wanted_by)
        for holder in sorted(resident.leases):
            state.emit(Revoke(resident.name, holder, revoked, reason))
        state.note("drain" if drain else "revoke", resident.name, reason)
        state.stir()

    def quiet_at(self, resident: Resident) -> float:
        """When whoever runs a resident that leaves has surely forgotten the calls to it that have ended."""
        limits, retirement = self._state.limits, resident.retirement
        quiet = resident.fresh_until(limits.fresh_s)
        last_used = self._state.residency.rows[resident.name].last_used
        # What a holder used lately it has not told yet.
        if retirement is not None and last_used >= retirement.since - limits.lease_ttl_s:
            quiet = max(quiet, retirement.since + limits.echo_s)
        return quiet

    def keep(self, resident: Resident, reason: str) -> None:
        """Let a resident stay whose replicas were not told yet."""
        resident.retirement = None
        self._state.note("keep", resident.name, reason)
        self._state.stir()

    def settle(self) -> None:
        """Retire those that no lease protects any more; keep those that turned out to be busy."""
        state = self._state
        if state.waits_for_news:
            return
        for resident in list(state.residency.residents.values()):
            retirement = resident.retirement
            if retirement is None or retirement.sent:
                continue
            resident.drop_expired(state.now)
            if resident.leases or state.now < self.quiet_at(resident):
                continue
            if resident.busy(state.now) and not retirement.drain:
                state.residency.pending.pop(retirement.wanted_by or "", None)
                self.keep(resident, "requests were still running when its leases had ended")
            else:
                retirement.sent = True
                state.emit(Retire(resident.name, resident.epoch, retirement.drain, retirement.reason))
                state.note("retire", resident.name, retirement.reason)

    def keep_unwanted(self) -> None:
        """Let those stay that were to leave for a load that is wanted no more."""
        pending = self._state.residency.pending
        for resident in self._state.residency.residents.values():
            retirement = resident.retirement
            if retirement and not retirement.sent and retirement.wanted_by and retirement.wanted_by not in pending:
                self.keep(resident, f"{retirement.wanted_by} does not need its room any more")

    def renewed(self, event: LeaseRenewed) -> None:
        """Extend a lease, or say that it has ended. Leases of an earlier router are taken over."""
        state, resident = self._state, self._state.residency.residents.get(event.model)
        if event.uses > 0 and event.model in state.residency.rows:
            state.popularity.arrived(event.model, event.uses)
            state.note_use(event.model, event.holder, event.uses)
        row = state.residency.rows.get(event.model)
        if row is not None and not row.model.resides:
            state.emit(Extend(event.holder, Lease(event.model, state.epoch, state.limits.lease_ttl_s)))
            return
        if resident is None or not resident.ready:
            self._deny(event, resident)
            return
        if event.uses > 0:
            self.use(resident)
        state.emit(Extend(event.holder, self.lease(resident, event.holder)))

    def acknowledged(self, event: Acknowledged) -> None:
        """A holder calls no more. One that acknowledges an older epoch than it was asked for has missed the news."""
        resident = self._state.residency.residents.get(event.model)
        if resident is None or resident.retirement is None:
            return
        if event.epoch >= resident.retirement.revoked:
            resident.leases.pop(event.holder, None)
        if event.in_flight > 0:
            resident.used_until = self._state.now + max(self._state.limits.settle_s, IN_FLIGHT_S)

    def released(self, event: LeaseReleased) -> None:
        resident = self._state.residency.residents.get(event.model)
        if resident is None:
            return
        resident.leases.pop(event.holder, None)
        if not resident.leases:
            resident.used_until = self._state.now
        self._state.stirred = True

    def _deny(self, event: LeaseRenewed, resident: Resident | None) -> None:
        state, epoch = self._state, self._state.epoch
        if resident is not None and resident.retirement is not None:
            epoch = resident.retirement.revoked
            if state.waits_for_news and event.holder not in resident.leases:
                self.lease(resident, event.holder)  # of an earlier router: it must end before the model is retired
        state.emit(Revoke(event.model, event.holder, epoch, "the model is not in memory"))
