import asyncio

import pytest

from serve_app.domain.events import Queued, Terminated
from serve_app.live import LiveStream

END = Terminated("s", "", 0, "USER_REQUESTED")


async def read(stream: LiveStream, after: int = 0) -> list[int]:
    return [numbered.seq async for numbered in stream.follow(after)]


async def test_early_late_and_resuming_readers_see_the_same_events() -> None:
    stream = LiveStream()
    early = asyncio.create_task(read(stream))
    await asyncio.sleep(0)
    for position in range(1, 4):
        stream.append(Queued(position, "busy"))
        await asyncio.sleep(0)
    middle = asyncio.create_task(read(stream, 2))
    await asyncio.sleep(0)
    stream.append(END)
    assert await early == [1, 2, 3, 4]
    assert await middle == [3, 4]
    assert await read(stream) == [1, 2, 3, 4]
    assert await read(stream, 4) == []


async def test_nothing_follows_the_terminal_event() -> None:
    stream = LiveStream()
    stream.append(END)
    with pytest.raises(AssertionError):
        stream.append(Queued(1, "busy"))


async def test_readers_are_counted_when_they_leave_too() -> None:
    counts: list[int] = []
    stream = LiveStream(counts.append)
    reader = asyncio.create_task(read(stream))
    await asyncio.sleep(0)
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    assert counts == [1, 0]
