"""Where models go, who leaves, and what never happens: one test per rule."""

import json
from dataclasses import replace

import pytest

from serve_app.domain.catalog import LOCAL_PROVIDER, ModelState
from serve_app.domain.errors import InvalidConfig, ModelNotFound
from serve_app.domain.eviction import LRU
from serve_app.domain.placement import Node, Resources
from serve_app.domain.planning import Verdict
from serve_app.domain.rotation_effects import (
    Allow,
    Extend,
    Grant,
    Load,
    Log,
    Refuse,
    Retire,
)
from serve_app.domain.rotation_events import (
    CapacityChanged,
    EmergencyCleanup,
    Gone,
    Heartbeat,
    LeaseRenewed,
    Limits,
    MemoryMeasured,
    Pin,
    ProviderDown,
    ProviderUp,
    Recalled,
    Registered,
    ScaleOut,
    Unload,
    Unregistered,
)
from tests.unit.domain.rotation_world import GIB, QUICK, World, model


def with_idle(world: World, *names: str) -> World:
    """Bring models into memory, one second apart, and let them become idle."""
    for name in names:
        world.ask(f"for-{name}", name, lease=False)
        world.settle()
        world.pass_time(1)
    return world


def loads(world: World) -> list[str]:
    return [effect.model for effect in world.kinds(Load)]


def test_two_models_that_both_fit_load_at_the_same_time() -> None:
    world = World([model("A"), model("B")], sizes=(2,))
    world.ask("t1", "A")
    world.ask("t2", "B")
    assert loads(world) == ["A", "B"]


def test_models_are_packed_on_the_fullest_node_that_takes_them() -> None:
    world = with_idle(World([model("A", 2), model("B", 1)], sizes=(4, 2)), "A", "B")
    assert [(load.model, load.node) for load in world.kinds(Load)] == [("A", "n1"), ("B", "n0")]


def test_the_victims_make_room_on_one_node() -> None:
    world = with_idle(World([model("A"), model("B"), model("C"), model("D", 2)], sizes=(2, 1)), "A", "B", "C")
    where = {name: replica.node for name, replica in world.replicas.items()}
    world.ask("t1", "D")
    world.settle()
    assert world.granted("t1") and world.replicas["D"].node == "n0"
    assert {effect.model for effect in world.kinds(Retire)} == {name for name, node in where.items() if node == "n0"}


def test_a_model_that_no_node_can_hold_is_refused_with_the_numbers() -> None:
    world = World([model("A", 3)], sizes=(2, 2))
    [refusal] = world.ask("t1", "A")
    assert isinstance(refusal, Refuse) and refusal.code == "MODEL_TOO_LARGE" and not refusal.error["retryable"]
    assert refusal.reason == "A needs 3 GiB; the largest place for it has 2 GiB. It never fits here."
    assert refusal.error["details"]["demand"]["memoryBytes"] == 3 * GIB
    assert world.rotation.state_of("A") == (ModelState.COLD, refusal.reason)  # known before anybody asks


def test_before_any_node_is_known_requests_wait() -> None:
    world = World([model("A")], sizes=())
    world.ask("t1", "A")
    assert world.waiting() == {"t1"}
    world.tell(CapacityChanged(LOCAL_PROVIDER, (Node("n9", Resources(memory=GIB), LOCAL_PROVIDER),)))
    assert loads(world) == ["A"]


def test_a_pinned_model_never_leaves_and_a_request_that_needs_its_room_is_told_at_once() -> None:
    world = with_idle(World([model("A", pinned=True), model("B")], sizes=(1,)), "A")
    [refusal] = world.ask("t1", "B")
    assert isinstance(refusal, Refuse) and refusal.code == "MEMORY_EXCEEDED"
    assert refusal.reason == "B needs 1 GiB, but pinned models hold the room: A."
    world.tell(Pin("A", False))
    world.ask("t2", "B")
    world.settle()
    assert world.granted("t2")


def test_a_busy_model_drains_when_somebody_has_waited_for_max_wait() -> None:
    world = World([model("A"), model("B")], sizes=(1,))
    world.ask("t1", "A")
    world.settle()
    world.ask("t2", "B")
    world.pass_time(QUICK.max_wait_s - 1)
    assert world.rotation.state_of("A")[0] is not ModelState.RETIRING
    world.pass_time(1)
    [retire] = world.kinds(Retire)
    assert retire.drain and retire.reason == "B has waited for more than 30 s"
    world.ask("t3", "A")
    assert world.waiting() == {"t2", "t3"}
    world.replicas["A"].running = 0
    world.ends("A")
    world.loaded("B")
    assert world.granted("t2")


def test_a_busy_model_stays_for_its_least_time_and_an_idle_one_does_not() -> None:
    limits = replace(QUICK, max_wait_s=5, min_residency_s=20)
    world = World([model("A"), model("B")], sizes=(1,), limits=limits)
    world.ask("t1", "A")
    world.settle()
    world.ask("t2", "B")
    world.pass_time(19)
    assert not world.kinds(Retire)
    world.pass_time(1)
    assert world.kinds(Retire)[0].drain
    idle = with_idle(World([model("A"), model("B")], sizes=(1,), limits=limits), "A")
    idle.ask("t2", "B")
    assert idle.kinds(Retire)


def test_a_steady_stream_to_one_model_does_not_starve_another() -> None:
    world = World([model("A"), model("B", reload_s=8)], sizes=(1,), limits=replace(QUICK, load_timeout_s=60))
    world.ask("t0", "A")
    world.settle()
    world.ask("tb", "B")
    number = 0
    while not world.granted("tb"):
        number += 1
        world.ask(f"a{number}", "A", lease=False)
        world.pass_time(0.05)
        world.acknowledge()
        if world.replicas.get("A") and world.replicas["A"].retired:
            world.replicas["A"].running = 0
            world.ends("A")
            world.pass_time(8)
            world.loaded("B")
    assert world.answers["tb"].waited_s <= QUICK.max_wait_s + 8 + 0.2


def test_a_request_for_which_nothing_can_be_done_ends_with_a_timeout() -> None:
    world = World([model("A"), model("B")], sizes=(1,), limits=replace(QUICK, min_residency_s=1000))
    world.ask("t1", "A")
    world.settle()
    world.ask("t2", "B")
    world.pass_time(QUICK.max_wait_s + QUICK.load_timeout_s)
    refusal = world.answers["t2"]
    assert isinstance(refusal, Refuse) and refusal.code == "TIMEOUT" and refusal.error["details"]["phase"] == "load"


@pytest.mark.parametrize("limits", [{"max_local_models": 1}, {"max_models": 1}])
def test_a_cap_on_the_number_of_models_evicts_even_when_the_bytes_fit(limits: dict[str, int]) -> None:
    world = with_idle(World([model("A"), model("B")], sizes=(8,), limits=replace(QUICK, **limits)), "A")
    world.ask("t1", "B")
    assert [effect.model for effect in world.kinds(Retire)] == ["A"] and loads(world) == ["A"]
    world.settle()
    assert world.granted("t1")


def test_the_cap_on_local_models_does_not_count_those_of_other_providers() -> None:
    remote = replace(model("o/X"), pool="ollama")
    world = World([model("A"), remote], sizes=(8,), limits=replace(QUICK, max_local_models=1))
    world.nodes["box"] = Node("box", Resources(memory=2 * GIB), "ollama")
    world.tell(CapacityChanged("ollama", (world.nodes["box"],)))
    with_idle(world, "A", "o/X")
    assert not world.kinds(Retire) and world.replicas["o/X"].node == "box"


def test_a_model_that_holds_no_memory_here_is_granted_always() -> None:
    world = World([replace(model("far/X"), resides=False, pool="far")], sizes=(1,))
    world.ask("t1", "far/X")
    assert world.granted("t1") and not world.kinds(Load)


def test_more_replicas_are_allowed_while_they_fit() -> None:
    world = with_idle(World([model("A"), model("B", 2)], sizes=(3,)), "A")
    [allow] = [effect for effect in world.tell(ScaleOut("A", 2)) if isinstance(effect, Allow)]
    assert (allow.replicas, allow.reason) == (2, "it fits") and world.rotation.granted("A") == 2
    allow = world.tell(ScaleOut("A", 9))[0]
    assert isinstance(allow, Allow) and (allow.replicas, allow.reason) == (3, "one more replica does not fit")
    world.tell(Heartbeat("A", "A#2", "n0", ModelState.READY))
    world.tell(Gone("A", "A#2"))
    assert world.rotation.granted("A") == 2


def test_a_scale_out_never_overtakes_a_load_that_waits() -> None:
    world = with_idle(World([model("A"), model("B", 1), model("C", 3)], sizes=(3,)), "A", "B")
    world.ask("t1", "B")
    world.ask("t2", "C")
    [allow] = world.tell(ScaleOut("B", 2))[:1]
    assert isinstance(allow, Allow) and (allow.replicas, allow.reason) == (1, "C waits for memory")


def test_measured_memory_counts_when_it_is_more_than_declared() -> None:
    world = with_idle(World([model("A"), model("B")], sizes=(2,)), "A")
    world.beat("A", memory=1.5 * GIB)
    plan = world.rotation.plan("B")
    assert plan.verdict is Verdict.EVICTS and plan.victims == ("A",) and plan.freed.memory == 1.5 * GIB
    world.beat("A", memory=0.5 * GIB)
    assert world.rotation.plan("A").demand.memory == 1.5 * GIB


def test_plan_answers_without_acting() -> None:
    world = World([model("A", reload_s=4), model("B", 2, reload_s=6), model("X", 9)], sizes=(2,))
    before = repr(world.rotation), len(world.rotation.history)
    fits = world.rotation.plan("A")
    assert (fits.verdict, fits.node, fits.eta_s, fits.demand.memory) == (Verdict.FITS, "n0", 4, GIB)
    never = world.rotation.plan("X")
    assert (never.verdict, never.error, never.capacity.memory) == (Verdict.NEVER, "MODEL_TOO_LARGE", 2 * GIB)
    assert (repr(world.rotation), len(world.rotation.history)) == before
    with_idle(world, "A")
    assert world.rotation.plan("A").verdict is Verdict.READY
    evicts = world.rotation.plan("B")
    assert (evicts.verdict, evicts.victims, evicts.free.memory, evicts.freed.memory) == (
        Verdict.EVICTS,
        ("A",),
        GIB,
        GIB,
    )
    assert evicts.eta_s == 6 + QUICK.retire_s and evicts.to_json()["verdict"] == "evicts"
    world.ask("t1", "A")
    waits = world.rotation.plan("B")
    assert waits.verdict is Verdict.WAITS and waits.reason == "A would be asked to drain"
    with pytest.raises(ModelNotFound):
        world.rotation.plan("nobody")


def test_a_transient_failure_is_tried_again_with_growing_delays_and_heals() -> None:
    world = World([model("A")], limits=replace(QUICK, retry_delay_s=1, load_timeout_s=600))
    world.ask("t1", "A")
    for failures, delay in ((1, 1), (2, 2), (3, 4)):
        world.fails("A")
        world.settle()
        assert world.rotation.next_try("A") == world.now + delay and len(loads(world)) == failures
        assert world.rotation.state_of("A") == (ModelState.FAILED, "A broke")
        world.pass_time(delay)
        assert len(loads(world)) == failures + 1
    world.settle()
    assert world.granted("t1") and world.rotation.state_of("A")[0] is ModelState.BUSY


def test_when_the_tries_are_used_up_the_request_ends_and_a_later_one_may_try() -> None:
    world = World([model("A")], limits=replace(QUICK, retry_attempts=0, retry_cap_s=10))
    world.ask("t1", "A")
    world.fails("A")
    world.settle()
    refusal = world.answers["t1"]
    assert isinstance(refusal, Refuse) and refusal.code == "MODEL_LOAD_FAILED" and refusal.error["retryable"]
    world.pass_time(9)
    world.ask("t2", "A")
    assert isinstance(world.answers["t2"], Refuse)
    world.pass_time(1)
    world.ask("t3", "A")
    world.settle()
    assert world.granted("t3")


def test_a_deterministic_failure_holds_until_the_files_change() -> None:
    world = World([model("A", revision="1"), model("B")])
    world.ask("t1", "A")
    world.ask("t2", "A", "B")
    world.fails("A", retryable=False)
    assert isinstance(world.answers["t1"], Refuse)
    world.settle()
    grant = world.answers["t2"]
    assert isinstance(grant, Grant) and grant.model == "B"
    world.ask("t3", "A")
    assert isinstance(world.answers["t3"], Refuse) and world.rotation.next_try("A") is None
    world.tell(Registered(model("A", revision="2")))
    world.ask("t4", "A")
    world.settle()
    assert world.granted("t4")


def test_a_load_that_takes_too_long_has_failed() -> None:
    world = World([model("A")], limits=replace(QUICK, load_timeout_s=10, retry_attempts=0))
    world.ask("t1", "A")
    world.pass_time(10)
    assert isinstance(world.answers["t1"], Refuse) and world.kinds(Retire)


def test_a_process_that_ends_while_it_loads_is_a_transient_failure() -> None:
    world = World([model("A")])
    world.ask("t1", "A")
    world.replicas.clear()
    world.tell(Gone("A"))
    assert world.rotation.state_of("A")[0] is ModelState.FAILED
    world.pass_time(1)
    assert loads(world) == ["A", "A"]


def test_requests_go_to_their_next_model_when_a_provider_is_down() -> None:
    remote = replace(model("o/X"), pool="ollama")
    world = World([remote, model("A")], sizes=(1,))
    world.nodes["box"] = Node("box", Resources(memory=GIB), "ollama")
    world.tell(CapacityChanged("ollama", (world.nodes["box"],)))
    world.ask("t1", "o/X", "A")
    world.ask("t2", "o/X")
    world.tell(ProviderDown("ollama", "connection refused"))
    assert world.rotation.state_of("o/X") == (ModelState.UNAVAILABLE, "connection refused")
    refusal = world.answers["t2"]
    assert isinstance(refusal, Refuse) and refusal.code == "PROVIDER_UNAVAILABLE"
    world.loaded("A")
    assert world.granted("t1")
    world.tell(ProviderUp("ollama"))
    assert world.rotation.state_of("o/X")[0] is ModelState.LOADING


def test_an_operator_unloads_and_removes_models() -> None:
    world = with_idle(World([model("A"), model("B")], sizes=(2,)), "A", "B")
    world.ask("t1", "A")
    world.tell(Unload("A"))
    world.acknowledge()
    [retire] = world.kinds(Retire)
    assert retire.drain and retire.reason == "an operator unloaded it"
    world.replicas["A"].running = 0
    world.ends("A")
    assert world.rotation.state_of("A")[0] is ModelState.COLD
    world.tell(Unregistered("B"))
    world.settle()
    with pytest.raises(ModelNotFound):
        world.rotation.state_of("B")
    assert isinstance(world.ask("t2", "B")[0], Refuse)


def test_emergency_cleanup_takes_every_idle_unpinned_model() -> None:
    world = with_idle(World([model(name) for name in "ABCD"], sizes=(4,)), "A", "B", "C")
    world.tell(Pin("A"))
    world.ask("t1", "B")
    world.tell(EmergencyCleanup())
    assert [effect.model for effect in world.kinds(Retire)] == ["C"]


def test_a_model_that_is_idle_for_long_leaves_when_its_spec_says_so() -> None:
    world = with_idle(World([model("A", idle_unload_s=30), model("B")], sizes=(2,)), "A", "B")
    world.pass_time(27)
    assert not world.kinds(Retire)
    world.pass_time(2)
    assert [effect.reason for effect in world.kinds(Retire)] == ["it was idle for 30 s"]


def test_each_memory_threshold_acts_once_and_again_only_after_relief() -> None:
    world = with_idle(World([model("A"), model("B"), model("C")], sizes=(4,), policy=LRU), "A", "B")

    def kinds(gib: float) -> list[str]:
        effects = world.tell(MemoryMeasured("n0", gib * GIB, 10 * GIB))
        return [effect.kind if isinstance(effect, Log) else f"retire {effect.model}" for effect in effects]

    assert kinds(7.9) == []
    assert kinds(8.0) == ["memory_warning"]
    assert kinds(7.7) == kinds(8.4) == []
    assert kinds(9.1) == ["memory_cleanup", "retire A"]
    assert kinds(9.2) == kinds(8.7) == []
    assert kinds(9.6) == ["memory_critical", "retire B"]
    world.settle()
    world.ask("t1", "C")
    assert loads(world) == ["A", "B"]
    assert world.rotation.waiting("t1").reason == "memory is short on n0: no load starts"
    assert kinds(9.1) == []
    assert kinds(8.9)[0] == "memory_relief" and loads(world)[-1] == "C"
    assert "memory_relief" in kinds(5.0)
    assert "memory_warning" in kinds(8.1)


def test_contradictory_thresholds_are_refused_at_the_start() -> None:
    with pytest.raises(InvalidConfig, match="warning < cleanup < critical"):
        Limits(warning=0.9, cleanup=0.8)


def test_a_replica_that_falls_silent_is_taken_for_gone() -> None:
    world = with_idle(World([model("A")], limits=replace(QUICK, silence_s=5)), "A")
    world.pass_time(6)
    assert world.rotation.state_of("A")[0] is ModelState.COLD


def test_a_model_that_others_loaded_is_counted_by_what_it_holds() -> None:
    world = World([model("A", 2)], sizes=(2,))
    world.tell(Heartbeat("stranger", "s#1", "n0", ModelState.READY, memory=GIB))
    assert world.rotation.plan("A").victims == ("stranger",)


def test_every_decision_is_in_the_history_with_its_reason() -> None:
    world = with_idle(World([model("A"), model("B")], sizes=(1,), limits=replace(QUICK, history=6)), "A")
    world.ask("t1", "B")
    world.settle()
    actions = [decision.action for decision in world.rotation.history]
    assert actions == ["evict", "retire", "gone", "load", "ready", "grant"]
    assert all(decision.reason for decision in world.rotation.history)
    load = next(decision for decision in world.rotation.history if decision.action == "load")
    assert load.victims == ("A",) and load.to_json()["reason"] == "evicting A"


def test_a_model_that_is_removed_and_comes_back_is_as_new() -> None:
    world = with_idle(World([model("A")], sizes=(1,)), "A")
    world.tell(Unregistered("A"))
    assert isinstance(world.ask("t1", "A")[0], Refuse)
    world.tell(Registered(model("A")))
    world.ask("t2", "A")
    world.settle()
    assert world.granted("t2") and loads(world) == ["A", "A"]


def test_what_was_learned_outlives_the_router() -> None:
    world = with_idle(World([model("A", revision="1"), model("B")], sizes=(4,)), "A")
    world.beat("A", memory=2 * GIB)
    world.tell(Pin("A"))
    world.ask("t1", "B")
    world.fails("B", retryable=False)
    later = World([model("A", revision="1"), model("B")], sizes=(4,))
    for name in "AB":
        later.tell(Recalled(name, json.loads(json.dumps(world.rotation.learned(name)))))
    assert later.rotation.pinned("A") and later.rotation.plan("A").demand.memory == 2 * GIB
    assert later.rotation.state_of("B") == (ModelState.FAILED, "B broke")


def test_a_lease_on_a_model_that_holds_no_memory_here_goes_on() -> None:
    world = World([replace(model("far/X"), resides=False, pool="far")], sizes=(1,))
    [extend] = world.tell(LeaseRenewed("i1", "far/X"))
    assert isinstance(extend, Extend)


def test_a_load_that_was_decided_waits_while_memory_is_critical() -> None:
    world = with_idle(World([model("A"), model("B")], sizes=(1,)), "A")
    world.ask("t1", "B")
    world.tell(MemoryMeasured("n0", 99, 100))
    world.settle()
    assert loads(world) == ["A"] and world.waiting() == {"t1"}
    world.tell(MemoryMeasured("n0", 50, 100))
    assert loads(world) == ["A", "B"]
