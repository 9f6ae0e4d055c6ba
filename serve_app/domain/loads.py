"""How models come into memory: loads start, succeed, fail and are tried again; replicas speak and fall silent."""

from __future__ import annotations

from collections.abc import Mapping

from serve_app.domain.catalog import LOCAL_PROVIDER, ModelState
from serve_app.domain.departures import Departures
from serve_app.domain.errors import DeadlineExceeded, ModelLoadFailed
from serve_app.domain.placement import Resources
from serve_app.domain.planning import room_for, starts_now
from serve_app.domain.residency import Failure, Pending, Resident, Retirement, Slot, is_loaded
from serve_app.domain.rotation_effects import Allow, Load, Log
from serve_app.domain.rotation_events import Gone, Heartbeat, Model, ScaleOut
from serve_app.domain.rotation_state import State


class Loads:
    """Loads and replicas."""

    def __init__(self, state: State, departures: Departures) -> None:
        self._state = state
        self._departures = departures

    def start(self, pending: Pending) -> bool:
        """Load now if it fits now; the room that leaving models still hold is waited for."""
        state = self._state
        row = state.residency.rows[pending.model]
        if pending.model in state.residency.residents or not starts_now(state, row, pending.node):
            return False
        del state.residency.pending[pending.model]
        slot = Slot(pending.node, state.now)
        resident = Resident(pending.model, state.next_epoch(), state.now, [slot])
        state.residency.residents[pending.model] = resident
        state.line.served(pending.model)
        state.emit(Load(pending.model, pending.node, resident.epoch, pending.reason, pending.victims))
        state.note("load", pending.model, pending.reason, pending.victims, state.now - pending.since)
        state.stir()
        return True

    def heard(self, beat: Heartbeat) -> bool:
        """Take a heartbeat; whether the model can answer from now on and could not before."""
        state = self._state
        resident = self._resident_of(beat)
        if resident is None:
            return False
        row = state.residency.rows[beat.model]
        known = [(slot.node, slot.replica) for slot in resident.slots]
        was_busy = resident.running > 0
        resident.hear(beat, state.now)
        if beat.state is ModelState.RETIRING and not resident.leaving and resident.retired:
            # Told so by the router before this one, or by an answer that this one had not meant for it.
            resident.retirement = Retirement("its replicas are leaving", state.now, resident.epoch, True, sent=True)
            state.note("retire", beat.model, resident.retirement.reason)
            state.stir()
        if beat.running > 0:
            row.last_used = state.now
        moved = known != [(slot.node, slot.replica) for slot in resident.slots]
        if moved or (beat.memory is not None and row.measure(beat.memory)):
            state.stir()
        state.stirred = state.stirred or was_busy != (resident.running > 0)
        if not resident.loading or not is_loaded(beat.state):
            return False
        self._loaded(resident)
        return True

    def failed(self, name: str, error: Mapping[str, object]) -> None:
        """A load has failed: note when the next try is due, and let go of what its replica holds."""
        state, limits = self._state, self._state.limits
        row = state.residency.rows[name]
        failures = row.failure.failures + 1 if row.failure else 1
        if error.get("retryable"):
            delay = min(limits.retry_cap_s, limits.retry_delay_s * 2 ** (failures - 1))
            exhausted = failures > limits.retry_attempts
            next_try = state.now + (limits.retry_cap_s if exhausted else delay)
            row.failure = Failure(error, failures, next_try, exhausted)
        else:
            row.failure = Failure(error, failures, None)
        reason = str(error.get("message", "no reason was given"))
        state.note("failed", name, reason)
        state.emit(Log("warning", "load_failed", f"{name} could not be loaded: {reason}", {"failures": failures}))
        resident = state.residency.residents.get(name)
        if resident is not None and not resident.leaving:
            self._departures.begin(resident, f"its load failed: {reason}", drain=True)

    def gone(self, event: Gone) -> None:
        """A replica has ended, or all of a model's."""
        resident = self._state.residency.residents.get(event.model)
        if resident is not None:
            self.drop(resident, [slot for slot in resident.slots if event.replica in (None, slot.replica)])

    def drop(self, resident: Resident, ended: list[Slot]) -> None:
        """Take out slots whose memory is free again; with the last one the model is cold."""
        if not ended:
            return
        state, name = self._state, resident.name
        resident.slots = [slot for slot in resident.slots if all(slot is not other for other in ended)]
        state.stir()
        if resident.slots:
            return
        del state.residency.residents[name]
        state.residency.rows[name].left_at = state.now
        since = resident.retirement.since if resident.retirement else resident.since
        reason = resident.retirement.reason if resident.retirement else "its replica ended by itself"
        state.note("gone" if resident.leaving else "lost", name, reason, duration_s=state.now - since)
        if resident.loading:
            text = f"{name} could not be loaded: its process ended."
            self.failed(name, ModelLoadFailed(text, retryable=True).to_dict())

    def check(self, resident: Resident) -> None:
        """Give up a load that takes too long; drop replicas that fell silent."""
        state, limits = self._state, self._state.limits
        if resident.loading and state.now - resident.since >= limits.load_timeout_s:
            error = DeadlineExceeded.during("load", limits.load_timeout_s).to_dict()
            self.failed(resident.name, {**error, "retryable": True})
        if limits.silence_s is not None:
            silent = [slot for slot in resident.slots if slot.replica and state.now - slot.heard_at > limits.silence_s]
            self.drop(resident, silent)

    def allowed(self, model: str) -> int:
        """How many replicas the model may have right now."""
        resident = self._state.residency.residents.get(model)
        if resident is None or (resident.retirement is not None and resident.retirement.sent):
            return 0
        return max(1, len(resident.slots))

    def scale(self, event: ScaleOut) -> None:
        """Allow as many replicas as fit now, unless a load waits for the same nodes."""
        state = self._state
        resident = state.residency.residents.get(event.model)
        if resident is None or not resident.ready or state.waits_for_news:
            state.emit(
                Allow(event.model, self.allowed(event.model), "the model is not in memory, or was just found there")
            )
            return
        row = state.residency.rows[event.model]
        reason = "it fits"
        while len(resident.slots) > event.replicas and any(slot.replica is None for slot in resident.slots[1:]):
            resident.slots.remove(next(slot for slot in resident.slots[1:] if slot.replica is None))
            state.stir()
        while len(resident.slots) < event.replicas:
            waits = self._someone_waits(row.model.pool)
            choice = None if waits else room_for(state, row)
            if choice is None or choice.victims or not starts_now(state, row, choice.node):
                reason = f"{waits} waits for memory" if waits else "one more replica does not fit"
                break
            resident.slots.append(Slot(choice.node, state.now))
            state.stir()
        allowed = min(max(event.replicas, 1), max(len(resident.slots), 1))
        state.emit(Allow(event.model, allowed, reason))
        told = f"{allowed} of {event.replicas} replicas: {reason}"
        if told != resident.scaled:
            state.note("scale", event.model, told)
        resident.scaled = told

    def _someone_waits(self, pool: str) -> str | None:
        """A model of the pool that waits for a load to start."""
        state = self._state
        for name in [*state.residency.pending, *state.line.groups]:
            row, resident = state.residency.rows.get(name), state.residency.residents.get(name)
            if row is not None and row.model.pool == pool and (resident is None or resident.leaving):
                return name
        return None

    def _resident_of(self, beat: Heartbeat) -> Resident | None:
        """The resident that speaks; one that nobody asked for is taken as it is, unless it has not loaded yet."""
        state = self._state
        resident = state.residency.residents.get(beat.model)
        if resident is not None:
            return resident
        unasked = beat.state is ModelState.LOADING and not state.waits_for_news
        if unasked or beat.state in (ModelState.COLD, ModelState.FAILED, ModelState.UNAVAILABLE):
            return None
        if beat.model not in state.residency.rows:
            self._adopt(beat)
        state.residency.pending.pop(beat.model, None)
        resident = Resident(beat.model, state.next_epoch(), state.now)
        if beat.state is ModelState.RETIRING:
            resident.retirement = Retirement("it was leaving already", state.now, state.epoch, drain=True, sent=True)
        state.residency.residents[beat.model] = resident
        state.note("found", beat.model, f"replica {beat.replica} on {beat.node} is {beat.state.value}")
        state.stir()
        return resident

    def _adopt(self, beat: Heartbeat) -> None:
        """Register a model that others loaded, by what it was measured to hold."""
        node = self._state.residency.nodes.get(beat.node)
        demand = Resources(memory=beat.memory or 0)
        self._state.residency.add(Model(beat.model, demand, node.pool if node else LOCAL_PROVIDER))

    def _loaded(self, resident: Resident) -> None:
        state, row = self._state, self._state.residency.rows[resident.name]
        resident.loaded_at = state.now
        row.failure = None
        row.last_used = max(row.last_used, state.now)
        if state.now > resident.since:
            row.loaded_in(state.now - resident.since)
        state.note("ready", resident.name, "its load has ended", duration_s=state.now - resident.since)
        state.stir()
