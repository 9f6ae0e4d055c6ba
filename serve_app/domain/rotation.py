"""Rotation: which models hold memory, who waits for which, and why.

Events go in, effects come out; one writer, synchronous, no clock of its own. docs/rotation.md has the rules. They live
in :mod:`queue` (whose turn it is), :mod:`admissions` (which load is next), :mod:`planning` and :mod:`eviction` (where,
and who leaves), :mod:`departures` (leases and retirements) and :mod:`loads` (replicas). This module holds what each
event means and the order in which the parts act.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from heapq import merge
from typing import Any

from serve_app.domain.admissions import Admissions
from serve_app.domain.catalog import ModelState
from serve_app.domain.departures import Departures
from serve_app.domain.errors import ModelNotFound, ModelTooLarge
from serve_app.domain.eviction import COST_AWARE, Policy, victims_for
from serve_app.domain.loads import Loads
from serve_app.domain.placement import NOTHING, Resources
from serve_app.domain.planning import Plan, evictables, obstacle, plan
from serve_app.domain.pressure import Level, Pressure
from serve_app.domain.residency import Row
from serve_app.domain.rotation_effects import Decision, Effect, Log, Notify
from serve_app.domain.rotation_events import (
    Acknowledged,
    Cancel,
    CapacityChanged,
    Claimed,
    EmergencyCleanup,
    Event,
    Gone,
    Heartbeat,
    LeaseReleased,
    LeaseRenewed,
    Limits,
    LoadFailed,
    MemoryMeasured,
    Pin,
    ProviderDown,
    ProviderUp,
    Recalled,
    Registered,
    Request,
    Retuned,
    ScaleOut,
    Tick,
    Unload,
    Unregistered,
)
from serve_app.domain.rotation_state import State


class Rotation:
    """The one writer of the fleet's memory.

    Args:
        now: seconds, on the clock of all events. Starts the barrier of ``limits.barrier_s``: until it has passed,
            residents and tickets are only taken in, and nothing is loaded or retired.
        limits: the settings.
        policy: which victims are cheapest.
        generation: of the router; greater than that of every router before it.
    """

    def __init__(
        self, now: float = 0.0, limits: Limits | None = None, policy: Policy = COST_AWARE, generation: int = 1
    ) -> None:
        limits = limits or Limits()
        self._state = State(limits, policy, generation, now, now + limits.barrier_s)
        self._departures = Departures(self._state)
        self._loads = Loads(self._state, self._departures)
        self._admissions = Admissions(self._state, self._departures, self._loads)
        self._starting = True
        self._hear: Mapping[type[Any], Callable[[Any], None]] = {
            Registered: self._registered,
            Unregistered: self._unregistered,
            Recalled: self._recalled,
            CapacityChanged: self._capacity_changed,
            Request: self._admissions.request,
            Claimed: self._admissions.claimed,
            Cancel: lambda event: self._admissions.cancel(event.ticket),
            Heartbeat: self._heartbeat,
            LoadFailed: self._load_failed,
            Gone: self._gone,
            LeaseRenewed: self._departures.renewed,
            Acknowledged: self._departures.acknowledged,
            LeaseReleased: self._departures.released,
            ScaleOut: self._loads.scale,
            Unload: self._unload,
            Pin: self._pin,
            EmergencyCleanup: self._emergency_cleanup,
            MemoryMeasured: self._memory_measured,
            ProviderDown: self._provider_down,
            ProviderUp: self._provider_up,
            Retuned: self._retuned,
            Tick: self._ticked,
        }

    def __repr__(self) -> str:
        state = self._state
        shown: dict[str, list[str]] = {"ready": [], "loading": [], "retiring": []}
        for resident in state.residency.residents.values():
            mark = "*" if resident.ready and resident.busy(state.now) else ""
            kind = "retiring" if resident.leaving else "ready" if resident.ready else "loading"
            shown[kind].append(f"{resident.name}{mark}")
        shown["pending"] = list(state.residency.pending)
        shown["waiting"] = [f"{model}×{len(group)}" for model, group in state.line.groups.items()]
        parts = [f"{kind}: {' '.join(sorted(names))}" for kind, names in shown.items() if names]
        return f"Rotation({'; '.join(parts)})"

    def handle(self, event: Event, now: float) -> list[Effect]:
        """Take one event at ``now`` and return what is to be done, in this order. Never raises for what users ask.

        Time does not run backwards: an earlier ``now`` counts as the latest one.
        """
        state = self._state
        state.now = max(state.now, now)
        self._hear[type(event)](event)
        self._advance()
        effects, state.effects = state.effects, []
        return effects

    def plan(self, model: str) -> Plan:
        """What asking for ``model`` now would lead to; changes nothing. Raises ``ModelNotFound``."""
        return plan(self._state, model)

    def state_of(self, model: str) -> tuple[ModelState, str | None]:
        """The state of a model and, when there is one to give, the reason for it. Raises ``ModelNotFound``."""
        state = self._state
        row = self._row(model)
        resident = state.residency.residents.get(model)
        if row.model.pool in state.down:
            return ModelState.UNAVAILABLE, state.down[row.model.pool]
        if resident is not None and not resident.leaving:
            return resident.state(state.now), None
        if row.failure is not None:
            return ModelState.FAILED, str(row.failure.error.get("message"))
        if resident is not None and resident.retirement is not None:
            return ModelState.RETIRING, resident.retirement.reason
        if model in state.line.groups:
            return ModelState.QUEUED, self._admissions.why(model)
        if not row.model.resides:
            return ModelState.READY, None
        error = obstacle(state, model)
        return ModelState.COLD, error.message if isinstance(error, ModelTooLarge) else None

    def next_try(self, model: str) -> float | None:
        """When a failed load will be tried again; None = not by itself, or it has not failed."""
        failure = self._row(model).failure
        return failure.next_try if failure else None

    def pinned(self, model: str) -> bool:
        return self._row(model).pinned

    def granted(self, model: str) -> int:
        """How many replicas the model may have right now: the figure that answers every heartbeat."""
        return self._loads.allowed(model)

    def waiting(self, ticket: str) -> Notify | None:
        """What a waiting request was told last; None when it does not wait."""
        waiting = self._state.line.tickets.get(ticket)
        return waiting.told if waiting else None

    def learned(self, model: str) -> dict[str, Any]:
        """What of a model should outlive this router; a later one hears it as :class:`Recalled`."""
        return self._row(model).learned()

    @property
    def history(self) -> tuple[Decision, ...]:
        """The last decisions and the last uses of models in memory, oldest first: what a replay needs."""
        return tuple(merge(self._state.history, self._state.uses, key=lambda decision: decision.at))

    @property
    def state(self) -> State:
        """For reading only: views, metrics and tests."""
        return self._state

    def wake_at(self) -> float | None:
        """When the next :class:`Tick` is due, if no event comes before; None = nothing depends on time."""
        state, limits = self._state, self._state.limits
        times = [state.barrier_until] if state.waits_for_news else []
        for resident in state.residency.residents.values():
            if resident.leaving:
                times += [*resident.leases.values(), self._departures.quiet_at(resident)]
            elif resident.loading:
                times.append(resident.since + limits.load_timeout_s)
            elif state.line.groups:
                times += [resident.used_until, *resident.promised.values()]
        for ticket in state.line.tickets.values():
            times += [ticket.asked_at + limits.max_wait_s, ticket.asked_at + limits.max_wait_s + limits.load_timeout_s]
        for model in state.line.groups:
            failure = state.residency.rows[model].failure
            times += [failure.next_try] if failure and failure.next_try is not None else []
        return min((time for time in times if time > state.now), default=None)

    # What each event means

    def _registered(self, event: Registered) -> None:
        self._state.residency.add(event.model)
        self._state.stir()

    def _recalled(self, event: Recalled) -> None:
        row = self._state.residency.rows.get(event.model)
        if row is not None:
            row.recall(event.learned)
            self._state.stir()

    def _unregistered(self, event: Unregistered) -> None:
        state = self._state
        if event.model not in state.residency.rows:
            return
        self._admissions.move_all(event.model, ModelNotFound(f"{event.model} is not offered any more: {event.reason}."))
        resident = state.residency.residents.get(event.model)
        if resident is not None and not resident.leaving:
            self._departures.begin(resident, event.reason, drain=True)
        state.residency.rows[event.model].removed = True
        self._forget_removed(event.model)

    def _capacity_changed(self, event: CapacityChanged) -> None:
        residency = self._state.residency
        kept = {name: node for name, node in residency.nodes.items() if node.pool != event.pool}
        lost = set(residency.nodes) - set(kept) - {node.name for node in event.nodes}
        residency.nodes = kept | {node.name: node for node in event.nodes}
        for resident in list(residency.residents.values()):
            self._loads.drop(resident, [slot for slot in resident.slots if slot.node in lost])
            self._forget_removed(resident.name)
        residency.pending = {name: load for name, load in residency.pending.items() if load.node not in lost}
        self._state.stir()

    def _gone(self, event: Gone) -> None:
        self._loads.gone(event)
        self._forget_removed(event.model)

    def _heartbeat(self, event: Heartbeat) -> None:
        if self._loads.heard(event):
            self._admissions.grant_all(event.model)

    def _load_failed(self, event: LoadFailed) -> None:
        if event.model in self._state.residency.rows:
            self._loads.failed(event.model, event.error)
            self._state.residency.pending.pop(event.model, None)

    def _unload(self, event: Unload) -> None:
        resident = self._state.residency.residents.get(event.model)
        if resident is not None and not resident.leaving:
            self._departures.begin(resident, event.reason, drain=True)

    def _pin(self, event: Pin) -> None:
        row = self._state.residency.rows.get(event.model)
        if row is not None:
            row.pinned = event.pinned
            self._state.note("pin" if event.pinned else "unpin", event.model, "an operator wants it so")
            self._state.stir()

    def _emergency_cleanup(self, event: EmergencyCleanup) -> None:
        victims = tuple(victim.name for victim in evictables(self._state))
        self._evict(victims, "emergency cleanup")
        self._state.note("cleanup", "", "an operator asked for it", victims)

    def _memory_measured(self, event: MemoryMeasured) -> None:
        state, limits = self._state, self._state.limits
        pressure = state.pressures.setdefault(event.node, Pressure())
        before = pressure.level
        crossed = pressure.measure(event.used / event.total if event.total else 0.0, limits)
        for level in crossed:
            text = f"{event.node} uses {event.used / event.total:.0%} of its memory"
            kind = f"memory_{level.name.lower()}"
            state.emit(Log("warning" if level < Level.CRITICAL else "error", kind, text, {"node": event.node}))
            state.note(kind, "", text)
        if Level.CLEANUP in crossed or Level.CRITICAL in crossed:
            excess = event.used - (limits.cleanup - limits.hysteresis) * event.total
            self._relieve(event.node, excess)
        if pressure.level < before:
            text = f"{event.node}: memory pressure fell to {pressure.level.name.lower()}"
            state.emit(Log("info", "memory_relief", text, {"node": event.node}))
        state.stirred = state.stirred or pressure.level != before

    def _provider_down(self, event: ProviderDown) -> None:
        state = self._state
        state.down[event.pool] = event.reason
        state.stirred = True
        for model in list(state.line.groups):
            error = obstacle(state, model)
            if state.residency.rows[model].model.pool == event.pool and error is not None:
                self._admissions.move_all(model, error)

    def _provider_up(self, event: ProviderUp) -> None:
        self._state.down.pop(event.pool, None)
        self._state.stirred = True

    def _retuned(self, event: Retuned) -> None:
        self._state.limits = event.limits
        self._state.stirred = True

    def _ticked(self, event: Tick) -> None:
        state = self._state
        state.stirred = True
        for resident in list(state.residency.residents.values()):
            self._loads.check(resident)
            self._forget_removed(resident.name)
        self._admissions.time_out()
        for resident in list(state.residency.residents.values()):
            row = state.residency.rows[resident.name]
            idle_s = row.model.idle_unload_s
            unused = resident.ready and not row.pinned and not resident.busy(state.now)
            if idle_s is not None and unused and state.now - row.last_used >= idle_s:
                self._departures.begin(resident, f"it was idle for {idle_s:g} s")

    def _relieve(self, node: str, excess: float) -> None:
        """Evict the cheapest idle residents of a node until ``excess`` bytes less are in use, or all of them."""
        state = self._state
        if not state.limits.enabled or excess <= 0 or state.waits_for_news or node not in state.residency.nodes:
            return
        capacity = Resources(memory=max(excess, state.residency.nodes[node].capacity.memory))
        leaving = sum(
            state.residency.held_by(resident).get(node, NOTHING).memory
            for resident in state.residency.residents.values()
            if resident.leaving
        )
        need = Resources(memory=max(0, excess - leaving))
        idle = [resident for resident in evictables(state) if node in resident.frees]
        choice = victims_for(need, {node: NOTHING}, {node: capacity}, idle, state.policy)
        victims = choice.names if choice else tuple(sorted(resident.name for resident in idle))
        self._evict(victims, f"memory is short on {node}")
        if victims:
            state.note("cleanup", "", f"memory is short on {node}", victims)

    def _evict(self, victims: tuple[str, ...], reason: str) -> None:
        for name in victims:
            self._departures.begin(self._state.residency.residents[name], reason)

    def _row(self, model: str) -> Row:
        row = self._state.residency.rows.get(model)
        if row is None:
            raise ModelNotFound(f"There is no model called {model!r} in the pool.")
        return row

    # The order in which things happen after every event

    def _advance(self) -> None:
        state = self._state
        if not state.waits_for_news:
            if self._starting:
                self._starting, state.stirred = False, True
                state.line.retag()
            self._departures.settle()
            told = state.stirred
            while state.stirred:
                state.stirred = False
                self._admissions.schedule()
                self._departures.keep_unwanted()
                self._departures.settle()
            if not told:
                return
        self._admissions.tell()

    def _forget_removed(self, model: str) -> None:
        """Drop a model that was removed from the pool, once nothing of it is in memory."""
        residency, row = self._state.residency, self._state.residency.rows.get(model)
        if row is not None and row.removed and model not in residency.residents:
            del residency.rows[model]
            self._state.popularity.forget(model)
            self._state.note("removed", model, "it left the pool")
            self._state.stir()
