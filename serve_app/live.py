"""A reply in the making: a growing list of events with any number of readers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable

from serve_app.domain.events import Event, Numbered, Rewind, Token
from serve_app.domain.stream_log import Transcript, rewind_for


class LiveStream:
    """Readers hold an index into one shared list, so a slow one costs nothing and delays nobody.

    Args:
        on_readers: called with the number of readers whenever it changes.
        told: what there is of the stream already.
    """

    def __init__(self, on_readers: Callable[[int], None] | None = None, told: Transcript | None = None) -> None:
        told = told or Transcript()
        self.events: list[Numbered] = list(told.events)
        self.length = len(told.text)
        self.closed = False
        self._starts = told.starts
        self._waiting: list[asyncio.Future[None]] = []
        self._readers = 0
        self._on_readers = on_readers or (lambda readers: None)

    def __repr__(self) -> str:
        return f"LiveStream(events={len(self.events)}, readers={self._readers}, finished={self.finished})"

    @property
    def finished(self) -> bool:
        return bool(self.events) and self.events[-1].event.terminal

    def append(self, event: Event) -> Numbered:
        """Add an event and wake the readers; after a terminal event nothing may follow."""
        numbered = Numbered(len(self.events) + 1, event)
        self.extend([numbered])
        return numbered

    def extend(self, events: Iterable[Numbered]) -> None:
        """Add events that have their numbers."""
        for numbered in events:
            assert not self.finished and not self.closed, f"{numbered} after the end of the stream"
            if isinstance(numbered.event, Token):
                self.length += len(numbered.event.text)
            self.events.append(numbered)
        self._wake()

    def close(self) -> None:
        """The stream goes on elsewhere: readers get what there is, and no more from here."""
        self.closed = True
        self._wake()

    def rewind_for(self, after: int) -> Rewind | None:
        """What a reader must be told first whose last event had the number ``after``."""
        return rewind_for(after, len(self.events), self.length, self._starts)

    async def wait_beyond(self, seq: int) -> None:
        """Return once there is an event after number ``seq``, or there will be none."""
        while len(self.events) <= seq and not self.closed:
            future = asyncio.get_running_loop().create_future()
            self._waiting.append(future)
            await future

    async def follow(self, after: int = 0) -> AsyncGenerator[Numbered, None]:
        """Yield the events after number ``after``, the ones to come included, until the terminal one."""
        self._readers += 1
        self._on_readers(self._readers)
        try:
            while not ((self.finished or self.closed) and after >= len(self.events)):
                await self.wait_beyond(after)
                for numbered in self.events[after:]:
                    yield numbered
                    after = numbered.seq
        finally:
            self._readers -= 1
            self._on_readers(self._readers)

    def _wake(self) -> None:
        waiting, self._waiting = self._waiting, []
        for future in waiting:
            if not future.done():
                future.set_result(None)
