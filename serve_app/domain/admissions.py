"""How requests wait and are granted or refused, and which load is decided next."""

from __future__ import annotations

import math
from collections.abc import Mapping

from serve_app.domain.departures import Departures
from serve_app.domain.errors import DeadlineExceeded, ModelNotFound, QueueFull, RotundaError
from serve_app.domain.eviction import Choice
from serve_app.domain.loads import Loads
from serve_app.domain.planning import eta_s, obstacle, overdrawn, room_for
from serve_app.domain.queue import Ticket
from serve_app.domain.residency import Pending, Resident, Row
from serve_app.domain.rotation_effects import Grant, Notify, Refuse
from serve_app.domain.rotation_events import Claimed, Request
from serve_app.domain.rotation_state import State
from serve_app.domain.routing import Lease

URGENT = 0.5
"""A request that has waited for so much of ``max_wait_s`` goes before all that have not, whatever their priority."""


class Admissions:
    """Tickets and the loads that they ask for."""

    def __init__(self, state: State, departures: Departures, loads: Loads) -> None:
        self._state = state
        self._departures = departures
        self._loads = loads
        self._whys: dict[str, str] = {}
        """Why each model is still waited for."""

    def why(self, model: str) -> str | None:
        """Why requests for the model still wait."""
        return self._whys.get(model)

    def request(self, event: Request) -> None:
        """Grant at once, put in the line, or refuse. Asking again with the same ticket keeps the place."""
        state = self._state
        known = state.line.tickets.get(event.ticket)
        if known is not None:
            known.touched_at = state.now
            return
        if event.models and event.models[0] in state.residency.rows:
            state.popularity.arrived(event.models[0])
        self._enter(event)

    def claimed(self, event: Claimed) -> None:
        """Give the lease that goes with a grant. A request whose model has left since waits again, with its age."""
        request, resident = event.request, self._state.residency.residents.get(event.model)
        if resident is not None:
            resident.promised.pop(request.ticket, None)
        if obstacle(self._state, event.model) is None and self._is_ready(event.model):
            self._let_in(request, event.model, event.reason)
        else:
            self._enter(request)

    def _enter(self, event: Request) -> None:
        state, asked_at = self._state, self._asked_at(event)
        choice, error = self._usable(event, 0)
        if choice is None:
            self._refuse(event, asked_at, error)
        elif self._is_ready(event.models[choice]):
            self._grant(event, event.models[choice], "it is in memory")
        elif len(state.line) >= state.limits.max_queue:
            self._turn_away(event, choice)
        else:
            state.line.join(event, asked_at, state.now, choice)
            state.note("queued", event.models[choice], "it is not in memory", caller=event.caller)
            state.stirred = True

    def _turn_away(self, event: Request, choice: int) -> None:
        """The line is full: one of the next models answers if it is in memory, else the request is refused."""
        full = self._queue_full(event.models[choice])
        for model in event.models[choice + 1 :]:
            if obstacle(self._state, model) is None and self._is_ready(model):
                self._grant(event, model, f"instead: {full.message}")
                return
        self._refuse(event, self._asked_at(event), full)

    def cancel(self, ticket_id: str, reason: str = "its caller has left") -> None:
        ticket = self._state.line.tickets.get(ticket_id)
        if ticket is not None:
            self._leave(ticket)
            self._state.note("cancelled", ticket.model, reason, caller=ticket.request.caller)
        for resident in self._state.residency.residents.values():
            resident.promised.pop(ticket_id, None)

    def grant_all(self, model: str) -> None:
        """Grant every request that waits for a model which has just become ready."""
        for ticket in self._state.line.group(model):
            self._promise(ticket, model, "its load has ended")

    def move_all(self, model: str, error: RotundaError) -> None:
        """Send the requests for a model that cannot be had on to their next model, or refuse them."""
        for ticket in self._state.line.group(model):
            self._move_on(ticket, error)

    def time_out(self) -> None:
        """Drop the requests that nobody asks after, and refuse those that waited too long."""
        state, limits = self._state, self._state.limits
        for ticket in list(state.line.tickets.values()):
            waited = state.now - ticket.asked_at
            asked_after = ticket.request.lease  # what only warms a model waits for nobody
            if asked_after and limits.ticket_ttl_s is not None and state.now - ticket.touched_at > limits.ticket_ttl_s:
                self.cancel(ticket.id, "nobody asked after it any more")
            elif waited >= limits.max_wait_s + limits.load_timeout_s:
                self._leave(ticket)
                self._refuse(ticket.request, ticket.asked_at, DeadlineExceeded.during("load", round(waited, 3)))

    def schedule(self) -> None:
        """Decide, in the order of the line, which loads start or make room now."""
        state = self._state
        blocked: set[str] = set()
        self._drop_overdrawn()
        for model, head in self._ordered():
            if model not in state.line.groups:
                continue
            row = state.residency.rows[model]
            resident = state.residency.residents.get(model)
            pending = state.residency.pending.get(model)
            if resident is not None and not resident.leaving:
                if resident.ready:
                    self.grant_all(model)
                continue
            if pending is not None:
                self._loads.start(pending)
                continue
            if row.model.pool in blocked:
                continue
            error = obstacle(state, model)
            if error is not None:
                self.move_all(model, error)
            elif not self._place(row, head, resident):
                blocked.add(row.model.pool)

    def tell(self) -> None:
        """News for every request whose place or reason has changed."""
        state = self._state
        ahead: list[Row] = []
        for position, (model, _) in enumerate(self._ordered(), 1):
            row, pending = state.residency.rows[model], state.residency.pending.get(model)
            resident = state.residency.residents.get(model)
            loading = pending is not None or (resident is not None and resident.loading)
            evicting = pending.victims if pending else ()
            reason = self._waiting_for(model)
            eta = eta_s(state, row, ahead)
            for ticket in state.line.groups[model].values():
                told = ticket.told
                if told is None or (told.position, told.reason, told.evicting) != (position, reason, evicting):
                    ticket.told = Notify(ticket.id, model, position, reason, round(eta, 3), loading, evicting)
                    state.emit(ticket.told)
            if not loading:
                ahead.append(row)

    def _drop_overdrawn(self) -> None:
        """Decide anew on loads whose victims were kept after all, or whose node has shrunk; the latest ones first."""
        pending = self._state.residency.pending
        for load in reversed(list(pending.values())):
            if overdrawn(self._state, load):
                del pending[load.model]
                self._state.stir()

    def _place(self, row: Row, head: Ticket, leaving: Resident | None) -> bool:
        """Decide on a load. False: it must wait, and so must everyone behind it in the same pool."""
        state, limits, model = self._state, self._state.limits, row.model.name
        overdue = state.now - head.asked_at >= limits.max_wait_s
        if leaving is not None:
            return True
        if row.failure is not None and state.now < (row.failure.next_try or -math.inf):
            self._whys[model] = f"its load failed and is tried again in {(row.failure.next_try or 0) - state.now:.1f} s"
            return True
        if 0 < limits.max_parallel_loads <= state.residency.loading(row.model.pool):
            self._whys[model] = "other models are being loaded"
            return False
        choice = room_for(state, row)
        if choice is None and overdue and limits.enabled:
            choice = room_for(state, row, drain=True)
        if choice is None:
            self._whys[model] = self._no_room()
            return limits.enabled and not overdue
        self._decide(row, choice)
        return True

    def _decide(self, row: Row, choice: Choice) -> None:
        """Ask the victims to leave, and start the load as soon as it fits."""
        state, model = self._state, row.model.name
        names = ", ".join(choice.names)
        reason = f"evicting {names}" if names else f"it fits on {choice.node}"
        state.residency.pending[model] = pending = Pending(model, choice.node, choice.names, state.now, reason)
        for victim in choice.victims:
            why = (
                f"{model} has waited for more than {state.limits.max_wait_s:g} s"
                if victim.busy
                else f"room for {model}"
            )
            self._departures.begin(state.residency.residents[victim.name], why, victim.busy, model)
        state.stir()
        if choice.names:
            state.note("evict", model, f"{state.policy.name}: {names} must leave {choice.node}", choice.names)
        self._departures.settle()
        self._loads.start(pending)

    def _move_on(self, ticket: Ticket, error: RotundaError) -> None:
        choice, _ = self._usable(ticket.request, ticket.choice + 1)
        if choice is None:
            self._leave(ticket)
            self._refuse(ticket.request, ticket.asked_at, error)
        elif self._is_ready(ticket.request.models[choice]):
            self._promise(ticket, ticket.request.models[choice], f"instead: {error.message}")
        else:
            self._withdraw(ticket.model, ticket)
            self._state.line.move(ticket, choice)
            self._state.note("moved", ticket.model, error.message, caller=ticket.request.caller)
            self._state.stirred = True

    def _usable(self, request: Request, start: int) -> tuple[int | None, RotundaError]:
        """The index of the first model from ``start`` on that can be granted or waited for, else the first error."""
        first: RotundaError | None = None
        for index in range(start, len(request.models)):
            error = obstacle(self._state, request.models[index])
            if error is None:
                return index, ModelNotFound("")
            first = first or error
        return None, first or ModelNotFound("The request names no model.")

    def _is_ready(self, model: str) -> bool:
        resident = self._state.residency.residents.get(model)
        return not self._state.residency.rows[model].model.resides or (resident is not None and resident.ready)

    def _asked_at(self, request: Request) -> float:
        return self._state.now if request.asked_at is None else min(request.asked_at, self._state.now)

    def _promise(self, ticket: Ticket, model: str, reason: str) -> None:
        """Grant a request that has waited: its holder comes for the lease when it hears of it."""
        request, resident = ticket.request, self._state.residency.residents.get(model)
        self._leave(ticket)
        if resident is not None and request.lease:
            self._departures.promise(resident, request.ticket)
        waited = self._state.now - ticket.asked_at
        self._state.emit(Grant(request.ticket, model, request.holder, None, waited, reason))
        self._state.note("grant", model, reason, duration_s=waited, caller=request.caller)

    def _grant(self, request: Request, model: str, reason: str) -> None:
        """Grant a request that need not wait."""
        self._let_in(request, model, reason)
        waited = self._state.now - self._asked_at(request)
        self._state.note("grant", model, reason, duration_s=waited, caller=request.caller)

    def _let_in(self, request: Request, model: str, reason: str) -> None:
        """Answer a request whose holder is asking at this moment, with a lease if it wants one."""
        state, lease = self._state, None
        resident = state.residency.residents.get(model)
        if resident is not None and request.lease:
            lease = self._departures.lease(resident, request.holder)
            self._departures.use(resident)
        elif request.lease:
            lease = Lease(model, state.epoch, state.limits.lease_ttl_s)
        waited = state.now - self._asked_at(request)
        state.emit(Grant(request.ticket, model, request.holder, lease, waited, reason))

    def _refuse(self, request: Request, asked_at: float, error: RotundaError) -> None:
        state = self._state
        state.emit(Refuse(request.ticket, error.to_dict(), error.message))
        model = request.models[0] if request.models else ""
        state.note("refuse", model, error.message, duration_s=state.now - asked_at, caller=request.caller)

    def _leave(self, ticket: Ticket) -> None:
        """Take a ticket out of the line; the last one for a model takes its decided load along."""
        self._withdraw(ticket.model, ticket)
        self._state.line.leave(ticket)
        self._state.stirred = True

    def _withdraw(self, model: str, ticket: Ticket) -> None:
        if self._state.line.groups.get(model, {}).keys() <= {ticket.id}:
            self._whys.pop(model, None)
            if self._state.residency.pending.pop(model, None) is not None:
                self._state.stir()

    def _ordered(self) -> list[tuple[str, Ticket]]:
        state = self._state
        if not state.line.groups:
            return []
        return state.line.ordered(state.now, URGENT * state.limits.max_wait_s, not state.limits.enabled)

    def _queue_full(self, model: str) -> QueueFull:
        state = self._state
        rows: Mapping[str, Row] = state.residency.rows
        after = math.ceil(eta_s(state, rows[model], [rows[name] for name in state.line.groups if name != model]))
        return QueueFull(
            f"{len(state.line)} requests wait for models already. Try again in {after} s.",
            details={"retryAfterS": max(1, after), "waiting": len(state.line)},
        )

    def _no_room(self) -> str:
        if self._state.stopped:
            return f"memory is short on {', '.join(sorted(self._state.stopped))}: no load starts"
        return "every model that could leave is busy, being loaded, or new"

    def _waiting_for(self, model: str) -> str:
        state = self._state
        resident, pending = state.residency.residents.get(model), state.residency.pending.get(model)
        if state.waits_for_news:
            return "the router has just started and listens for what is in memory"
        if resident is not None:
            return "it is being loaded" if resident.loading else "it is leaving memory, and is loaded again after that"
        if pending is not None:
            victims = [name for name in pending.victims if name in state.residency.residents]
            return f"{' and '.join(victims)} must leave memory" if victims else "its room is being freed"
        return self._whys.get(model, "it waits for its turn")
