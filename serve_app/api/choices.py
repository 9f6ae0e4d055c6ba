"""Several replies as one stream, for the protocols whose clients leave when they have enough."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import Any

from fastapi import Request
from starlette.requests import ClientDisconnect

from serve_app.api.sse import until_disconnect
from serve_app.gateway import Routed, Step

Numbered = tuple[int, Step]
Choices = AsyncGenerator[Numbered, None]
OPENING_S = 2.0
"""How long the answer's status waits for the model's first word; then headers go out, before clients try again."""
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


async def unless_disconnected(request: Request, answer: Any) -> Any:
    """The awaited ``answer``, or ClientDisconnect after cancelling it."""
    loop = asyncio.get_running_loop()
    work = loop.create_task(answer)
    gone = loop.create_task(until_disconnect(request.receive))
    try:
        await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise ClientDisconnect
        return work.result()
    finally:
        for task in (work, gone):
            task.cancel()
        await asyncio.gather(work, gone, return_exceptions=True)


async def first_word(choices: Choices) -> asyncio.Task[Numbered]:
    """Wait until the status is known: the first step after the route, its failure (raised here), or too long a time."""
    loop = asyncio.get_running_loop()
    first = loop.create_task(_first_step(choices))
    try:
        await asyncio.wait((first,), timeout=OPENING_S)
        if first.done():
            first.result()
    except BaseException:
        async with ended(first):
            pass
        await choices.aclose()
        raise
    return first


async def _first_step(choices: Choices) -> Numbered:
    """A model that waits or loads says so at once; a resident one accepts or refuses the prompt."""
    while isinstance((numbered := await anext(choices))[1], Routed):
        pass
    return numbered


@asynccontextmanager
async def ended(task: asyncio.Task[Any]) -> AsyncIterator[None]:
    """A generator cannot be closed while somebody waits for its next item: see to it that nobody does."""
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def going_on(opening: asyncio.Task[Numbered], choices: Choices) -> Choices:
    """All steps, those of :func:`first_word` included."""
    yield await opening
    async for numbered in choices:
        yield numbered
