"""The scripted engine's own promises: exact times, exact text, faults on demand. Time is simulated."""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Callable
from typing import Any

import pytest

from serve_app.domain.catalog import ModelInfo
from serve_app.domain.errors import InvalidConfig, InvalidInput, RotundaError
from serve_app.domain.generation import Accepted, Delta, Finish, FinishReason, GenerationRequest, Item, Message, Options
from serve_app.engines.base import EngineOptions
from serve_app.engines.scripted import ScriptedEngine, create


class SimulatedClock:
    """Jumps to the next call when asked; calls are as late as ``lag`` says."""

    def __init__(self) -> None:
        self.now = 100.0
        self.lag: Callable[[float], float] = lambda when: 0.0
        self._calls: list[tuple[float, int, Any]] = []

    def time(self) -> float:
        return self.now

    def call_at(self, when: float, callback: Callable[..., Any], *args: Any) -> Any:
        handle = asyncio.Handle(callback, args, asyncio.get_running_loop())
        heapq.heappush(self._calls, (when, id(handle), handle))
        return handle

    async def run(self, task: asyncio.Task[Any]) -> Any:
        while not task.done():
            for _ in range(10):
                await asyncio.sleep(0)
            if self._calls and not task.done():
                when, _, handle = heapq.heappop(self._calls)
                if not handle.cancelled():
                    self.now = max(self.now, when + self.lag(when))
                    handle._run()
        return task.result()


def engine_of(clock: SimulatedClock | None = None, **extra: Any) -> ScriptedEngine:
    return ScriptedEngine(ModelInfo("m", ""), EngineOptions(extra=tuple(extra.items())), clock)


def ask(text: str = "Hello", **options: Any) -> GenerationRequest:
    return GenerationRequest("r", "m", (Message.of("user", text),), Options(**options))


async def collect(engine: ScriptedEngine, request: GenerationRequest) -> list[Item]:
    return [item async for item in engine.generate(request)]


async def text_of(engine: ScriptedEngine, request: GenerationRequest) -> str:
    return "".join(item.text for item in await collect(engine, request) if isinstance(item, Delta))


async def times(clock: SimulatedClock, engine: ScriptedEngine, request: GenerationRequest) -> list[float]:
    async def watch() -> list[float]:
        return [clock.now - 100.0 async for item in engine.generate(request) if isinstance(item, Delta)]

    return list(await clock.run(asyncio.create_task(watch())))


async def test_each_token_comes_exactly_when_it_is_due() -> None:
    clock = SimulatedClock()
    found = await times(clock, engine_of(clock, tokens=5, ttft=0.5, pace=0.02), ask())
    assert found == pytest.approx([0.5, 0.52, 0.54, 0.56, 0.58])


async def test_a_late_token_does_not_delay_those_after_it() -> None:
    clock = SimulatedClock()
    clock.lag = lambda when: 0.03 if when < 100.53 else 0.0
    found = await times(clock, engine_of(clock, tokens=5, ttft=0.5, pace=0.02), ask())
    assert found == pytest.approx([0.53, 0.53, 0.54, 0.56, 0.58])


async def test_replies_in_step_have_their_tokens_at_the_same_moments() -> None:
    clock = SimulatedClock()
    clock.now = 100.013
    engine = engine_of(clock, tokens=3, ttft=0.5, pace=0.02, in_step=True)
    assert await times(clock, engine, ask()) == pytest.approx([0.52, 0.54, 0.56])
    clock.now = 101.001
    assert await times(clock, engine, ask()) == pytest.approx([1.52, 1.54, 1.56])


async def test_timing_tells_the_parts() -> None:
    clock = SimulatedClock()
    items = await clock.run(asyncio.create_task(collect(engine_of(clock, tokens=3, ttft=0.5, pace=0.1), ask())))
    finish = items[-1]
    assert isinstance(finish, Finish)
    assert (finish.timing.prefill_s, finish.timing.decode_s) == pytest.approx((0.5, 0.2))
    assert (finish.usage.prompt_tokens, finish.usage.completion_tokens) == (1, 3)


async def test_the_reply_is_known_beforehand() -> None:
    assert await text_of(engine_of(tokens=3), ask()) == "word0 word1 word2"
    assert await text_of(engine_of(text="one  two\nthree"), ask()) == "one  two\nthree"
    assert await text_of(engine_of(text="one two"), ask("[[tokens=5]]")) == "one two one two one"
    assert await text_of(engine_of(), ask("say é 🙂 [[echo=true]]")) == "say é 🙂"


async def test_directives_win_over_settings_and_can_be_turned_off() -> None:
    assert len(await collect(engine_of(tokens=9), ask("[[tokens=2]]"))) == 4
    assert len(await collect(engine_of(tokens=9, directives=False), ask("[[tokens=2]]"))) == 11


async def test_the_length_is_cut_by_max_tokens() -> None:
    finish = (await collect(engine_of(), ask("[[tokens=9]]", max_tokens=4)))[-1]
    assert isinstance(finish, Finish) and finish.reason is FinishReason.LENGTH
    finish = (await collect(engine_of(), ask("[[tokens=4]]", max_tokens=4)))[-1]
    assert isinstance(finish, Finish) and finish.reason is FinishReason.STOP
    assert len(await collect(engine_of(), ask("[[tokens=0]]"))) == 2


async def test_it_fails_where_it_is_told_to() -> None:
    engine = engine_of()
    seen: list[Item] = []
    with pytest.raises(RotundaError) as failed:
        async for item in engine.generate(ask("[[fail_at=2 error=PROVIDER_ERROR]]")):
            seen.append(item)
    assert failed.value.code == "PROVIDER_ERROR" and len(seen) == 3
    with pytest.raises(RotundaError) as failed:
        async for item in engine.generate(ask("[[error=QUEUE_FULL]]")):
            pytest.fail(f"{item} before the refusal")
    assert failed.value.code == "QUEUE_FULL"
    assert engine.counters().failed == 2


async def test_it_hangs_until_it_is_cancelled() -> None:
    engine = engine_of()
    stream = engine.generate(ask("[[hang_at=1]]"))
    assert isinstance(await anext(stream), Accepted)
    assert isinstance(await anext(stream), Delta)
    task = asyncio.ensure_future(anext(stream))
    done, _ = await asyncio.wait({task}, timeout=0.05)
    assert not done and engine.counters().running == 1
    task.cancel()
    await asyncio.wait({task})
    assert engine.counters().cancelled == 1


MALFORMED = [
    "tokens",
    "tokens=",
    "tokens=x",
    "tokens=-1",
    "pace=nan",
    "pace=inf",
    "echo=maybe",
    "error=NO_CODE",
    "text=x",
    "load_s=1",
    "a=1",
]


@pytest.mark.parametrize("directive", MALFORMED)
async def test_directives_are_read_strictly(directive: str) -> None:
    with pytest.raises(InvalidInput):
        await collect(engine_of(), ask(f"[[{directive}]]"))


@pytest.mark.parametrize("extra", [{"speed": 1}, {"tokens": "many"}, {"load_error": "NO_CODE"}, {"pace": -1.0}])
def test_settings_are_read_strictly(extra: dict[str, Any]) -> None:
    with pytest.raises(InvalidConfig):
        engine_of(**extra)


def test_loading_takes_time_and_fails_as_it_is_told() -> None:
    seen: list[tuple[str, float]] = []
    create(ModelInfo("m", ""), EngineOptions(), lambda phase, done: seen.append((phase, done)))
    assert seen == [("weights", 0.0), ("weights", 1.0)]
    with pytest.raises(RotundaError) as failed:
        create(ModelInfo("m", ""), EngineOptions(extra=(("load_error", "MODEL_LOAD_FAILED"),)))
    assert failed.value.code == "MODEL_LOAD_FAILED"
