"""The life of one reply: it is generated, and its end, whatever it is, is recorded in one place."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from serve_app.domain.conversation import SessionStatus, StoredImage, StreamSession, TerminationReason
from serve_app.domain.errors import Internal, RotundaError
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
from serve_app.domain.generation import Accepted, Delta, GenerationRequest, Timing, Usage
from serve_app.domain.prompt_length import least_tokens
from serve_app.domain.routing import Admission
from serve_app.gateway import Completed, Gateway, Routed
from serve_app.logbook import Contact, Logbook
from serve_app.replies import ImageUrls, LiveReply, SessionLimits
from serve_app.store.records import new_id
from serve_app.store.store import Store

logger = logging.getLogger(__name__)

OPENING_S = 2.0
"""How long a resident model may take to accept the prompt before the stream opens without its word."""
RETRY_S = 0.25
"""Between two tries to record an end."""

Terminal = Ended | Terminated | Failed


class Author:
    """Writes the replies of one ingress.

    Args:
        store: where ends are recorded.
        gateway: generates.
        urls: where a client finds an image.
        limits: bounds and intervals.
        logbook: writes the logs until the end.
        contact: learns how the store answers.
    """

    def __init__(
        self, store: Store, gateway: Gateway, urls: ImageUrls, limits: SessionLimits, logbook: Logbook, contact: Contact
    ) -> None:
        self._store = store
        self._gateway = gateway
        self._urls = urls
        self._limits = limits
        self._logbook = logbook
        self._contact = contact

    async def write(
        self,
        reply: LiveReply,
        request: Callable[[], Awaitable[GenerationRequest]],
        admission: Admission | None,
        timeout_s: float,
    ) -> None:
        """Generate in a task that can be cancelled, and record the end whatever it is.

        Args:
            reply: the reply, which its readers follow.
            request: what the model is asked.
            admission: the router's first answer, when it is known.
            timeout_s: the longest life that the reply still has.
        """
        loop = asyncio.get_running_loop()
        generation = loop.create_task(self._generate(reply, request, admission))
        reply.run(generation)
        timeout = loop.call_later(max(timeout_s, 0), reply.stop, TerminationReason.TIMEOUT)
        opening = loop.call_later(OPENING_S, self._open, reply, None)
        completed: Completed | None = None
        failure: RotundaError | None = None
        try:
            completed = await generation
        except asyncio.CancelledError:
            if not reply.moved:
                reply.stop_reason = reply.stop_reason or TerminationReason.SERVER_SHUTDOWN
        except RotundaError as error:
            failure = error
        except Exception:
            logger.exception("session %s failed (trace %s)", reply.session.id, reply.trace.trace_id)
            failure = Internal.masked()
        finally:
            timeout.cancel()
            opening.cancel()
        with reply.trace.phase("store.write"):
            await self._logbook.settle(reply)
            if not reply.moved:
                await self._finish(reply, completed, failure)
        if reply.moved:
            reply.stream.close()
        reply.trace.finish(reply.failure, reply.stop_reason)
        reply.leave_alone()
        reply.done.set()
        reply.logged()  # whoever waits for room need not any more

    async def _generate(
        self, reply: LiveReply, request: Callable[[], Awaitable[GenerationRequest]], admission: Admission | None
    ) -> Completed | None:
        completed: Completed | None = None
        wanted = await request()
        ask = replace(reply.wanted.ask(wanted.request_id), least_tokens=least_tokens(wanted))
        async with aclosing(self._gateway.reply(ask, wanted, admission, reply.trace)) as steps:
            async for step in steps:
                match step:
                    case Routed(candidate):
                        reply.tried(candidate.name, candidate.entry.provider)
                    case Accepted():
                        reply.prompt_tokens, reply.revision = step.prompt_tokens, step.revision
                        self._open(reply, step.dropped)
                    case Delta():
                        self._open(reply, None)
                        reply.add(step)
                        await reply.room()
                    case Queued() | Loading() | Switched():
                        self._open(reply, None)
                        reply.emit(step)
                    case Completed():
                        completed = step
        return completed

    def _open(self, reply: LiveReply, dropped: int | None) -> None:
        """The first event of the stream, once."""
        if reply.stream.events:
            return
        id, conversation = reply.session.id, reply.conversation
        reply.emit(SessionOpened(id, conversation.id, reply.model, reply.provider, reply.trace.trace_id, dropped))
        if reply.user_message.images:
            images = tuple(self._image_json(image, conversation.is_private) for image in reply.user_message.images)
            reply.emit(ImagesProcessed(images, reply.warnings))

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
        if failure is None:
            self._open(reply, None)
        terminal = _terminal(reply, completed, failure, new_id() if reply.text else None)
        try:
            row = await self._record(reply, completed, failure, terminal)
        except RotundaError as error:
            logger.error("session %s could not be recorded: %s", reply.session.id, error)
            failure, row, terminal = error, None, _failed(reply, error)
        if row is not None and row.epoch != reply.session.epoch:
            logger.warning("session %s was ended, or is written, by another server", reply.session.id)
            reply.moved = True
            reply.trace.hand_over()
            return
        reply.message_id = row.message_id if row else None
        reply.failure = failure
        reply.stream.append(terminal)

    async def _record(
        self, reply: LiveReply, completed: Completed | None, failure: RotundaError | None, terminal: Terminal
    ) -> StreamSession:
        loop = asyncio.get_running_loop()
        rows = reply.rest(terminal)
        deadline = loop.time() + self._limits.record_s
        while True:
            began = loop.time()
            try:
                return await self._store.finish_session(
                    reply.session.id,
                    epoch=reply.session.epoch,
                    status=_status(reply, failure),
                    text=reply.text,
                    token_count=reply.token_count,
                    model=reply.model,
                    provider=reply.provider,
                    usage=_usage(reply, completed),
                    timing=completed.timing if completed else None,
                    finish_reason=completed.finish.reason.value if completed else None,
                    termination_reason=reply.stop_reason if not failure else None,
                    error_code=failure.code if failure else None,
                    error_message=failure.message if failure else None,
                    message_id=terminal.message_id if isinstance(terminal, Ended) else None,
                    provider_stopped=True if isinstance(terminal, Terminated) else None,
                    rows=rows,
                )
            except RotundaError as error:
                self._contact.lost(error)
                if not error.retryable or loop.time() > deadline:
                    raise
            await asyncio.sleep(max(0.0, began + RETRY_S - loop.time()))


def _status(reply: LiveReply, failure: RotundaError | None) -> SessionStatus:
    if failure is not None:
        return SessionStatus.ERROR
    return SessionStatus.COMPLETED if reply.stop_reason is None else SessionStatus.TERMINATED


def _usage(reply: LiveReply, completed: Completed | None) -> Usage | None:
    """Of a reply that broke off, what was seen of it; the gateway counts what was said before it was adopted."""
    if completed is None:
        return None if reply.prompt_tokens is None else Usage(reply.prompt_tokens, reply.token_count)
    return completed.finish.usage


def _terminal(
    reply: LiveReply, completed: Completed | None, failure: RotundaError | None, message_id: str | None
) -> Terminal:
    if failure is not None:
        return _failed(reply, failure)
    if completed is None or reply.stop_reason is not None:
        reason = (reply.stop_reason or TerminationReason.ERROR).value
        return Terminated(reply.session.id, reply.text, reply.token_count, reason)
    usage = _usage(reply, completed) or Usage()
    return Ended(message_id, usage, completed.timing or Timing(), completed.finish.reason)


def _failed(reply: LiveReply, failure: RotundaError) -> Failed:
    trace_id = reply.trace.trace_id
    return Failed(failure.code, failure.message, failure.provider, failure.retryable, trace_id, failure.details)
