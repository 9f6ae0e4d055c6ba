"""A time limit for each of many waits, at the price of one timer: streams wait once per token.

``asyncio.timeout`` arms and disarms a timer for every wait. Here one timer looks, whenever it fires, at the deadline of
the wait under way, and goes back to sleep when that lies ahead.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from typing import TypeVar

Value = TypeVar("Value")


class Watchdog:
    """Limits waits that come one after the other. Close it when the last one is over."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._deadline = 0.0
        self._waiting: asyncio.Task[object] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0
        self._barked = False

    async def wait(self, awaitable: Awaitable[Value], limit_s: float) -> Value:
        """The result of ``awaitable``; raises ``TimeoutError`` when it takes longer than ``limit_s`` seconds."""
        self._deadline = self._loop.time() + limit_s
        if self._timer is None or self._timer_at > self._deadline:
            self._arm(self._deadline)
        self._waiting, self._barked = asyncio.current_task(), False
        try:
            return await awaitable
        except asyncio.CancelledError:
            # Ours, unless somebody else cancels the task too.
            if self._barked and self._waiting is not None and self._waiting.uncancel() == 0:
                raise TimeoutError from None
            raise
        finally:
            self._waiting = None

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _arm(self, at: float) -> None:
        self.close()
        self._timer_at = at
        self._timer = self._loop.call_at(at, self._look)

    def _look(self) -> None:
        self._timer = None
        if self._waiting is None:
            return
        if self._loop.time() < self._deadline:
            self._arm(self._deadline)
        else:
            self._barked = True
            self._waiting.cancel()


@asynccontextmanager
async def watching() -> AsyncIterator[Watchdog]:
    """A watchdog that is closed after the block."""
    dog = Watchdog()
    try:
        yield dog
    finally:
        dog.close()
