"""Several replies as one stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from serve_app.gateway import Step

Numbered = tuple[int, Step]
WAITING = 64
"""Steps that may wait for a slow reader before the replies are held up."""


async def together(replies: Sequence[AsyncGenerator[Step, None]]) -> AsyncGenerator[Numbered, None]:
    """Each step of each reply, with the reply's number, as they come.

    Closing it closes all; a reply that fails ends the others and raises its error here.
    """
    if len(replies) == 1:
        async with aclosing(replies[0]) as steps:
            async for step in steps:
                yield 0, step
        return
    queue: asyncio.Queue[Numbered | BaseException | None] = asyncio.Queue(WAITING)
    tasks = [asyncio.ensure_future(_pump(number, reply, queue)) for number, reply in enumerate(replies)]
    try:
        left = len(tasks)
        while left:
            item = await queue.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                left -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _pump(
    number: int, reply: AsyncGenerator[Step, None], queue: asyncio.Queue[Numbered | BaseException | None]
) -> None:
    try:
        async with aclosing(reply):
            async for step in reply:
                await queue.put((number, step))
    except Exception as error:  # whatever it is, it belongs to who reads the queue
        await queue.put(error)
    else:
        await queue.put(None)
