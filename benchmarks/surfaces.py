"""The protocols that replies are asked for in, and how each is read: one class for each surface."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from benchmarks.arrivals import Planned
from benchmarks.wire import Exchange, Target, body_of, exchange, request_bytes


class Piece(NamedTuple):
    """One event of a stream; ``data`` is the text of its data lines."""

    at: float
    id: str | None
    name: str | None
    data: str


@dataclass(slots=True)
class Reply:
    """What a stream came to. ``times``: when each piece of text came. ``terminals``: the events that claim to be the
    last one, of which there must be one. Token counts are the server's own; None where it does not say."""

    times: list[float]
    texts: list[str]
    terminals: list[str]
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    code: str | None = None
    session: str | None = None

    @property
    def text(self) -> str:
        return "".join(self.texts)


class Surface(Protocol):
    """How one protocol asks and answers."""

    name: str

    async def prepare(self, target: Target, planned: Planned) -> str | None:
        """What must exist before the request is sent (not timed), for instance a conversation's id."""
        ...

    def request(self, target: Target, planned: Planned, prepared: str | None) -> bytes: ...

    def read(self, pieces: Iterable[Piece]) -> Reply: ...


def events(result: Exchange) -> Iterator[Piece]:
    """The server-sent events of an answer. A comment has the name ":"."""
    buffer = b""
    for at, data in body_of(result):
        buffer += data.replace(b"\r\n", b"\n")
        *blocks, buffer = buffer.split(b"\n\n")
        for block in blocks:
            if block.strip():
                yield _piece(at, block.decode())


def _piece(at: float, block: str) -> Piece:
    identifier = name = None
    data = []
    for line in block.split("\n"):
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if field == "":
            name = ":" if name is None else name
        elif field == "id":
            identifier = value
        elif field == "event":
            name = value
        elif field == "data":
            data.append(value)
    return Piece(at, identifier, name if name != ":" or not data else None, "\n".join(data))


class StreamMessage:
    """``POST /api/stream-message``: a conversation of its own for each request, stored and resumable."""

    name = "sse"
    _terminal = ("end", "terminated", "error")

    async def prepare(self, target: Target, planned: Planned) -> str | None:
        return None

    def request(self, target: Target, planned: Planned, prepared: str | None) -> bytes:
        body: dict[str, Any] = {
            "model": planned.model,
            "message": planned.prompt,
            "options": {"maxTokens": planned.max_tokens, "temperature": 0},
        }
        if prepared is not None:
            body["conversationId"] = prepared
        return request_bytes(target, "/api/stream-message", _json(body))

    def read(self, pieces: Iterable[Piece]) -> Reply:
        reply = Reply([], [], [])
        for piece in pieces:
            if piece.name == ":":
                continue
            data = json.loads(piece.data)
            if piece.name is None:
                reply.times.append(piece.at)
                reply.texts.append(data["token"])
            elif piece.name == "session":
                reply.session = data["sessionId"]
            elif piece.name in self._terminal:
                reply.terminals.append(piece.name)
                usage = data.get("usage") or {}
                reply.prompt_tokens, reply.completion_tokens = usage.get("promptTokens"), usage.get("completionTokens")
                reply.code = data.get("code") or (data.get("reason") if piece.name == "terminated" else None)
        return reply


class Subscription:
    """GraphQL's ``streamMessage`` over graphql-sse, in its distinct-connections mode."""

    name = "graphql"
    _document = """subscription Ask($input: MessageInput!) { streamMessage(input: $input) { __typename seq
 ... on SessionEvent { sessionId } ... on TokenEvent { token offset }
 ... on EndEvent { usage { promptTokens completionTokens } } ... on TerminatedEvent { reason }
 ... on ErrorEvent { code } } }"""
    _create = "mutation Create($input: CreateConversationInput!) { createConversation(input: $input) { message } }"

    async def prepare(self, target: Target, planned: Planned) -> str | None:
        """The subscription speaks into a conversation that exists."""
        id = secrets.token_hex(12)
        variables = {"input": {"id": id, "tabName": "Benchmark", "llmModel": planned.model}}
        body = _json({"query": self._create, "variables": variables})
        result = await exchange(target, request_bytes(target, "/graphql", body))
        if result.status != 200:
            raise RuntimeError(f"no conversation could be made: HTTP {result.status}, {result.error}")
        return id

    def request(self, target: Target, planned: Planned, prepared: str | None) -> bytes:
        options = {"maxTokens": planned.max_tokens, "temperature": 0}
        given = {"conversationId": prepared, "message": planned.prompt, "model": planned.model, "options": options}
        body = _json({"query": self._document, "variables": {"input": given}})
        return request_bytes(target, "/graphql", body, {"Accept": "text/event-stream"})

    def read(self, pieces: Iterable[Piece]) -> Reply:
        reply = Reply([], [], [])
        for piece in pieces:
            if piece.name != "next":
                continue
            payload = json.loads(piece.data)
            if payload.get("errors"):
                reply.code = payload["errors"][0].get("extensions", {}).get("code", "INTERNAL")
                reply.terminals.append("error")
                continue
            self._take(reply, piece.at, payload["data"]["streamMessage"])
        return reply

    @staticmethod
    def _take(reply: Reply, at: float, event: dict[str, Any]) -> None:
        kind = event["__typename"]
        if kind == "TokenEvent":
            reply.times.append(at)
            reply.texts.append(event["token"])
        elif kind == "SessionEvent":
            reply.session = event["sessionId"]
        elif kind in ("EndEvent", "TerminatedEvent", "ErrorEvent"):
            reply.terminals.append(kind.removesuffix("Event").lower())
            usage = event.get("usage") or {}
            reply.prompt_tokens, reply.completion_tokens = usage.get("promptTokens"), usage.get("completionTokens")
            reply.code = event.get("code") or event.get("reason")


class OpenAI:
    """``/v1/completions`` and ``/v1/chat/completions``, streamed; also what other servers offer there."""

    def __init__(self, chat: bool) -> None:
        self.name = "chat" if chat else "completions"
        self._chat = chat

    async def prepare(self, target: Target, planned: Planned) -> str | None:
        return None

    def request(self, target: Target, planned: Planned, prepared: str | None) -> bytes:
        asked: dict[str, Any] = (
            {"messages": [{"role": "user", "content": planned.prompt}]} if self._chat else {"prompt": planned.prompt}
        )
        body = {
            "model": planned.model,
            **asked,
            "max_tokens": planned.max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        path = "/v1/chat/completions" if self._chat else "/v1/completions"
        return request_bytes(target, path, _json(body), {"Authorization": "Bearer unused"})

    def read(self, pieces: Iterable[Piece]) -> Reply:
        reply = Reply([], [], [])
        for piece in pieces:
            if piece.data in ("", "[DONE]"):
                continue
            self._take(reply, piece.at, json.loads(piece.data))
        return reply

    def _take(self, reply: Reply, at: float, chunk: dict[str, Any]) -> None:
        if "error" in chunk:
            error = chunk["error"]
            reply.code = str(error.get("code") or error.get("type")) if isinstance(error, dict) else str(error)
            reply.terminals.append("error")
            return
        for choice in chunk.get("choices") or ():
            text = (choice.get("delta") or {}).get("content") if self._chat else choice.get("text")
            if text:
                reply.times.append(at)
                reply.texts.append(text)
            if choice.get("finish_reason"):
                reply.terminals.append("end")
        if usage := chunk.get("usage"):
            reply.prompt_tokens, reply.completion_tokens = usage.get("prompt_tokens"), usage.get("completion_tokens")


SURFACES: dict[str, Surface] = {
    surface.name: surface for surface in (StreamMessage(), Subscription(), OpenAI(chat=True), OpenAI(chat=False))
}


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()
