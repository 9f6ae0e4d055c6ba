"""admit → route → stream → record, with a router and a backend that do what the test tells them."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from dataclasses import replace
from typing import Any

import pytest

from serve_app.domain.backoff import Backoff
from serve_app.domain.breaker import Breakers, Rules
from serve_app.domain.catalog import Entry, ModelInfo, ModelState
from serve_app.domain.errors import (
    CapabilityMissing,
    DeadlineExceeded,
    GenerationFailed,
    ProviderError,
    ProviderUnavailable,
    QueueFull,
    RateLimited,
    ReplicaRetired,
    RotundaError,
)
from serve_app.domain.events import Loading, Queued, Switched
from serve_app.domain.fleet import FleetView
from serve_app.domain.generation import Accepted, Delta, Finish, FinishReason, GenerationRequest, Item, Message, Usage
from serve_app.domain.leasing import Orders
from serve_app.domain.leasing import Report as HolderReport
from serve_app.domain.rotation_view import HISTORY, RotationView
from serve_app.domain.routing import Admission, Ask, Candidate, Granted, Lease, Route, Waiting
from serve_app.fullness import FULL_S
from serve_app.gateway import Completed, Gateway, Limits, Step

Script = Callable[[GenerationRequest], AsyncGenerator[Item, None]]
FINISH = Finish(FinishReason.STOP, Usage(1, 2))
NO_WAIT = Backoff(attempts=3, base_s=0)


async def answer(request: GenerationRequest) -> AsyncGenerator[Item, None]:
    yield Accepted(1)
    yield Delta("one", (1,))
    yield Delta(" two", (2,))
    yield FINISH


def failing(error: Exception, after: int = 0) -> Script:
    async def script(request: GenerationRequest) -> AsyncGenerator[Item, None]:
        async for item in answer(request):
            if after == 0:
                raise error
            after_left[0] -= 1
            if after_left[0] < 0:
                raise error
            yield item

    after_left = [after]
    return script


class ScriptedBackend:
    """Answers each call with the next script; remembers who was called, and who was closed early."""

    def __init__(self, *scripts: Script) -> None:
        self.scripts = list(scripts)
        self.called: list[str] = []
        self.closed = 0

    async def stream(self, entry: Entry, request: GenerationRequest, epoch: int) -> AsyncGenerator[Item, None]:
        self.called.append(entry.id)
        try:
            async for item in self.scripts.pop(0)(request):
                yield item
        except (asyncio.CancelledError, GeneratorExit):
            self.closed += 1
            raise


class ScriptedRouter:
    """Gives its answers in order, and the last one again and again."""

    def __init__(self, *answers: Admission) -> None:
        self.answers = list(answers)
        self.asked = 0
        self.cancelled: list[str] = []

    async def admit(self, ask: Ask) -> Admission:
        self.asked += 1
        if ask.alone:  # another candidate is about to be called, and needs a lease of its own
            return granted(str(ask.model).removeprefix("huggingface/"))
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]

    async def cancel(self, ticket: str) -> None:
        self.cancelled.append(ticket)

    async def sync(self, report: HolderReport) -> Orders:
        return Orders()

    async def view(self) -> FleetView:
        return FleetView()

    async def rotation(self, history: int = HISTORY) -> RotationView:
        return RotationView()

    async def command(self, action: str, model: str = "", **arguments: Any) -> dict[str, Any]:
        return {}


def route(*names: str, state: ModelState = ModelState.READY) -> Route:
    entries = [Entry(name, "huggingface", f"model-{name}", "model") for name in names]
    return Route(tuple(Candidate(entry, entry.id, state, "asked for") for entry in entries))


def granted(*names: str, state: ModelState = ModelState.READY) -> Granted:
    return Granted(route(*names, state=state), Lease(f"huggingface/{names[0]}", 1, 2.0))


ASK = Ask("ticket", "a")
REQUEST = GenerationRequest("r", "a", (Message.of("user", "hello"),))


async def steps(gateway: Gateway) -> list[Step]:
    return [step async for step in gateway.reply(ASK, REQUEST)]


def kinds(found: list[Step]) -> list[str]:
    return [type(step).__name__ for step in found]


async def test_a_resident_model_answers() -> None:
    found = await steps(Gateway(ScriptedRouter(granted("a")), ScriptedBackend(answer)))
    assert kinds(found) == ["Routed", "Accepted", "Delta", "Delta", "Completed"]
    last = found[-1]
    assert isinstance(last, Completed)
    assert last.finish is FINISH
    assert last.timing.ttft_s is not None and last.timing.load_s == 0


async def test_a_cold_model_says_that_it_loads_and_how_long_that_took() -> None:
    now = [0.0]

    async def slow(request: GenerationRequest) -> AsyncGenerator[Item, None]:
        now[0] += 7
        async for item in answer(request):
            yield item

    router = ScriptedRouter(granted("a", state=ModelState.COLD))
    found = await steps(Gateway(router, ScriptedBackend(slow), clock=lambda: now[0]))
    assert found[1] == Loading("a")
    assert isinstance(found[-1], Completed)
    assert found[-1].timing.load_s == 7


async def test_waiting_tells_each_new_position_once_and_then_goes_on() -> None:
    waits = [Waiting("ticket", route("a"), place, "memory is full", retry_in_s=0) for place in (2, 2, 1)]
    found = await steps(Gateway(ScriptedRouter(*waits, granted("a")), ScriptedBackend(answer)))
    assert found[:2] == [Queued(2, "memory is full"), Queued(1, "memory is full")]
    assert kinds(found)[2:] == ["Routed", "Accepted", "Delta", "Delta", "Completed"]


async def test_leaving_while_waiting_gives_the_ticket_back() -> None:
    router = ScriptedRouter(Waiting("ticket", route("a"), 1, "memory is full", retry_in_s=60))
    reply = Gateway(router, ScriptedBackend()).reply(ASK, REQUEST)
    assert isinstance(await anext(reply), Queued)
    await reply.aclose()
    assert router.cancelled == ["ticket"]


async def test_a_live_lease_spares_the_call_and_an_expired_one_does_not() -> None:
    now, router = [0.0], ScriptedRouter(granted("a"))
    gateway = Gateway(router, ScriptedBackend(answer, answer, answer), clock=lambda: now[0])
    await steps(gateway)
    await steps(gateway)
    assert router.asked == 1
    now[0] += 2.1
    await steps(gateway)
    assert router.asked == 2


async def test_what_was_granted_for_a_short_prompt_is_not_taken_for_a_long_one() -> None:
    given = granted("a")
    entry = replace(given.route.first.entry, info=ModelInfo("a", "", context_length=10))
    short = replace(given, route=Route((replace(given.route.first, entry=entry),)))
    router = ScriptedRouter(short)
    gateway = Gateway(router, ScriptedBackend(answer, answer))
    await gateway.admit(replace(ASK, least_tokens=9))
    await gateway.admit(replace(ASK, least_tokens=9))
    assert router.asked == 1
    await gateway.admit(replace(ASK, least_tokens=10))
    assert router.asked == 2


async def test_what_holds_for_the_moment_is_asked_anew_each_time() -> None:
    given = granted("a")
    router = ScriptedRouter(replace(given, route=replace(given.route, momentary=True)))
    gateway = Gateway(router, ScriptedBackend())
    await gateway.admit(ASK)
    await gateway.admit(ASK)
    assert router.asked == 2


async def test_a_failure_before_the_first_byte_is_tried_again_unseen() -> None:
    backend = ScriptedBackend(failing(ProviderUnavailable("gone")), failing(ProviderUnavailable("gone"), 1), answer)
    found = await steps(Gateway(ScriptedRouter(granted("a")), backend, Limits(backoff=NO_WAIT)))
    assert backend.called == ["a", "a", "a"]
    assert [step.text for step in found if isinstance(step, Delta)] == ["one", " two"]
    assert isinstance(found[-1], Completed)


async def test_when_the_tries_are_used_up_the_next_candidate_answers() -> None:
    backend = ScriptedBackend(*[failing(ProviderUnavailable("gone"))] * 3, answer)
    found = await steps(Gateway(ScriptedRouter(granted("a", "b")), backend, Limits(backoff=NO_WAIT)))
    assert backend.called == ["a", "a", "a", "b"]
    assert Switched("a", "b", "gone") in found
    assert isinstance(found[-1], Completed)


async def test_what_cannot_be_tried_again_goes_to_the_next_candidate_at_once() -> None:
    backend = ScriptedBackend(failing(GenerationFailed("broken")), answer)
    await steps(Gateway(ScriptedRouter(granted("a", "b")), backend, Limits(backoff=NO_WAIT)))
    assert backend.called == ["a", "b"]


@pytest.mark.parametrize("busy", [QueueFull("full"), RateLimited("later", details={"retryAfterS": 7})])
async def test_who_is_busy_is_not_asked_again_but_the_next_candidate_is(busy: RotundaError) -> None:
    backend = ScriptedBackend(failing(busy), answer)
    assert Switched("a", "b", busy.message) in await steps(Gateway(ScriptedRouter(granted("a", "b")), backend))
    assert backend.called == ["a", "b"]
    backend = ScriptedBackend(failing(busy))
    with pytest.raises(type(busy)) as refused:
        await steps(Gateway(ScriptedRouter(granted("a")), backend))
    assert backend.called == ["a"] and refused.value.retry_after_s == busy.retry_after_s


async def test_a_model_that_was_full_is_not_called_until_one_of_ours_has_ended() -> None:
    now, begun, free = [100.0], asyncio.Event(), asyncio.Event()

    async def held(request: GenerationRequest) -> AsyncGenerator[Item, None]:
        yield Accepted(1)
        begun.set()
        await free.wait()
        yield FINISH

    full = failing(QueueFull("full", details={"retryAfterS": 3}))
    backend, router = ScriptedBackend(held, full, full, answer), ScriptedRouter(granted("a"))
    gateway = Gateway(router, backend, clock=lambda: now[0])
    running = asyncio.create_task(steps(gateway))
    await begun.wait()
    for called in (2, 2, 2):
        with pytest.raises(QueueFull) as refused:
            await steps(gateway)
        assert refused.value.retry_after_s == 3 and len(backend.called) == called
    assert router.asked == 1  # the lease is as good as before
    with pytest.raises(QueueFull):
        await gateway.admit(ASK)
    now[0] += FULL_S
    with pytest.raises(QueueFull):
        await steps(gateway)
    assert len(backend.called) == 3  # others may have left the line meanwhile
    free.set()
    await running
    assert isinstance((await steps(gateway))[-1], Completed)


async def test_the_next_model_is_asked_instead_of_one_that_was_full() -> None:
    begun, free = asyncio.Event(), asyncio.Event()

    async def held(request: GenerationRequest) -> AsyncGenerator[Item, None]:
        yield Accepted(1)
        begun.set()
        await free.wait()
        yield FINISH

    backend = ScriptedBackend(held, failing(QueueFull("full")), answer, answer)
    gateway = Gateway(ScriptedRouter(granted("a", "b")), backend)
    running = asyncio.create_task(steps(gateway))
    await begun.wait()
    for _ in range(2):
        assert Switched("a", "b", "full") in await steps(gateway)
    assert backend.called == ["a", "a", "b", "b"]
    free.set()
    await running


async def test_a_limit_without_a_time_is_tried_again() -> None:
    backend = ScriptedBackend(failing(RateLimited("later")), answer)
    assert isinstance(
        (await steps(Gateway(ScriptedRouter(granted("a")), backend, Limits(backoff=NO_WAIT))))[-1], Completed
    )
    assert backend.called == ["a", "a"]


async def test_a_request_that_is_wrong_is_wrong_everywhere() -> None:
    backend = ScriptedBackend(failing(CapabilityMissing("no images")))
    with pytest.raises(CapabilityMissing):
        await steps(Gateway(ScriptedRouter(granted("a", "b")), backend))
    assert backend.called == ["a"]


async def test_a_retired_replica_means_a_new_lease_unseen_by_the_client() -> None:
    backend, router = ScriptedBackend(failing(ReplicaRetired("leaving")), answer), ScriptedRouter(granted("a"))
    found = await steps(Gateway(router, backend, Limits(backoff=NO_WAIT)))
    assert router.asked == 2
    assert isinstance(found[-1], Completed)
    assert not any(isinstance(step, Switched) for step in found)


async def test_an_answer_without_an_end_is_a_failure() -> None:
    async def broken(request: GenerationRequest) -> AsyncGenerator[Item, None]:
        yield Accepted(1)
        yield Delta("half", (1,))

    backend = ScriptedBackend(broken, broken)
    with pytest.raises(ProviderError):
        await steps(Gateway(ScriptedRouter(granted("a")), backend, Limits(backoff=Backoff(2, 0))))


@pytest.mark.parametrize(
    ("silent_after", "limits", "phase"),
    [
        (0, Limits(load_s=0.01, backoff=Backoff(1)), "load"),
        (1, Limits(first_token_s=0.01, backoff=Backoff(1)), "first token"),
        (2, Limits(idle_s=0.01, backoff=Backoff(1)), "idle"),
        (2, Limits(total_s=0.01, backoff=Backoff(1)), "total"),
    ],
)
async def test_each_wait_has_its_own_limit(silent_after: int, limits: Limits, phase: str) -> None:
    async def silent(request: GenerationRequest) -> AsyncGenerator[Item, None]:
        left = silent_after
        async for item in answer(request):
            if left == 0:
                await asyncio.Event().wait()
            left -= 1
            yield item

    backend = ScriptedBackend(silent)
    with pytest.raises(DeadlineExceeded) as caught:
        await steps(Gateway(ScriptedRouter(granted("a")), backend, limits))
    assert caught.value.details["phase"] == phase
    assert backend.closed == 1


async def test_closing_the_reply_closes_the_call() -> None:
    backend = ScriptedBackend(answer)
    reply = Gateway(ScriptedRouter(granted("a")), backend).reply(ASK, REQUEST)
    async for step in reply:
        if isinstance(step, Delta):
            break
    await reply.aclose()
    assert backend.closed == 1


async def test_a_way_that_fails_again_and_again_is_closed_and_the_fallback_answers_at_once() -> None:
    now = [0.0]
    breakers = Breakers(Rules(threshold=2, timeout_s=10))
    dead = failing(ProviderUnavailable("gone"))
    backend = ScriptedBackend(*[dead] * 3, answer, dead, answer, answer, answer)
    gateway = Gateway(
        ScriptedRouter(granted("a", "b")), backend, Limits(backoff=NO_WAIT), lambda: now[0], breakers=breakers
    )
    assert Switched("a", "b", "gone") in await steps(gateway)
    assert backend.called == ["a", "a", "a", "b"]  # the tries of one request are one failure
    assert Switched("a", "b", "gone") in await steps(gateway)
    assert backend.called[4:] == ["a", "b"]  # no second try: that failure closed the way
    found = await steps(gateway)
    assert found[0] == Switched("a", "b", "a failed several times in a row")
    now[0] = 10
    await steps(gateway)
    assert backend.called[6:] == ["b", "b"]  # healthy before half-open


async def test_when_every_way_is_closed_the_client_learns_when_to_come_again() -> None:
    backend = ScriptedBackend(failing(ProviderUnavailable("gone")), answer)
    breakers, now = Breakers(Rules(threshold=1, timeout_s=10)), [0.0]
    gateway = Gateway(ScriptedRouter(granted("a")), backend, clock=lambda: now[0], breakers=breakers)
    for _ in range(2):
        with pytest.raises(ProviderUnavailable) as caught:
            await steps(gateway)
    assert caught.value.retry_after_s == 10
    assert backend.called == ["a"]
    now[0] = 10
    assert isinstance((await steps(gateway))[-1], Completed)


async def test_a_client_that_leaves_during_the_one_try_lets_another_one_try() -> None:
    breakers, now = Breakers(Rules(threshold=1, timeout_s=10)), [10.0]
    backend = ScriptedBackend(answer, answer)
    gateway = Gateway(ScriptedRouter(granted("a")), backend, clock=lambda: now[0], breakers=breakers)
    breakers.failed(granted("a").route.first.entry, ProviderUnavailable("gone"), 0)
    reply = gateway.reply(ASK, REQUEST)
    async for step in reply:
        if isinstance(step, Delta):
            break
    with pytest.raises(ProviderUnavailable):
        await steps(gateway)
    await reply.aclose()
    assert isinstance((await steps(gateway))[-1], Completed)


async def test_a_model_that_routing_passed_over_is_named_with_its_reason() -> None:
    passed = Granted(replace(route("b"), passed_over=(("a", "its provider is down"),)), Lease("b", 1, 2.0))
    found = await steps(Gateway(ScriptedRouter(passed), ScriptedBackend(answer)))
    assert found[0] == Switched("a", "b", "its provider is down")
