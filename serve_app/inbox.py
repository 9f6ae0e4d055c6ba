"""An ingress's end of the wire (:mod:`serve_app.frames`): every stream's items in order, once each."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator

from serve_app.domain.errors import ProviderUnavailable, error_from_dict
from serve_app.domain.generation import Item
from serve_app.frames import Broken, Frame, Piece, is_last

GAP_S = 5.0
"""How long the receiving side waits for a piece that is missing."""


class Mailbox:
    """The receiving side of one stream: its items in order, once each."""

    def __init__(self, gap_s: float = GAP_S) -> None:
        self._gap_s = gap_s
        self._next_seq = 0
        self._early: dict[int, Item | Broken] = {}
        self._items: deque[Item | Broken] = deque()
        self._failure: BaseException | None = None
        self._deadline: float | None = None
        self._changed: asyncio.Future[None] | None = None

    def deliver(self, piece: Piece) -> None:
        """Take a piece, whole or in part known already, in order or not."""
        for number, item in enumerate(piece.items, piece.seq):
            if number >= self._next_seq:
                self._early[number] = item
        while self._next_seq in self._early:
            self._items.append(self._early.pop(self._next_seq))
            self._next_seq += 1
        self._wake()

    def fail(self, error: BaseException) -> None:
        """The stream's own call failed: what has come is still read, then this is raised."""
        self._failure = error
        self._wake()

    def call_ended(self, now: float) -> None:
        """The stream's own call ended well: its last item is on the way, and must come soon."""
        self._deadline = now + self._gap_s
        self._wake()

    async def __aiter__(self) -> AsyncGenerator[Item, None]:
        while True:
            while self._items:
                item = self._items.popleft()
                if isinstance(item, Broken):
                    raise error_from_dict(item.error)
                yield item
                if is_last(item):
                    return
            if self._failure is not None:
                raise self._failure
            await self._wait()

    async def _wait(self) -> None:
        loop = asyncio.get_running_loop()
        self._changed = loop.create_future()
        if self._deadline is None:
            await self._changed
            return
        try:
            async with asyncio.timeout_at(self._deadline):
                await self._changed
        except TimeoutError:
            raise ProviderUnavailable("Part of the answer was lost on its way. Try again.") from None

    def _wake(self) -> None:
        if self._changed is not None and not self._changed.done():
            self._changed.set_result(None)


class Inbox:
    """The receiving side of an ingress: hands the pieces of every frame to their streams."""

    def __init__(self) -> None:
        self._mailboxes: dict[str, Mailbox] = {}

    def __repr__(self) -> str:
        return f"Inbox(streams={len(self._mailboxes)})"

    def open(self, name: str) -> Mailbox:
        mailbox = self._mailboxes[name] = Mailbox()
        return mailbox

    def close(self, name: str) -> None:
        self._mailboxes.pop(name, None)

    def deliver(self, frame: Frame) -> None:
        """Pieces of streams that nobody reads any more are dropped."""
        for piece in frame:
            mailbox = self._mailboxes.get(piece.stream)
            if mailbox is not None:
                mailbox.deliver(piece)
