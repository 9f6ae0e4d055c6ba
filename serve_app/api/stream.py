"""Replies as server-sent events: start one, come back to one, end one."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack, aclosing
from datetime import UTC, datetime

from fastapi import APIRouter, Request, Response
from starlette.responses import JSONResponse

from serve_app.api import idempotency
from serve_app.api.access import ANONYMOUS
from serve_app.api.body import StreamMessage, TerminateStream, json_body, stream_message
from serve_app.api.context import address_of, caller_of, token_of, trace_of
from serve_app.api.images import RawImage, Received
from serve_app.api.services import Services
from serve_app.api.sse import EventStream, encode
from serve_app.api.validation import read
from serve_app.domain.conversation import Conversation, SessionStatus, StreamSession, TerminationReason
from serve_app.domain.errors import (
    DeadlineExceeded,
    InvalidInput,
    MalformedRequest,
    RotundaError,
)
from serve_app.domain.events import Numbered
from serve_app.replies import LiveReply, NewReply
from serve_app.sessions import Ending
from serve_app.store.records import AlreadyBegun, NewConversation, new_id
from serve_app.telemetry.tracing import Trail

TITLE_LENGTH = 60
IDEMPOTENCY_KEY = "Idempotency-Key"


class Streams:
    """The three operations on streams, over one ingress's services."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._heartbeat_s = services.settings.heartbeat_ms / 1000

    async def begin(self, request: Request) -> Response:
        """``POST /api/stream-message``: what can be refused is refused before the stream opens."""
        trace = trace_of(request.scope)
        with trace.reading():
            body, images = await stream_message(request)
            longest = self._services.settings.max_message_chars
            if len(body.message) > longest:
                raise InvalidInput(f"The message has {len(body.message):,} characters; {longest:,} is the most.")
            options = body.options.to_options()
            key, print_ = _idempotency(request, body, images)
            known = None if key is None else await self._services.store.session_by_key(key)
            existing = None if known is not None else await self._existing(body, request)
        if known is not None:
            return await self._join(known, print_, body, request)

        def wanted(conversation: Conversation, fresh: NewConversation | None, received: Received) -> NewReply:
            return NewReply(
                conversation=conversation,
                fresh=fresh,
                text=body.message,
                model=body.model,
                system_prompt=body.system_prompt,
                uploads=received.uploads,
                image_warnings=received.warnings,
                options=options,
                priority=body.order,
                fallbacks=tuple(body.fallback_models),
                context_policy=body.context_policy,
                on_disconnect=body.on_disconnect,
                caller=caller_of(request) or ANONYMOUS,
                trace=trace,
                idempotency_key=key,
                fingerprint=print_,
            )

        try:
            async with AsyncExitStack() as block:
                received = Received()
                if images:
                    with trace.phase("images.read"):
                        received = await block.enter_async_context(self._services.intake.receive(images))
                if existing is not None:
                    new = wanted(existing, None, received)
                else:
                    fresh = await self._fresh(body)
                    new = wanted(fresh.empty(), fresh, received)
                reply = await self._begun(new)
        except AlreadyBegun as begun:
            return await self._join(await self._services.store.get_session(begun.session_id), print_, body, request)
        return self._following(reply.session, 0)

    async def _begun(self, new: NewReply) -> LiveReply:
        """The reply, once its stream has begun; a fresh conversation does not outlive a reply that cannot begin."""
        reply = await self._services.sessions.start(new)
        try:
            await reply.opened()
        except RotundaError:
            if new.fresh is not None:
                await self._discard(new.conversation)
            raise
        return reply

    async def _join(self, known: StreamSession, fingerprint: str, body: StreamMessage, request: Request) -> Response:
        """The answer to a request that was made before: the stream that it began."""
        await self._services.access.conversation(
            known.conversation_id, password=body.password, token=token_of(request), address=address_of(request)
        )
        return self._following(idempotency.the_same(known, fingerprint, IDEMPOTENCY_KEY), 0)

    async def follow(self, session_id: str, request: Request) -> Response:
        """``GET /api/stream-message/{sessionId}``: replay what was sent after an event, and follow."""
        after = _position(request)
        services = self._services
        trace = trace_of(request.scope)
        with trace.phase("store.read"):
            session = await services.store.get_session(session_id)
            await services.access.conversation(
                session.conversation_id, token=token_of(request), address=address_of(request)
            )
        trace.follows(session.trace_id, session.id)
        chunks = _encoded(services.sessions.follow(session, after))
        return EventStream(_followed(trace, chunks), self._heartbeat_s)

    def _following(self, session: StreamSession, after: int) -> Response:
        return EventStream(_encoded(self._services.sessions.follow(session, after)), self._heartbeat_s)

    async def terminate(self, request: Request) -> Response:
        """``POST /api/terminate-stream``: end a stream wherever it runs; the partial reply is kept."""
        body = await _terminate_body(request)
        reason = _reason(body.reason)
        services = self._services
        await services.access.conversation(
            body.conversation_id, password=body.password, token=token_of(request), address=address_of(request)
        )
        ending = await services.sessions.terminate(body.session_id, body.conversation_id, reason)
        after = ending.session
        if after.status is SessionStatus.ACTIVE:
            raise DeadlineExceeded(
                "The server that writes this reply has not stopped yet. It has been told; ask again in a few seconds.",
                after.provider,
                True,
                {"sessionId": after.id},
            )
        return JSONResponse(_termination(ending))

    async def _existing(self, body: StreamMessage, request: Request) -> Conversation | None:
        if body.conversation_id is None:
            return None
        return await self._services.access.conversation(
            body.conversation_id, password=body.password, token=token_of(request), address=address_of(request)
        )

    async def _fresh(self, body: StreamMessage) -> NewConversation:
        """A new conversation, which begins with its first reply; as everywhere, a password makes it private."""
        hash = None if body.password is None else await self._services.passwords.hash(body.password)
        title = " ".join(body.message.split())[:TITLE_LENGTH] or "New conversation"
        return NewConversation(new_id(), title, body.model, hash, body.system_prompt)

    async def _discard(self, conversation: Conversation) -> None:
        """The conversation was made for a reply that could not begin, and nobody knows its id."""
        await self._services.archive.drop(await self._services.store.delete_conversation(conversation.id))


async def _encoded(events: AsyncGenerator[Numbered, None]) -> AsyncGenerator[bytes, None]:
    async with aclosing(events):
        async for numbered in events:
            yield encode(numbered)


async def _followed(trace: Trail, chunks: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    """For whoever comes back to a reply: the time of the following is a trace of its own."""
    with trace.phase("stream.follow"):
        async with aclosing(chunks):
            async for chunk in chunks:
                yield chunk


def _idempotency(request: Request, body: StreamMessage, images: Sequence[RawImage | str]) -> tuple[str | None, str]:
    """What names the request among all of this caller's, and what tells whether another is the same."""
    content = body.model_dump(mode="json", exclude={"password"})
    uploads = [hashlib.sha256(image.encode() if isinstance(image, str) else image.data).hexdigest() for image in images]
    key = idempotency.key_of(caller_of(request) or ANONYMOUS, request.headers.get(IDEMPOTENCY_KEY), IDEMPOTENCY_KEY)
    return key, idempotency.fingerprint([content, uploads])


def _position(request: Request) -> int:
    """The number of the last event that the client has seen; ``?after=`` is for clients that cannot set headers."""
    given = request.query_params.get("after") or request.headers.get("last-event-id") or "0"
    if not (given.isascii() and given.isdecimal() and len(given) < 16):
        raise InvalidInput("after (or Last-Event-ID) must be the number of an event of this stream.")
    return int(given)


async def _terminate_body(request: Request) -> TerminateStream:
    """Unlike elsewhere, a body of the wrong shape is answered 400: clients of the chat service rely on it."""
    value = await json_body(request)
    try:
        return read(TerminateStream, value)
    except InvalidInput as error:
        raise MalformedRequest(error.message) from error


def _reason(given: str | None) -> TerminationReason:
    try:
        return TerminationReason((given or TerminationReason.USER_REQUESTED).upper())
    except ValueError as error:
        raise MalformedRequest(f"reason must be one of {', '.join(TerminationReason)}.") from error


def _termination(ending: Ending) -> dict[str, object]:
    after, stopped = ending.session, ending.stopped
    message = "The stream was terminated." if stopped else f"The stream had already ended ({after.status.value})."
    return {
        "success": stopped,
        "message": message,
        **after.summary(),
        "timestamp": (after.ended_at or datetime.now(UTC)).isoformat(),
    }


def stream_router(services: Services) -> APIRouter:
    """``/api/stream-message`` and ``/api/terminate-stream``."""
    streams = Streams(services)
    router = APIRouter()

    @router.post("/api/stream-message")
    async def begin(request: Request) -> Response:
        return await streams.begin(request)

    @router.get("/api/stream-message/{session_id}")
    async def follow(session_id: str, request: Request) -> Response:
        return await streams.follow(session_id, request)

    @router.post("/api/terminate-stream")
    async def terminate(request: Request) -> Response:
        return await streams.terminate(request)

    return router
