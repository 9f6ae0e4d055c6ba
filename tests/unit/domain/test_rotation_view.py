"""The picture of the rotation that people and programs see."""

from dataclasses import replace

from serve_app.domain.generation import Priority
from serve_app.domain.rotation_events import MemoryMeasured
from serve_app.domain.rotation_view import view_of
from tests.unit.domain.rotation_world import GIB, QUICK, World, model


def test_the_view_shows_rooms_residents_the_line_and_the_failures() -> None:
    world = World([model("A"), model("B"), model("C", 0.5)], sizes=(1.25,), limits=replace(QUICK, max_parallel_loads=1))
    world.ask("t1", "A")
    world.settle()
    world.pass_time(3)
    world.ask("t2", "B", priority=Priority.LOW, caller="me")
    world.ask("t3", "C")
    world.tell(MemoryMeasured("n0", 0.85, 1))
    world.pass_time(1)
    view = view_of(world.rotation, world.now, str.lower, history=2)

    [node] = view.nodes
    assert (node.total.memory, node.used.memory, node.free.memory) == (1.25 * GIB, GIB, 0.25 * GIB)
    assert (node.measured, node.pressure) == (0.85, "warning")
    [resident] = view.residents
    assert (resident.model, resident.state.value, resident.running, resident.holders) == ("a", "busy", 1, ())
    assert [(one.position, one.model, one.priority, one.caller, one.waiting_ms) for one in view.queue] == [
        (1, "c", "high", "anonymous", 1000),
        (2, "b", "low", "me", 1000),
    ]
    assert all(one.reason for one in view.queue)
    assert len(view.history) == 2 and view.history[-1].at >= view.history[0].at


def test_a_failed_load_is_shown_with_its_reason_and_the_next_try() -> None:
    world = World([model("A"), model("B")])
    world.ask("t1", "A")
    world.fails("A")
    world.ask("t2", "B")
    world.fails("B", retryable=False)
    transient, final = view_of(world.rotation, world.now).failures
    assert (transient.model, transient.failures, transient.message) == ("A", 1, "A broke")
    assert transient.next_try is not None and transient.next_try > world.now
    assert (final.model, final.code, final.next_try) == ("B", "MODEL_LOAD_FAILED", None)


def test_the_view_is_json() -> None:
    world = World([model("A")])
    world.ask("t1", "A")
    shown = view_of(world.rotation, world.now, removed=("X",)).to_json()
    assert shown["removed"] == ["X"] and shown["enabled"] is True and shown["policy"] == "cost_aware"
    assert shown["nodes"][0]["total"] == {"cpu": 0.0, "gpu": 0.0, "memoryBytes": 2 * GIB}
    assert [line["action"] for line in shown["history"]] == ["queued", "load"]
