import asyncio
from collections.abc import AsyncGenerator

import pytest

from serve_app.domain.errors import GenerationFailed
from serve_app.domain.generation import Accepted, Delta, Finish, FinishReason, Item, Usage
from serve_app.engines.frames import gather, merged

FINISH = Finish(FinishReason.STOP, Usage(1, 3))
DELTAS = [Delta("a", (1,)), Delta("b", (2,)), Delta("c", (3,))]


async def source(*items: Item, fail: Exception | None = None) -> AsyncGenerator[Item, None]:
    for item in items:
        yield item
    if fail:
        raise fail


def test_neighbouring_deltas_join_up_to_the_bound() -> None:
    assert merged([Accepted(1), *DELTAS, FINISH], 2) == [Accepted(1), Delta("ab", (1, 2)), Delta("c", (3,)), FINISH]
    assert merged(list(DELTAS), 1) == DELTAS


async def test_nothing_is_lost_or_reordered_for_a_slow_reader() -> None:
    got: list[Item] = []
    async for message in gather(source(Accepted(1), *DELTAS, FINISH), 32):
        got += message
        await asyncio.sleep(0.01)
    assert merged(got, 32) == [Accepted(1), Delta("abc", (1, 2, 3)), FINISH]


async def test_a_fast_reader_gets_each_item_as_it_comes() -> None:
    gates = [asyncio.Event() for _ in DELTAS]

    async def gated() -> AsyncGenerator[Item, None]:
        for gate, delta in zip(gates, DELTAS, strict=True):
            await gate.wait()
            yield delta

    messages = gather(gated(), 32)
    for gate, delta in zip(gates, DELTAS, strict=True):
        gate.set()
        assert await anext(messages) == (delta,)
    with pytest.raises(StopAsyncIteration):
        await anext(messages)


async def test_an_error_comes_after_what_was_ready_before_it() -> None:
    messages = gather(source(*DELTAS, fail=GenerationFailed("broken")), 32)
    assert merged(list(await anext(messages)), 32) == [Delta("abc", (1, 2, 3))]
    with pytest.raises(GenerationFailed):
        await anext(messages)


async def test_closing_it_closes_the_source() -> None:
    closed = asyncio.Event()

    async def endless() -> AsyncGenerator[Item, None]:
        try:
            while True:
                yield DELTAS[0]
                await asyncio.sleep(0)
        finally:
            closed.set()

    messages = gather(endless(), 32)
    await anext(messages)
    await messages.aclose()
    await asyncio.wait_for(closed.wait(), 1)
