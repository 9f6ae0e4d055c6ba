"""Which models stay in memory: policies against each other and against an optimum that knows the future.

``python -m benchmarks.scenarios.rotation_sim`` replays synthetic traces (and, with ``--trace``, a recorded decision
log) through the same ``Rotation`` that the router runs, on a fake clock, and writes
``benchmarks/results/rotation_sim.json``.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from statistics import fmean, median
from typing import cast

from benchmarks.simulator import Outcome, Simulation
from benchmarks.traces import (
    Arrival,
    bursty,
    drifting,
    evenly,
    hit_bound,
    model_names,
    poisson,
    recorded,
    zipf,
)
from serve_app.domain.catalog import LOCAL_PROVIDER, ModelState
from serve_app.domain.eviction import COST_AWARE, LRU, OLLAMA, Policy
from serve_app.domain.placement import Node, Resources
from serve_app.domain.rotation import Rotation
from serve_app.domain.rotation_events import (
    CapacityChanged,
    Heartbeat,
    Limits,
    Model,
    Registered,
    Request,
)

RESULTS = Path(__file__).resolve().parents[1] / "results" / "rotation_sim.json"
MODELS = 1000
SHARE = 0.05
"""Budget, as a share of what all models need together."""
LOAD_S = 8.0
MAX_WAIT_S = 120.0
OPTIMUM_BUSY = 0.6
"""How busy the optimum keeps the only loader of the timed runs."""
ONLINE = (COST_AWARE, LRU, OLLAMA)
INSTANT = Limits(barrier_s=0, settle_s=0, min_residency_s=0, silence_s=None, max_queue=1_000_000)
GIB = 2**30

Row = dict[str, object]


def optimum(simulation: Callable[[], Simulation], requests: Sequence[str]) -> Policy:
    """Belady's rule: the model whose next use is farthest away leaves. Optimal for equal sizes and instant loads."""
    positions: dict[str, list[int]] = {}
    for index in range(len(requests) - 1, -1, -1):
        positions.setdefault(requests[index], []).append(index)

    def next_use(name: str) -> int:
        ahead = positions.get(name, [])
        while ahead and ahead[-1] <= simulation().arrived:
            ahead.pop()
        return ahead[-1] if ahead else len(requests)

    return Policy("belady", lambda resident: -float(next_use(resident.name)))


def replay(
    arrivals: Sequence[Arrival],
    policy: Policy | None,
    models: Sequence[Model],
    budget: float,
    limits: Limits = INSTANT,
    load_s: float | None = 0.0,
    retire_s: float = 0.0,
    warm_up: int = 0,
) -> Outcome:
    """One trace under one policy; None = the optimum."""
    running: list[Simulation] = []
    chosen = policy or optimum(lambda: running[0], [arrival.model for arrival in arrivals])
    running.append(Simulation(models, budget, chosen, limits, load_s, retire_s))
    return running[0].run(arrivals, warm_up)


def equal_models(size: float = GIB, reload_s: float = LOAD_S) -> list[Model]:
    return [Model(name, Resources(memory=size), reload_s=reload_s) for name in model_names(MODELS)]


def unequal_models(seed: int) -> list[Model]:
    """Sizes from 0.5 to 32 GiB, evenly on a logarithmic scale and independent of popularity; loads at 1 GiB/s + 2 s."""
    rng = random.Random(seed)
    sizes = [GIB * 0.5 * 64 ** rng.random() for _ in range(MODELS)]
    return [
        Model(name, Resources(memory=int(size)), reload_s=2 + size / GIB)
        for name, size in zip(model_names(MODELS), sizes, strict=True)
    ]


def compare(kind: str, draw: Callable[[int], list[str]], seeds: Sequence[int]) -> Row:
    """Hit rates on equal sizes and instant loads: every policy, as a ratio of the optimum and of LRU."""
    budget, models = SHARE * MODELS * GIB, equal_models()
    runs: dict[str, list[Outcome]] = {}
    for seed in seeds:
        arrivals = evenly(draw(seed))
        for policy in (None, *ONLINE):
            outcome = replay(arrivals, policy, models, budget)
            runs.setdefault(outcome.policy, []).append(outcome)
    rates = {name: fmean(outcome.hit_rate for outcome in outcomes) for name, outcomes in runs.items()}
    best, lru = rates["belady"], rates["lru"]
    return {
        "trace": kind,
        "seeds": list(seeds),
        "requests": runs["belady"][0].requests,
        "hitRate": {name: round(rate, 4) for name, rate in rates.items()},
        "ofOptimum": {name: round(rate / best, 4) for name, rate in rates.items()},
        "ofLru": {name: round(rate / lru, 4) for name, rate in rates.items()},
        "runs": [outcome.to_json() for outcomes in runs.values() for outcome in outcomes],
    }


def unequal(count: int, seeds: Sequence[int]) -> Row:
    """Models of unequal sizes, against the PFOO-U bound."""
    rates: dict[str, list[float]] = {}
    runs = []
    for seed in seeds:
        models, requests = unequal_models(seed), zipf(count, MODELS, seed)
        sizes = {model.name: model.demand.memory for model in models}
        budget = SHARE * sum(sizes.values())
        rates.setdefault("bound", []).append(hit_bound(requests, sizes, budget))
        for policy in ONLINE:
            outcome = replay(evenly(requests), policy, models, budget)
            rates.setdefault(policy.name, []).append(outcome.hit_rate)
            runs.append(outcome.to_json())
    means = {name: fmean(values) for name, values in rates.items()}
    return {
        "trace": "zipf 1.0, sizes 0.5–32 GiB",
        "seeds": list(seeds),
        "requests": count,
        "hitRate": {name: round(rate, 4) for name, rate in means.items()},
        "ofBound": {name: round(rate / means["bound"], 4) for name, rate in means.items()},
        "runs": runs,
    }


def waits(count: int, seed: int) -> Row:
    """Loads of 8 s, one at a time, at the rate at which the optimum keeps the loader 60 % busy.

    The first quarter of the trace fills the memory at a third of that rate and does not count.
    """
    requests, budget, models = zipf(count, MODELS, seed), SHARE * MODELS * GIB, equal_models()
    misses = 1 - replay(evenly(requests), None, models, budget).hit_rate
    rate = OPTIMUM_BUSY / (LOAD_S * misses)
    warm_up = count // 4
    slow = poisson(requests[:warm_up], rate / 3, seed, service_s=1.0)
    fast = poisson(requests[warm_up:], rate, seed, service_s=1.0)
    arrivals = slow + [replace(arrival, at=arrival.at + slow[-1].at) for arrival in fast]
    limits = Limits(
        barrier_s=0,
        silence_s=None,
        max_queue=1_000_000,
        max_parallel_loads=1,
        max_wait_s=MAX_WAIT_S,
        load_timeout_s=3600,
    )
    policies = (None, COST_AWARE, LRU)
    runs = [replay(arrivals, one, models, budget, limits, LOAD_S, warm_up=warm_up).to_json() for one in policies]
    return {"seed": seed, "rate": round(rate, 4), "maxWaitSeconds": MAX_WAIT_S, "loadSeconds": LOAD_S, "runs": runs}


def bursts(times: int = 100, count: int = 10) -> Row:
    """ABCABC… × 100 with room for two, all requests of a burst together, a minute between bursts."""
    models = [Model(name, Resources(memory=GIB), reload_s=2.0) for name in "ABC"]
    arrivals = [Arrival(60.0 * burst, name, service_s=0.5) for burst in range(count) for name in "ABC" * times]
    limits = Limits(barrier_s=0, silence_s=None, max_queue=10_000)
    outcome = replay(arrivals, COST_AWARE, models, 2 * GIB, limits, None, 0.5)
    return {**outcome.to_json(), "bursts": count, "loadsPerModelAndBurst": round(outcome.loads / (3 * count), 3)}


def footprint(registered: int) -> Row:
    """Bytes per registered idle model, and how long a plan takes that must evict, in ms.

    ``cpu`` is processor time of the thread, ``wall`` includes what else the machine does.
    """
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    rotation = Rotation(0.0, INSTANT)
    for index in range(registered):
        rotation.handle(Registered(Model(f"provider/organisation/model-{index:05d}", Resources(1, 0, GIB))), 0.0)
    idle = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    residents = int(SHARE * registered)
    rotation.handle(CapacityChanged(LOCAL_PROVIDER, (_node(residents),)), 0.0)
    for index in range(registered):
        name = f"provider/organisation/model-{index:05d}"
        if index < residents:
            rotation.handle(Heartbeat(name, f"replica-{index}", "node", ModelState.READY), 0.0)
            rotation.handle(Request(f"ticket-{index}", (name,), "ingress"), 0.0)
    wall, cpu = [], []
    for index in range(residents, min(registered, residents + 200)):
        start, start_cpu = time.perf_counter(), time.thread_time()
        plan = rotation.plan(f"provider/organisation/model-{index:05d}")
        wall.append(1000 * (time.perf_counter() - start))
        cpu.append(1000 * (time.thread_time() - start_cpu))
        assert plan.victims
    return {
        "registered": registered,
        "residents": residents,
        "bytesPerIdleModel": round(idle / registered),
        "planMs": {
            "wallP50": round(median(wall), 3),
            "wallMax": round(max(wall), 3),
            "cpuP50": round(median(cpu), 3),
            "cpuMax": round(max(cpu), 3),
        },
    }


def _node(residents: int) -> Node:
    return Node("node", Resources(residents, 0, residents * GIB), LOCAL_PROVIDER)


def replay_log(path: Path, limits: Limits) -> Row:
    """A recorded decision log under every policy, with room for 5 % of its models (at least one)."""
    arrivals = recorded(path)
    names = sorted({arrival.model for arrival in arrivals})
    models = [Model(name, Resources(memory=GIB), reload_s=LOAD_S) for name in names]
    budget = max(1, round(SHARE * len(names))) * GIB
    runs = [replay(arrivals, policy, models, budget, limits, None).to_json() for policy in (None, *ONLINE)]
    return {"trace": path.name, "models": len(names), "runs": runs}


def table(report: Row) -> Iterator[str]:
    """The report as lines of text."""
    yield "trace                       policy       hit rate  of optimum  of LRU"
    for row in (*_rows(report["hitRates"]), *_rows([report["unequalSizes"]])):
        ratios, of_lru = _numbers(row.get("ofOptimum") or row["ofBound"]), _numbers(row.get("ofLru") or {})
        for name, rate in _numbers(row["hitRate"]).items():
            against = f"{of_lru[name]:6.3f}" if name in of_lru else "     –"
            yield f"{row['trace']!s:27} {name:12} {rate:8.3f}  {ratios[name]:10.3f}  {against}"
    waiting = _rows([report["waits"]])[0]
    yield f"waits, loads of {LOAD_S:g} s one at a time, {waiting['rate']} requests/s:"
    for run in _rows(waiting["runs"]):
        yield f"  {run['policy']!s:12} hit rate {run['hitRate']}, loader busy {run['loaderBusy']}, {run['waitSeconds']}"
    yield f"bursts: {_rows([report['bursts']])[0]['loadsPerModelAndBurst']} loads per model and burst"
    for row in _rows(report["footprint"]):
        yield f"{row['registered']} models: plan {row['planMs']} ms, {row['bytesPerIdleModel']} bytes per idle model"
    if "recorded" in report:
        yield json.dumps(report["recorded"])


def _rows(value: object) -> list[Row]:
    return cast(list[Row], value)


def _numbers(value: object) -> dict[str, float]:
    return cast(dict[str, float], value)


def main() -> None:
    """Run everything, print the tables, write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=20_000, help="requests of each synthetic trace")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--trace", type=Path, help="also replay this decision log (JSON lines)")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    count, seeds = options.requests, options.seeds
    report: Row = {
        "python": platform.python_version(),
        "rotunda": version("rotunda"),
        "hitRates": [
            compare("zipf 1.0", lambda seed: zipf(count, MODELS, seed), seeds),
            compare("bursty", lambda seed: bursty(count, MODELS, seed), seeds),
            compare("drifting", lambda seed: drifting(count, MODELS, seed), seeds),
        ],
        "unequalSizes": unequal(count, seeds),
        "waits": waits(count, seeds[0]),
        "bursts": bursts(),
        "footprint": [footprint(1_000), footprint(10_000)],
    }
    if options.trace:
        report["recorded"] = replay_log(options.trace, INSTANT)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    for line in table(report):
        print(line)  # noqa: T201


if __name__ == "__main__":
    main()
