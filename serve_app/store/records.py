"""What the store takes in, and how its rows become the domain's values."""

from __future__ import annotations

import base64
import binascii
import json
import secrets
from dataclasses import asdict, dataclass, field
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
from serve_app.domain.stream_log import LogRow, Origin
from serve_app.domain.wanted import Wanted
from serve_app.store.tables import clean


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
class NewConversation:
    """A conversation to keep; a password hash makes it private."""

    id: str
    tab_name: str
    llm_model: str | None = None
    password_hash: str | None = None
    system_prompt: str | None = None
    created_at: datetime = field(default_factory=utc_now)

    @property
    def is_private(self) -> bool:
        return self.password_hash is not None

    def empty(self) -> Conversation:
        """As it will be kept."""
        return Conversation(
            clean(self.id), clean(self.tab_name), clean(self.llm_model), self.is_private, self.password_hash,
            clean(self.system_prompt), self.created_at, self.created_at,
        )  # fmt: skip

    def values(self) -> dict[str, Any]:
        """The row."""
        return asdict(self) | {"is_private": self.is_private, "updated_at": self.created_at}


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
    """A stream session to open. ``owner`` generates it and renews its ownership before ``ttl_s`` seconds pass.

    ``wanted``: how the reply is wanted, so that another owner can go on with it; None: nobody can.
    ``idempotency_key``: names the request among all requests; ``fingerprint``: tells whether another is the same.
    """

    id: str
    conversation_id: str
    model: str
    provider: str
    owner: str
    ttl_s: float = 5.0
    timeout_ms: int | None = None
    trace_id: str | None = None
    wanted: Wanted | None = None
    idempotency_key: str | None = None
    fingerprint: str | None = None
    started_at: datetime = field(default_factory=utc_now)

    def begun(self, question_id: str | None) -> StreamSession:
        """As it will be kept."""
        return StreamSession(
            id=clean(self.id),
            conversation_id=clean(self.conversation_id),
            model=clean(self.model),
            provider=clean(self.provider),
            status=SessionStatus.ACTIVE,
            started_at=self.started_at,
            updated_at=self.started_at,
            timeout_ms=self.timeout_ms,
            owner=self.owner,
            trace_id=self.trace_id,
            wanted=self.wanted,
            question_id=question_id,
            fingerprint=self.fingerprint,
        )

    def values(self, question_id: str | None) -> dict[str, Any]:
        """The row, but for when its ownership runs out."""
        return {
            "id": self.id,
            "conversation_id": self.conversation_id,
            "model": self.model,
            "provider": self.provider,
            "status": SessionStatus.ACTIVE.value,
            "started_at": self.started_at,
            "updated_at": self.started_at,
            "created_at": self.started_at,
            "partial_response": "",
            "token_count": 0,
            "timeout_ms": self.timeout_ms,
            "trace_id": self.trace_id,
            "owner": self.owner,
            "epoch": 1,
            "wanted": None if self.wanted is None else json.dumps(self.wanted.to_json()),
            "question_id": question_id,
            "idempotency_key": self.idempotency_key,
            "fingerprint": self.fingerprint,
            "has_log": self.wanted is not None,
        }

    def lease(self) -> dict[str, int]:
        """For how long it is owned, by the database's clock."""
        return {"ttl_ms": int(self.ttl_s * 1000)}


class AlreadyBegun(Exception):
    """The reply that was to begin has begun before, under the same idempotency key, as the session ``session_id``."""

    def __init__(self, session_id: str) -> None:
        super().__init__(session_id)
        self.session_id = session_id


class Pulse(NamedTuple):
    """An active session as its owner finds it: ``terminate`` is the reason for which it should stop."""

    epoch: int
    terminate: str | None


class SessionState(NamedTuple):
    """What followers must know of a session: whether it runs, and whether its owner still does."""

    active: bool
    abandoned: bool


class Adopted(NamedTuple):
    """A session that has a new owner, and what its log says."""

    session: StreamSession
    rows: list[LogRow]


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


def message_values(message: StoredMessage, has_images: bool = False) -> dict[str, Any]:
    """The row of a message, but for its place in the conversation."""
    return {
        "id": message.id,
        "conversation_id": message.conversation_id,
        "text": message.text,
        "sender": message.sender,
        "timestamp": message.timestamp,
        "created_at": message.timestamp,
        "has_images": has_images,
        "status": message.status.value,
        "model": message.model,
        "provider": message.provider,
    }


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
        epoch=row.epoch,
        wanted=None if row.wanted is None else Wanted.from_json(json.loads(row.wanted)),
        question_id=row.question_id,
        fingerprint=row.fingerprint,
        provider_stopped=row.provider_stopped,
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


def log_values(session_id: str, row: LogRow) -> dict[str, Any]:
    """A row of stream_events."""
    return {
        "session_id": session_id,
        "seq": row.seq,
        "epoch": row.epoch,
        "seq_to": row.seq_to,
        "text_offset": row.offset,
        "kind": row.kind,
        "text": row.text,
        "lengths": _packed(row.lengths) if len(row.lengths) > 1 else None,
        "payload": None if row.payload is None else json.dumps(row.payload),
        "token_ids": _packed(row.origin.token_ids) if row.origin.token_ids else None,
        "provider": row.origin.provider,
        "model": row.origin.model,
        "attempt": row.origin.attempt,
        "revision": row.origin.revision,
    }


def log_row_of(row: Row[Any]) -> LogRow:
    return LogRow(
        seq=row.seq,
        seq_to=row.seq_to,
        offset=row.text_offset,
        kind=row.kind,
        text=row.text,
        lengths=_numbers(row.lengths) or (len(row.text),),
        payload=None if row.payload is None else json.loads(row.payload),
        origin=Origin(row.model, row.provider, row.attempt, row.revision, _numbers(row.token_ids)),
        epoch=row.epoch,
    )


def _packed(numbers: tuple[int, ...]) -> str:
    """A JSON list, as ``json.dumps`` writes it without blanks, at a third of its cost."""
    return f"[{','.join(map(str, numbers))}]"


def _numbers(text: str | None) -> tuple[int, ...]:
    return () if text is None else tuple(json.loads(text))
