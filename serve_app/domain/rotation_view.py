"""A picture of the rotation at one moment, for people and programs: rooms, residents, the line, failures, history."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from serve_app.domain.catalog import ModelState
from serve_app.domain.placement import NOTHING, Resources
from serve_app.domain.residency import Resident
from serve_app.domain.rotation import Rotation
from serve_app.domain.rotation_effects import Decision

HISTORY = 100
"""How many decisions are shown unless somebody asks for another number."""


@dataclass(frozen=True, slots=True)
class NodeView:
    """A place for models. ``used`` counts everything that models hold or are promised there right now.

    ``measured`` is the fraction of its memory that was last found in use by whomever, None when nobody measured;
    ``pressure`` is calm, warning, cleanup or critical.
    """

    name: str
    pool: str
    total: Resources
    used: Resources
    free: Resources
    measured: float | None = None
    pressure: str = "calm"

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "provider": self.pool,
            "total": self.total.to_json(),
            "used": self.used.to_json(),
            "free": self.free.to_json(),
            "measured": self.measured,
            "pressure": self.pressure,
        }


@dataclass(frozen=True, slots=True)
class ResidentView:
    """A model that holds memory or is about to. ``held`` is counted for it, over all replicas; times are seconds since
    the epoch; ``holders`` are the ingresses with a lease on it."""

    model: str
    state: ModelState
    nodes: tuple[str, ...]
    held: Resources
    running: int
    pinned: bool
    since: float
    last_used_at: float | None
    holders: tuple[str, ...] = ()
    reason: str | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "state": self.state.value,
            "nodes": list(self.nodes),
            "replicas": len(self.nodes),
            "held": self.held.to_json(),
            "running": self.running,
            "pinned": self.pinned,
            "since": self.since,
            "lastUsedAt": self.last_used_at,
            "holders": list(self.holders),
            "reason": self.reason,
        }


@dataclass(frozen=True, slots=True)
class QueueView:
    """One waiting request. ``position`` counts from 1 over the *models* that are waited for."""

    position: int
    model: str
    priority: str
    caller: str
    waiting_ms: int
    reason: str
    eta_ms: int | None = None
    evicting: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {
            "position": self.position,
            "model": self.model,
            "priority": self.priority,
            "caller": self.caller,
            "waitingMs": self.waiting_ms,
            "reason": self.reason,
            "etaMs": self.eta_ms,
            "evicting": list(self.evicting),
        }


@dataclass(frozen=True, slots=True)
class FailureView:
    """A model whose last load failed. ``next_try`` is seconds since the epoch; None: not before its files change."""

    model: str
    code: str
    message: str
    failures: int
    next_try: float | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "code": self.code,
            "message": self.message,
            "failures": self.failures,
            "nextTry": self.next_try,
        }


@dataclass(frozen=True, slots=True)
class RotationView:
    """``history`` is oldest first. ``enabled`` False: nothing leaves memory for another model. ``removed`` are the
    models that an operator took out of the pool. ``counts``: how often each kind of warning was given, among them
    memory_warning, memory_cleanup, memory_critical and load_failed."""

    nodes: tuple[NodeView, ...] = ()
    residents: tuple[ResidentView, ...] = ()
    queue: tuple[QueueView, ...] = ()
    history: tuple[Decision, ...] = ()
    failures: tuple[FailureView, ...] = ()
    enabled: bool = True
    policy: str = ""
    removed: tuple[str, ...] = ()
    counts: Mapping[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            "enabled": self.enabled,
            "policy": self.policy,
            "nodes": [node.to_json() for node in self.nodes],
            "residents": [resident.to_json() for resident in self.residents],
            "queue": [waiting.to_json() for waiting in self.queue],
            "history": [decision.to_json() for decision in self.history],
            "failures": [failure.to_json() for failure in self.failures],
            "removed": list(self.removed),
            "counts": dict(self.counts),
        }


Naming = Callable[[str], str]
"""From a full name to the one that people know the model by."""


def view_of(
    rotation: Rotation,
    now: float,
    name_of: Naming = str,
    history: int = HISTORY,
    removed: tuple[str, ...] = (),
    counts: Mapping[str, int] | None = None,
) -> RotationView:
    """The rotation as it stands at ``now``, with the last ``history`` decisions."""
    state = rotation.state
    past = [_named(decision, name_of) for decision in list(state.history)[-history:]] if history > 0 else []
    return RotationView(
        nodes=_nodes(rotation),
        residents=tuple(
            _resident(rotation, resident, now, name_of) for _, resident in sorted(state.residency.residents.items())
        ),
        queue=_queue(rotation, now, name_of),
        history=tuple(past),
        failures=tuple(_failures(rotation, name_of)),
        enabled=state.limits.enabled,
        policy=state.policy.name,
        removed=tuple(name_of(name) for name in removed),
        counts=counts or {},
    )


def _nodes(rotation: Rotation) -> tuple[NodeView, ...]:
    state = rotation.state
    found = []
    for name, node in sorted(state.residency.nodes.items()):
        pressure = state.pressures.get(name)
        found.append(
            NodeView(
                name,
                node.pool,
                node.capacity,
                state.residency.used(name),
                state.residency.free_now(name),
                pressure.fraction if pressure else None,
                pressure.level.name.lower() if pressure else "calm",
            )
        )
    return tuple(found)


def _resident(rotation: Rotation, resident: Resident, now: float, name_of: Naming) -> ResidentView:
    row = rotation.state.residency.rows[resident.name]
    state, reason = rotation.state_of(resident.name)
    return ResidentView(
        name_of(resident.name),
        state,
        tuple(slot.node for slot in resident.slots),
        sum(rotation.state.residency.held_by(resident).values(), NOTHING),
        resident.running,
        row.pinned,
        resident.since if resident.loaded_at is None else resident.loaded_at,
        row.last_used or None,
        tuple(sorted(holder for holder, until in resident.leases.items() if until > now)),
        reason,
    )


def _queue(rotation: Rotation, now: float, name_of: Naming) -> tuple[QueueView, ...]:
    found = []
    for ticket in rotation.state.line.tickets.values():
        told = ticket.told
        found.append(
            QueueView(
                told.position if told else 0,
                name_of(ticket.model),
                ticket.priority.name.lower(),
                ticket.request.caller,
                max(0, round(1000 * (now - ticket.asked_at))),
                told.reason if told else "",
                round(1000 * told.eta_s) if told and told.eta_s is not None else None,
                tuple(name_of(victim) for victim in told.evicting) if told else (),
            )
        )
    return tuple(sorted(found, key=lambda waiting: (waiting.position, -waiting.waiting_ms)))


def _failures(rotation: Rotation, name_of: Naming) -> list[FailureView]:
    found = []
    for name, row in sorted(rotation.state.residency.rows.items()):
        if row.failure is not None:
            error: Mapping[str, Any] = row.failure.error
            found.append(
                FailureView(
                    name_of(name),
                    str(error.get("code")),
                    str(error.get("message")),
                    row.failure.failures,
                    row.failure.next_try,
                )
            )
    return found


def _named(decision: Decision, name_of: Naming) -> Decision:
    victims = tuple(name_of(victim) for victim in decision.victims)
    return replace(decision, model=name_of(decision.model) if decision.model else "", victims=victims)
