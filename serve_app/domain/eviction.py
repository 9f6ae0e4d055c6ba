"""Which residents leave so that a target fits: pure functions, named policies.

A policy puts a price on the departure of one resident. :func:`victims_for` looks, on each node, for a cheap set of
residents whose departure makes the target fit there, and takes the cheapest of these sets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from serve_app.domain.errors import InvalidConfig
from serve_app.domain.placement import NOTHING, Resources


@dataclass(frozen=True, slots=True)
class Evictable:
    """A resident that may leave, as a policy sees it.

    ``frees`` is what its departure gives back on each node, ``reload_s`` what bringing it back takes in seconds,
    ``chance`` the probability that the next arrival is for it, ``last_used`` and ``keep_alive_s`` are seconds.
    ``busy`` ones are given only when a model may be asked to drain; ``counts`` is False where no cap counts it.
    """

    name: str
    frees: Mapping[str, Resources]
    reload_s: float = 1.0
    chance: float = 0.0
    last_used: float = 0.0
    keep_alive_s: float = 300.0
    busy: bool = False
    counts: bool = True


@dataclass(frozen=True, slots=True)
class Policy:
    """How victims are compared.

    Args:
        name: as in the settings and reports.
        price: of the departure of one resident; the lower, the sooner it goes.
        per_share: whether residents compete by price per share of the node that they give back, and sets by the sum
            of their prices. Otherwise residents compete by price alone and sets by their dearest member.
    """

    name: str
    price: Callable[[Evictable], float]
    per_share: bool = False

    def __repr__(self) -> str:
        return f"Policy({self.name})"


LRU = Policy("lru", lambda resident: resident.last_used)
"""The least recently used one goes."""

COST_AWARE = Policy("cost_aware", lambda resident: max(resident.reload_s, 0.001) * resident.chance, per_share=True)
"""Expected reload time lost, per share freed: greedy-dual-size-frequency (L. Cherkasova, HP Labs 98-69, 1998) with a
learned chance of reuse in the place of its frequency and ageing terms."""

OLLAMA = Policy("ollama", lambda resident: resident.keep_alive_s)
"""Ollama's rule (``server/sched.go``, findRunnerToUnload): the shortest keep-alive goes, ties by name."""

POLICIES: Mapping[str, Policy] = {policy.name: policy for policy in (COST_AWARE, LRU, OLLAMA)}


def policy_named(name: str) -> Policy:
    """The policy of that name.

    Raises:
        InvalidConfig: there is none; the message lists them.
    """
    if name not in POLICIES:
        raise InvalidConfig(f"There is no eviction policy {name!r}; there are {', '.join(sorted(POLICIES))}.")
    return POLICIES[name]


@dataclass(frozen=True, slots=True)
class Choice:
    """The victims that make the target fit on ``node``; ``price`` compares choices (busy victims first)."""

    node: str
    victims: tuple[Evictable, ...]
    price: tuple[int, float]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(victim.name for victim in self.victims)


def victims_for(
    demand: Resources,
    free: Mapping[str, Resources],
    capacity: Mapping[str, Resources],
    residents: Sequence[Evictable],
    policy: Policy,
    surplus: int = 0,
) -> Choice | None:
    """The cheapest set whose departure makes ``demand`` fit on one node, or None when no set does.

    Args:
        demand: of one replica of the target.
        free: of each node that the target may land on, departures under way counted in.
        capacity: of the same nodes.
        residents: that may leave.
        policy: that compares them.
        surplus: how many counted residents must leave at least, whatever they free (a cap on their number).
    """
    choices = [
        choice
        for node, amount in sorted(free.items())
        if (choice := _on_node(node, demand, amount, capacity[node], residents, policy, surplus)) is not None
    ]
    return min(choices, key=lambda choice: (choice.price, len(choice.victims), choice.node), default=None)


def _on_node(
    node: str,
    demand: Resources,
    free: Resources,
    capacity: Resources,
    residents: Sequence[Evictable],
    policy: Policy,
    surplus: int,
) -> Choice | None:
    if not capacity.covers(demand):
        return None
    chosen: list[Evictable] = []
    missing = free.missing(demand)
    if missing != NOTHING:
        here = [resident for resident in residents if node in resident.frees]
        ranked = _ranked(here, policy, lambda resident: resident.frees[node].share_of(capacity, missing))
        greedy = _cover(ranked, node, demand, free, policy)
        if greedy is None:
            return None
        chosen = greedy
    chosen = _with_surplus(chosen, residents, policy, surplus)
    if chosen is None or sum(victim.counts for victim in chosen) < surplus:
        return None
    return Choice(node, tuple(chosen), _total(chosen, policy))


def _ranked(residents: Iterable[Evictable], policy: Policy, share: Callable[[Evictable], float]) -> list[Evictable]:
    """Cheapest first, busy ones last; those that give back nothing that is short do not appear."""
    keyed = []
    for resident in residents:
        part = share(resident)
        if part > 0:
            price = policy.price(resident)
            keyed.append(((resident.busy, price / part if policy.per_share else price, resident.name), resident))
    return [resident for _, resident in sorted(keyed, key=lambda pair: pair[0])]


def _cover(
    ranked: Sequence[Evictable], node: str, demand: Resources, free: Resources, policy: Policy
) -> list[Evictable] | None:
    """The shortest cheap prefix that fits the target, less the members that it can spare, dearest first."""
    chosen: list[Evictable] = []
    room = free
    for resident in ranked:
        if room.covers(demand):
            break
        chosen.append(resident)
        room += resident.frees[node]
    if not room.covers(demand):
        return None
    for victim in sorted(chosen, key=lambda one: (one.busy, policy.price(one), one.name), reverse=True):
        if (room - victim.frees[node]).covers(demand):
            chosen.remove(victim)
            room -= victim.frees[node]
    return chosen


def _with_surplus(
    chosen: list[Evictable], residents: Sequence[Evictable], policy: Policy, surplus: int
) -> list[Evictable]:
    """``chosen`` and as many more of the cheapest counted residents as the cap on their number asks for."""
    lacking = surplus - sum(victim.counts for victim in chosen)
    if lacking <= 0:
        return chosen
    taken = {victim.name for victim in chosen}
    others = [resident for resident in residents if resident.counts and resident.name not in taken]
    return chosen + _ranked(others, policy, lambda _: 1.0)[:lacking]


def _total(victims: Iterable[Evictable], policy: Policy) -> tuple[int, float]:
    prices = [policy.price(victim) for victim in victims]
    price = sum(prices) if policy.per_share else max(prices, default=float("-inf"))
    return sum(victim.busy for victim in victims), price
