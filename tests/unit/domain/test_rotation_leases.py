"""Nobody may call a model that is being retired."""

from dataclasses import replace

from serve_app.domain.catalog import LOCAL_PROVIDER, ModelState
from serve_app.domain.placement import Node, Resources
from serve_app.domain.rotation_effects import Extend, Load, Retire, Revoke
from serve_app.domain.rotation_events import Acknowledged, CapacityChanged, Heartbeat, LeaseRenewed, Unload
from tests.unit.domain.rotation_world import GIB, QUICK, Replica, World, model


def idle_with_lease() -> World:
    """A is in memory, idle, and i1 holds a lease on it; B needs its room."""
    world = World([model("A"), model("B"), model("C", 0.5)], sizes=(1,))
    world.ask("t1", "A")
    world.settle()
    world.finish("A")
    world.pass_time(0.5)
    return world


def test_a_model_is_retired_when_its_holder_has_acknowledged() -> None:
    world = idle_with_lease()
    effects = world.ask("t2", "B")
    assert [type(effect).__name__ for effect in effects] == ["Revoke", "Notify"]
    assert world.rotation.state_of("A") == (ModelState.RETIRING, "room for B")
    retire = world.acknowledge()[0]
    assert isinstance(retire, Retire) and (retire.model, retire.drain) == ("A", False)
    load = world.ends("A")[0]
    assert isinstance(load, Load) and (load.model, load.evicted) == ("B", ("A",))
    world.loaded("B")
    assert world.granted("t2")


def test_a_silent_holder_is_waited_for_until_its_lease_has_surely_ended() -> None:
    world = idle_with_lease()
    world.ask("t2", "B")
    world.pass_time(QUICK.lease_ttl_s - 0.5)
    assert not world.kinds(Retire)
    world.pass_time(QUICK.lease_slack_s)
    assert world.kinds(Retire)


def test_every_holder_must_acknowledge() -> None:
    world = idle_with_lease()
    world.ask("t1b", "A", holder="i2")
    world.pass_time(0.5)
    world.finish("A")
    world.ask("t2", "B")
    assert {effect.holder for effect in world.kinds(Revoke)} == {"i1", "i2"}
    world.acknowledge_one(0)
    assert not world.kinds(Retire)
    world.acknowledge_one(0)
    assert world.kinds(Retire)


def test_an_acknowledgement_of_an_older_lease_does_not_count() -> None:
    world = idle_with_lease()
    world.ask("t2", "B")
    [revoke] = world.kinds(Revoke)
    world.tell(Acknowledged("i1", "A", revoke.epoch - 1))
    assert not world.kinds(Retire)


def test_a_model_that_turns_out_to_be_busy_stays() -> None:
    world = idle_with_lease()
    world.ask("t2", "B")
    world.replicas["A"].running = 1
    effects = world.acknowledge()
    assert not world.kinds(Retire) and world.rotation.state_of("A")[0] is not ModelState.RETIRING, effects
    world.ask("t3", "A", holder="i3")
    assert world.granted("t3")
    world.replicas["A"].running = 0
    world.beat("A")
    world.pass_time(1)
    world.settle()
    assert world.granted("t2")


def test_victims_stay_when_nobody_wants_their_room_any_more() -> None:
    world = idle_with_lease()
    world.ask("t2", "B")
    world.cancel("t2")
    assert repr(world.rotation) == "Rotation(ready: A)"
    world.ask("t3", "A")
    world.acknowledge()
    assert world.granted("t3") and not world.kinds(Retire)


def test_leases_given_after_a_revocation_have_a_newer_epoch() -> None:
    world = idle_with_lease()
    first = world.answers["t1"].lease
    world.ask("t2", "B")
    [revoke] = world.kinds(Revoke)
    world.cancel("t2")
    world.ask("t3", "A")
    assert first.epoch <= revoke.epoch < world.answers["t3"].lease.epoch


def test_a_retired_model_refuses_every_lease_that_was_ever_given() -> None:
    world = idle_with_lease()
    world.ask("t2", "B")
    world.acknowledge()
    [retire] = world.kinds(Retire)
    assert world.answers["t1"].lease.epoch < retire.epoch
    assert world.rotation.granted("A") == 0


def test_a_lease_is_extended_while_its_model_stays_and_denied_after() -> None:
    world = idle_with_lease()
    [extend] = world.tell(LeaseRenewed("i1", "A", uses=0))
    assert isinstance(extend, Extend) and extend.lease.model == "A"
    world.ask("t2", "B")
    [denied] = world.tell(LeaseRenewed("i1", "A", uses=0))
    assert isinstance(denied, Revoke)
    world.acknowledge()
    [denied] = world.tell(LeaseRenewed("i1", "A"))
    assert isinstance(denied, Revoke)


def test_calls_under_a_lease_keep_a_model_busy_and_count_as_arrivals() -> None:
    world = World([model("A"), model("B")], sizes=(1,), limits=replace(QUICK, settle_s=0.5))
    world.ask("t1", "A")
    world.settle()
    world.finish("A")
    world.pass_time(1)
    world.tell(LeaseRenewed("i1", "A", uses=5))
    assert world.rotation.state_of("A")[0] is ModelState.BUSY
    assert repr(world.rotation.state.popularity).startswith("Popularity(6 arrivals")
    world.ask("t2", "B")
    assert not world.kinds(Revoke)
    world.release("i1", "A")
    assert world.kinds(Retire)


def test_a_load_that_rested_on_room_which_is_kept_is_decided_anew() -> None:
    models = [model("A", 2), model("B"), model("C")]
    world = World(models, sizes=(2,))
    world.ask("t1", "A")
    world.settle()
    world.finish("A")
    world.pass_time(0.5)
    world.ask("t2", "B")
    world.ask("t3", "C")
    assert sorted(world.rotation.state.residency.pending) == ["B", "C"]
    world.cancel("t2")
    assert world.rotation.state_of("A")[0] is ModelState.RETIRING
    world.settle()
    assert world.granted("t3")


def test_after_a_restart_leases_of_the_earlier_router_end_before_anything_is_retired() -> None:
    world = World([model("A"), model("B")], sizes=(1,), limits=replace(QUICK, barrier_s=3), now=50, generation=7)
    world.tell(Heartbeat("A", "A#1", "n0", ModelState.READY))
    world.ask("t2", "B")
    assert world.kinds(Load) == [] and world.rotation.waiting("t2").reason.startswith("the router has just started")
    world.pass_time(2.9)
    [extend] = world.tell(LeaseRenewed("i1", "A", uses=0))
    assert isinstance(extend, Extend) and extend.lease.epoch >> 32 == 7
    world.replicas["A"] = Replica("n0", loaded=True)
    world.leases["i1", "A"] = world.now + 2
    world.pass_time(0.2)
    assert world.kinds(Revoke) and not world.kinds(Retire)
    world.acknowledge()
    assert world.kinds(Retire)


def test_a_model_in_memory_is_granted_during_the_barrier() -> None:
    world = World([model("A")], limits=replace(QUICK, barrier_s=3))
    world.replicas["A"] = Replica("n0", loaded=True)
    world.beat("A")
    world.ask("t1", "A")
    assert world.granted("t1")


def test_a_node_that_dies_takes_its_models_along() -> None:
    world = World([model("A")], sizes=(1, 1))
    world.ask("t1", "A")
    world.settle()
    world.replicas.clear()
    world.nodes.pop("n0")
    world.tell(CapacityChanged(LOCAL_PROVIDER, (Node("n1", Resources(memory=GIB), LOCAL_PROVIDER),)))
    assert world.rotation.state_of("A")[0] is ModelState.COLD
    world.ask("t2", "A")
    assert world.kinds(Load)[-1].node == "n1"


def test_a_model_that_was_in_use_is_told_to_leave_once_its_calls_are_surely_forgotten() -> None:
    world = World([model("A"), model("B")], sizes=(1,), limits=replace(QUICK, echo_s=1.6))
    world.ask("t1", "A")
    world.settle()
    world.tell(Unload("A", "an operator wants it so"))
    revoked_at = world.now
    while not world.kinds(Retire):
        world.pass_time(0.1)
        assert world.now - revoked_at < 5
    assert world.now - revoked_at >= 1.6
