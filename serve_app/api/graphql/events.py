"""The events of a stream as GraphQL types: one for each of :mod:`serve_app.domain.events`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import strawberry

from serve_app.api.graphql.types import Timing, Usage
from serve_app.domain import events as domain


@strawberry.interface(description="One step of a reply. Exactly one EndEvent, TerminatedEvent or ErrorEvent is last.")
class StreamEvent:
    seq: int = strawberry.field(description="Its place in the stream, from 1; give it as `after` to go on from here.")


@strawberry.type
class SessionEvent(StreamEvent):
    session_id: strawberry.ID
    conversation_id: str
    model: str
    # As in ErrorEvent: one selection may ask several types for a field only if it has one type in all of them.
    provider: str | None
    trace_id: str
    context_dropped: int | None = strawberry.field(description="Turns left out of the prompt; null when not known.")


@strawberry.type
class EventImage:
    id: strawberry.ID
    filename: str
    url: str
    size: int = strawberry.field(description="In bytes.")
    mime_type: str


@strawberry.type
class ImagesEvent(StreamEvent):
    processed: int
    warnings: list[str]
    images: list[EventImage]


@strawberry.type
class QueuedEvent(StreamEvent):
    position: int
    reason: str
    eta_ms: int | None


@strawberry.type
class LoadingEvent(StreamEvent):
    model: str
    evicting: list[str]
    progress: float | None = strawberry.field(description="From 0 to 1, when it is known.")


@strawberry.type
class TokenEvent(StreamEvent):
    token: str = strawberry.field(description="Text of one or more tokens.")
    offset: int = strawberry.field(description="Characters of the reply before this text, which belongs there.")


@strawberry.type(description="Another model goes on with the reply.")
class SwitchedEvent(StreamEvent):
    from_model: str
    to_model: str
    reason: str


@strawberry.type
class EndEvent(StreamEvent):
    message_id: str | None
    finish_reason: str
    usage: Usage | None
    timing: Timing | None


@strawberry.type
class TerminatedEvent(StreamEvent):
    session_id: strawberry.ID
    partial_response: str
    token_count: int
    reason: str


@strawberry.type
class ErrorEvent(StreamEvent):
    code: str
    error: str
    provider: str | None
    retryable: bool
    trace_id: str


@strawberry.type(
    description="Text that was received from `offset` on was lost. Drop it; what follows has the numbers after seq."
)
class RewindEvent(StreamEvent):
    offset: int = strawberry.field(description="Characters of the reply that stay.")


EVENT_TYPES = (
    SessionEvent,
    ImagesEvent,
    QueuedEvent,
    LoadingEvent,
    TokenEvent,
    SwitchedEvent,
    EndEvent,
    TerminatedEvent,
    ErrorEvent,
    RewindEvent,
)


def event_of(numbered: domain.Numbered) -> StreamEvent:
    """The GraphQL form of an event."""
    return _FORMS[type(numbered.event)](numbered.seq, numbered.event)


def _session(seq: int, event: domain.SessionOpened) -> StreamEvent:
    return SessionEvent(
        seq=seq,
        session_id=strawberry.ID(event.session_id),
        conversation_id=event.conversation_id,
        model=event.model,
        provider=event.provider,
        trace_id=event.trace_id,
        context_dropped=event.context_dropped,
    )


def _images(seq: int, event: domain.ImagesProcessed) -> StreamEvent:
    images = [
        EventImage(
            id=strawberry.ID(image["id"]),
            filename=image["filename"],
            url=image["url"],
            size=image["size"],
            mime_type=image["mimeType"],
        )
        for image in event.images
    ]
    return ImagesEvent(seq=seq, processed=len(images), warnings=list(event.warnings), images=images)


def _queued(seq: int, event: domain.Queued) -> StreamEvent:
    return QueuedEvent(seq=seq, position=event.position, reason=event.reason, eta_ms=event.eta_ms)


def _loading(seq: int, event: domain.Loading) -> StreamEvent:
    return LoadingEvent(seq=seq, model=event.model, evicting=list(event.evicting), progress=event.progress)


def _token(seq: int, event: domain.Token) -> StreamEvent:
    return TokenEvent(seq=seq, token=event.text, offset=event.offset)


def _switched(seq: int, event: domain.Switched) -> StreamEvent:
    return SwitchedEvent(seq=seq, from_model=event.source, to_model=event.target, reason=event.reason)


def _ended(seq: int, event: domain.Ended) -> StreamEvent:
    return EndEvent(
        seq=seq,
        message_id=event.message_id,
        finish_reason=event.finish_reason.value,
        usage=Usage.of(event.usage),
        timing=Timing.of(event.timing),
    )


def _terminated(seq: int, event: domain.Terminated) -> StreamEvent:
    return TerminatedEvent(
        seq=seq,
        session_id=strawberry.ID(event.session_id),
        partial_response=event.partial_response,
        token_count=event.token_count,
        reason=event.reason,
    )


def _failed(seq: int, event: domain.Failed) -> StreamEvent:
    return ErrorEvent(
        seq=seq,
        code=event.code,
        error=event.error,
        provider=event.provider,
        retryable=event.retryable,
        trace_id=event.trace_id,
    )


def _rewind(seq: int, event: domain.Rewind) -> StreamEvent:
    return RewindEvent(seq=seq, offset=event.offset)


_FORMS: dict[type[domain.Event], Callable[[int, Any], StreamEvent]] = {
    domain.SessionOpened: _session,
    domain.ImagesProcessed: _images,
    domain.Queued: _queued,
    domain.Loading: _loading,
    domain.Token: _token,
    domain.Switched: _switched,
    domain.Ended: _ended,
    domain.Terminated: _terminated,
    domain.Failed: _failed,
    domain.Rewind: _rewind,
}
