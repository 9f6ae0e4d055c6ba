"""The rotation on an event loop: who hears what, and when, through the calls that gateways really make."""

import asyncio
from collections.abc import Callable
from dataclasses import replace

import pytest

from serve_app.domain.catalog import Entry, ModelState
from serve_app.domain.errors import ModelNotFound
from serve_app.domain.leasing import Orders, Report
from serve_app.domain.rotation import Rotation
from serve_app.domain.rotation_effects import Effect, Grant, Load, Notify, Refuse, Retire
from serve_app.domain.rotation_events import Acknowledged, CapacityChanged, Gone, Heartbeat, Registered, Request, Tick
from serve_app.domain.routing import Admission, Ask, Candidate, Granted, Lease, Route, Waiting
from serve_app.leases import Leases, RouterAway
from serve_app.rotor import HOLD_S, Rotor
from tests.unit.domain.rotation_world import QUICK, model, nodes


class Fleet:
    """Replicas that load as soon as they are asked to and leave as soon as they are told; a rotor above them."""

    def __init__(self, *names: str, room: float = 1, echo_s: float = 0.0) -> None:
        self.now = 100.0
        self.effects: list[Effect] = []
        limits = replace(QUICK, settle_s=0.05, echo_s=echo_s, ticket_ttl_s=15.0)
        self.rotor = Rotor(Rotation(self.now, limits), self._perform, lambda: self.now)
        for name in names:
            self.rotor.tell(Registered(model(name)))
        self.rotor.tell(CapacityChanged("huggingface", nodes(room)))

    def _perform(self, effect: Effect) -> None:
        self.effects.append(effect)
        loop = asyncio.get_running_loop()
        if isinstance(effect, Load):
            loop.call_soon(self.rotor.tell, Heartbeat(effect.model, "r", effect.node, ModelState.READY))
        elif isinstance(effect, Retire):
            loop.call_soon(self.rotor.tell, Gone(effect.model))

    def kinds(self) -> list[tuple[str, str]]:
        return [(type(effect).__name__, effect.model) for effect in self.effects if isinstance(effect, Load | Retire)]

    # What a gateway calls

    async def admit(self, ask: Ask) -> Admission:
        request = Request(ask.ticket, (ask.model or "",), ask.holder, ask.priority, ask.caller, self.now - ask.waited_s)
        answer = self.rotor.ask(request)
        route = Route((Candidate(Entry(request.models[0], "p", "a", "d"), request.models[0], ModelState.READY, ""),))
        if isinstance(answer, Refuse):
            raise ModelNotFound(answer.reason)
        if isinstance(answer, Grant):
            assert answer.lease is not None
            return Granted(route, answer.lease)
        return Waiting(ask.ticket, route, answer.position, answer.reason, retry_in_s=60)

    async def sync(self, report: Report) -> Orders:
        return await self.rotor.sync(report)


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110 - there is no event for what a test waits for
            await asyncio.sleep(0.005)


async def wait_for(leases: Leases, ask: Ask) -> Granted:
    """What a gateway does with a request: ask, and ask again whenever there is news."""
    answer = await leases.ask(ask)
    while isinstance(answer, Waiting):
        await leases.news(ask.ticket, answer.retry_in_s)
        answer = await leases.ask(ask)
    return answer


async def test_a_waiting_request_hears_of_its_grant_at_once() -> None:
    fleet = Fleet("A")
    leases = Leases(fleet, "g1", lambda: fleet.now)
    keeping = asyncio.create_task(leases.keep())
    started = asyncio.get_running_loop().time()
    granted = await wait_for(leases, Ask("t1", "A"))
    assert granted.lease.model == "A" and leases.live("A") == granted.lease
    assert asyncio.get_running_loop().time() - started < HOLD_S
    keeping.cancel()


async def test_a_lease_is_renewed_while_it_is_used_and_ends_when_it_is_not() -> None:
    fleet = Fleet("A")
    leases = Leases(fleet, "g1", lambda: fleet.now)
    keeping = asyncio.create_task(leases.keep())
    granted = await wait_for(leases, Ask("t1", "A"))
    for _ in range(4):
        assert leases.use("A") is not None
        fleet.now += 1.5
        await until(lambda: leases.live("A") is not None and leases._held["A"].expires > fleet.now + 1)
    fleet.now += granted.lease.ttl_s
    assert leases.live("A") is None
    keeping.cancel()


async def test_a_revoked_lease_is_given_up_before_the_model_is_told_to_leave() -> None:
    fleet = Fleet("A", "B")
    holding, wanting = Leases(fleet, "g1", lambda: fleet.now), Leases(fleet, "g2", lambda: fleet.now)
    keeping = [asyncio.create_task(leases.keep()) for leases in (holding, wanting)]
    await wait_for(holding, Ask("t1", "A"))
    fleet.now += 0.1
    waiting = asyncio.create_task(wait_for(wanting, Ask("t2", "B")))
    await until(lambda: ("Retire", "A") in fleet.kinds())
    assert holding.live("A") is None
    await waiting
    assert fleet.kinds() == [("Load", "A"), ("Retire", "A"), ("Load", "B")]
    for task in keeping:
        task.cancel()


async def test_a_gateway_that_comes_late_for_its_grant_has_a_lease_from_then_on() -> None:
    fleet = Fleet("A", "B")
    late, other = Leases(fleet, "g1", lambda: fleet.now), Leases(fleet, "g2", lambda: fleet.now)
    keeping = asyncio.create_task(other.keep())
    assert isinstance(await late.ask(Ask("t1", "A")), Waiting)
    await until(lambda: fleet.rotor._tickets["t1"].answer is not None)
    waiting = asyncio.create_task(wait_for(other, Ask("t2", "B")))
    fleet.now += 1.9
    await asyncio.sleep(0.05)
    granted = await late.ask(Ask("t1", "A"))  # the model has stayed for it
    assert isinstance(granted, Granted) and fleet.kinds() == [("Load", "A")]
    fleet.now += 1.9
    assert late.live("A") == granted.lease
    fleet.rotor.tell(Tick())
    assert ("Retire", "A") not in fleet.kinds(), "a call under that lease would wake a model that has left"
    fleet.now += 0.5
    fleet.rotor.tell(Tick())
    await waiting
    assert late.live("A") is None and fleet.kinds() == [("Load", "A"), ("Retire", "A"), ("Load", "B")]
    keeping.cancel()


async def test_a_grant_that_nobody_came_for_lapses_and_the_request_waits_again_with_its_age() -> None:
    fleet = Fleet("A", "B")
    late, other = Leases(fleet, "g1", lambda: fleet.now), Leases(fleet, "g2", lambda: fleet.now)
    keeping = asyncio.create_task(other.keep())
    await late.ask(Ask("t1", "A"))
    await until(lambda: fleet.rotor._tickets["t1"].answer is not None)
    fleet.now += 5
    await wait_for(other, Ask("t2", "B"))
    assert isinstance(await late.ask(Ask("t1", "A")), Waiting)
    assert fleet.rotor.rotation.state.line.tickets["t1"].asked_at == 100.0
    late_keeping = asyncio.create_task(late.keep())
    fleet.now += 5
    fleet.rotor.tell(Tick())
    granted = await wait_for(late, Ask("t1", "A"))
    assert late.live("A") == granted.lease
    assert fleet.kinds() == [("Load", "A"), ("Retire", "A"), ("Load", "B"), ("Retire", "B"), ("Load", "A")]
    for task in (keeping, late_keeping):
        task.cancel()


async def test_a_model_that_turns_out_to_stay_at_the_moment_of_a_request_is_granted_with_a_lease() -> None:
    fleet = Fleet("A", "B", echo_s=0.5)
    first, other, last = (Leases(fleet, name, lambda: fleet.now) for name in ("g1", "g2", "g3"))
    keeping = asyncio.create_task(first.keep())
    await wait_for(first, Ask("t1", "A"))
    keeping.cancel()
    fleet.now += 0.1
    assert isinstance(await other.ask(Ask("t2", "B")), Waiting)
    leaving = fleet.rotor.rotation.state.residency.residents["A"]
    assert leaving.retirement is not None
    fleet.rotor.tell(Acknowledged("g1", "A", leaving.retirement.revoked, in_flight=1))
    assert leaving.leaving, "what the replica says is not known yet"
    fleet.now += 0.9
    granted = await last.ask(Ask("t3", "A"))  # before any tick: with it time passes for the rotation, too
    assert isinstance(granted, Granted) and last.live("A") == granted.lease
    assert ("Retire", "A") not in fleet.kinds()


async def test_a_grant_that_arrives_after_its_lease_was_given_up_gives_no_right_to_call() -> None:
    fleet = Fleet("A")
    leases = Leases(fleet, "g1", lambda: fleet.now)
    leases._obey(Orders(revoked={"A": 7}), fleet.now)
    leases._take(Lease("A", 7, 2.0), fleet.now)
    assert leases.live("A") is None
    leases._take(Lease("A", 8, 2.0), fleet.now)
    assert leases.live("A") == Lease("A", 8, 2.0)


async def test_a_router_that_was_away_hears_of_the_waiting_requests_with_their_age() -> None:
    fleet = Fleet("A", "B")
    asked: list[Ask] = []
    restarted = asyncio.Event()

    class Restarting:
        """Loses its memory after the first question, and does not answer the second."""

        async def admit(self, ask: Ask) -> Admission:
            asked.append(ask)
            if len(asked) == 1:
                return Waiting(ask.ticket, Route(()), 1, "", retry_in_s=60)
            if len(asked) == 2:
                raise RouterAway("away")
            return await fleet.admit(ask)

        async def sync(self, report: Report) -> Orders:
            await restarted.wait()
            return await fleet.sync(report)

    leases = Leases(Restarting(), "g1", lambda: fleet.now)
    keeping = asyncio.create_task(leases.keep())
    waiting = asyncio.create_task(wait_for(leases, Ask("t1", "A")))
    await until(lambda: len(asked) == 1)
    fleet.now += 5
    restarted.set()
    assert (await waiting).lease.model == "A"
    assert [ask.waited_s for ask in asked[:3]] == [0, 5, 5] and {ask.ticket for ask in asked} == {"t1"}
    keeping.cancel()


async def test_a_request_whose_gateway_has_died_is_forgotten() -> None:
    fleet = Fleet("A", "B")
    fleet.rotor.ask(Request("t1", ("A",), "g1"))
    await until(lambda: fleet.rotor.rotation.waiting("t1") is None)
    told = fleet.rotor.ask(Request("t2", ("B",), "g2"))
    assert isinstance(told, Notify)
    fleet.now += 16
    fleet.rotor.start()
    await until(lambda: not fleet.rotor._tickets)
    assert fleet.rotor.rotation.waiting("t2") is None
    fleet.rotor.stop()


@pytest.mark.parametrize("kept_open", [True, False])
async def test_a_quiet_gateway_is_answered_after_a_while_and_a_busy_one_at_once(kept_open: bool) -> None:
    fleet = Fleet("A")
    loop = asyncio.get_running_loop()
    started = loop.time()
    orders = await fleet.sync(Report("g1", tickets=() if kept_open else ("unknown",)))
    took = loop.time() - started
    assert (took >= HOLD_S * 0.9, orders.stirred) == (kept_open, () if kept_open else ("unknown",))
