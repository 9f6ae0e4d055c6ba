"""Durable replies: a conversation's context in, a recorded stream out.

Every reply of a conversation is a stream session. One ingress owns and generates it, in a task of its own: the client
may leave and come back, here or elsewhere, and whoever ends the stream (the model, a person, a time limit, a shutdown)
does it in one place. When the owner dies, another ingress adopts the session and goes on from its log.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from typing import Any

from serve_app.author import Author
from serve_app.domain.conversation import (
    SessionStatus,
    StreamSession,
    TerminationReason,
)
from serve_app.domain.errors import MalformedRequest, NotFound, QueueFull, RotundaError
from serve_app.domain.events import Failed, Numbered
from serve_app.domain.generation import GenerationRequest
from serve_app.domain.prompt_length import least_tokens
from serve_app.domain.stream_log import Transcript
from serve_app.domain.wanted import Wanted
from serve_app.gateway import Gateway
from serve_app.history import History
from serve_app.logbook import Contact, Logbook
from serve_app.replies import ImageUrls, LiveReply, NewReply, SessionLimits
from serve_app.store.images import ImageFiles
from serve_app.store.ownership import Abandoned
from serve_app.store.records import Adopted, AlreadyBegun, NewSession, utc_now
from serve_app.store.store import Store
from serve_app.tails import Tails
from serve_app.telemetry.tracing import Tracing

logger = logging.getLogger(__name__)

PRUNE_EVERY_S = 60.0
TURN_S = 1.0
"""An adoption that had to wait longer for its turn to write is put off: see Store.adopt_session."""


@dataclass(frozen=True, slots=True)
class Ending:
    """A session that somebody wanted to end. ``ran``: whether it had not ended already."""

    session: StreamSession
    ran: bool

    @property
    def stopped(self) -> bool:
        """Whether it was this that ended it."""
        return self.ran and self.session.status is SessionStatus.TERMINATED


class Sessions:
    """The stream sessions of one ingress.

    Args:
        store: where conversations and sessions are kept.
        gateway: generates.
        files: the images' files.
        urls: where a client finds an image.
        limits: bounds and intervals.
        owner: this ingress, unique among all of them.
        tracing: makes the spans of adopted replies, in the traces that they began in.
    """

    def __init__(
        self,
        store: Store,
        gateway: Gateway,
        files: ImageFiles,
        urls: ImageUrls,
        limits: SessionLimits,
        owner: str,
        tracing: Tracing | None = None,
    ) -> None:
        self._store = store
        self._gateway = gateway
        self._history = History(store, files, limits.max_history)
        self._limits = limits
        self._owner = owner
        self._tracing = tracing or Tracing.off()
        self._live: dict[str, LiveReply] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._closing = False
        self._contact = Contact()
        self._logbook = Logbook(store, owner, limits, self._live, self._contact)
        self._tails = Tails(store, limits.tick_s, self._contact, self.rescue)
        self._author = Author(store, gateway, urls, limits, self._logbook, self._contact)

    def __repr__(self) -> str:
        return f"Sessions(owner={self._owner!r}, live={sorted(self._live)})"

    @property
    def running(self) -> int:
        """How many this ingress generates right now."""
        return len(self._live)

    def find(self, session_id: str) -> LiveReply | None:
        """The session, when this ingress generates it right now."""
        return self._live.get(session_id)

    async def start(self, new: NewReply) -> LiveReply:
        """Store the message, open a session and begin to generate.

        Raises:
            RotundaError: the request cannot be served; nothing was stored.
            AlreadyBegun: it is served already, under the same idempotency key; nothing was stored.
        """
        self._check_room()
        wanted = new.wanted()
        with new.trace.phase("store.read"):
            request = await self._history.request(new, wanted)
        ask = replace(wanted.ask(request.request_id), least_tokens=least_tokens(request))
        admission = await self._gateway.admit(ask, new.trace)
        first = admission.route.first
        opening = NewSession(
            id=request.request_id,
            conversation_id=new.conversation.id,
            model=first.name,
            provider=first.entry.provider,
            owner=self._owner,
            ttl_s=self._limits.ownership_s,
            timeout_ms=int(self._limits.session_timeout_s * 1000),
            trace_id=new.trace.trace_id,
            wanted=wanted,
            idempotency_key=new.idempotency_key,
            fingerprint=new.fingerprint,
        )
        images = [upload.row for upload in new.uploads]
        try:
            with new.trace.phase("store.write"):
                question, session = await self._store.begin_reply(
                    opening, text=new.text, images=images, conversation=new.fresh
                )
        except (RotundaError, AlreadyBegun):
            await self._gateway.forget(ask, admission)
            raise
        warnings = new.image_warnings
        reply = LiveReply(new.conversation, session, question, wanted, new.trace, self._limits, warnings=warnings)

        new.trace.keep(session.id, new.conversation.id)

        async def known() -> GenerationRequest:
            return request

        self._take(reply, self._author.write(reply, known, admission, self._limits.session_timeout_s))
        return reply

    async def follow(self, session: StreamSession, after: int = 0) -> AsyncGenerator[Numbered, None]:
        """The events of a stream after number ``after``, wherever it is written, until the terminal one.

        A reader who has seen what was lost with an owner is told to go back first (:class:`Rewind`), and again when
        that happens while it reads.
        """
        while True:
            try:
                stream = reply.stream if (reply := self.find(session.id)) else await self._tails.open(session)
            except RotundaError as error:
                yield Numbered(after + 1, _unreadable(session, error))
                return
            rewind = stream.rewind_for(after)
            if rewind is not None:
                yield Numbered(rewind.seq, rewind)
                after = rewind.seq
            async with aclosing(stream.follow(after)) as events:
                async for numbered in events:
                    yield numbered
                    after = numbered.seq
            if stream.finished:
                return
            await asyncio.sleep(self._limits.tick_s)
            try:
                session = await self._store.get_session(session.id)
            except NotFound as error:
                yield Numbered(after + 1, _unreadable(session, error))
                return
            except RotundaError as error:
                logger.warning("session %s cannot be looked up now: %s", session.id, error)

    async def terminate(self, session_id: str, conversation_id: str, reason: TerminationReason) -> Ending:
        """End a session wherever it runs, and return it as it was recorded.

        A session that has already ended is returned as it is. One whose owner does not answer within a few seconds is
        returned still ACTIVE: the request stays recorded, and whoever adopts it obeys it.

        Raises:
            NotFound: no such session. MalformedRequest: it belongs to another conversation.
        """
        reply = self.find(session_id)
        session = reply.session if reply else await self._store.get_session(session_id, log=False)
        if session.conversation_id != conversation_id:
            raise MalformedRequest("The session belongs to another conversation.")
        if reply is not None:  # stopped before anything is looked up: every moment costs a token
            reply.stop(reason)
            await reply.done.wait()
            session = await self._store.get_session(session_id)
        if session.status is not SessionStatus.ACTIVE:
            return Ending(session, ran=reply is not None)
        await self._store.request_termination(session_id, reason.value)
        return Ending(await self._ended_elsewhere(session_id), ran=True)

    async def conclude(self, reply: LiveReply) -> None:
        """Return when the reply has ended; it then has its message, and tells its end even if another wrote it."""
        await reply.done.wait()
        if reply.moved:
            reply.ended_as(await self._store.get_session(reply.session.id))
        if reply.message_id is not None:
            reply.message = await self._store.get_message(reply.message_id)

    async def _ended_elsewhere(self, session_id: str) -> StreamSession:
        """The session as its owner, another ingress, ended it; as it is when the owner takes too long."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + 2 * self._limits.ownership_s
        while True:
            ((state, _),) = (await self._store.read_log({session_id: 2**31 - 1})).values() or [(None, [])]
            if state is None or not state.active or loop.time() > deadline:
                return await self._store.get_session(session_id)
            if state.abandoned:  # though its owner may live, and only could not renew: it should stop anyway
                await self._store.close_abandoned([session_id])
            else:
                await asyncio.sleep(self._limits.tick_s)

    async def terminate_all(self, conversation_id: str, reason: TerminationReason) -> None:
        """End whatever runs for a conversation."""
        active = await self._store.list_sessions(conversation_id=conversation_id, status=SessionStatus.ACTIVE)
        for session in active:
            await self.terminate(session.id, conversation_id, reason)

    async def tick(self) -> None:
        """Keep the sessions, for ever: write the logs, read those of others, see to what nobody owns."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._logbook.run())
            group.create_task(self._tails.run())
            group.create_task(self._sweep())
            group.create_task(self._prune())

    async def rescue(self, session_id: str) -> None:
        """Go on with a session whose owner is gone; end it when nobody may. With no room for it here, another will.

        Not while the store itself was away a moment ago: then its owner may live, and only could not renew.
        """
        if self._closing or self._contact.steady_s() < self._limits.ownership_s or session_id in self._live:
            return
        if len(self._live) < self._limits.max_sessions:
            adopted = await self._store.adopt_session(session_id, self._owner, self._limits.ownership_s, TURN_S)
            if adopted is not None:
                await self._adopt(adopted)
                return
        for session in await self._store.close_abandoned([session_id], hopeless=True):
            logger.warning("closed session %s, whose owner %s is gone", session.id, session.owner)

    async def close(self) -> None:
        """End every running reply as terminated by the shutdown, with its partial text saved."""
        await self._leave(lambda reply: reply.stop(TerminationReason.SERVER_SHUTDOWN))

    async def hand_over(self) -> None:
        """Give every running reply to the ingress that will adopt it; without one they count as terminated."""
        replies = list(self._live.values())
        await self._leave(lambda reply: reply.move())
        for reply in replies:
            if reply.moved:
                await self._release(reply)

    async def _leave(self, part_with: Callable[[LiveReply], None]) -> None:
        self._closing = True
        for reply in list(self._live.values()):
            part_with(reply)
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=10)

    async def _release(self, reply: LiveReply) -> None:
        try:
            await self._store.release_session(reply.session.id, reply.session.epoch, reply.rest())
        except RotundaError as error:
            logger.warning("session %s could not be handed over: %s", reply.session.id, error)

    def _check_room(self) -> None:
        if self._closing or len(self._live) >= self._limits.max_sessions:
            raise QueueFull(
                f"This server already runs {len(self._live)} replies. Try again soon.", details={"retryAfterS": 2}
            )

    async def _adopt(self, adopted: Adopted) -> None:
        """Go on with a reply from its log."""
        session, told = adopted.session, Transcript()
        told.add(adopted.rows)
        told.adopted(session.epoch)
        wanted = session.wanted or Wanted()
        conversation = await self._store.get_conversation(session.conversation_id)
        question = await self._store.get_message(session.question_id or "")
        trace = self._tracing.going_on("adopt", wanted.trace)
        trace.follows(session.trace_id, session.id)
        trace.keep(session.id, conversation.id)
        trace.end()  # as soon as the reply has
        reply = LiveReply(conversation, session, question, wanted, trace, self._limits, told=told)
        logger.warning(
            "session %s is adopted after event %d, as its owner number %d", session.id, told.seq, session.epoch
        )

        async def again() -> GenerationRequest:
            return await self._history.again(reply, told)

        age_s = (utc_now() - session.started_at).total_seconds()
        self._take(reply, self._author.write(reply, again, None, self._limits.session_timeout_s - age_s))
        self._tails.leave(session.id)

    def _take(self, reply: LiveReply, life: Coroutine[Any, Any, None]) -> None:
        """Let the reply live, in a task of its own."""
        reply.hurry = partial(self._logbook.hurry, reply.session.id)
        self._live[reply.session.id] = reply
        task = asyncio.get_running_loop().create_task(life)
        self._tasks.add(task)

        def ended(task: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            self._live.pop(reply.session.id, None)

        task.add_done_callback(ended)

    async def _sweep(self) -> None:
        """See to abandoned sessions that nobody follows. Each is looked at twice: its owner may be about to renew."""
        seen: set[str] = set()
        while True:
            await asyncio.sleep(self._limits.sweep_s if not seen else 2 * self._limits.ownership_s / 5)
            try:
                abandoned = await self._store.abandoned_sessions()
                for one in abandoned:
                    if one.session.id in seen:
                        await self._see_to(one)
            except RotundaError as error:
                self._contact.lost(error)
                continue
            seen = set() if seen else {one.session.id for one in abandoned}

    async def _see_to(self, one: Abandoned) -> None:
        if one.for_s < self._limits.detach_grace_s:
            await self.rescue(one.session.id)
        elif self._contact.steady_s() >= self._limits.ownership_s:
            for session in await self._store.close_abandoned([one.session.id]):
                logger.warning("closed session %s, whose owner %s is gone", session.id, session.owner)

    async def _prune(self) -> None:
        """Delete logs that nobody will follow any more."""
        while True:
            await asyncio.sleep(PRUNE_EVERY_S)
            try:
                while await self._store.prune_log(utc_now() - timedelta(seconds=self._limits.log_retention_s)):
                    pass
            except RotundaError as error:
                logger.warning("the logs of ended streams stay for now: %s", error)


def _unreadable(session: StreamSession, error: RotundaError) -> Failed:
    return Failed(error.code, error.message, None, error.retryable, session.trace_id or "", error.details)
