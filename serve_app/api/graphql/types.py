"""Conversations, messages, images and stream sessions as GraphQL types."""

from __future__ import annotations

from datetime import UTC, datetime

import strawberry
from strawberry.types import Info

from serve_app.api.graphql.context import Context
from serve_app.api.graphql.paging import After, Before, Last, Limit, MessagePage
from serve_app.api.graphql.resolvers import field
from serve_app.domain import conversation as domain
from serve_app.domain import generation
from serve_app.replies import LiveReply

GraphInfo = Info[Context, None]


def iso(time: datetime) -> str:
    """ISO 8601 in UTC, with milliseconds and a ``Z``."""
    return time.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def moment(epoch_s: float) -> str:
    """Seconds since 1970, as :func:`iso` writes them."""
    return iso(datetime.fromtimestamp(epoch_s, UTC))


def moment_or_none(epoch_s: float | None) -> str | None:
    return None if epoch_s is None else moment(epoch_s)


@strawberry.type
class Image:
    id: strawberry.ID
    filename: str
    file_size: int
    mime_type: str
    content_hash: str
    created_at: str
    url: str = strawberry.field(
        description="Where the file is; for a private conversation with a signed token that expires."
    )

    @classmethod
    def of(cls, stored: domain.StoredImage, url: str) -> Image:
        return cls(
            id=strawberry.ID(stored.id),
            filename=stored.filename,
            file_size=stored.file_size,
            mime_type=stored.mime_type,
            content_hash=stored.content_hash,
            created_at=iso(stored.created_at),
            url=url,
        )


@strawberry.type
class Message:
    stored: strawberry.Private[domain.StoredMessage]
    private: strawberry.Private[bool]
    id: strawberry.ID
    conversation_id: str
    text: str
    sender: str = strawberry.field(description='Either "user" or "llm".')
    timestamp: str
    has_images: bool
    status: str = strawberry.field(
        description='Either "complete", or "terminated" or "error" for a reply that ended early.'
    )
    model: str | None
    provider: str | None

    @classmethod
    def of(cls, stored: domain.StoredMessage, private: bool) -> Message:
        return cls(
            stored=stored,
            private=private,
            id=strawberry.ID(stored.id),
            conversation_id=stored.conversation_id,
            text=stored.text,
            sender=stored.sender,
            timestamp=iso(stored.timestamp),
            has_images=bool(stored.images),
            status=stored.status.value,
            model=stored.model,
            provider=stored.provider,
        )

    @strawberry.field
    def images(self, info: GraphInfo) -> list[Image]:
        return [Image.of(stored, info.context.image_url(stored, self.private)) for stored in self.stored.images]


@strawberry.type
class Conversation:
    id: strawberry.ID
    tab_name: str
    llm_model: str = strawberry.field(description="The model of its replies; empty when it names none.")
    system_prompt: str | None
    is_private: bool
    created_at: str
    updated_at: str
    message_count: int

    @classmethod
    def of(cls, stored: domain.Conversation) -> Conversation:
        return cls(
            id=strawberry.ID(stored.id),
            tab_name=stored.tab_name,
            llm_model=stored.llm_model or "",
            system_prompt=stored.system_prompt,
            is_private=stored.is_private,
            created_at=iso(stored.created_at),
            updated_at=iso(stored.updated_at),
            message_count=stored.message_count,
        )

    @field("Oldest first. Whoever holds the conversation has proven access already.")
    async def messages(
        self, info: GraphInfo, limit: Limit = None, after: After = None, before: Before = None, last: Last = None
    ) -> list[Message]:
        found = await info.context.messages(self.id, MessagePage(limit, last, after, before))
        return [Message.of(stored, self.is_private) for stored in found]


@strawberry.type
class ConversationList:
    conversations: list[Conversation]
    count: int = strawberry.field(description="Of all public conversations, whatever the limit.")
    next_cursor: str | None = strawberry.field(description="Give it as `after` for the next page; null on the last.")


@strawberry.type
class Usage:
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    total_tokens: int

    @classmethod
    def of(cls, usage: generation.Usage) -> Usage:
        return cls(
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
            cached_tokens=usage.cached_tokens,
            total_tokens=usage.total_tokens,
        )


@strawberry.type(description="Where the time of one reply went, in milliseconds.")
class Timing:
    queued_ms: float
    load_ms: float
    ttft_ms: float | None
    decode_ms: float
    total_ms: float

    @classmethod
    def of(cls, timing: generation.Timing) -> Timing:
        values = timing.to_json()
        return cls(
            queued_ms=values["queuedMs"] or 0.0,
            load_ms=values["loadMs"] or 0.0,
            ttft_ms=values["ttftMs"],
            decode_ms=values["decodeMs"] or 0.0,
            total_ms=values["totalMs"] or 0.0,
        )


@strawberry.type(description="One reply in the making or made.")
class StreamSession:
    id: strawberry.ID
    conversation_id: str
    model: str
    provider: str
    status: str = strawberry.field(description="ACTIVE, COMPLETED, TERMINATED or ERROR.")
    started_at: str
    updated_at: str
    ended_at: str | None
    partial_response: str = strawberry.field(description="The text so far.")
    token_count: int
    termination_reason: str | None
    error: str | None
    error_code: str | None
    trace_id: str = strawberry.field(description="Empty for a session that the chat service left behind.")
    message_id: str | None = strawberry.field(description="The saved reply, once the session has ended with some text.")
    usage: Usage | None
    timing: Timing | None

    @classmethod
    def of(cls, stored: domain.StreamSession, live: LiveReply | None = None) -> StreamSession:
        """``live``: the reply itself, when this ingress generates it and knows better than the store."""
        text, tokens = (live.text, live.token_count) if live else (stored.partial_response, stored.token_count)
        return cls(
            id=strawberry.ID(stored.id),
            conversation_id=stored.conversation_id,
            model=stored.model,
            provider=stored.provider,
            status=stored.status.value,
            started_at=iso(stored.started_at),
            updated_at=iso(stored.updated_at),
            ended_at=iso(stored.ended_at) if stored.ended_at else None,
            partial_response=text,
            token_count=tokens,
            termination_reason=stored.termination_reason,
            error=stored.error_message,
            error_code=stored.error_code,
            trace_id=stored.trace_id or "",
            message_id=stored.message_id,
            usage=Usage.of(stored.usage) if stored.usage else None,
            timing=Timing.of(stored.timing) if stored.timing else None,
        )


@strawberry.type
class StreamSessionList:
    sessions: list[StreamSession]
    next_cursor: str | None = strawberry.field(description="Give it as `after` for the next page; null on the last.")
