"""Messages between a model replica and an ingress: what is ready travels together, and nothing waits for a timer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import suppress

from serve_app.domain.generation import Delta, Item


async def gather(items: AsyncIterator[Item], most_tokens: int) -> AsyncGenerator[tuple[Item, ...], None]:
    """Yield at once whatever ``items`` has ready; neighbouring deltas become one of at most ``most_tokens`` tokens.

    A message holds several items only when its reader was slower than their source. Errors of ``items`` come after
    everything that was ready before them; closing this closes ``items``.
    """
    ready: list[Item] = []
    changed = asyncio.Event()

    async def pump() -> None:
        try:
            async for item in items:
                ready.append(item)
                changed.set()
        finally:
            changed.set()

    source = asyncio.get_running_loop().create_task(pump())
    try:
        while ready or not source.done():
            await changed.wait()
            changed.clear()
            if ready:
                message = tuple(merged(ready, most_tokens))
                ready.clear()
                yield message
            if ready:
                changed.set()
        await source
    finally:
        source.cancel()
        with suppress(asyncio.CancelledError, Exception):
            await source


def merged(items: list[Item], most_tokens: int) -> list[Item]:
    """The items with neighbouring deltas joined while they hold at most ``most_tokens`` tokens together."""
    result: list[Item] = []
    for item in items:
        last = result[-1] if result else None
        if isinstance(item, Delta) and isinstance(last, Delta):
            ids = last.token_ids + item.token_ids
            if len(ids) <= most_tokens:
                result[-1] = Delta(last.text + item.text, ids)
                continue
        result.append(item)
    return result
