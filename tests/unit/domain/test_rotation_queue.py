"""Whose turn it is, and what those who wait are told."""

from dataclasses import replace

from serve_app.domain.generation import Priority
from serve_app.domain.rotation_effects import Grant, Load, Notify, Refuse
from serve_app.domain.rotation_events import Request, Retuned
from tests.unit.domain.rotation_world import QUICK, World, model

ONE_AT_A_TIME = replace(QUICK, max_parallel_loads=1)


def loads(world: World) -> list[str]:
    return [effect.model for effect in world.kinds(Load)]


def served_in_order(world: World) -> list[str]:
    """Let everything load, one after the other, every request ending at once."""
    for _ in range(20):
        world.settle()
        world.use_up()
        world.pass_time(1)
    return loads(world)


def test_a_model_in_memory_is_granted_at_once_while_another_one_loads() -> None:
    world = World([model("A"), model("B", 2)], sizes=(3,))
    world.ask("t1", "A")
    world.settle()
    world.ask("t2", "B")
    assert repr(world.rotation) == "Rotation(ready: A*; loading: B; waiting: B×1)"
    [grant] = world.ask("t3", "A")
    assert isinstance(grant, Grant) and grant.reason == "it is in memory" and grant.waited_s == 0


def test_requests_for_the_same_model_share_one_load() -> None:
    world = World([model("A")])
    for ticket in ("t1", "t2", "t3"):
        world.ask(ticket, "A")
    effects = world.loaded("A")
    assert [effect.ticket for effect in effects if isinstance(effect, Grant) and effect.lease] == ["t1", "t2", "t3"]
    assert loads(world) == ["A"]


def test_priority_goes_before_age() -> None:
    world = World([model(name) for name in "ABCD"], sizes=(1,), limits=ONE_AT_A_TIME)
    world.ask("t1", "A")
    world.ask("t2", "B", priority=Priority.LOW)
    world.ask("t3", "C", priority=Priority.NORMAL)
    world.ask("t4", "D", priority=Priority.HIGH)
    assert served_in_order(world) == ["A", "D", "C", "B"]


def test_a_caller_who_asks_for_many_models_shares_with_one_who_asks_for_few() -> None:
    world = World([model(name) for name in "ABCDX"], sizes=(1,), limits=ONE_AT_A_TIME)
    for name in "ABCD":
        world.ask(f"many-{name}", name, caller="many")
    world.ask("few", "X", caller="few")
    assert served_in_order(world) == ["A", "X", "B", "C", "D"]


def test_many_requests_for_one_model_cost_a_caller_one_turn() -> None:
    world = World([model(name) for name in "ABCD"], sizes=(1,), limits=ONE_AT_A_TIME)
    for ticket in range(20):
        world.ask(f"a{ticket}", "A", caller="x")
    world.ask("b", "B", caller="x")
    world.ask("c", "C", caller="y")
    world.ask("d", "D", caller="y")
    assert served_in_order(world) == ["A", "C", "B", "D"]


def test_a_request_that_has_waited_for_half_of_its_time_goes_before_every_priority() -> None:
    world = World([model(name) for name in "ABC"], sizes=(1,), limits=ONE_AT_A_TIME)
    world.ask("t1", "A")
    world.ask("t2", "B", priority=Priority.LOW)
    world.pass_time(QUICK.max_wait_s / 2)
    world.ask("t3", "C", priority=Priority.HIGH)
    assert served_in_order(world) == ["A", "B", "C"]


def test_a_full_queue_refuses_and_says_when_to_try_again() -> None:
    world = World([model("A", reload_s=7), model("B")], limits=replace(QUICK, max_queue=2))
    world.ask("t1", "A")
    world.ask("t2", "A")
    refusal = world.ask("t3", "A")[-1]
    assert isinstance(refusal, Refuse) and refusal.code == "QUEUE_FULL"
    assert refusal.error["retryable"] and refusal.error["details"]["retryAfterS"] == 7
    assert len(world.rotation.state.line) == 2


def test_with_a_full_queue_a_fallback_in_memory_answers_and_a_cold_one_does_not() -> None:
    world = World([model("A"), model("B", 2), model("C")], sizes=(3,), limits=replace(QUICK, max_queue=1))
    world.ask("t1", "A")
    world.settle()
    world.ask("t2", "B")
    [grant] = [effect for effect in world.ask("t3", "B", "C", "A") if isinstance(effect, Grant)]
    assert (grant.model, grant.reason.startswith("instead: 1 requests wait")) == ("A", True)
    refusal = world.ask("t4", "B", "C")[-1]
    assert isinstance(refusal, Refuse) and refusal.code == "QUEUE_FULL"


def test_a_full_queue_does_not_hold_up_models_in_memory() -> None:
    world = World([model("A"), model("B", 2)], sizes=(3,), limits=replace(QUICK, max_queue=1))
    world.ask("t1", "A")
    world.settle()
    world.ask("t2", "B")
    world.ask("t3", "A")
    assert world.granted("t3")


def test_cancelling_leaves_no_trace() -> None:
    world = World([model(name) for name in "ABC"], sizes=(1,))
    world.ask("t1", "A")
    world.settle()
    world.pass_time(0.5)
    before, line = repr(world.rotation), repr(world.rotation.state.line)
    world.ask("t2", "B")
    world.ask("t3", "C")
    world.cancel("t3")
    world.cancel("t2")
    assert (repr(world.rotation), repr(world.rotation.state.line)) == (before, line)
    world.use_up()
    world.pass_time(1)
    assert loads(world) == ["A"] and world.rotation.state.residency.pending == {}
    world.ask("t4", "A")
    assert world.granted("t4")


def test_a_cancelled_ticket_costs_its_caller_no_turn() -> None:
    world = World([model(name) for name in "ABCD"], sizes=(1,), limits=ONE_AT_A_TIME)
    world.ask("t1", "A", caller="z")
    world.ask("t2", "B", caller="x")
    world.cancel("t2")
    world.ask("t3", "C", caller="x")
    world.ask("t4", "D", caller="y")
    assert served_in_order(world) == ["A", "C", "D"]


def test_those_who_wait_hear_their_place_and_why() -> None:
    world = World([model("A", reload_s=4), model("B", reload_s=4)], sizes=(1,), limits=ONE_AT_A_TIME)
    world.ask("t1", "A")
    [news] = world.ask("t2", "B")
    assert news == Notify("t2", "B", 2, "other models are being loaded", 4.0)
    told = world.rotation.waiting("t1")
    assert told is not None and (told.position, told.loading, told.reason) == (1, True, "it is being loaded")
    world.loaded("A")
    told = world.rotation.waiting("t2")
    assert told is not None and told.reason == "every model that could leave is busy, being loaded, or new"
    world.pass_time(0.5)
    world.finish("A")
    told = world.rotation.waiting("t2")
    assert told is not None and (told.evicting, told.loading) == (("A",), True)
    assert told.reason == "A must leave memory"


def test_asking_again_with_the_same_ticket_keeps_the_place_and_says_nothing_twice() -> None:
    world = World([model("A")])
    world.ask("t1", "A")
    world.pass_time(5)
    assert world.ask("t1", "A") == []
    world.settle()
    assert world.granted("t1") and world.answers["t1"].waited_s == 5


def test_a_ticket_that_nobody_asks_after_is_dropped() -> None:
    world = World([model("A")], limits=replace(QUICK, ticket_ttl_s=10))
    world.ask("t1", "A")
    world.pass_time(9)
    world.ask("t1", "A")
    world.pass_time(9)
    assert world.rotation.waiting("t1") is not None
    world.pass_time(2)
    assert world.rotation.waiting("t1") is None and "t1" not in world.answers


def test_without_rotation_age_alone_decides_and_nobody_is_evicted() -> None:
    world = World([model(name) for name in "ABCD"], sizes=(2,), limits=replace(ONE_AT_A_TIME, enabled=False))
    world.ask("t1", "A", priority=Priority.LOW)
    world.ask("t2", "B", priority=Priority.LOW)
    world.ask("t3", "C", priority=Priority.HIGH)
    assert served_in_order(world) == ["A", "B"]
    refusal = world.answers["t3"]
    assert isinstance(refusal, Refuse) and refusal.code == "MEMORY_EXCEEDED" and "switched off" in refusal.reason
    world.tell(Retuned(QUICK))
    world.ask("t4", "D")
    world.settle()
    assert world.granted("t4")


def test_tickets_that_come_back_after_a_restart_keep_age_and_priority() -> None:
    limits = replace(ONE_AT_A_TIME, barrier_s=3)
    world = World([model(name) for name in "ABC"], sizes=(1,), limits=limits, now=100, generation=2)
    world.tell(Request("t3", ("C",), "i1", caller="x", asked_at=98))
    world.tell(Request("t2", ("B",), "i1", caller="x", asked_at=95))
    world.tell(Request("t1", ("A",), "i1", Priority.LOW, caller="x", asked_at=90))
    assert loads(world) == []
    world.asked_at = {"t1": 90, "t2": 95, "t3": 98}
    world.pass_time(3)
    assert served_in_order(world) == ["B", "C", "A"]
    grant = world.answers["t2"]
    assert isinstance(grant, Grant) and grant.waited_s >= 8 and grant.lease is not None and grant.lease.epoch >> 32 == 2
