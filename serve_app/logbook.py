"""The log of all streams of one ingress: one transaction per tick, behind the streams and never in front of them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Mapping

from serve_app.domain.conversation import TerminationReason
from serve_app.domain.errors import RotundaError
from serve_app.replies import LiveReply, SessionLimits
from serve_app.store.records import Pulse
from serve_app.store.store import Store

logger = logging.getLogger(__name__)

SLOW_S = 1.0
"""A store that takes longer is in trouble; then owners that did not renew are not dead."""


class Contact:
    """Since when the store has been answering promptly."""

    def __init__(self) -> None:
        self._since: float | None = None
        self._away = False

    def steady_s(self) -> float:
        """Seconds for which every call came back well and in time."""
        now = asyncio.get_running_loop().time()
        if self._since is None:
            self._since = now
        return now - self._since

    def lost(self, why: RotundaError) -> None:
        """A call failed. What it says is logged once, not as often as the call is tried again."""
        self._since = asyncio.get_running_loop().time()
        if not self._away:
            logger.warning("streams wait for the store, their clients do not: %s", why)
        self._away = True

    def took(self, seconds: float) -> None:
        """A call came back well after so many seconds."""
        if self._away:
            logger.warning("the store answers again")
        self._away = False
        if seconds > SLOW_S:
            self._since = asyncio.get_running_loop().time()


class Logbook:
    """Writes what the replies of one ingress have to log, renews their ownership, and hears who should stop.

    Args:
        store: where the log is kept.
        owner: this ingress.
        limits: the tick, and for how long a session is owned.
        replies: those that run, by their sessions' ids; the caller's, read at every tick.
        contact: learns how the store answers.
    """

    def __init__(
        self, store: Store, owner: str, limits: SessionLimits, replies: Mapping[str, LiveReply], contact: Contact
    ) -> None:
        self._store = store
        self._owner = owner
        self._limits = limits
        self._replies = replies
        self._contact = contact
        self._urgent = asyncio.Event()
        self._hurried: set[str] = set()
        self._turn = asyncio.Lock()
        self._renewed = float("-inf")

    def hurry(self, session_id: str) -> None:
        """Write what this stream has now: it has begun to speak."""
        self._hurried.add(session_id)
        self._urgent.set()

    async def run(self) -> None:
        """Write once per tick, for ever."""
        loop, tick_s = asyncio.get_running_loop(), self._limits.tick_s
        due = loop.time() + tick_s
        while True:
            try:
                async with asyncio.timeout_at(due):
                    await self._urgent.wait()
            except TimeoutError:
                pass
            self._urgent.clear()
            hurried, self._hurried = self._hurried, set()
            if loop.time() < due:
                await self.write(hurried)
                continue
            if self._replies:
                await self.write()
            due = max(due + tick_s, loop.time() + tick_s / 2)  # a store that is slow, or away, is let breathe

    async def settle(self, reply: LiveReply) -> None:
        """Return when no batch with events of this reply is on its way, nor will be: it writes the rest itself."""
        reply.leaving = True
        async with self._turn:
            pass

    async def write(self, only: Collection[str] | None = None) -> None:
        """One transaction: what all replies, or ``only`` these, have to log, and every so often their ownership."""
        loop = asyncio.get_running_loop()
        async with self._turn:
            replies = {id: reply for id, reply in self._replies.items() if only is None or id in only}
            if not replies:
                return
            batches = {id: rows for id, reply in replies.items() if not reply.leaving and (rows := reply.batch())}
            began = loop.time()
            renews = only is None and began - self._renewed >= self._limits.ownership_s / 5
            try:
                pulses = await self._store.write_log(
                    self._owner, list(replies), batches, self._limits.ownership_s if renews else None
                )
            except RotundaError as error:
                self._contact.lost(error)
                return
            self._contact.took(loop.time() - began)
            if renews:
                self._renewed = began
            for id in batches:
                replies[id].logged()
        for id, reply in replies.items():
            self._obey(reply, pulses.get(id))

    def _obey(self, reply: LiveReply, pulse: Pulse | None) -> None:
        """Stop what should stop: by somebody's wish, or because it is ours no more."""
        if reply.ending or reply.moved:
            return
        if pulse is None or pulse.epoch != reply.session.epoch:
            logger.warning("session %s is no longer ours: its generation stops", reply.session.id)
            reply.move()
        elif pulse.terminate is not None:
            reply.stop(TerminationReason(pulse.terminate))
