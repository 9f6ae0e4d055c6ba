"""Who is in memory, where, and who may call whom: the table that rotation decides by. No decisions here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from serve_app.domain.catalog import RESIDENT, ModelState
from serve_app.domain.placement import NOTHING, Node, Resources
from serve_app.domain.rotation_events import Heartbeat, Model

RELOAD_WEIGHT = 0.3
"""Weight of the newest load in the running mean of a model's load time."""


@dataclass(slots=True)
class Failure:
    """Why the last load failed; ``next_try`` None = not before the revision changes."""

    error: Mapping[str, object]
    failures: int
    next_try: float | None
    exhausted: bool = False


@dataclass(slots=True)
class Row:
    """One registered model and what was learned of it."""

    model: Model
    demand: Resources
    reload_s: float
    pinned: bool
    failure: Failure | None = None
    last_used: float = 0.0
    left_at: float = -math.inf
    """When it was last out of memory for good; what was seen of it before may be told after."""
    measured: float = 0
    removed: bool = False
    """It leaves the pool as soon as its replicas are gone."""

    @classmethod
    def of(cls, model: Model) -> Row:
        return cls(model, model.demand, model.reload_s, model.pinned)

    def measure(self, memory: float) -> bool:
        """Keep the larger of what is declared and what was measured, in bytes; whether that changed anything."""
        self.measured = max(self.measured, memory)
        before, declared = self.demand, self.model.demand
        self.demand = Resources(declared.cpu, declared.gpu, max(declared.memory, self.measured))
        return self.demand != before

    def learned(self) -> dict[str, Any]:
        """What a later router should know, as JSON values; :meth:`recall` reads it back. Empty: nothing was learned."""
        if not self.measured and self.failure is None and self.pinned == self.model.pinned:
            return {}
        failure = asdict(self.failure) if self.failure else None
        return {
            "revision": self.model.revision,
            "pinned": self.pinned,
            "declaredPin": self.model.pinned,
            "measured": self.measured,
            "reloadS": self.reload_s,
            "failure": failure,
        }

    def recall(self, learned: Mapping[str, Any]) -> None:
        """Take over what an earlier router had learned: sizes and failures of the same revision, and the pin unless
        what is declared of it has changed since."""
        if not learned:
            return
        if learned.get("declaredPin", self.model.pinned) == self.model.pinned:
            self.pinned = bool(learned["pinned"])
        if learned["revision"] == self.model.revision:
            self.measure(learned["measured"])
            self.reload_s = learned["reloadS"]
            self.failure = Failure(**learned["failure"]) if learned["failure"] else None

    def loaded_in(self, seconds: float) -> None:
        self.reload_s += RELOAD_WEIGHT * (seconds - self.reload_s)


@dataclass(slots=True)
class Slot:
    """Room that one replica takes; ``replica`` is None until it has spoken."""

    node: str
    heard_at: float
    replica: str | None = None
    state: ModelState = ModelState.LOADING
    running: int = 0


@dataclass(slots=True)
class Retirement:
    """A model is leaving; leases up to ``revoked`` have ended. Until ``sent`` its replicas know nothing, and it may
    still be kept."""

    reason: str
    since: float
    revoked: int
    drain: bool = False
    wanted_by: str | None = None
    sent: bool = False


@dataclass(slots=True)
class Resident:
    """A model that holds memory or is about to. ``leases`` are holders and when their right surely has ended;
    ``promised`` are requests that were granted and have not been claimed, and for how long the model stays for them."""

    name: str
    epoch: int
    since: float
    slots: list[Slot] = field(default_factory=list)
    leases: dict[str, float] = field(default_factory=dict)
    promised: dict[str, float] = field(default_factory=dict)
    loaded_at: float | None = None
    used_until: float = float("-inf")
    retirement: Retirement | None = None
    scaled: str = ""
    """What was decided last about the number of its replicas."""

    @property
    def retired(self) -> bool:
        """Whether every replica says that it is leaving."""
        return bool(self.slots) and all(slot.state is ModelState.RETIRING for slot in self.slots)

    @property
    def ready(self) -> bool:
        return self.retirement is None and self.loaded_at is not None

    @property
    def loading(self) -> bool:
        return self.retirement is None and self.loaded_at is None

    @property
    def leaving(self) -> bool:
        return self.retirement is not None

    @property
    def running(self) -> int:
        return sum(slot.running for slot in self.slots)

    def busy(self, now: float) -> bool:
        """Whether requests run, have been let in so lately that no heartbeat could tell, or are about to come."""
        if now < self.used_until or self.running > 0:
            return True
        return bool(self.promised) and max(self.promised.values()) > now

    def fresh_until(self, fresh_s: float) -> float:
        """Until when it is too new to be told to leave."""
        return float("-inf") if self.loaded_at is None else self.loaded_at + fresh_s

    def drop_expired(self, now: float) -> None:
        self.leases = {holder: until for holder, until in self.leases.items() if until > now}
        self.promised = {ticket: until for ticket, until in self.promised.items() if until > now}

    def hear(self, beat: Heartbeat, now: float) -> Slot:
        """The slot of a replica that speaks; one that nobody knew takes the first that waits for one."""
        slot = next((slot for slot in self.slots if slot.replica == beat.replica), None)
        slot = slot or next((slot for slot in self.slots if slot.replica is None), None)
        if slot is None:
            slot = Slot(beat.node, now)
            self.slots.append(slot)
        slot.replica, slot.node, slot.state = beat.replica, beat.node, beat.state
        slot.running, slot.heard_at = beat.running, now
        return slot

    def state(self, now: float) -> ModelState:
        if self.leaving:
            return ModelState.RETIRING
        if self.loading:
            return ModelState.LOADING
        return ModelState.BUSY if self.busy(now) else ModelState.READY


@dataclass(slots=True)
class Pending:
    """A load that is decided and waits until the victims' memory is free."""

    model: str
    node: str
    victims: tuple[str, ...]
    since: float
    reason: str


class Residency:
    """Nodes, registered models, residents and decided loads, with the sums over them.

    *Used* room is what residents hold now, those that leave included. *Promised* room is what will be held once all
    departures and decided loads under way have ended; planning is done by that one.
    """

    def __init__(self) -> None:
        self.nodes: dict[str, Node] = {}
        self.rows: dict[str, Row] = {}
        self.residents: dict[str, Resident] = {}
        self.pending: dict[str, Pending] = {}
        self._sums: tuple[dict[str, Resources], dict[str, Resources]] | None = None

    def __repr__(self) -> str:
        return f"Residency({', '.join(f'{node.name}: {node.capacity}' for node in self.nodes.values())})"

    def add(self, model: Model) -> Row:
        """Register a model, or what changed of it; another revision clears what was learned of the old one."""
        row = self.rows.get(model.name)
        if row is None or row.model.revision != model.revision:
            pinned = model.pinned or (row is not None and row.pinned and not row.model.pinned)
            row = self.rows[model.name] = Row.of(model)
            row.pinned = pinned
        else:
            if row.model.pinned != model.pinned:
                row.pinned = model.pinned
            row.model = model
            row.measure(row.measured)
        row.removed = False
        self.changed()
        return row

    def changed(self) -> None:
        """To be called after every change of nodes, slots, demands, retirements or decided loads."""
        self._sums = None

    def used(self, node: str) -> Resources:
        """What replicas hold on a node now."""
        return self._summed()[0].get(node, NOTHING)

    def free_now(self, node: str) -> Resources:
        return self.nodes[node].capacity - self.used(node)

    def free_then(self, node: str) -> Resources:
        """What is free on a node once departures and decided loads under way have ended."""
        return self.nodes[node].capacity - self._summed()[1].get(node, NOTHING)

    def in_pool(self, pool: str) -> list[Node]:
        return [node for node in self.nodes.values() if node.pool == pool]

    def held_by(self, resident: Resident) -> dict[str, Resources]:
        """What a resident holds on each node."""
        demand = self.rows[resident.name].demand
        held: dict[str, Resources] = {}
        for slot in resident.slots:
            held[slot.node] = held.get(slot.node, NOTHING) + demand
        return held

    def staying(self, pool: str | None = None) -> int:
        """How many models hold memory, or will: all of them, or those of one pool."""
        names = [resident.name for resident in self.residents.values() if not resident.leaving]
        names += [name for name in self.pending if name not in self.residents or self.residents[name].leaving]
        return sum(pool is None or self.rows[name].model.pool == pool for name in names)

    def loading(self, pool: str | None = None) -> int:
        """How many loads are under way or decided."""
        names = [resident.name for resident in self.residents.values() if resident.loading] + list(self.pending)
        return sum(pool is None or self.rows[name].model.pool == pool for name in names)

    def _summed(self) -> tuple[dict[str, Resources], dict[str, Resources]]:
        if self._sums is None:
            used, then = _Sums(), _Sums()
            for resident in self.residents.values():
                demand, leaving = self.rows[resident.name].demand, resident.leaving
                for slot in resident.slots:
                    used.add(slot.node, demand)
                    if not leaving:
                        then.add(slot.node, demand)
            for pending in self.pending.values():
                then.add(pending.node, self.rows[pending.model].demand)
            self._sums = used.read(), then.read()
        return self._sums


class _Sums:
    """Resources added up per node, in place: this is the innermost loop of planning."""

    def __init__(self) -> None:
        self._sums: dict[str, list[float]] = {}

    def add(self, node: str, amount: Resources) -> None:
        held = self._sums.get(node)
        if held is None:
            self._sums[node] = [amount.cpu, amount.gpu, amount.memory]
            return
        held[0] += amount.cpu
        held[1] += amount.gpu
        held[2] += amount.memory

    def read(self) -> dict[str, Resources]:
        return {node: Resources(*amounts) for node, amounts in self._sums.items()}


def is_loaded(state: ModelState) -> bool:
    """Whether a replica in this state can answer."""
    return state in RESIDENT
