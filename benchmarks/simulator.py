"""A cluster in fast motion: carries out the effects of a ``Rotation`` and tells it what came of them."""

from __future__ import annotations

import heapq
import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from benchmarks.traces import Arrival
from serve_app.domain.catalog import LOCAL_PROVIDER, ModelState
from serve_app.domain.eviction import Policy
from serve_app.domain.placement import Node, Resources
from serve_app.domain.rotation import Rotation
from serve_app.domain.rotation_effects import (
    Grant,
    Load,
    Refuse,
    Retire,
    Revoke,
)
from serve_app.domain.rotation_events import (
    Acknowledged,
    CapacityChanged,
    Claimed,
    Event,
    Gone,
    Heartbeat,
    LeaseReleased,
    Limits,
    Model,
    Registered,
    Request,
    Tick,
)

HOLDER = "ingress"
NODE = "node"


@dataclass
class Outcome:
    """What a trace came to."""

    policy: str
    requests: int
    hits: int = 0
    waits: list[float] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)
    loads: int = 0
    bytes_moved: float = 0
    start: float = 0.0
    end: float = 0.0
    loading_s: float = 0.0

    @property
    def hit_rate(self) -> float:
        return self.hits / self.requests if self.requests else 0.0

    def wait_s(self, percent: float) -> float:
        """A percentile of the waits of granted requests, hits included, in seconds."""
        ordered = sorted(self.waits)
        return ordered[min(len(ordered) - 1, int(percent / 100 * len(ordered)))] if ordered else 0.0

    def to_json(self) -> dict[str, object]:
        return {
            "policy": self.policy,
            "requests": self.requests,
            "hitRate": round(self.hit_rate, 4),
            "loads": self.loads,
            "bytesMoved": int(self.bytes_moved),
            "refused": dict(self.refused),
            "waitSeconds": {f"p{percent:g}": round(self.wait_s(percent), 3) for percent in (50, 90, 99, 99.9, 100)},
            "loaderBusy": round(self.loading_s / (self.end - self.start), 3) if self.end > self.start else 0.0,
        }


class Simulation:
    """One node, one ingress that acknowledges at once, loads and retirements that take their time.

    Args:
        models: that are registered.
        budget: memory of the node, in bytes.
        policy: of the rotation.
        limits: of the rotation.
        load_s: what every load really takes; None = the model's own ``reload_s``.
        retire_s: from the end of a model's last request to its memory being free.
    """

    def __init__(
        self,
        models: Iterable[Model],
        budget: float,
        policy: Policy,
        limits: Limits,
        load_s: float | None = None,
        retire_s: float = 0.0,
    ) -> None:
        self.models = {model.name: model for model in models}
        self.rotation = Rotation(0.0, limits, policy)
        self.arrived = 0
        """Index of the arrival that is being handled; an optimum that knows the future starts from there."""
        self._load_s = load_s
        self._retire_s = retire_s
        self._heap: list[tuple[float, int, Event]] = []
        self._order = itertools.count()
        self._running: Counter[str] = Counter()
        self._leaving: set[str] = set()
        self._arrivals: Sequence[Arrival] = ()
        self._warm_up = 0
        for model in self.models.values():
            self.rotation.handle(Registered(model), 0.0)
        node = Node(NODE, Resources(memory=budget), LOCAL_PROVIDER)
        self.rotation.handle(CapacityChanged(LOCAL_PROVIDER, (node,)), 0.0)

    def run(self, arrivals: Sequence[Arrival], warm_up: int = 0) -> Outcome:
        """Replay the arrivals, and go on until every request is granted or refused; the first ones do not count."""
        self._arrivals, self._warm_up = arrivals, warm_up
        outcome = Outcome(self.rotation.state.policy.name, len(arrivals) - warm_up)
        for index, arrival in enumerate(arrivals):
            self._until(arrival.at, outcome)
            if index == warm_up:
                outcome.loads, outcome.bytes_moved, outcome.loading_s, outcome.start = 0, 0, 0.0, arrival.at
            self.arrived = index
            self._handle(self._request(index), arrival.at, outcome)
        self._until(float("inf"), outcome)
        return outcome

    def _request(self, index: int) -> Request:
        arrival = self._arrivals[index]
        return Request(str(index), (arrival.model,), HOLDER, caller=arrival.caller, asked_at=arrival.at)

    def _until(self, end: float, outcome: Outcome) -> None:
        """Let everything happen that is due before ``end``."""
        while True:
            due = self._heap[0][0] if self._heap else float("inf")
            waiting = len(self.rotation.state.line) > 0
            tick = (self.rotation.wake_at() if waiting else None) or float("inf")
            if min(due, tick) >= end or min(due, tick) == float("inf"):
                return
            if tick < due:
                self._handle(Tick(), tick, outcome)
            else:
                at, _, event = heapq.heappop(self._heap)
                self._handle(self._now(event), at, outcome)

    def _handle(self, event: Event, now: float, outcome: Outcome) -> None:
        outcome.end = max(outcome.end, now)
        for effect in self.rotation.handle(event, now):
            match effect:
                case Grant(lease=None):
                    self._handle(Claimed(self._request(int(effect.ticket)), effect.model, effect.reason), now, outcome)
                case Grant():
                    self._granted(effect, now, outcome)
                case Refuse():
                    outcome.refused[effect.code] += 1
                case Load():
                    self._load(effect, now, outcome)
                case Revoke():
                    self._handle(Acknowledged(effect.holder, effect.model, effect.epoch), now, outcome)
                case Retire():
                    self._leaving.add(effect.model)
                    self._leave(effect.model, now, outcome)

    def _granted(self, grant: Grant, now: float, outcome: Outcome) -> None:
        arrival = self._arrivals[int(grant.ticket)]
        if int(grant.ticket) >= self._warm_up:
            outcome.waits.append(grant.waited_s)
            outcome.hits += grant.reason == "it is in memory"
        if arrival.service_s:
            self._running[grant.model] += 1
            self._later(now + arrival.service_s, LeaseReleased(grant.ticket, grant.model))
            self._handle(self._beat(grant.model), now, outcome)

    def _load(self, load: Load, now: float, outcome: Outcome) -> None:
        model = self.models[load.model]
        outcome.loads += 1
        outcome.bytes_moved += model.demand.memory
        takes = model.reload_s if self._load_s is None else self._load_s
        outcome.loading_s += takes
        if takes:
            self._later(now + takes, self._beat(load.model))
        else:
            self._handle(self._beat(load.model), now, outcome)

    def _leave(self, model: str, now: float, outcome: Outcome) -> None:
        """End a retired model as soon as nothing runs on it."""
        if model not in self._leaving or self._running[model]:
            return
        self._leaving.discard(model)
        if self._retire_s:
            self._later(now + self._retire_s, Gone(model))
        else:
            self._handle(Gone(model), now, outcome)

    def _now(self, event: Event) -> Event:
        """A request that ended is told as the heartbeat of its replica."""
        if not isinstance(event, LeaseReleased):
            return event
        self._running[event.model] -= 1
        if event.model in self._leaving and not self._running[event.model]:
            self._leaving.discard(event.model)
            return Gone(event.model)
        return self._beat(event.model)

    def _beat(self, model: str) -> Heartbeat:
        running = self._running[model]
        return Heartbeat(model, f"{model}#1", NODE, ModelState.BUSY if running else ModelState.READY, running)

    def _later(self, at: float, event: Event) -> None:
        heapq.heappush(self._heap, (at, next(self._order), event))
