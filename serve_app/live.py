"""A reply in the making: an append-only list of events with any number of readers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable

from serve_app.domain.events import Event, Numbered


class LiveStream:
    """Readers hold an index into one shared list, so a slow one costs nothing and delays nobody.

    Args:
        on_readers: called with the number of readers whenever it changes.
    """

    def __init__(self, on_readers: Callable[[int], None] | None = None) -> None:
        self.events: list[Numbered] = []
        self._waiting: list[asyncio.Future[None]] = []
        self._readers = 0
        self._on_readers = on_readers or (lambda readers: None)

    def __repr__(self) -> str:
        return f"LiveStream(events={len(self.events)}, readers={self._readers}, finished={self.finished})"

    @property
    def finished(self) -> bool:
        return bool(self.events) and self.events[-1].event.terminal

    def append(self, event: Event) -> None:
        """Add an event and wake the readers; after a terminal event nothing may follow."""
        assert not self.finished, f"{event} after the end of the stream"
        self.events.append(Numbered(len(self.events) + 1, event))
        waiting, self._waiting = self._waiting, []
        for future in waiting:
            if not future.done():
                future.set_result(None)

    async def wait_beyond(self, seq: int) -> None:
        """Return once there is an event after number ``seq``."""
        while len(self.events) <= seq:
            future = asyncio.get_running_loop().create_future()
            self._waiting.append(future)
            await future

    async def follow(self, after: int = 0) -> AsyncGenerator[Numbered, None]:
        """Yield the events after number ``after``, the ones to come included, until the terminal one."""
        self._readers += 1
        self._on_readers(self._readers)
        try:
            while not (self.finished and after >= len(self.events)):
                await self.wait_beyond(after)
                for numbered in self.events[after:]:
                    yield numbered
                    after = numbered.seq
        finally:
            self._readers -= 1
            self._on_readers(self._readers)
