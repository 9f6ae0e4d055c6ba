"""A small cluster that a test moves by hand, and that watches over the rules which must hold whatever happens."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from serve_app.domain.catalog import LOCAL_PROVIDER, ModelState
from serve_app.domain.errors import ModelLoadFailed
from serve_app.domain.eviction import COST_AWARE, Policy
from serve_app.domain.placement import NOTHING, Node, Resources
from serve_app.domain.rotation import Rotation
from serve_app.domain.rotation_effects import (
    Effect,
    Extend,
    Grant,
    Load,
    Refuse,
    Retire,
    Revoke,
)
from serve_app.domain.rotation_events import (
    Acknowledged,
    Cancel,
    CapacityChanged,
    Claimed,
    Event,
    Gone,
    Heartbeat,
    LeaseReleased,
    LeaseRenewed,
    Limits,
    LoadFailed,
    Model,
    Registered,
    Request,
    Tick,
)

GIB = 2**30
QUICK = Limits(barrier_s=0, silence_s=None, settle_s=0.5, min_residency_s=0, max_wait_s=30, load_timeout_s=60)


def model(name: str, gib: float = 1, **more: object) -> Model:
    return Model(name, Resources(memory=int(gib * GIB)), **more)  # type: ignore[arg-type]


def nodes(*gib: float) -> tuple[Node, ...]:
    return tuple(Node(f"n{i}", Resources(memory=int(size * GIB)), LOCAL_PROVIDER) for i, size in enumerate(gib))


@dataclass
class Replica:
    """A process of the cluster."""

    node: str
    loaded: bool = False
    running: int = 0
    retired: bool = False


class World:
    """The cluster and the ingresses as they really are. Every effect is checked against them."""

    def __init__(
        self,
        models: Iterable[Model],
        sizes: Iterable[float] = (2,),
        limits: Limits = QUICK,
        policy: Policy = COST_AWARE,
        generation: int = 1,
        now: float = 0.0,
        prompt: bool = True,
    ) -> None:
        self.now = now
        self.prompt = prompt
        """Whether an ingress comes at once for what it was granted while it waited; else a test calls ``claim``."""
        self.unclaimed: dict[str, Grant] = {}
        self.limits = limits
        self.models = {one.name: one for one in models}
        self.nodes = {node.name: node for node in nodes(*sizes)}
        self.rotation = Rotation(now, limits, policy, generation)
        self.events: list[tuple[Event, float]] = []
        self.replicas: dict[str, Replica] = {}
        self.leases: dict[tuple[str, str], float] = {}
        self.revoked: list[Revoke] = []
        self.asked: dict[str, Request] = {}
        self.asked_at: dict[str, float] = {}
        self.answers: dict[str, Effect] = {}
        self.cancelled: set[str] = set()
        self.effects: list[Effect] = []
        for one in self.models.values():
            self.tell(Registered(one))
        self.tell(CapacityChanged(LOCAL_PROVIDER, tuple(self.nodes.values())))

    # What a test does

    def tell(self, event: Event) -> list[Effect]:
        """Pass an event on, check every effect, and return them."""
        self.events.append((event, self.now))
        if isinstance(event, Request):
            self.asked[event.ticket] = event
            self.asked_at.setdefault(event.ticket, self.now if event.asked_at is None else event.asked_at)
        effects = self.rotation.handle(event, self.now)
        self.effects += effects
        for effect in effects:
            self._check(effect)
        self._check_capacity()
        for effect in effects:
            if isinstance(effect, Grant) and effect.model in self.replicas and effect.lease is not None:
                effects = effects + self.beat(effect.model)
            if isinstance(effect, Grant) and effect.ticket in self.unclaimed and self.prompt:
                effects = effects + self.claim(effect.ticket)
        return effects

    def claim(self, ticket: str) -> list[Effect]:
        """The ingress comes for a grant."""
        grant = self.unclaimed.pop(ticket)
        del self.answers[ticket]
        request = replace(self.asked[ticket], asked_at=self.asked_at[ticket])
        return self.tell(Claimed(request, grant.model, grant.reason))

    def ask(self, ticket: str, *models: str, holder: str = "i1", **more: object) -> list[Effect]:
        return self.tell(Request(ticket, models, holder, **more))  # type: ignore[arg-type]

    def cancel(self, ticket: str) -> list[Effect]:
        self.cancelled.add(ticket)
        self.unclaimed.pop(ticket, None)
        return self.tell(Cancel(ticket))

    def pass_time(self, seconds: float) -> list[Effect]:
        self.now += seconds
        return self.tell(Tick())

    def loaded(self, name: str) -> list[Effect]:
        self.replicas[name].loaded = True
        return self.beat(name)

    def fails(self, name: str, retryable: bool = True) -> list[Effect]:
        return self.tell(LoadFailed(name, ModelLoadFailed(f"{name} broke", retryable=retryable).to_dict()))

    def beat(self, name: str, memory: float | None = None) -> list[Effect]:
        replica = self.replicas[name]
        state = ModelState.BUSY if replica.running else ModelState.READY
        state = ModelState.RETIRING if replica.retired else state if replica.loaded else ModelState.LOADING
        return self.tell(Heartbeat(name, f"{name}#1", replica.node, state, replica.running, memory))

    def use(self, holder: str, name: str) -> list[Effect]:
        """An ingress calls under its lease, without asking."""
        assert self.may_call(holder, name)
        replica = self.replicas[name]
        assert not replica.retired, "a late call would wake the model"
        replica.running += 1
        return [*self.beat(name), *self.tell(LeaseRenewed(holder, name))]

    def release(self, holder: str, name: str) -> list[Effect]:
        del self.leases[holder, name]
        return self.tell(LeaseReleased(holder, name))

    def finish(self, name: str) -> list[Effect]:
        self.replicas[name].running -= 1
        return self.beat(name)

    def acknowledge(self) -> list[Effect]:
        """Every ingress that was told to stop has stopped."""
        effects = []
        while self.revoked:
            effects += self.acknowledge_one(0)
        return effects

    def acknowledge_one(self, index: int) -> list[Effect]:
        revoke = self.revoked.pop(index)
        self.leases.pop((revoke.holder, revoke.model), None)
        replica = self.replicas.get(revoke.model)
        return self.tell(Acknowledged(revoke.holder, revoke.model, revoke.epoch, replica.running if replica else 0))

    def ends(self, name: str) -> list[Effect]:
        """The process of a retired model ends; its streams have."""
        assert self.replicas[name].retired and not self.replicas[name].running
        del self.replicas[name]
        return self.tell(Gone(name))

    def settle(self) -> None:
        """Let everything that is under way end well, without time passing."""
        before = -1
        while before != len(self.events):
            before = len(self.events)
            self.acknowledge()
            for name, replica in list(self.replicas.items()):
                if replica.retired:
                    replica.running = 0
                    self.ends(name)
                elif not replica.loaded:
                    self.loaded(name)

    def use_up(self) -> None:
        """Let every running request end."""
        for name, replica in list(self.replicas.items()):
            while replica.running and not replica.retired:
                self.finish(name)

    # What a test reads

    def may_call(self, holder: str, name: str) -> bool:
        return self.now < self.leases.get((holder, name), float("-inf"))

    def waiting(self) -> set[str]:
        return self.asked.keys() - self.answers.keys() - self.cancelled

    def granted(self, ticket: str) -> bool:
        return isinstance(self.answers.get(ticket), Grant)

    def kinds(self, kind: type[Effect]) -> list[Effect]:
        return [effect for effect in self.effects if isinstance(effect, kind)]

    # What must hold

    def _check(self, effect: Effect) -> None:
        match effect:
            case Grant() | Refuse():
                assert effect.ticket not in self.answers, f"{effect.ticket} was answered twice"
                assert effect.ticket not in self.cancelled, f"{effect.ticket} had left"
                self.answers[effect.ticket] = effect
                here = isinstance(effect, Grant) and self.models[effect.model].resides
                if isinstance(effect, Grant) and here and effect.lease is not None:
                    self._let_in(effect)
                elif isinstance(effect, Grant) and here and self.asked[effect.ticket].lease:
                    self.unclaimed[effect.ticket] = effect
            case Load():
                assert effect.model not in self.replicas, f"{effect.model} is there already"
                self.replicas[effect.model] = Replica(effect.node)
            case Extend():
                self.leases[effect.holder, effect.lease.model] = self.now + effect.lease.ttl_s
            case Revoke():
                self.revoked.append(effect)
            case Retire():
                self._check_retire(effect)
                self.replicas[effect.model].retired = True

    def _let_in(self, grant: Grant) -> None:
        replica = self.replicas[grant.model]
        assert replica.loaded and not replica.retired, f"{grant.model} cannot answer"
        replica.running += 1
        self.leases[grant.holder, grant.model] = self.now + self.limits.lease_ttl_s

    def _check_retire(self, effect: Retire) -> None:
        replica = self.replicas[effect.model]
        holders = [holder for holder, name in self.leases if name == effect.model and self.may_call(holder, name)]
        assert not holders, f"{holders} may still call {effect.model}"
        assert effect.drain or not replica.running, f"{effect.model} is busy"
        by_rule = "room for" in effect.reason or "has waited" in effect.reason or "idle" in effect.reason
        assert not (by_rule and self.rotation.pinned(effect.model)), f"{effect.model} is pinned"
        if "has waited" in effect.reason:
            waits = [self.now - at for ticket, at in self.asked_at.items() if ticket not in self.cancelled]
            assert max(waits) >= self.limits.max_wait_s

    def _check_capacity(self) -> None:
        for node in self.nodes.values():
            held = [self.models[name].demand for name, replica in self.replicas.items() if replica.node == node.name]
            assert node.capacity.covers(sum(held, NOTHING)), f"{node.name} holds too much: {held}"
