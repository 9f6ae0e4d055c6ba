"""What a client sees of a reply, whatever protocol it speaks: the events of one stream.

A stream is a numbered list of events. It begins with ``session``, and exactly one terminal event (``end``,
``terminated`` or ``error``) ends it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from serve_app.domain.generation import FinishReason, Timing, Usage


@dataclass(frozen=True, slots=True)
class SessionOpened:
    """``context_dropped``: turns left out of the prompt because they did not fit; None when not yet known."""

    name: ClassVar[str | None] = "session"
    terminal: ClassVar[bool] = False
    session_id: str
    conversation_id: str
    model: str
    provider: str
    trace_id: str
    context_dropped: int | None = None

    def payload(self) -> dict[str, Any]:
        return {
            "sessionId": self.session_id,
            "conversationId": self.conversation_id,
            "model": self.model,
            "provider": self.provider,
            "traceId": self.trace_id,
            "contextDropped": self.context_dropped,
        }


@dataclass(frozen=True, slots=True)
class ImagesProcessed:
    """``images``: JSON values with id, filename, url, size (bytes) and mimeType."""

    name: ClassVar[str | None] = "images"
    terminal: ClassVar[bool] = False
    images: tuple[Mapping[str, Any], ...]
    warnings: tuple[str, ...] = ()

    def payload(self) -> dict[str, Any]:
        return {
            "processed": len(self.images),
            "warnings": list(self.warnings),
            "images": [dict(image) for image in self.images],
        }


@dataclass(frozen=True, slots=True)
class Queued:
    """``position`` counts from 1; ``eta_ms`` is None when nothing is known yet."""

    name: ClassVar[str | None] = "queued"
    terminal: ClassVar[bool] = False
    position: int
    reason: str
    eta_ms: int | None = None

    def payload(self) -> dict[str, Any]:
        return {"position": self.position, "reason": self.reason, "etaMs": self.eta_ms}


@dataclass(frozen=True, slots=True)
class Loading:
    """``progress`` runs from 0 to 1 when the replica can tell."""

    name: ClassVar[str | None] = "loading"
    terminal: ClassVar[bool] = False
    model: str
    evicting: tuple[str, ...] = ()
    progress: float | None = None

    def payload(self) -> dict[str, Any]:
        payload: dict[str, Any] = {"model": self.model, "evicting": list(self.evicting)}
        return payload if self.progress is None else {**payload, "progress": self.progress}


@dataclass(frozen=True, slots=True)
class Token:
    """``offset``: code points of the reply before this text."""

    name: ClassVar[str | None] = None
    terminal: ClassVar[bool] = False
    text: str
    offset: int

    def payload(self) -> dict[str, Any]:
        return {"token": self.text, "offset": self.offset}


@dataclass(frozen=True, slots=True)
class Switched:
    """Another model goes on with the reply."""

    name: ClassVar[str | None] = "switched"
    terminal: ClassVar[bool] = False
    source: str
    target: str
    reason: str

    def payload(self) -> dict[str, Any]:
        return {"from": self.source, "to": self.target, "reason": self.reason}


@dataclass(frozen=True, slots=True)
class Ended:
    name: ClassVar[str | None] = "end"
    terminal: ClassVar[bool] = True
    message_id: str | None
    usage: Usage
    timing: Timing
    finish_reason: FinishReason

    def payload(self) -> dict[str, Any]:
        return {
            "messageId": self.message_id,
            "usage": self.usage.to_json(),
            "timing": self.timing.to_json(),
            "finishReason": self.finish_reason.value,
        }


@dataclass(frozen=True, slots=True)
class Terminated:
    name: ClassVar[str | None] = "terminated"
    terminal: ClassVar[bool] = True
    session_id: str
    partial_response: str
    token_count: int
    reason: str

    def payload(self) -> dict[str, Any]:
        return {
            "sessionId": self.session_id,
            "partialResponse": self.partial_response,
            "tokenCount": self.token_count,
            "reason": self.reason,
        }


@dataclass(frozen=True, slots=True)
class Failed:
    name: ClassVar[str | None] = "error"
    terminal: ClassVar[bool] = True
    code: str
    error: str
    provider: str | None
    retryable: bool
    trace_id: str
    details: Mapping[str, Any]

    def payload(self) -> dict[str, Any]:
        return {
            "code": self.code,
            "error": self.error,
            "provider": self.provider,
            "retryable": self.retryable,
            "traceId": self.trace_id,
            **({"details": dict(self.details)} if self.details else {}),
        }


@dataclass(frozen=True, slots=True)
class Rewind:
    """For one reader: what it has of the text from ``offset`` (code points) on was lost; event ``seq`` is its last.

    It is no event of the stream, and what follows has the numbers after ``seq``.
    """

    name: ClassVar[str | None] = "rewind"
    terminal: ClassVar[bool] = False
    seq: int
    offset: int

    def payload(self) -> dict[str, Any]:
        return {"seq": self.seq, "offset": self.offset}


Event = SessionOpened | ImagesProcessed | Queued | Loading | Token | Switched | Ended | Terminated | Failed | Rewind


@dataclass(frozen=True, slots=True)
class Numbered:
    """An event with its place in the stream: ``seq`` counts from 1 and is the SSE ``id:``."""

    seq: int
    event: Event
