"""Where a model would go and who would have to leave: read-only questions to the state."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from serve_app.domain.catalog import LOCAL_PROVIDER
from serve_app.domain.errors import (
    MemoryExceeded,
    ModelNotFound,
    ModelTooLarge,
    ProviderUnavailable,
    RotundaError,
    error_from_dict,
)
from serve_app.domain.eviction import Choice, Evictable, victims_for
from serve_app.domain.placement import EPSILON, NOTHING, Resources
from serve_app.domain.residency import Pending, Resident, Row
from serve_app.domain.rotation_state import State


class Verdict(StrEnum):
    """What asking for a model now would lead to."""

    READY = "resident"
    LOADING = "loading"
    FITS = "fits"
    EVICTS = "evicts"
    """It fits after others have left."""
    WAITS = "waits"
    """For a model that is busy, or too new to leave."""
    NEVER = "never_fits"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class Plan:
    """The answer to "what if somebody asked for this model now?".

    ``capacity`` and ``free`` are those of ``node``; ``freed`` is what the victims give back there. ``error`` is the
    code that a request would end with. ``eta_s`` is None when nobody can tell.
    """

    model: str
    verdict: Verdict
    reason: str
    demand: Resources = NOTHING
    node: str | None = None
    capacity: Resources = NOTHING
    free: Resources = NOTHING
    freed: Resources = NOTHING
    victims: tuple[str, ...] = ()
    eta_s: float | None = None
    error: str | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "verdict": self.verdict.value,
            "reason": self.reason,
            "node": self.node,
            "evicts": list(self.victims),
            "etaMs": None if self.eta_s is None else round(1000 * self.eta_s),
            "demand": self.demand.to_json(),
            "capacity": self.capacity.to_json(),
            "free": self.free.to_json(),
            "freed": self.freed.to_json(),
            "error": self.error,
        }


def room_for(state: State, row: Row, drain: bool = False) -> Choice | None:
    """The node for ``row`` and its cheapest victims; None when nothing can leave. ``drain`` admits busy victims."""
    residency = state.residency
    nodes = [node for node in residency.in_pool(row.model.pool) if node.name not in state.stopped]
    free = {node.name: residency.free_then(node.name) for node in nodes}
    surplus = _surplus(state, row)
    if surplus <= 0:
        fitting = [name for name, amount in free.items() if amount.covers(row.demand)]
        if fitting:
            tightest = min(fitting, key=lambda name: (_left(free[name], row.demand), name))
            return Choice(tightest, (), (0, -math.inf))
    if not state.limits.enabled:
        return None
    capacity = {node.name: node.capacity for node in nodes}
    local_cap = state.limits.max_local_models > 0 and row.model.pool == LOCAL_PROVIDER
    candidates = evictables(state, row.model.pool if local_cap else None, drain)
    return victims_for(row.demand, free, capacity, candidates, state.policy, max(0, surplus))


def evictables(state: State, counted_pool: str | None = None, drain: bool = False) -> list[Evictable]:
    """Idle, unpinned residents; with ``drain`` also busy ones that have stayed their least time."""
    found = []
    for resident in state.residency.residents.values():
        row = state.residency.rows[resident.name]
        if not resident.ready or row.pinned:
            continue
        busy = resident.busy(state.now)
        if busy and not (drain and _may_drain(state, resident, row)):
            continue
        found.append(
            Evictable(
                resident.name,
                state.residency.held_by(resident),
                row.reload_s,
                state.popularity.chance(resident.name) if state.policy.per_share else 0.0,
                row.last_used,
                row.model.keep_alive_s,
                busy,
                counted_pool is None or row.model.pool == counted_pool,
            )
        )
    return found


def starts_now(state: State, row: Row, node: str) -> bool:
    """Whether a decided load fits at this moment, those that are still leaving counted in."""
    if node in state.stopped or not state.residency.free_now(node).covers(row.demand):
        return False
    present = [state.residency.rows[name].model.pool for name in state.residency.residents if name != row.model.name]
    local = (row.model.pool == LOCAL_PROVIDER and state.limits.max_local_models) or math.inf
    return present.count(LOCAL_PROVIDER) < local and len(present) < (state.limits.max_models or math.inf)


def overdrawn(state: State, pending: Pending) -> bool:
    """Whether a decided load rests on room that will not come free any more."""
    if pending.node not in state.residency.nodes:
        return True
    then = state.residency.free_then(pending.node)
    short = min(then.cpu, then.gpu) < -EPSILON or then.memory < 0
    return short or _surplus(state, state.residency.rows[pending.model], more=0) > 0


def obstacle(state: State, name: str) -> RotundaError | None:
    """The error that a request for the model ends with now; None when it can be granted or wait."""
    row = state.residency.rows.get(name)
    if row is None or row.removed:
        return ModelNotFound(f"There is no model called {name!r} in the pool.")
    provider = row.model.pool
    if provider in state.down:
        return ProviderUnavailable(f"{provider} is unavailable: {state.down[provider]}", provider)
    resident = state.residency.residents.get(name)
    if not row.model.resides or (resident is not None and resident.ready):
        return None
    if row.failure is not None and (row.failure.next_try is None or _rests(state, row)):
        return error_from_dict(row.failure.error)
    if resident is not None or name in state.residency.pending:
        return None
    return _too_large(state, row) or _crowded_out(state, row)


def eta_s(state: State, row: Row, ahead: Iterable[Row] = ()) -> float:
    """Estimated seconds until the model is ready, when the loads of ``ahead`` come first."""
    resident = state.residency.residents.get(row.model.name)
    if resident is not None and resident.loading:
        return max(0.0, row.reload_s - (state.now - resident.since))
    waits = sum(other.reload_s for other in ahead) / (state.limits.max_parallel_loads or 2)
    leaves = state.limits.retire_s if row.model.name in state.residency.pending else 0.0
    return waits + leaves + row.reload_s


def plan(state: State, name: str) -> Plan:
    """What asking for ``name`` now would lead to; changes nothing.

    Raises:
        ModelNotFound: the model is not registered.
    """
    row = state.residency.rows.get(name)
    error = obstacle(state, name)
    if row is None:
        raise error or ModelNotFound(f"There is no model called {name!r} in the pool.")
    if error is not None:
        largest = max((node.capacity for node in state.residency.in_pool(row.model.pool)), key=_size, default=NOTHING)
        verdict = Verdict.NEVER if isinstance(error, ModelTooLarge) else Verdict.REFUSED
        return Plan(name, verdict, error.message, row.demand, capacity=largest, error=error.code)
    resident = state.residency.residents.get(name)
    if not row.model.resides or (resident is not None and resident.ready):
        return Plan(name, Verdict.READY, "it is in memory", row.demand, eta_s=0.0)
    if (resident is not None and resident.loading) or name in state.residency.pending:
        return Plan(name, Verdict.LOADING, "it is being loaded", row.demand, eta_s=eta_s(state, row))
    return _placed(state, row)


def _placed(state: State, row: Row) -> Plan:
    name, choice, verdict = row.model.name, room_for(state, row), Verdict.EVICTS
    ahead = [state.residency.rows[model] for model in state.line.groups if model != name]
    if choice is None:
        choice, verdict = room_for(state, row, drain=True), Verdict.WAITS
    if choice is None:
        reason = "all of its room is taken by models that are busy, being loaded, or new"
        return Plan(name, Verdict.WAITS, reason, row.demand)
    node, victims = choice.node, choice.names
    freed = sum((victim.frees.get(node, NOTHING) for victim in choice.victims), NOTHING)
    eta = eta_s(state, row, ahead) + (state.limits.retire_s if victims else 0.0)
    if verdict is Verdict.WAITS:
        eta, reason = eta + state.limits.max_wait_s, f"{' and '.join(victims)} would be asked to drain"
    elif victims:
        reason = f"{' and '.join(victims)} would leave: idle, and the cheapest to bring back ({state.policy.name})"
    else:
        verdict, reason = Verdict.FITS, f"it fits into what is free on {node}"
    residency = state.residency
    free = residency.free_then(node)
    return Plan(name, verdict, reason, row.demand, node, residency.nodes[node].capacity, free, freed, victims, eta)


def _surplus(state: State, row: Row, more: int = 1) -> int:
    """How many models must leave before ``more`` like ``row`` may stay, by the caps on their number."""
    limits, residency = state.limits, state.residency
    over = [0]
    if limits.max_models:
        over.append(residency.staying() + more - limits.max_models)
    if limits.max_local_models and row.model.pool == LOCAL_PROVIDER:
        over.append(residency.staying(LOCAL_PROVIDER) + more - limits.max_local_models)
    return max(over)


def _may_drain(state: State, resident: Resident, row: Row) -> bool:
    least = row.model.min_residency_s
    stays = state.limits.min_residency_s if least is None else least
    return resident.loaded_at is not None and state.now - resident.loaded_at >= stays


def _rests(state: State, row: Row) -> bool:
    """Whether the tries at a load that kept failing are used up, and the next one is not due yet."""
    failure = row.failure
    return failure is not None and failure.exhausted and state.now < (failure.next_try or 0.0)


def _too_large(state: State, row: Row) -> RotundaError | None:
    nodes = state.residency.in_pool(row.model.pool)
    if not nodes or any(node.capacity.covers(row.demand) for node in nodes):
        return None
    largest = max((node.capacity for node in nodes), key=_size)
    return ModelTooLarge(
        f"{row.model.name} needs {row.demand!r}; the largest place for it has {largest!r}. It never fits here.",
        row.model.pool,
        details={"demand": row.demand.to_json(), "capacity": largest.to_json()},
    )


def _crowded_out(state: State, row: Row) -> RotundaError | None:
    """Why no wait can help: pinned models hold the room, or nothing may leave because rotation is off."""
    residency, limits = state.residency, state.limits
    nodes = residency.in_pool(row.model.pool)
    if not nodes:
        return None
    if not limits.enabled:
        moving = bool(residency.pending) or any(resident.leaving for resident in residency.residents.values())
        if moving or room_for(state, row) is not None or state.stopped:
            return None
        text = f"{row.model.name} does not fit beside the models in memory, and rotation is switched off."
        return MemoryExceeded(text, row.model.pool, details={"demand": row.demand.to_json()})
    fixed: dict[str, Resources] = {}
    pinned = [resident for resident in residency.residents.values() if residency.rows[resident.name].pinned]
    for resident in pinned:
        for node, amount in residency.held_by(resident).items():
            fixed[node] = fixed.get(node, NOTHING) + amount
    fits = any((node.capacity - fixed.get(node.name, NOTHING)).covers(row.demand) for node in nodes)
    local = sum(residency.rows[resident.name].model.pool == LOCAL_PROVIDER for resident in pinned)
    counted = row.model.pool == LOCAL_PROVIDER and 0 < limits.max_local_models <= local
    if fits and not counted and not 0 < limits.max_models <= len(pinned):
        return None
    names = ", ".join(sorted(resident.name for resident in pinned))
    text = f"{row.model.name} needs {row.demand!r}, but pinned models hold the room: {names}."
    return MemoryExceeded(text, row.model.pool, details={"demand": row.demand.to_json()})


def _left(free: Resources, demand: Resources) -> float:
    """What a node has left after the load: memory where that is counted, else CPUs."""
    left = free - demand
    return left.memory if demand.memory and not math.isinf(left.memory) else left.cpu


def _size(capacity: Resources) -> tuple[float, float, float]:
    return capacity.memory, capacity.gpu, capacity.cpu
