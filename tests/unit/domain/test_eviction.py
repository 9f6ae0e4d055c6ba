"""Who leaves: the policies, and the cheapest set on one node."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app.domain.errors import InvalidConfig
from serve_app.domain.eviction import COST_AWARE, LRU, OLLAMA, POLICIES, Evictable, policy_named, victims_for
from serve_app.domain.placement import NOTHING, Resources


def resident(name: str, gib: float = 1, node: str = "n", **more: object) -> Evictable:
    return Evictable(name, {node: Resources(memory=gib)}, **more)  # type: ignore[arg-type]


def victims(need: float, free: float, *residents: Evictable, policy=COST_AWARE, total: float = 10, surplus: int = 0):
    sizes = {"n": Resources(memory=total)}
    choice = victims_for(Resources(memory=need), {"n": Resources(memory=free)}, sizes, residents, policy, surplus)
    return None if choice is None else choice.names


def test_lru_takes_the_one_that_was_used_longest_ago() -> None:
    assert victims(1, 0, resident("a", last_used=5), resident("b", last_used=3), policy=LRU) == ("b",)


def test_ollama_takes_the_shortest_keep_alive_then_the_name() -> None:
    assert victims(1, 0, resident("b"), resident("a"), resident("c", keep_alive_s=400), policy=OLLAMA) == ("a",)
    assert victims(1, 0, resident("a"), resident("c", keep_alive_s=10), policy=OLLAMA) == ("c",)


def test_cost_aware_weighs_reload_time_chance_of_reuse_and_size() -> None:
    slow = resident("slow", reload_s=60, chance=0.01)
    liked = resident("liked", reload_s=5, chance=0.2)
    small = resident("small", 0.5, reload_s=5, chance=0.09)
    assert victims(1, 0, liked, slow) == ("slow",)
    assert victims(0.5, 0, liked, small) == ("small",)
    assert victims(0.5, 0, liked, small, resident("large", 4, reload_s=5, chance=0.1)) == ("large",)


def test_nobody_leaves_who_can_be_spared() -> None:
    small, large = resident("small", 1, chance=0.01), resident("large", 4, chance=0.9)
    assert victims(4, 0, small, large) == ("large",)
    assert victims(4, 3, small, large) == ("small",)
    assert victims(3, 3, small) == ()


def test_no_set_is_enough() -> None:
    assert victims(5, 1, resident("a"), resident("b")) is None
    assert victims(11, 0, resident("a", 10)) is None


def test_residents_of_two_nodes_do_not_add_up() -> None:
    two = [resident("a", 2, "n1"), resident("b", 2, "n2"), resident("c", 1, "n2")]
    free = {"n1": NOTHING, "n2": NOTHING}
    sizes = {"n1": Resources(memory=2), "n2": Resources(memory=3)}
    choice = victims_for(Resources(memory=3), free, sizes, two, LRU)
    assert choice is not None and choice.node == "n2" and set(choice.names) == {"b", "c"}


def test_the_scarce_resource_decides_who_helps() -> None:
    cpu = Evictable("cpu", {"n": Resources(cpu=4, memory=1)}, chance=0.5)
    memory = Evictable("memory", {"n": Resources(cpu=0, memory=9)}, chance=0.1)
    whole = {"n": Resources(cpu=8, memory=16)}
    choice = victims_for(Resources(cpu=2, memory=1), {"n": Resources(memory=6)}, whole, [cpu, memory], COST_AWARE)
    assert choice is not None and choice.names == ("cpu",)


def test_idle_ones_leave_before_busy_ones() -> None:
    busy = resident("busy", last_used=1, busy=True)
    assert victims(1, 0, busy, resident("idle", last_used=9), policy=LRU) == ("idle",)
    assert victims(1, 0, busy, policy=LRU) == ("busy",)


def test_a_cap_on_the_number_takes_the_cheapest_counted_ones() -> None:
    a, b = resident("a", last_used=1), resident("b", last_used=2, counts=False)
    assert victims(1, 5, b, a, policy=LRU, surplus=1) == ("a",)
    assert victims(1, 5, b, policy=LRU, surplus=1) is None


def test_an_unknown_policy_is_refused_with_the_names_of_the_others() -> None:
    assert policy_named("lru") is LRU
    with pytest.raises(InvalidConfig, match="cost_aware, lru, ollama"):
        policy_named("fifo")


@given(
    need=st.integers(1, 12),
    free=st.integers(0, 6),
    sizes=st.lists(st.tuples(st.integers(1, 5), st.integers(0, 9), st.booleans()), max_size=6),
    policy=st.sampled_from(sorted(POLICIES)),
)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_the_victims_always_suffice_and_none_is_superfluous(
    need: int, free: int, sizes: list[tuple[int, int, bool]], policy: str
) -> None:
    residents = [
        resident(f"r{index}", size, last_used=used, chance=used / 10, busy=busy)
        for index, (size, used, busy) in enumerate(sizes)
    ]
    chosen = victims(need, free, *residents, policy=POLICIES[policy], total=40)
    gives = {one.name: one.frees["n"].memory for one in residents}
    if chosen is None:
        assert free + sum(gives.values()) < need
        return
    given = sum(gives[name] for name in chosen)
    assert free + given >= need
    assert all(free + given - gives[name] < need for name in chosen)
