"""Conversations and their stream sessions, as the store keeps them and the surfaces show them."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any, Literal

from serve_app.domain.generation import Timing, Usage
from serve_app.domain.wanted import Wanted

Sender = Literal["user", "llm"]


class MessageStatus(StrEnum):
    COMPLETE = "complete"
    TERMINATED = "terminated"
    ERROR = "error"


class SessionStatus(StrEnum):
    ACTIVE = "ACTIVE"
    COMPLETED = "COMPLETED"
    TERMINATED = "TERMINATED"
    ERROR = "ERROR"


class TerminationReason(StrEnum):
    USER_REQUESTED = "USER_REQUESTED"
    TIMEOUT = "TIMEOUT"
    ERROR = "ERROR"
    SERVER_SHUTDOWN = "SERVER_SHUTDOWN"
    CLIENT_DISCONNECTED = "CLIENT_DISCONNECTED"


@dataclass(frozen=True, slots=True)
class Conversation:
    id: str
    tab_name: str
    llm_model: str | None
    is_private: bool
    password_hash: str | None
    system_prompt: str | None
    created_at: datetime
    updated_at: datetime
    message_count: int = 0

    def __repr__(self) -> str:
        return f"Conversation({self.id!r}, private={self.is_private}, messages={self.message_count})"


@dataclass(frozen=True, slots=True)
class StoredImage:
    """An image file that belongs to a message. ``file_path`` is relative to the image store."""

    id: str
    conversation_id: str
    message_id: str | None
    filename: str
    file_path: str
    file_size: int
    mime_type: str
    content_hash: str
    created_at: datetime
    expires_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class StoredMessage:
    id: str
    conversation_id: str
    text: str
    sender: Sender
    timestamp: datetime
    status: MessageStatus = MessageStatus.COMPLETE
    model: str | None = None
    provider: str | None = None
    images: tuple[StoredImage, ...] = ()


@dataclass(frozen=True, slots=True)
class StreamSession:
    """One reply in the making or made.

    ``owner`` is the ingress that generates it, the ``epoch``-th one; None for one that was given up, for another to
    adopt. ``question_id``: the message that it answers. ``provider_stopped``: whether the call to the model was ended
    before its end, of a reply that was terminated.
    """

    id: str
    conversation_id: str
    model: str
    provider: str
    status: SessionStatus
    started_at: datetime
    updated_at: datetime
    ended_at: datetime | None = None
    partial_response: str = ""
    token_count: int = 0
    termination_reason: str | None = None
    error_message: str | None = None
    error_code: str | None = None
    timeout_ms: int | None = None
    owner: str | None = None
    trace_id: str | None = None
    message_id: str | None = None
    usage: Usage | None = None
    timing: Timing | None = None
    finish_reason: str | None = None
    epoch: int = 1
    wanted: Wanted | None = None
    question_id: str | None = None
    fingerprint: str | None = None
    provider_stopped: bool | None = None

    def summary(self) -> dict[str, Any]:
        """The fields that tell the session's end, as JSON values."""
        return {
            "sessionId": self.id,
            "finalStatus": self.status.value,
            "terminationReason": self.termination_reason,
            "partialResponse": self.partial_response,
            "tokenCount": self.token_count,
            "usage": self.usage.to_json() if self.usage else None,
            "providerStopped": self.provider_stopped,
            "savedMessageId": self.message_id,
        }
