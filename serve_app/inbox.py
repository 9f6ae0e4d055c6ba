"""An ingress's end of the wire (:mod:`serve_app.frames`): every stream's items in order, once each."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

from serve_app.domain.errors import ProviderUnavailable, error_from_dict
from serve_app.domain.generation import Delta, Item
from serve_app.frames import Broken, Frame, Piece, is_last, merged

MANY = 16
"""Streams in a frame from which on the receiving side lets them wait a little for the next frame."""
TURNS = 2
"""Turns of the event loop that they wait: microseconds when it is idle, and the longer the busier it is."""
HELD = 3
"""Frames that are read together at most; more make the gaps between tokens wider than they save."""
GAP_S = 5.0
"""How long the receiving side waits for a piece that is missing."""


class Mailbox:
    """The receiving side of one stream: its items in order, once each."""

    def __init__(self, gap_s: float = GAP_S, most_tokens: int = 32) -> None:
        self._gap_s = gap_s
        self._most_tokens = most_tokens
        self._next_seq = 0
        self._early: dict[int, Item | Broken] = {}
        self._items: list[Item | Broken] = []
        self._failure: BaseException | None = None
        self._deadline: float | None = None
        self._changed: asyncio.Future[None] | None = None
        self.speaks = False
        """Whether its first token has come."""

    def deliver(self, piece: Piece) -> None:
        """Take a piece, whole or in part known already, in order or not."""
        self.take(piece)
        self.wake()

    def take(self, piece: Piece) -> None:
        """Take a piece that may be read once somebody calls :meth:`wake`."""
        for number, item in enumerate(piece.items, piece.seq):
            if number >= self._next_seq:
                self._early[number] = item
        while self._next_seq in self._early:
            item = self._early.pop(self._next_seq)
            self._items.append(item)
            self.speaks = self.speaks or isinstance(item, Delta)
            self._next_seq += 1

    def fail(self, error: BaseException) -> None:
        """The stream's own call failed: what has come is still read, then this is raised."""
        self._failure = error
        self.wake()

    def call_ended(self, now: float) -> None:
        """The stream's own call ended well: its last item is on the way, and must come soon."""
        self._deadline = now + self._gap_s
        self.wake()

    async def __aiter__(self) -> AsyncGenerator[Item, None]:
        while True:
            items, self._items = self._items, []
            for item in merged(items, self._most_tokens) if len(items) > 1 else items:
                if isinstance(item, Broken):
                    raise error_from_dict(item.error)
                yield item
                if is_last(item):
                    return
            if self._items:
                continue
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

    def wake(self) -> None:
        if self._changed is not None and not self._changed.done():
            self._changed.set_result(None)


class Inbox:
    """The receiving side of an ingress: hands the pieces of every frame to their streams.

    A stream costs the more the more often it is woken. So when a frame wakes many, they wait for a few turns of the
    event loop, and what frames bring meanwhile comes with it: nothing when the loop is idle, several frames when it
    lags. A stream's first token is never held.
    """

    def __init__(self) -> None:
        self._mailboxes: dict[str, Mailbox] = {}
        self._waiting: set[Mailbox] = set()
        self._held = 0
        """Frames that wait."""
        self._turns = 0
        """Turns of the loop that they still wait."""
        self._turning = False

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
            if mailbox is None:
                continue
            if mailbox.speaks and len(frame) >= MANY:
                mailbox.take(piece)
                self._waiting.add(mailbox)
            else:
                mailbox.deliver(piece)
        if not self._waiting:
            return
        self._held += 1
        if self._held >= HELD:
            self._wake_all()
        else:
            self._turns = TURNS
            if not self._turning:
                self._turning = True
                asyncio.get_running_loop().call_soon(self._turn)

    def _turn(self) -> None:
        self._turns -= 1
        if self._turns > 0:
            asyncio.get_running_loop().call_soon(self._turn)
        else:
            self._turning = False
            self._wake_all()

    def _wake_all(self) -> None:
        waiting, self._waiting, self._held, self._turns = self._waiting, set(), 0, 0
        for mailbox in waiting:
            mailbox.wake()
