"""The JSON of Ollama's answers: lines of a stream, and what is said of models. Durations are nanoseconds."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

from serve_app.api.sse import encode_json
from serve_app.domain.catalog import Capability
from serve_app.domain.fleet import ModelStatus
from serve_app.domain.generation import Delta, Finish, FinishReason, Timing
from serve_app.domain.tools import ToolCallPart
from serve_app.gateway import Completed

CAPABILITIES: Mapping[Capability, str] = {
    Capability.COMPLETION: "completion",
    Capability.CHAT: "completion",
    Capability.VISION: "vision",
    Capability.TOOLS: "tools",
    Capability.EMBEDDINGS: "embedding",
}
STAYS = timedelta(days=365)
"""When a model in memory leaves it is the rotation's decision, and not known beforehand."""

Kind = Literal["chat", "generate"]


def line(payload: Mapping[str, Any]) -> bytes:
    """One line of NDJSON, in ASCII: some clients split lines at U+2028 and its like."""
    return f"{encode_json(payload)}\n".encode()


def stamp(at: datetime | None = None) -> str:
    return (at or datetime.now(UTC)).isoformat().replace("+00:00", "Z")


class Shape:
    """How the answers of one endpoint are written, to one request.

    Args:
        kind: of the endpoint.
        model: the name that the client used.
        thinks: whether it reads what the model thinks.
    """

    def __init__(self, kind: Kind, model: str, thinks: bool = True) -> None:
        self._kind = kind
        self._model = model
        self._thinks = thinks
        self._calls: list[ToolCallPart] = []

    def chunk(self, delta: Delta) -> dict[str, Any] | None:
        """A line of a stream; None when it says nothing. Calls wait for the end, whole."""
        self._calls += delta.tool_calls
        thinking = delta.reasoning if self._thinks else ""
        return self._said(delta.text, thinking) if delta.text or thinking else None

    def empty(self) -> dict[str, Any]:
        """A line that says nothing, against the client's impatience."""
        return self._said("", "")

    def calls(self) -> dict[str, Any] | None:
        """The line with the calls of the reply, if there are any."""
        calls = calls_json(self._calls)
        return self._said("", "", calls) if calls else None

    def last(self, completed: Completed) -> dict[str, Any]:
        """The line that ends a stream."""
        return {**self._said("", ""), **ending(completed.finish, completed.timing)}

    def whole(self, deltas: Sequence[Delta], completed: Completed) -> dict[str, Any]:
        """The answer that is no stream."""
        delta = Delta.joined(deltas)
        said = self._said(delta.text, delta.reasoning if self._thinks else "", calls_json(delta.tool_calls))
        return {**said, **ending(completed.finish, completed.timing)}

    def done(self, reason: str) -> dict[str, Any]:
        """The answer to a request that was about the model's place in memory alone."""
        return {**self._said("", ""), "done_reason": reason, "done": True}

    def _said(self, text: str, thinking: str, calls: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
        head = {"model": self._model, "created_at": stamp()}
        thought = {"thinking": thinking} if thinking else {}
        if self._kind == "generate":
            return {**head, "response": text, **thought, "done": False}
        called = {"tool_calls": list(calls)} if calls else {}
        return {**head, "message": {"role": "assistant", "content": text, **thought, **called}, "done": False}


def ending(finish: Finish, timing: Timing) -> dict[str, Any]:
    """What the last line tells of the whole reply."""
    reading_s = max(0.0, (timing.ttft_s or timing.total_s) - timing.queued_s - timing.load_s)
    return {
        "done": True,
        "done_reason": "length" if finish.reason is FinishReason.LENGTH else "stop",
        "total_duration": nanoseconds(timing.total_s),
        "load_duration": nanoseconds(timing.load_s),
        "prompt_eval_count": finish.usage.prompt_tokens,
        "prompt_eval_duration": nanoseconds(reading_s),
        "eval_count": finish.usage.completion_tokens,
        "eval_duration": nanoseconds(timing.decode_s),
    }


def nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)


def calls_json(parts: Sequence[ToolCallPart]) -> list[dict[str, Any]]:
    """Whole calls out of their parts; the arguments are an object. A call that broke off has none, and is left out."""
    names: dict[int, str] = {}
    arguments: dict[int, str] = {}
    for part in parts:
        names[part.index] = part.name or names.get(part.index, "")
        arguments[part.index] = arguments.get(part.index, "") + part.arguments
    calls = []
    for index in sorted(names):
        with suppress(ValueError):
            calls.append({"function": {"name": names[index], "arguments": json.loads(arguments[index] or "{}")}})
    return calls


def tag(status: ModelStatus) -> dict[str, Any]:
    """A model in the list of all."""
    info = status.entry.info
    loaded = max((report.loaded_at or 0.0 for report in status.reports), default=0.0)
    return {
        "name": status.name,
        "model": status.name,
        "modified_at": stamp(datetime.fromtimestamp(loaded, UTC)),
        "size": (info.size_bytes if info else None) or 0,
        "digest": hashlib.sha256(f"{status.entry.full_name} {info.revision if info else ''}".encode()).hexdigest(),
        "details": details(status),
    }


def details(status: ModelStatus) -> dict[str, Any]:
    info = status.entry.info
    family = (info.architecture if info else None) or ""
    return {
        "parent_model": "",
        "format": "safetensors" if info and info.path else "",
        "family": family,
        "families": [family] if family else [],
        "parameter_size": _parameters(info.parameters if info else None),
        "quantization_level": (info.quantization or info.dtype if info else None) or "",
    }


def running(status: ModelStatus) -> dict[str, Any]:
    """A model in memory. ``size_vram`` is nought where the replica measures only the host's memory."""
    info = status.entry.info
    return {
        **tag(status),
        "size": status.total("memory_bytes") or ((info.size_bytes if info else None) or 0),
        "size_vram": 0,
        "expires_at": stamp(datetime.now(UTC) + STAYS),
        "context_length": (info.context_length if info else None) or 0,
    }


def shown(status: ModelStatus) -> dict[str, Any]:
    """A model in detail."""
    info = status.entry.info
    family = (info.architecture if info else None) or "model"
    facts: dict[str, Any] = {"general.architecture": family}
    if info and info.parameters:
        facts["general.parameter_count"] = info.parameters
    if info and info.context_length:
        facts[f"{family}.context_length"] = info.context_length
    known = {CAPABILITIES[one] for one in status.entry.capabilities if one in CAPABILITIES}
    return {
        "modelfile": "",
        "parameters": "",
        "template": "",
        "details": details(status),
        "model_info": facts,
        "capabilities": sorted(known),
        "modified_at": tag(status)["modified_at"],
    }


def _parameters(count: int | None) -> str:
    """As Ollama rounds it: 8.0B, 906.25M."""
    if not count:
        return ""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if count >= size:
            return f"{count / size:.4g}{letter}"
    return str(count)
