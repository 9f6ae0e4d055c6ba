"""One streamed reply as a client sees it: its events in, its text and its end out."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from serve_app.cli.client import Client
from serve_app.cli.screen import Screen
from serve_app.cli.sse import ServerEvent
from serve_app.domain.errors import ProviderError, RotundaError, error_from_dict

RECONNECTS = 5
RECONNECT_DELAY_S = 1.0


@dataclass
class Reply:
    """What has arrived. ``status``: streaming, complete, terminated or error."""

    text: str = ""
    status: str = "streaming"
    session_id: str | None = None
    conversation_id: str | None = None
    model: str | None = None
    last_id: str = ""
    tokens: int | None = None
    reason: str | None = None
    error: RotundaError | None = None
    interrupted: bool = False
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def done(self) -> bool:
        return self.status != "streaming"

    def to_json(self) -> dict[str, Any]:
        status = "terminated" if self.interrupted else self.status
        return {
            "status": status,
            "text": self.text,
            "sessionId": self.session_id,
            "conversationId": self.conversation_id,
            "model": self.model,
            "reason": "USER_REQUESTED" if self.interrupted else self.reason,
            "error": self.error.to_dict() if self.error else None,
            **self.facts,
        }


def stream_reply(
    client: Client, body: dict[str, Any], reply: Reply, screen: Screen, sleep: Callable[[float], None]
) -> None:
    """Ask for a reply and follow it to its end into ``reply``, resuming it where a connection breaks off.

    The end may be an error of the stream, which is kept in ``reply``. Raises :class:`RotundaError` when there is no
    stream, or when it cannot be resumed.
    """
    source = client.stream("POST", "/api/stream-message", body)
    for attempt in range(RECONNECTS + 1):
        delay_s = RECONNECT_DELAY_S
        try:
            _take_all(source, reply, screen)
        except RotundaError as error:
            if not reply.session_id or not error.retryable or attempt == RECONNECTS:
                raise
            delay_s = error.retry_after_s or delay_s
        if reply.done:
            return
        if not reply.session_id:
            raise ProviderError("The server closed the stream before it began.")
        screen.waiting("the connection broke off; resuming")
        sleep(delay_s)
        source = client.stream("GET", f"/api/stream-message/{reply.session_id}", after=reply.last_id)
    raise ProviderError("The stream broke off again and again. The server keeps the reply in the conversation.")


def _take_all(source: AbstractContextManager[Iterator[ServerEvent]], reply: Reply, screen: Screen) -> None:
    with source as events:
        for event in events:
            _take(event, reply, screen)
            if reply.done:
                return


def _take(event: ServerEvent, reply: Reply, screen: Screen) -> None:
    try:
        data = json.loads(event.data)
    except ValueError:
        data = None
    if not isinstance(data, dict):
        raise ProviderError("The server sent an event that is not JSON. Is --url right?")
    reply.last_id = event.id or reply.last_id
    taker = _TAKERS.get(event.name)
    if taker:
        taker(data, reply, screen)


def _session(data: dict[str, Any], reply: Reply, screen: Screen) -> None:
    reply.session_id, reply.conversation_id = data.get("sessionId"), data.get("conversationId")
    reply.model = data.get("model")
    reply.facts["traceId"] = data.get("traceId")
    if data.get("contextDropped"):
        screen.note(f"{data['contextDropped']} earlier turns did not fit into the context and were left out.")


def _images(data: dict[str, Any], reply: Reply, screen: Screen) -> None:
    for warning in data.get("warnings", ()):
        screen.note(str(warning))


def _queued(data: dict[str, Any], reply: Reply, screen: Screen) -> None:
    eta = f", about {data['etaMs'] / 1000:.0f} s" if data.get("etaMs") else ""
    screen.waiting(f"queued at place {data.get('position')}{eta}: {data.get('reason')}")


def _loading(data: dict[str, Any], reply: Reply, screen: Screen) -> None:
    progress = f" {data['progress']:.0%}" if data.get("progress") is not None else ""
    evicting = f", unloading {', '.join(data['evicting'])}" if data.get("evicting") else ""
    screen.waiting(f"loading {data.get('model')}{progress}{evicting}")


def _token(data: dict[str, Any], reply: Reply, screen: Screen) -> None:
    text = str(data.get("token", ""))
    reply.text += text
    screen.text(text)


def _rewind(data: dict[str, Any], reply: Reply, screen: Screen) -> None:
    """The server's log ends before what was shown: the text from ``offset`` on comes again."""
    reply.last_id = str(data.get("seq", reply.last_id))
    kept = reply.text[: int(data.get("offset", len(reply.text)))]
    if kept != reply.text:
        reply.text = kept
        screen.restart(kept)


def _switched(data: dict[str, Any], reply: Reply, screen: Screen) -> None:
    reply.model = data.get("to")
    screen.note(f"{data.get('to')} goes on for {data.get('from')}: {data.get('reason')}")


def _end(data: dict[str, Any], reply: Reply, screen: Screen) -> None:
    reply.status, reply.reason = "complete", data.get("finishReason")
    reply.tokens = (data.get("usage") or {}).get("completionTokens")
    reply.facts |= {name: data.get(name) for name in ("messageId", "usage", "timing", "finishReason")}


def _terminated(data: dict[str, Any], reply: Reply, screen: Screen) -> None:
    reply.status, reply.reason = "terminated", data.get("reason")
    reply.tokens = data.get("tokenCount")


def _error(data: dict[str, Any], reply: Reply, screen: Screen) -> None:
    reply.status = "error"
    trace = f" (trace {data['traceId']})" if data.get("traceId") else ""
    reply.error = error_from_dict({**data, "message": f"{data.get('error')}{trace}"})


_TAKERS: dict[str, Callable[[dict[str, Any], Reply, Screen], None]] = {
    "session": _session,
    "images": _images,
    "queued": _queued,
    "loading": _loading,
    "": _token,
    "message": _token,
    "rewind": _rewind,
    "switched": _switched,
    "end": _end,
    "terminated": _terminated,
    "error": _error,
}
