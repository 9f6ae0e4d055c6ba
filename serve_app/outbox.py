"""A replica's end of the wire (:mod:`serve_app.frames`): which call carries what is ready, and what is sent again.

The first token leaves at once. What waits is a stream that runs ahead of the wire, or of what any model makes.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, suppress
from dataclasses import dataclass, field

from serve_app.domain.errors import Internal, RotundaError
from serve_app.domain.generation import Item
from serve_app.frames import Broken, Frame, Piece, is_last, merged

TAIL_S = 5.0
"""For how long the sending side keeps what it sent; longer than anything lies in the pipes."""
TRANSIT_S = 1.0
"""How long a frame may be on its way between two processes that are well."""
AHEAD = 64
"""Items that one stream may have ready; a source that is faster than the wire waits until they have left. So no frame
holds more of one stream than its neighbours can wait for."""
MOST_PER_S = 1280.0
"""Items per second that a stream with neighbours gives, after the first ``FREE_S`` seconds' worth of them: a source
that makes more would take the wire and the processors from them."""
FREE_S = 0.5
STRIDE = 16
"""Items between two looks at the clock."""
FEW = 16
"""Pieces of one stream that one frame sends again, for the same reason."""


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
        due, count = -math.inf, 0
        try:
            async with aclosing(items):
                async for item in items:
                    stream.add(item)
                    self._changed.set()
                    count += 1
                    if len(stream.ready) >= AHEAD:
                        await stream.wait_for_room()
                    if count % STRIDE == 0:
                        now = self._clock()
                        due = max(due, now - FREE_S) + STRIDE / MOST_PER_S
                        if self._alone(stream):
                            due = min(due, now)  # neither a debt nor, once another comes, a burst
                        elif due > now:
                            await asyncio.sleep(due - now)
            if not stream.complete:
                stream.add(Broken(Internal.masked().to_dict()))
        except RotundaError as error:
            stream.add(Broken(error.to_dict()))
        except Exception as error:
            stream.add(Broken(self._fault(error).to_dict()))
        self._changed.set()

    def _alone(self, stream: _Outgoing) -> bool:
        return all(other is stream or other.ended for other in self._streams.values())

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
