"""Replies that break off after their first byte: who goes on, what the client sees, and when it truthfully ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from serve_app.domain.backoff import Backoff
from serve_app.domain.catalog import Entry, ModelState
from serve_app.domain.continuation import Continuation
from serve_app.domain.errors import (
    CapabilityMissing,
    DeadlineExceeded,
    GenerationFailed,
    ProviderError,
    ProviderUnavailable,
    RotundaError,
)
from serve_app.domain.events import Switched
from serve_app.domain.fleet import FleetView
from serve_app.domain.generation import (
    Accepted,
    Delta,
    FinishReason,
    GenerationRequest,
    Item,
    JsonFormat,
    Message,
    Options,
    Usage,
)
from serve_app.domain.leasing import Orders
from serve_app.domain.leasing import Report as HolderReport
from serve_app.domain.rotation_view import HISTORY, RotationView
from serve_app.domain.routing import Admission, Ask, Candidate, Granted, Lease, Route
from serve_app.domain.tools import Tool, ToolCallPart, ToolUse
from serve_app.engines.base import EngineOptions
from serve_app.engines.scripted import ScriptedEngine, describe
from serve_app.gateway import Completed, Gateway, Limits, Routed, Step

GONE = ProviderUnavailable("The replica went away.")
Break = tuple[str, int, RotundaError]
"""A model, the deltas after which its call breaks off, and with what."""


@dataclass
class Fleet:
    """Router and backend in one: scripted engines by name, whose calls break off as ``breaks`` say, first come."""

    engines: dict[str, ScriptedEngine]
    breaks: list[Break] = field(default_factory=list)
    called: list[GenerationRequest] = field(default_factory=list)
    others: dict[str, Callable[[GenerationRequest], AsyncGenerator[Item, None]]] = field(default_factory=dict)

    async def admit(self, ask: Ask) -> Admission:
        names = [*self.engines, *self.others]
        entries = [Entry(name, f"of-{name}", f"model-{name}", "model") for name in names]
        candidates = tuple(Candidate(entry, entry.id, ModelState.READY, "asked for") for entry in entries)
        if ask.alone:  # one of them is about to be called, and needs a lease of its own
            candidates = tuple(each for each in candidates if each.entry.full_name == ask.model)
        return Granted(Route(candidates), Lease(candidates[0].entry.full_name, 1, 2.0))

    async def cancel(self, ticket: str) -> None: ...

    async def sync(self, report: HolderReport) -> Orders:
        return Orders()

    async def view(self) -> FleetView:
        return FleetView()

    async def rotation(self, history: int = HISTORY) -> RotationView:
        return RotationView()

    async def command(self, action: str, model: str = "", **arguments: Any) -> dict[str, Any]:
        return {}

    async def embed(self, entry: Entry, texts: Any, epoch: int) -> Any:
        raise AssertionError

    async def stream(self, entry: Entry, request: GenerationRequest, epoch: int) -> AsyncGenerator[Item, None]:
        self.called.append(request)
        left = next((each for each in self.breaks if each[0] == entry.id), None)
        if left is not None:
            self.breaks.remove(left)
        deltas = 0
        source: Any = self.others[entry.id] if entry.id in self.others else self.engines[entry.id].generate
        async for item in source(request):
            if left is not None and deltas == left[1] and not isinstance(item, Accepted):
                raise left[2]
            deltas += isinstance(item, Delta)
            yield item


def engine(name: str, **extra: Any) -> ScriptedEngine:
    return ScriptedEngine(describe(name), EngineOptions(extra=tuple(extra.items())))


def request_of(text: str = "hello", **settings: Any) -> GenerationRequest:
    return GenerationRequest("r", "a", (Message.of("user", text),), **settings)


class Told:
    """What the client of one reply saw."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.error: RotundaError | None = None

    @property
    def text(self) -> str:
        return "".join(step.text for step in self.steps if isinstance(step, Delta))

    @property
    def ids(self) -> list[int]:
        return [token for step in self.steps if isinstance(step, Delta) for token in step.token_ids]

    def of(self, kind: type[Any]) -> list[Any]:
        return [step for step in self.steps if isinstance(step, kind)]

    @property
    def end(self) -> Completed:
        assert isinstance(self.steps[-1], Completed), self.error
        return self.steps[-1]


async def ask(fleet: Fleet, request: GenerationRequest | None = None, **limits: Any) -> Told:
    return await hear(Gateway(fleet, fleet, Limits(**({"backoff": Backoff(3, 0)} | limits))), request)


async def hear(gateway: Gateway, request: GenerationRequest | None = None) -> Told:
    told = Told()
    try:
        async for step in gateway.reply(Ask("t", "a"), request or request_of()):
            told.steps.append(step)
    except RotundaError as error:
        told.error = error
    return told


WHOLE = " ".join(f"word{n}" for n in range(16))


@pytest.mark.parametrize("after", [1, 5, 16])
async def test_the_same_model_goes_on_from_its_ids_unseen(after: int) -> None:
    fleet = Fleet({"a": engine("a")}, [("a", after, GONE)])
    told = await ask(fleet)
    assert told.text == WHOLE and told.ids == list(range(16))
    assert not told.of(Switched)
    # Each attempt tells its revision, without which its ids could not be gone on with once more.
    assert told.of(Accepted) == [Accepted(1, 0, "a")] * 2
    assert told.end.finish.usage == Usage(1, 16)
    assert [(part.model, part.attempt, part.tokens) for part in told.end.parts] == [
        ("of-a/a", 1, after), ("of-a/a", 2, 16 - after),
    ]  # fmt: skip
    assert [step.attempt for step in told.of(Routed)] == [1, 2]
    begun = fleet.called[1].continuation
    assert begun is not None and begun.token_ids == tuple(range(after)) and begun.spent == after


async def test_a_model_that_breaks_off_again_and_again_goes_on_as_often_as_it_may_be_tried() -> None:
    told = await ask(Fleet({"a": engine("a")}, [("a", 4, GONE)] * 2))
    assert told.text == WHOLE and told.end.finish.usage == Usage(1, 16)
    told = await ask(Fleet({"a": engine("a")}, [("a", 4, GONE)] * 3))
    assert told.text == " ".join(f"word{n}" for n in range(12)) and told.error is GONE


async def test_a_replica_that_dies_with_many_replies_is_one_failure_and_all_of_them_go_on() -> None:
    fleet = Fleet({"a": engine("a", pace=0.01)}, [("a", 8, GONE)] * 20)
    gateway = Gateway(fleet, fleet, Limits(backoff=Backoff(3, 0)))
    for told in await asyncio.gather(*(hear(gateway) for _ in range(20))):
        assert told.text == WHOLE and told.end.finish.usage == Usage(1, 16)
    assert len(fleet.called) == 40


async def test_another_model_goes_on_by_text_and_the_client_is_told_when_it_does() -> None:
    fleet = Fleet({"a": engine("a"), "b": engine("b", text="one two three four five six seven eight")})
    fleet.breaks = [("a", 3, GenerationFailed("broken"))]
    told = await ask(fleet)
    assert told.text == "word0 word1 word2 four five six seven eight"
    assert told.of(Switched) == [Switched("a", "b", "broken")]
    assert told.end.finish.usage == Usage(1, 8)
    assert [(part.provider, part.tokens, part.length) for part in told.end.parts] == [
        ("of-a", 3, 17), ("of-b", 5, 26),
    ]  # fmt: skip
    places = [type(step).__name__ for step in told.steps]
    assert places[places.index("Switched") :][:4] == ["Switched", "Routed", "Accepted", "Delta"]


async def test_the_second_model_goes_on_from_its_own_ids_behind_the_first_ones_text() -> None:
    fleet = Fleet({"a": engine("a"), "b": engine("b", text="one two three four five six seven eight")})
    fleet.breaks = [("a", 3, GenerationFailed("broken")), ("b", 2, GONE)]
    told = await ask(fleet)
    assert told.text == "word0 word1 word2 four five six seven eight"
    last = fleet.called[-1].continuation
    assert last is not None
    assert (last.token_ids, last.text[: last.earlier], last.spent) == ((3, 4), "word0 word1 word2", 5)
    assert told.end.finish.usage == Usage(1, 8)


async def test_what_remains_of_max_tokens_is_what_others_may_make() -> None:
    for second in ({}, {"text": "one two three four five six seven eight"}):
        fleet = Fleet({"a": engine("a"), "b": engine("b", **second)}, [("a", 3, GenerationFailed("broken"))])
        told = await ask(fleet, request_of(options=Options(max_tokens=5)))
        assert told.end.finish.reason is FinishReason.LENGTH
        assert told.end.finish.usage.completion_tokens == 5 and len(told.text.split()) == 5


async def test_a_model_that_cannot_go_on_is_passed_over_in_silence() -> None:
    fleet = Fleet({"a": engine("a"), "b": engine("b", continues="refuse"), "c": engine("c")})
    fleet.breaks = [("a", 3, GenerationFailed("broken"))]
    told = await ask(fleet)
    assert told.text == WHOLE
    assert told.of(Switched) == [Switched("a", "c", "broken")]
    assert [step.candidate.name for step in told.of(Routed)] == ["a", "c"]


async def test_without_anybody_who_can_go_on_the_failure_itself_is_told() -> None:
    fleet = Fleet({"a": engine("a"), "b": engine("b", continues="refuse")})
    fleet.breaks = [("a", 3, GenerationFailed("broken"))]
    told = await ask(fleet)
    assert told.text == "word0 word1 word2"
    assert isinstance(told.error, GenerationFailed) and told.error.provider == "of-a"
    assert not told.of(Switched) and [step.candidate.name for step in told.of(Routed)] == ["a"]


async def test_of_a_model_that_begins_the_text_anew_the_repetition_is_dropped() -> None:
    fleet = Fleet({"a": engine("a"), "b": engine("b", continues="restart")}, [("a", 6, GenerationFailed("broken"))])
    told = await ask(fleet)
    assert told.text == WHOLE
    assert told.end.finish.usage.completion_tokens == 16, "each token counts once"


async def test_a_model_that_begins_another_text_is_rejected_and_the_next_one_goes_on() -> None:
    other = "word0 word1 word2 word3 word4 and now something else"
    fleet = Fleet({"a": engine("a"), "b": engine("b", continues="restart", text=other), "c": engine("c")})
    fleet.breaks = [("a", 8, GenerationFailed("broken"))]
    told = await ask(fleet)
    assert told.text == WHOLE
    assert [switch.target for switch in told.of(Switched)] == ["c"]
    fleet = Fleet({"a": engine("a"), "b": engine("b", continues="restart", text=other)})
    fleet.breaks = [("a", 8, GenerationFailed("broken"))]
    told = await ask(fleet)
    assert told.text == " ".join(f"word{n}" for n in range(8))
    assert isinstance(told.error, ProviderError) and "anew" in told.error.message


async def test_a_reply_with_a_form_or_a_begun_call_is_never_gone_on_with() -> None:
    async def halfway(request: GenerationRequest) -> AsyncGenerator[Item, None]:
        yield Accepted(1, revision="a")
        yield Delta("{", (1,))
        raise GONE

    form = request_of(options=Options(response_format=JsonFormat()))
    for request in (form, request_of(tools=ToolUse((Tool("now"),), choice="required"))):
        fleet = Fleet({}, others={"a": halfway, "b": engine("b").generate})
        told = await ask(fleet, request)
        assert told.error is GONE and len(told.of(Routed)) == len(fleet.called) == 1

    async def calls(request: GenerationRequest) -> AsyncGenerator[Item, None]:
        yield Accepted(1)
        yield Delta("Wait. ", (1,))
        yield Delta("", (2,), tool_calls=(ToolCallPart(0, "", "id", "now"),))
        raise GONE

    fleet = Fleet({}, others={"a": calls})
    told = await ask(fleet, request_of(tools=ToolUse((Tool("now"),))))
    assert told.error is GONE and len(fleet.called) == 1


async def test_log_probabilities_come_from_one_model_alone() -> None:
    request = request_of(options=Options(logprobs=2))
    told = await ask(Fleet({"a": engine("a"), "b": engine("b")}, [("a", 3, GONE)]), request)
    assert told.text == WHOLE
    entries = [entry.token_id for step in told.of(Delta) for entry in step.logprobs]
    assert entries == list(range(16))
    fleet = Fleet({"a": engine("a"), "b": engine("b")}, [("a", 3, GenerationFailed("broken"))])
    told = await ask(fleet, request)
    assert isinstance(told.error, GenerationFailed) and not told.of(Switched)


async def test_reasoning_without_an_answer_is_gone_on_with_by_the_same_model_alone() -> None:
    thinks = {"text": "<think> one two three </think> four five"}
    told = await ask(Fleet({"a": engine("a", **thinks)}, [("a", 2, GONE)]))
    assert (told.text, "".join(step.reasoning for step in told.of(Delta))) == ("four five", "one two three")
    fleet = Fleet({"a": engine("a", **thinks), "b": engine("b")}, [("a", 2, GenerationFailed("broken"))])
    told = await ask(fleet)
    assert isinstance(told.error, GenerationFailed) and told.text == ""


async def test_when_its_time_is_up_nobody_else_is_asked() -> None:
    late = DeadlineExceeded.during("total", 1.0)
    fleet = Fleet({"a": engine("a"), "b": engine("b")}, [("a", 3, late)])
    told = await ask(fleet)
    assert told.error is late and len(fleet.called) == 1


async def test_a_model_that_falls_silent_gives_way_to_another() -> None:
    fleet = Fleet({"a": engine("a", hang_at=3), "b": engine("b")})
    told = await ask(fleet, idle_s=0.05)
    assert told.text == WHOLE and [switch.target for switch in told.of(Switched)] == ["b"]


async def test_a_fallback_that_cannot_do_it_does_not_hide_why_it_was_asked() -> None:
    async def refuses(request: GenerationRequest) -> AsyncGenerator[Item, None]:
        raise CapabilityMissing("No images here.")
        yield Accepted(1)

    fleet = Fleet({"a": engine("a", error="GENERATION_FAILED")}, others={"b": refuses})
    told = await ask(fleet)
    assert isinstance(told.error, GenerationFailed)


async def test_a_reply_that_another_gateway_began_is_adopted() -> None:
    begun = Continuation("word0 word1", (0, 1), "a", spent=2)
    fleet = Fleet({"a": engine("a")}, [("a", 4, GONE)])
    told = await ask(fleet, replace(request_of(draw_seed=1), continuation=begun))
    assert "word0 word1" + told.text == WHOLE
    assert told.end.finish.usage == Usage(1, 16) and told.of(Accepted) == [Accepted(1, 0, "a")] * 2
    assert fleet.called[1].continuation == Continuation(
        "word0 word1 word2 word3 word4 word5", tuple(range(6)), "a", spent=6
    )


async def test_the_draws_of_an_unseeded_request_are_the_same_for_every_attempt() -> None:
    fleet = Fleet({"a": engine("a")}, [("a", 3, GONE)])
    await ask(fleet)
    first, second = fleet.called
    assert first.draw_seed is not None and first.draw_seed == second.draw_seed
    fleet = Fleet({"a": engine("a")})
    await ask(fleet, request_of(options=Options(seed=4)))
    assert fleet.called[0].draw_seed is None


async def test_leaving_during_a_continuation_stops_it() -> None:
    fleet = Fleet({"a": engine("a", pace=0.001, tokens=1000)}, [("a", 3, GONE)])
    reply = Gateway(fleet, fleet, Limits(backoff=Backoff(3, 0))).reply(Ask("t", "a"), request_of())
    deltas = 0
    async for step in reply:
        deltas += isinstance(step, Delta)
        if deltas == 6:
            break
    await reply.aclose()
    for _ in range(1000):
        if fleet.engines["a"].counters().running == 0:
            break
        await asyncio.sleep(0.001)
    assert fleet.engines["a"].counters().running == 0
