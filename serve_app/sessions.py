"""Durable replies: a conversation's context in, a recorded stream out.

Every reply of a conversation is a stream session. One ingress owns and generates it, in a task of its own: the client
may leave and come back, and whoever ends the stream (the model, a person, a time limit, a shutdown) does it in one
place.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Mapping
from contextlib import aclosing
from typing import Any

from serve_app.domain.catalog import Capability
from serve_app.domain.conversation import (
    SessionStatus,
    StoredImage,
    StoredMessage,
    StreamSession,
    TerminationReason,
)
from serve_app.domain.errors import Internal, MalformedRequest, QueueFull, RotundaError
from serve_app.domain.events import (
    Ended,
    Failed,
    ImagesProcessed,
    Loading,
    Queued,
    SessionOpened,
    Switched,
    Terminated,
)
from serve_app.domain.generation import (
    Accepted,
    Delta,
    GenerationRequest,
    Image,
    Message,
    Role,
)
from serve_app.domain.routing import Admission, Ask
from serve_app.gateway import Completed, Gateway, Routed
from serve_app.replies import ImageUrls, LiveReply, NewReply, SessionLimits
from serve_app.store.images import ImageFiles
from serve_app.store.records import NewSession, Progress
from serve_app.store.store import Store

logger = logging.getLogger(__name__)

FINISH_ATTEMPTS = 5
OPENING_S = 2.0
"""How long a resident model may take to accept the prompt before the stream opens without its word."""


class Sessions:
    """The stream sessions of one ingress.

    Args:
        store: where conversations and sessions are kept.
        gateway: generates.
        files: the images' files.
        urls: where a client finds an image.
        limits: bounds and intervals.
        owner: this ingress, unique among all of them.
    """

    def __init__(
        self, store: Store, gateway: Gateway, files: ImageFiles, urls: ImageUrls, limits: SessionLimits, owner: str
    ) -> None:
        self._store = store
        self._gateway = gateway
        self._files = files
        self._urls = urls
        self._limits = limits
        self._owner = owner
        self._live: dict[str, LiveReply] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._closing = False

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
        """
        if self._closing or len(self._live) >= self._limits.max_sessions:
            raise QueueFull(
                f"This server already runs {len(self._live)} replies. Try again soon.", details={"retryAfterS": 2}
            )
        trail = new.trace
        with trail.phase("store.read"):
            request = await self._request(new)
        ask = self._ask(new, request)
        admission = await self._gateway.admit(ask, trail)
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
        )
        images = [upload.row for upload in new.uploads]
        try:
            with trail.phase("store.write"):
                user_message, session = await self._store.begin_reply(opening, text=new.text, images=images)
        except RotundaError:
            await self._gateway.forget(ask, admission)
            raise
        reply = LiveReply(new, session, user_message, self._limits)
        self._live[session.id] = reply
        trail.keep(session.id, new.conversation.id)
        self._spawn(self._run(reply, ask, request, admission))
        return reply

    async def terminate(self, session_id: str, conversation_id: str, reason: TerminationReason) -> StreamSession:
        """End a session wherever it runs, and return it as it was recorded.

        A session that has already ended is returned as it is. One whose owner does not answer within a few seconds is
        returned still ACTIVE: the request stays recorded, and the sweep closes what nobody owns.

        Raises:
            NotFound: no such session. MalformedRequest: it belongs to another conversation.
        """
        session = await self._store.get_session(session_id)
        if session.conversation_id != conversation_id:
            raise MalformedRequest("The session belongs to another conversation.")
        if session.status is not SessionStatus.ACTIVE:
            return session
        reply = self.find(session_id)
        if reply is not None:
            reply.stop(reason)
            await reply.done.wait()
            return await self._store.get_session(session_id)
        await self._store.request_termination(session_id, reason.value)
        return await self._ended_elsewhere(session_id)

    async def _ended_elsewhere(self, session_id: str) -> StreamSession:
        """The session as its owner, another ingress, ended it; as it is when the owner takes too long."""
        deadline = asyncio.get_running_loop().time() + 2 * self._limits.ownership_s
        while True:
            session = await self._store.get_session(session_id)
            if session.status is not SessionStatus.ACTIVE or asyncio.get_running_loop().time() > deadline:
                return session
            await asyncio.sleep(self._limits.tick_s)

    async def terminate_all(self, conversation_id: str, reason: TerminationReason) -> None:
        """End whatever runs for a conversation."""
        active = await self._store.list_sessions(conversation_id=conversation_id, status=SessionStatus.ACTIVE)
        for session in active:
            await self.terminate(session.id, conversation_id, reason)

    async def tick(self) -> None:
        """Keep the sessions: hear of terminations each tick, renew ownership, sweep what nobody owns."""
        loop = asyncio.get_running_loop()
        renewed = swept = loop.time()
        while True:
            await asyncio.sleep(self._limits.tick_s)
            try:
                await self._obey_terminations()
                if loop.time() - renewed >= self._limits.ownership_s / 5:
                    renewed = loop.time()
                    await self._keep_ownership()
                if loop.time() - swept >= self._limits.sweep_s:
                    swept = loop.time()
                    for session in await self._store.close_abandoned():
                        logger.warning("closed session %s, whose owner %s is gone", session.id, session.owner)
            except RotundaError as error:
                logger.warning("the session store did not answer: %s", error)

    async def close(self) -> None:
        """End every running reply as terminated by the shutdown, with its partial text saved."""
        self._closing = True
        for reply in list(self._live.values()):
            reply.stop(TerminationReason.SERVER_SHUTDOWN)
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=10)

    async def _obey_terminations(self) -> None:
        if not self._live:
            return
        for session_id, reason in (await self._store.termination_requests(self._owner)).items():
            reply = self.find(session_id)
            if reply is not None:
                reply.stop(TerminationReason(reason))

    async def _keep_ownership(self) -> None:
        """Renew, record how far the replies have come, and stop those that somebody else has closed or adopted."""
        owned = list(self._live)
        kept = await self._store.renew_ownership(self._owner, owned, self._limits.ownership_s)
        replies = [self._live[session_id] for session_id in kept if session_id in self._live]
        await self._store.save_progress(
            [
                Progress(reply.session.id, reply.text, reply.token_count, reply.model, reply.provider)
                for reply in replies
            ]
        )
        for session_id in set(owned) - kept:
            reply = self.find(session_id)
            if reply is not None and not reply.ending:
                logger.warning("session %s is no longer ours: its generation stops", session_id)
                reply.stop(TerminationReason.ERROR)

    async def _request(self, new: NewReply) -> GenerationRequest:
        """The model's view of the conversation: system prompt, history with its images, the new message."""
        system = new.system_prompt or new.conversation.system_prompt
        history = await self._store.last_messages(new.conversation.id, self._limits.max_history)
        messages = [Message.of(Role.SYSTEM, system)] if system else []
        messages += [await self._recall(stored) for stored in history if stored.text or stored.images]
        messages.append(Message.of(Role.USER, new.text, tuple(upload.image for upload in new.uploads)))
        return GenerationRequest(
            request_id=secrets.token_hex(16),
            model=new.model or "",
            messages=tuple(messages),
            options=new.options,
            priority=new.priority,
            caller=new.caller,
            context_policy=new.context_policy,
            trace=new.trace.carrier(),
        )

    async def _recall(self, stored: StoredMessage) -> Message:
        role = Role.USER if stored.sender == "user" else Role.ASSISTANT
        images = []
        for row in stored.images:
            data = await self._files.read(row.file_path)
            images.append(Image(row.mime_type, data))
        return Message.of(role, stored.text, tuple(images))

    @staticmethod
    def _ask(new: NewReply, request: GenerationRequest) -> Ask:
        needs = {Capability.CHAT} | ({Capability.VISION} if new.uploads else set())
        return Ask(
            ticket=request.request_id,
            model=new.model or new.conversation.llm_model or None,
            needs=frozenset(needs),
            fallbacks=new.fallbacks,
            priority=new.priority,
            caller=new.caller,
        )

    def _spawn(self, coroutine: Any) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run(self, reply: LiveReply, ask: Ask, request: GenerationRequest, admission: Admission) -> None:
        """Generate in a task that can be cancelled, and record the end whatever it is."""
        loop = asyncio.get_running_loop()
        generation = loop.create_task(self._generate(reply, ask, request, admission))
        reply.run(generation)
        timeout = loop.call_later(self._limits.session_timeout_s, reply.stop, TerminationReason.TIMEOUT)
        opening = loop.call_later(OPENING_S, self._open, reply, None)
        completed: Completed | None = None
        failure: RotundaError | None = None
        try:
            completed = await generation
        except asyncio.CancelledError:
            reply.stop_reason = reply.stop_reason or TerminationReason.SERVER_SHUTDOWN
        except RotundaError as error:
            failure = error
        except Exception:
            logger.exception("session %s failed (trace %s)", reply.session.id, reply.new.trace.trace_id)
            failure = Internal.masked()
        finally:
            timeout.cancel()
            opening.cancel()
        await self._finish(reply, completed, failure)

    async def _generate(
        self, reply: LiveReply, ask: Ask, request: GenerationRequest, admission: Admission
    ) -> Completed | None:
        completed: Completed | None = None
        async with aclosing(self._gateway.reply(ask, request, admission, reply.new.trace)) as steps:
            async for step in steps:
                match step:
                    case Routed(candidate):
                        reply.model, reply.provider = candidate.name, candidate.entry.provider
                    case Accepted():
                        self._open(reply, step.dropped)
                    case Delta():
                        self._open(reply, None)
                        reply.add(step)
                    case Queued() | Loading() | Switched():
                        self._open(reply, None)
                        reply.stream.append(step)
                    case Completed():
                        completed = step
        return completed

    def _open(self, reply: LiveReply, dropped: int | None) -> None:
        """The first event of the stream, once."""
        if reply.stream.events:
            return
        new = reply.new
        reply.stream.append(
            SessionOpened(
                reply.session.id, new.conversation.id, reply.model, reply.provider, new.trace.trace_id, dropped
            )
        )
        if new.uploads:
            images = tuple(self._image_json(image, new.conversation.is_private) for image in reply.user_message.images)
            reply.stream.append(ImagesProcessed(images, new.image_warnings))

    def _image_json(self, image: StoredImage, private: bool) -> Mapping[str, Any]:
        return {
            "id": image.id,
            "filename": image.filename,
            "url": self._urls(image, private),
            "size": image.file_size,
            "mimeType": image.mime_type,
        }

    async def _finish(self, reply: LiveReply, completed: Completed | None, failure: RotundaError | None) -> None:
        """Record the end, then tell it; a store that does not answer is asked again before the client hears of it."""
        with reply.new.trace.phase("store.write"):
            try:
                row = await self._record(reply, completed, failure)
            except RotundaError as error:
                logger.error("session %s could not be recorded: %s", reply.session.id, error)
                failure, row = error, None
            reply.failure = failure
            if row is not None and row.message_id is not None:
                reply.message = await self._saved(row.message_id)
        if failure is None:
            self._open(reply, None)
        reply.stream.append(self._terminal(reply, completed, failure, row))
        reply.new.trace.finish(failure, reply.stop_reason)
        reply.leave_alone()
        reply.done.set()
        self._live.pop(reply.session.id, None)

    async def _saved(self, message_id: str) -> StoredMessage | None:
        try:
            return await self._store.get_message(message_id)
        except RotundaError:
            return None

    async def _record(
        self, reply: LiveReply, completed: Completed | None, failure: RotundaError | None
    ) -> StreamSession:
        status = SessionStatus.COMPLETED
        if failure is not None:
            status = SessionStatus.ERROR
        elif reply.stop_reason is not None:
            status = SessionStatus.TERMINATED
        attempt = 0
        while True:
            try:
                return await self._store.finish_session(
                    reply.session.id,
                    status=status,
                    text=reply.text,
                    token_count=reply.token_count,
                    model=reply.model,
                    provider=reply.provider,
                    usage=completed.finish.usage if completed else None,
                    timing=completed.timing if completed else None,
                    finish_reason=completed.finish.reason.value if completed else None,
                    termination_reason=reply.stop_reason.value if reply.stop_reason and not failure else None,
                    error_code=failure.code if failure else None,
                    error_message=failure.message if failure else None,
                )
            except RotundaError as error:
                attempt += 1
                if attempt == FINISH_ATTEMPTS or not error.retryable:
                    raise
                await asyncio.sleep(0.1 * 2**attempt)

    @staticmethod
    def _terminal(
        reply: LiveReply, completed: Completed | None, failure: RotundaError | None, row: StreamSession | None
    ) -> Ended | Terminated | Failed:
        if failure is not None:
            trace_id = reply.new.trace.trace_id
            return Failed(failure.code, failure.message, failure.provider, failure.retryable, trace_id, failure.details)
        if completed is None or reply.stop_reason is not None:
            reason = (reply.stop_reason or TerminationReason.ERROR).value
            return Terminated(reply.session.id, reply.text, reply.token_count, reason)
        message_id = row.message_id if row else None
        return Ended(message_id, completed.finish.usage, completed.timing, completed.finish.reason)
