"""What the store takes in, and how its rows become the domain's values."""

from __future__ import annotations

import base64
import binascii
import json
import secrets
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, NamedTuple, cast

from sqlalchemy import Row

from serve_app.domain.conversation import (
    Conversation,
    MessageStatus,
    Sender,
    SessionStatus,
    StoredImage,
    StoredMessage,
    StreamSession,
)
from serve_app.domain.errors import InvalidInput
from serve_app.domain.generation import Timing, Usage


def new_id() -> str:
    """An id of 128 random bits, as 32 hexadecimal digits."""
    return secrets.token_hex(16)


def utc_now() -> datetime:
    """This process's clock, in UTC."""
    return datetime.now(UTC)


@dataclass(frozen=True, slots=True)
class Cursor:
    """A place in a list whose newest stand first: conversations by activity, sessions by their start."""

    at: datetime
    id: str

    @classmethod
    def of(cls, last: Conversation | StreamSession) -> Cursor:
        """The place right behind ``last``."""
        return cls(last.updated_at if isinstance(last, Conversation) else last.started_at, last.id)

    def encode(self) -> str:
        """The cursor as opaque URL-safe text."""
        pair = json.dumps([self.at.isoformat(), self.id])
        return base64.urlsafe_b64encode(pair.encode()).decode()

    @classmethod
    def decode(cls, text: str) -> Cursor:
        """Read :meth:`encode` back; anything else raises InvalidInput."""
        try:
            when, id = json.loads(base64.urlsafe_b64decode(text.encode()))
            at = datetime.fromisoformat(when).astimezone(UTC)
        except (binascii.Error, ValueError, TypeError, OverflowError) as error:
            raise InvalidInput("The cursor is not one that this server gave out.") from error
        return cls(at, str(id))


@dataclass(frozen=True, slots=True)
class NewImage:
    """An image file to attach to a message; ``file_path`` is relative to the image store, ``file_size`` in bytes."""

    filename: str
    file_path: str
    file_size: int
    mime_type: str
    content_hash: str
    expires_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class NewSession:
    """A stream session to open. ``owner`` generates it and renews its ownership before ``ttl_s`` seconds pass."""

    id: str
    conversation_id: str
    model: str
    provider: str
    owner: str
    ttl_s: float = 5.0
    timeout_ms: int | None = None
    trace_id: str | None = None


@dataclass(frozen=True, slots=True)
class Progress:
    """How far the reply of an active session has come; ``None`` leaves a field as it is.

    ``model`` and ``provider`` change when another candidate goes on with the reply.
    """

    session_id: str
    partial_response: str | None = None
    token_count: int | None = None
    model: str | None = None
    provider: str | None = None


class BegunReply(NamedTuple):
    """The stored user message and the session that answers it."""

    message: StoredMessage
    session: StreamSession


def conversation_of(row: Row[Any]) -> Conversation:
    """A row of conversations with its ``message_count``."""
    return Conversation(
        id=row.id,
        tab_name=row.tab_name,
        llm_model=row.llm_model,
        is_private=bool(row.is_private),
        password_hash=row.password_hash,
        system_prompt=row.system_prompt,
        created_at=row.created_at,
        updated_at=row.updated_at,
        message_count=row.message_count,
    )


def image_of(row: Row[Any]) -> StoredImage:
    return StoredImage(
        id=row.id,
        conversation_id=row.conversation_id,
        message_id=row.message_id,
        filename=row.filename,
        file_path=row.file_path,
        file_size=row.file_size,
        mime_type=row.mime_type,
        content_hash=row.content_hash,
        created_at=row.created_at,
        expires_at=row.expires_at,
    )


def message_of(row: Row[Any], images: tuple[StoredImage, ...] = ()) -> StoredMessage:
    return StoredMessage(
        id=row.id,
        conversation_id=row.conversation_id,
        text=row.text,
        sender=cast("Sender", row.sender),
        timestamp=row.timestamp,
        status=MessageStatus(row.status),
        model=row.model,
        provider=row.provider,
        images=images,
    )


def session_of(row: Row[Any]) -> StreamSession:
    return StreamSession(
        id=row.id,
        conversation_id=row.conversation_id,
        model=row.model,
        provider=row.provider,
        status=SessionStatus(row.status),
        started_at=row.started_at,
        updated_at=row.updated_at,
        ended_at=row.ended_at,
        partial_response=row.partial_response,
        token_count=row.token_count,
        termination_reason=row.termination_reason,
        error_message=row.error_message,
        error_code=row.error_code,
        timeout_ms=row.timeout_ms,
        owner=row.owner,
        trace_id=row.trace_id,
        message_id=row.message_id,
        usage=_usage_of(row),
        timing=_timing_of(row),
        finish_reason=row.finish_reason,
    )


def _usage_of(row: Row[Any]) -> Usage | None:
    if row.prompt_tokens is None:
        return None
    return Usage(row.prompt_tokens, row.completion_tokens, row.cached_tokens)


def _timing_of(row: Row[Any]) -> Timing | None:
    if row.total_s is None:
        return None
    return Timing(row.queued_s, row.load_s, row.ttft_s, row.decode_s, row.total_s)


def usage_columns(usage: Usage | None) -> dict[str, int | None]:
    """The columns of stream_sessions that hold ``usage``."""
    names = ("prompt_tokens", "completion_tokens", "cached_tokens")
    return {name: getattr(usage, name, None) for name in names}


def timing_columns(timing: Timing | None) -> dict[str, float | None]:
    """The columns of stream_sessions that hold ``timing``, in seconds."""
    names = ("queued_s", "load_s", "ttft_s", "decode_s", "total_s")
    return {name: getattr(timing, name, None) for name in names}
