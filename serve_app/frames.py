"""The wire between a model replica and an ingress: one message for all their streams, riding on one of the calls.

A message between two processes costs far more than its bytes, so what all streams of one ingress have ready leaves a
replica as one *frame*. Every request keeps a call of its own (Serve balances, drains, scales and cancels by it), but
only one of them, the *leader*, carries frames; the others stay silent. When the leader ends, the next one is
promoted.

Frames of two leaders may overtake each other, and those of a cancelled leader may be lost. So every item of a stream
has a number. The sending side keeps what it sent lately: after a leader that was cut off it sends that again, and a
call that never led ends with it. The receiving side puts the items in order and drops what it has already. What is
missing in spite of that makes a broken stream, and is said as such.

The first token leaves at once, and nothing ever waits for a timer. What waits is a stream that runs ahead of the wire,
and at a busy ingress that of many streams until the frames that lie there are read: it handles their items once.
"""

from __future__ import annotations

import asyncio
import pickle
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from typing import Any

from serve_app.domain.errors import Internal, ProviderUnavailable, RotundaError, error_from_dict
from serve_app.domain.generation import Delta, Finish, Item

TAIL_S = 5.0
"""For how long the sending side keeps what it sent; longer than anything lies in the pipes."""
TRANSIT_S = 1.0
"""How long a frame may be on its way between two processes that are well."""
AHEAD = 64
"""Items that one stream may have ready; a source that is faster than the wire waits until they have left. So no frame
holds more of one stream than its neighbours can wait for."""
FEW = 16
"""Pieces of one stream that one frame sends again, for the same reason."""
MANY = 16
"""Streams in a frame from which on the receiving side lets them wait a little for the next frame."""
TURNS = 2
"""Turns of the event loop that they wait: microseconds when it is idle, and the longer the busier it is."""
HELD = 3
"""Frames that are read together at most; more make the gaps between tokens wider than they save."""
GAP_S = 5.0
"""How long the receiving side waits for a piece that is missing."""


@dataclass(frozen=True, slots=True)
class Broken:
    """The error that ended a stream, as ``RotundaError.to_dict`` gives it."""

    error: dict[str, object]


@dataclass(frozen=True, slots=True)
class Piece:
    """What one stream had ready: its items with the number (from 0) of the first of them."""

    stream: str
    seq: int
    items: tuple[Item | Broken, ...]


Frame = tuple[Piece, ...]


def pack(frame: Frame) -> bytes:
    """The frame as bytes. A delta of text alone, nearly every item there is, becomes a bare pair: pickling a slotted
    dataclass costs some twenty times as much."""
    plain = [(piece.stream, piece.seq, [_bare(item) for item in piece.items]) for piece in frame]
    return pickle.dumps(plain, pickle.HIGHEST_PROTOCOL)


def unpack(data: bytes) -> Frame:
    """What :func:`pack` packed. Only for bytes from our own replicas: unpickling trusts them."""
    return tuple(
        Piece(stream, seq, tuple(Delta(*item) if type(item) is tuple else item for item in items))
        for stream, seq, items in pickle.loads(data)
    )


def _bare(item: Item | Broken) -> Any:
    if isinstance(item, Delta) and not (item.reasoning or item.tool_calls or item.logprobs):
        return (item.text, item.token_ids)
    return item


def is_last(item: Item | Broken) -> bool:
    return isinstance(item, Finish | Broken)


def merged(items: list[Item | Broken], most_tokens: int) -> list[Item | Broken]:
    """The items with neighbouring deltas joined while they hold at most ``most_tokens`` tokens together.

    A delta without ids comes from a server that tells none: it counts as one token, and would not when it was joined.
    """
    result: list[Item | Broken] = []
    for item in items:
        last = result[-1] if result else None
        if isinstance(item, Delta) and isinstance(last, Delta) and item.token_ids and last.token_ids:
            both = last + item
            if len(both.token_ids) <= most_tokens:
                result[-1] = both
                continue
        result.append(item)
    return result


@dataclass(eq=False)
class _Outgoing:
    """One stream on the sending side."""

    name: str
    ready: list[Item | Broken] = field(default_factory=list)
    sent: deque[tuple[float, Piece]] = field(default_factory=deque)
    """What left during the last ``TAIL_S`` seconds, and when."""
    again: list[Piece] = field(default_factory=list)
    """What must leave once more, exactly as it did: the numbers of its items are known to the other side."""
    next_seq: int = 0
    complete: bool = False
    """Whether the source has given its last item."""
    ended: bool = False
    """Whether that item has left in a frame."""
    turn: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when there is something to do: it was promoted, or it has ended."""
    room: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when what was ready has left."""

    def add(self, item: Item | Broken) -> None:
        self.ready.append(item)
        self.complete = self.complete or is_last(item)

    async def wait_for_room(self) -> None:
        self.room.clear()
        await self.room.wait()

    @property
    def has_more(self) -> bool:
        return bool(self.again or self.ready)

    def take(self, now: float, most_tokens: int) -> list[Piece]:
        """The pieces for the next frame; empty when nothing is ready."""
        pieces, self.again = self.again[:FEW], self.again[FEW:]
        if self.ready and not self.again:
            items = tuple(merged(self.ready, most_tokens) if len(self.ready) > 1 else self.ready)
            self.ready.clear()
            self.room.set()
            pieces.append(Piece(self.name, self.next_seq, items))
            self.next_seq += len(items)
        self.sent.extend((now, piece) for piece in pieces)
        while self.sent and now - self.sent[0][0] > TAIL_S:
            self.sent.popleft()
        if pieces and is_last(pieces[-1].items[-1]):
            self.ended = True
            self.turn.set()
        return pieces

    def repeat(self, since: float) -> None:
        """The frames that left after ``since`` may be lost: send their pieces again."""
        self.again = [piece for at, piece in self.sent if at >= since] + self.again
        self.sent = deque((at, piece) for at, piece in self.sent if at < since)


class Outbox:
    """The sending side: the streams of one ingress on one replica.

    Args:
        most_tokens: tokens that deltas of one stream may be joined to when several are ready.
        fault: what an exception that is no :class:`RotundaError` is logged and replaced by.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        most_tokens: int = 32,
        fault: Callable[[BaseException], RotundaError] = lambda _: Internal.masked(),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._most_tokens = most_tokens
        self._fault = fault
        self._clock = clock
        self._streams: dict[str, _Outgoing] = {}
        self._leader: _Outgoing | None = None
        self._changed = asyncio.Event()

    def __repr__(self) -> str:
        return f"Outbox(streams={sorted(self._streams)}, leader={self._leader and self._leader.name})"

    @property
    def empty(self) -> bool:
        return not self._streams

    async def carry(self, name: str, items: AsyncGenerator[Item, None]) -> AsyncGenerator[Frame, None]:
        """The body of one request's call: frames while it leads, silence while another does.

        Ends when the stream's last item has left, in whoever's frame. Closing it closes ``items``.
        """
        stream = self._streams[name] = _Outgoing(name)
        source = asyncio.get_running_loop().create_task(self._pump(stream, items))
        whole = led = False
        try:
            if self._leader is None:
                self._promote(stream)
            while not stream.ended:
                led = self._leader is stream
                if led:
                    frame = await self._next_frame()
                    if frame:
                        yield frame
                else:
                    await stream.turn.wait()
                    stream.turn.clear()
            if not led:
                # Its last frames went with another call, which may have been cut off since: these are its own.
                pieces = tuple(piece for _, piece in stream.sent)
                for first in range(0, len(pieces), FEW):
                    yield pieces[first : first + FEW]
            whole = True
        finally:
            del self._streams[name]
            if self._leader is stream:
                self._hand_over(lost=not whole)
            source.cancel()
            with suppress(asyncio.CancelledError):
                await source

    async def _pump(self, stream: _Outgoing, items: AsyncGenerator[Item, None]) -> None:
        try:
            async with aclosing(items):
                async for item in items:
                    stream.add(item)
                    self._changed.set()
                    if len(stream.ready) >= AHEAD:
                        await stream.wait_for_room()
            if not stream.complete:
                stream.add(Broken(Internal.masked().to_dict()))
        except RotundaError as error:
            stream.add(Broken(error.to_dict()))
        except Exception as error:
            stream.add(Broken(self._fault(error).to_dict()))
        self._changed.set()

    async def _next_frame(self) -> Frame:
        await self._changed.wait()
        self._changed.clear()
        now = self._clock()
        frame = tuple(piece for stream in self._streams.values() for piece in stream.take(now, self._most_tokens))
        if any(stream.has_more for stream in self._streams.values()):
            self._changed.set()
        return frame

    def _promote(self, stream: _Outgoing) -> None:
        self._leader = stream
        self._changed.set()
        stream.turn.set()

    def _hand_over(self, lost: bool) -> None:
        """Promote the next stream and send again what the leader may have lost.

        One that was cut off may have lost all that was in the pipes. One that ended well has lost only what somebody
        cut off while it was on its way.
        """
        self._leader = None
        living = [stream for stream in self._streams.values() if not stream.ended]
        since = self._clock() - (TAIL_S if lost else TRANSIT_S)
        for stream in living:
            stream.repeat(since)
        if living:
            self._promote(living[0])


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

    @property
    def begun(self) -> bool:
        """Whether anything has come."""
        return self._next_seq > 0

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
            self._items.append(self._early.pop(self._next_seq))
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
    lags. A stream's first piece is never held.
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
            if mailbox.begun and len(frame) >= MANY:
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
