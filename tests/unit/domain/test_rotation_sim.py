"""What the simulator promises, on short traces."""

import json
from pathlib import Path

from benchmarks.scenarios.rotation_sim import GIB, INSTANT, MODELS, SHARE, bursts, equal_models, footprint, replay
from benchmarks.simulator import Simulation
from benchmarks.traces import Arrival, bursty, drifting, evenly, hit_bound, recorded, zipf
from serve_app.domain.eviction import COST_AWARE, LRU
from serve_app.domain.placement import Resources
from serve_app.domain.rotation_events import Model

BUDGET = SHARE * MODELS * GIB


def belady(requests: list[str], room: int) -> float:
    """Hit rate of the optimum, computed without any rotation."""
    kept: set[str] = set()
    hits = 0
    for index, name in enumerate(requests):
        hits += name in kept
        if name not in kept and len(kept) >= room:
            ahead = {
                one: next((i for i in range(index + 1, len(requests)) if requests[i] == one), 10**9) for one in kept
            }
            kept.discard(max(sorted(kept), key=lambda one: ahead[one]))
        kept.add(name)
    return hits / len(requests)


def test_the_optimum_in_the_simulator_is_beladys() -> None:
    requests = zipf(300, 40, seed=3)
    models = [Model(f"m{index:04d}", Resources(memory=1), reload_s=1) for index in range(40)]
    assert replay(evenly(requests), None, models, 6).hit_rate == belady(requests, 6)


def test_popular_models_stay_where_lru_loses_them() -> None:
    arrivals = evenly(zipf(1500, MODELS, seed=1))
    rates = [replay(arrivals, policy, equal_models(), BUDGET).hit_rate for policy in (None, COST_AWARE, LRU)]
    assert rates[1] >= 0.82 * rates[0] and rates[1] >= 1.15 * rates[2]


def test_sessions_are_followed() -> None:
    arrivals = evenly(bursty(1000, MODELS, seed=1))
    best, ours = (replay(arrivals, one, equal_models(), BUDGET).hit_rate for one in (None, COST_AWARE))
    assert ours >= 0.9 * best


def test_a_change_of_taste_is_followed() -> None:
    arrivals = evenly(drifting(1500, MODELS, seed=1, period=500))
    ours, lru = (replay(arrivals, one, equal_models(), BUDGET).hit_rate for one in (COST_AWARE, LRU))
    assert ours >= lru


def test_requests_that_arrive_together_share_their_loads() -> None:
    assert bursts(times=20, count=3)["loadsPerModelAndBurst"] <= 1.5


def test_a_plan_is_quick_and_an_idle_model_is_cheap() -> None:
    figures = [footprint(1000) for _ in range(3)]
    assert figures[0]["bytesPerIdleModel"] < 10_000
    assert min(each["planMs"]["cpuP50"] for each in figures) < 1  # the quietest: a shared core may be half as fast


def test_no_policy_beats_the_bound_for_unequal_sizes() -> None:
    requests = zipf(400, 30, seed=2)
    sizes = {f"m{index:04d}": float(1 + index % 5) for index in range(30)}
    models = [Model(name, Resources(memory=size), reload_s=size) for name, size in sizes.items()]
    bound = hit_bound(requests, sizes, 15)
    for policy in (None, COST_AWARE, LRU):
        assert replay(evenly(requests), policy, models, 15).hit_rate <= bound


def test_the_history_of_a_rotation_can_be_replayed(tmp_path: Path) -> None:
    arrivals = [Arrival(float(index), name) for index, name in enumerate("ABCAAB")]
    simulation = Simulation([Model(name, Resources(memory=1)) for name in "ABC"], 2, LRU, INSTANT, load_s=0.25)
    simulation.run(arrivals)
    log = tmp_path / "decisions.jsonl"
    log.write_text("\n".join(json.dumps(decision.to_json()) for decision in simulation.rotation.history))
    assert [(one.at, one.model) for one in recorded(log)] == [(one.at, one.model) for one in arrivals]
