"""The JSON of OpenAI's answers: what is common to chat and text completions, and that of chats."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Protocol

from serve_app.api.openai_request import Order
from serve_app.domain.generation import Delta, Finish, TokenLogprob, Usage
from serve_app.domain.tools import ToolCallPart


class Shape(Protocol):
    """How one kind of completion is written; one for each answer."""

    prefix: str
    whole_kind: str
    chunk_kind: str

    def first(self, index: int) -> dict[str, Any] | None: ...

    def chunk(self, index: int, delta: Delta) -> dict[str, Any] | None: ...

    def last(self, index: int, finish: Finish) -> dict[str, Any]: ...

    def whole(self, index: int, delta: Delta, finish: Finish) -> dict[str, Any]: ...


def head(order: Order, shape: Shape, kind: str) -> dict[str, Any]:
    return {
        "id": f"{shape.prefix}{order.requests[0].request_id}",
        "object": kind,
        "created": int(time.time()),
        "model": order.model,
        "system_fingerprint": None,
    }


def usage_json(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.total_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


def total(usages: Sequence[Usage], choices: int) -> Usage:
    """Of a whole answer: a prompt counts once, however many choices were made of it."""
    prompts = usages[::choices]
    return Usage(
        sum(usage.prompt_tokens for usage in prompts),
        sum(usage.completion_tokens for usage in usages),
        sum(usage.cached_tokens for usage in prompts),
    )


class ChatShape:
    """The JSON of chat completions. Reasoning stands in ``reasoning_content``, as DeepSeek's and vLLM's servers do."""

    prefix = "chatcmpl-"
    whole_kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"

    def first(self, index: int) -> dict[str, Any] | None:
        """The chunk before a choice's text."""
        return _chunk(index, {"role": "assistant", "content": ""})

    def chunk(self, index: int, delta: Delta) -> dict[str, Any] | None:
        """The choice of a streamed piece; None when it says nothing."""
        told: dict[str, Any] = {}
        if delta.reasoning:
            told["reasoning_content"] = delta.reasoning
        if delta.text:
            told["content"] = delta.text
        if delta.tool_calls:
            told["tool_calls"] = [_part(part) for part in delta.tool_calls]
        return _chunk(index, told, logprobs=_logprobs(delta.logprobs)) if told else None

    def last(self, index: int, finish: Finish) -> dict[str, Any]:
        return _chunk(index, {}, finish.reason.value)

    def whole(self, index: int, delta: Delta, finish: Finish) -> dict[str, Any]:
        content = delta.text if delta.text or not delta.tool_calls else None
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if delta.reasoning:
            message["reasoning_content"] = delta.reasoning
        if delta.tool_calls:
            message["tool_calls"] = _calls(delta.tool_calls)
        return {
            "index": index,
            "message": message,
            "logprobs": _logprobs(delta.logprobs),
            "finish_reason": finish.reason.value,
        }


def _chunk(
    index: int, delta: dict[str, Any], reason: str | None = None, logprobs: dict[str, Any] | None = None
) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}


def _part(part: ToolCallPart) -> dict[str, Any]:
    function = {"arguments": part.arguments} if part.name is None else {"name": part.name, "arguments": part.arguments}
    known = {} if part.id is None else {"id": part.id, "type": "function"}
    return {"index": part.index, **known, "function": function}


def _calls(parts: Sequence[ToolCallPart]) -> list[dict[str, Any]]:
    """Whole calls out of their parts."""
    calls: dict[int, dict[str, Any]] = {}
    for part in parts:
        call = calls.setdefault(
            part.index, {"id": part.id or "", "type": "function", "function": {"name": part.name, "arguments": ""}}
        )
        call["function"]["arguments"] += part.arguments
    return [calls[index] for index in sorted(calls)]


def _logprobs(entries: Sequence[TokenLogprob]) -> dict[str, Any] | None:
    if not entries:
        return None
    content = [{**_entry(entry), "top_logprobs": [_entry(other) for other in entry.top]} for entry in entries]
    return {"content": content, "refusal": None}


def _entry(entry: TokenLogprob) -> dict[str, Any]:
    return {"token": entry.token, "logprob": entry.logprob, "bytes": list(entry.data)}
