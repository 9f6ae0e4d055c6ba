"""Streams that another ingress writes, read from the log: one reading per tick for any number of readers."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from serve_app.domain.conversation import SessionStatus, StreamSession
from serve_app.domain.errors import RotundaError
from serve_app.domain.recorded import recorded
from serve_app.domain.stream_log import Transcript
from serve_app.live import LiveStream
from serve_app.logbook import Contact
from serve_app.store.store import Store


@dataclass
class Tail:
    """A stream that runs elsewhere, as far as its log has been read here."""

    told: Transcript
    stream: LiveStream


class Tails:
    """The tails of one ingress.

    Args:
        store: holds the logs.
        tick_s: seconds between readings.
        contact: learns how the store answers.
        rescue: called with the id of a session whose owner is gone.
    """

    def __init__(self, store: Store, tick_s: float, contact: Contact, rescue: Callable[[str], Awaitable[None]]) -> None:
        self._store = store
        self._tick_s = tick_s
        self._contact = contact
        self._rescue = rescue
        self._tails: dict[str, Tail] = {}

    def __repr__(self) -> str:
        return f"Tails({sorted(self._tails)})"

    async def open(self, session: StreamSession) -> LiveStream:
        """The stream of a session, to be followed at once: shared while it runs, whole when it has ended."""
        if session.id not in self._tails:
            told = Transcript()
            answer = (await self._store.read_log({session.id: 0})).get(session.id)
            if answer is not None:
                told.add(answer[1])
            if session.id not in self._tails and not told.finished and answer is not None and answer[0].active:
                self._tails[session.id] = self._tail(session.id, told)
            elif session.id not in self._tails:
                return LiveStream(told=told if told.finished else await self._summary(session))
        return self._tails[session.id].stream

    def leave(self, session_id: str) -> None:
        """Whoever reads the session's tail must look again where it is written."""
        tail = self._tails.pop(session_id, None)
        if tail is not None:
            tail.stream.close()

    async def run(self) -> None:
        """Read once per tick, for ever."""
        while True:
            await asyncio.sleep(self._tick_s)
            if self._tails:
                await self._read()

    async def _read(self) -> None:
        loop = asyncio.get_running_loop()
        began, tails = loop.time(), dict(self._tails)
        try:
            found = await self._store.read_log({id: tail.told.seq for id, tail in tails.items()})
            self._contact.took(loop.time() - began)
            for id, tail in tails.items():
                if self._tails.get(id) is not tail:
                    continue
                state, rows = found.get(id, (None, []))
                tail.stream.extend(tail.told.add(rows))
                if tail.stream.finished or state is None or not state.active:
                    self.leave(id)
                elif state.abandoned:
                    await self._rescue(id)
        except RotundaError as error:
            self._contact.lost(error)

    def _tail(self, session_id: str, told: Transcript) -> Tail:
        def forget_unread(readers: int) -> None:
            if not readers and self._tails.get(session_id) is tail:
                del self._tails[session_id]

        tail = Tail(told, LiveStream(forget_unread, told))
        return tail

    async def _summary(self, session: StreamSession) -> Transcript:
        """A session that has ended and has no log any more: opening, the whole text, the end."""
        if session.status is SessionStatus.ACTIVE:  # it ended after the caller looked
            session = await self._store.get_session(session.id)
        if session.status is SessionStatus.ACTIVE:
            return Transcript()
        return Transcript(recorded(session), starts=[(0, 0)], text=session.partial_response)
