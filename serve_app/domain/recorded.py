"""A stream that has ended, told again from its record."""

from __future__ import annotations

from serve_app.domain.conversation import SessionStatus, StreamSession, TerminationReason
from serve_app.domain.errors import error_from_dict
from serve_app.domain.events import Ended, Failed, Numbered, SessionOpened, Terminated, Token
from serve_app.domain.generation import FinishReason, Timing, Usage


def recorded(session: StreamSession) -> list[Numbered]:
    """The events of an ended session: opening, the whole text, the end. How the text was cut is not recorded."""
    events = [
        SessionOpened(session.id, session.conversation_id, session.model, session.provider, session.trace_id or ""),
        *([Token(session.partial_response, 0)] if session.partial_response else []),
        _terminal(session),
    ]
    return [Numbered(seq, event) for seq, event in enumerate(events, 1)]


def _terminal(session: StreamSession) -> Ended | Terminated | Failed:
    if session.status is SessionStatus.COMPLETED:
        reason = FinishReason(session.finish_reason or FinishReason.STOP)
        return Ended(session.message_id, session.usage or Usage(), session.timing or Timing(), reason)
    if session.status is SessionStatus.TERMINATED:
        reason_text = session.termination_reason or TerminationReason.ERROR.value
        return Terminated(session.id, session.partial_response, session.token_count, reason_text)
    message = session.error_message or "The reply failed."
    error = error_from_dict({"code": session.error_code, "message": message, "provider": session.provider})
    return Failed(error.code, message, session.provider, error.retryable, session.trace_id or "", {})
