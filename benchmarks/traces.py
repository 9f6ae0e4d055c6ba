"""Arrival traces for simulations: synthetic ones with a seed, and recorded ones."""

from __future__ import annotations

import bisect
import itertools
import json
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request: when (seconds), for which model, by whom, and how long it runs once it may (seconds)."""

    at: float
    model: str
    caller: str = "anonymous"
    service_s: float = 0.0


def model_names(count: int) -> list[str]:
    """``m0000`` is the most popular one of the synthetic traces."""
    return [f"m{index:04d}" for index in range(count)]


def zipf(count: int, models: int, seed: int, exponent: float = 1.0) -> list[str]:
    """``count`` independent draws; the model of rank r has a weight of 1 / r ** exponent."""
    return list(itertools.islice(_zipf(random.Random(seed), models, exponent), count))


def bursty(count: int, models: int, seed: int, mean_length: float = 10.0, sessions: int = 20) -> list[str]:
    """Sessions: each asks for one model (drawn as in :func:`zipf`) an exponentially distributed number of times; up to
    ``sessions`` run at once, and every request is of a random one of them."""
    rng = random.Random(seed)
    draws = _zipf(rng, models, 1.0)
    live: list[tuple[str, int]] = []
    requests: list[str] = []
    while len(requests) < count:
        if not live or (len(live) < sessions and rng.random() < 0.2):
            live.append((next(draws), 1 + int(rng.expovariate(1 / mean_length))))
        index = rng.randrange(len(live))
        model, left = live.pop(index)
        requests.append(model)
        if left > 1:
            live.append((model, left - 1))
    return requests


def drifting(count: int, models: int, seed: int, period: int = 5000) -> list[str]:
    """As :func:`zipf`, but the ranks are dealt anew after every ``period`` requests."""
    rng = random.Random(seed)
    names = model_names(models)
    requests: list[str] = []
    for name in itertools.islice(_zipf(rng, models, 1.0), count):
        if len(requests) % period == 0:
            rng.shuffle(names)
        requests.append(names[int(name[1:])])
    return requests


def evenly(models: Iterable[str], gap_s: float = 1.0) -> list[Arrival]:
    """One arrival every ``gap_s`` seconds."""
    return [Arrival(index * gap_s, model) for index, model in enumerate(models)]


def poisson(models: Iterable[str], rate: float, seed: int, service_s: float = 0.0) -> list[Arrival]:
    """Arrivals with independent exponential gaps, ``rate`` per second."""
    rng = random.Random(seed)
    now = 0.0
    arrivals = []
    for model in models:
        now += rng.expovariate(rate)
        arrivals.append(Arrival(now, model, f"caller-{rng.randrange(8)}", service_s))
    return arrivals


def recorded(path: Path) -> list[Arrival]:
    """The arrivals behind a decision log: JSON lines as ``Decision.to_json`` writes them.

    A request arrived as long before its grant, refusal or cancellation as it had waited; calls under a lease arrived
    when they were reported.
    """
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    arrivals = [arrival for line in lines for arrival in _behind(line)]
    start = min((arrival.at for arrival in arrivals), default=0.0)
    moved = [Arrival(arrival.at - start, arrival.model, arrival.caller, arrival.service_s) for arrival in arrivals]
    return sorted(moved, key=lambda arrival: (arrival.at, arrival.model, arrival.caller))


def next_uses(requests: Sequence[str]) -> list[int]:
    """For each request the index of the next one for the same model; ``len(requests)`` when there is none."""
    following = [len(requests)] * len(requests)
    last: dict[str, int] = {}
    for index in range(len(requests) - 1, -1, -1):
        following[index] = last.get(requests[index], len(requests))
        last[requests[index]] = index
    return following


def hit_bound(requests: Sequence[str], sizes: dict[str, float], budget: float) -> float:
    """An upper bound of every policy's hit rate for models of unequal sizes.

    PFOO-U (D. Berger, N. Beckmann, M. Harchol-Balter, "Practical Bounds on Optimal Caching with Variable Object Sizes",
    SIGMETRICS 2018): a hit needs size × (requests since the last use) of memory, and all hits together can use no more
    than budget × length of the trace; take the cheapest ones until that is spent.
    """
    needs = [
        sizes[model] * (following - index)
        for index, (model, following) in enumerate(zip(requests, next_uses(requests), strict=True))
        if following < len(requests)
    ]
    left, hits = budget * len(requests), 0
    for need in sorted(needs):
        left -= need
        if left < 0:
            break
        hits += 1
    return hits / len(requests)


def _zipf(rng: random.Random, models: int, exponent: float) -> Iterator[str]:
    names = model_names(models)
    sums = list(itertools.accumulate(1 / (rank + 1) ** exponent for rank in range(models)))
    while True:
        yield names[bisect.bisect_left(sums, rng.random() * sums[-1])]


def _behind(line: dict[str, object]) -> Iterator[Arrival]:
    action, model, at = line.get("action"), str(line.get("model")), float(str(line.get("at", 0)))
    caller = str(line.get("caller") or "anonymous")
    if action in ("grant", "refuse", "cancelled"):
        yield Arrival(at - float(str(line.get("durationMs") or 0)) / 1000, model, caller)
    elif action == "used":
        yield from (Arrival(at, model, caller) for _ in range(int(str(line.get("times", 1)))))
