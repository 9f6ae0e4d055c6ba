"""What Ollama's clients ask for, as the platform's own request.

The protocol: https://github.com/ollama/ollama/blob/main/docs/api.md
Options that Rotunda's engines do not know (``num_ctx``, ``mirostat``, …) are ignored, as Ollama ignores those that a
model's runner does not know. Fields that would change what is asked are refused by name.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from serve_app.api.images import ImageIntake
from serve_app.api.openai_messages import read_tools
from serve_app.api.validation import read
from serve_app.domain.catalog import Capability
from serve_app.domain.errors import InvalidInput
from serve_app.domain.generation import (
    GenerationRequest,
    Image,
    JsonFormat,
    Message,
    Options,
    Part,
    Priority,
    Role,
    Text,
)
from serve_app.domain.prompt_length import least_tokens
from serve_app.domain.routing import Ask
from serve_app.domain.tools import NO_TOOLS, ToolCall
from serve_app.telemetry.tracing import Trail

ENDLESS = -1
"""``num_predict`` below nought: as much as the model likes."""


class Lenient(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)


class Sampling(Lenient):
    """``options``: the names are Ollama's."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    num_predict: int | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    repeat_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None


class Named(Lenient):
    """A body that names a model; old clients call it ``name``."""

    model: str = ""
    name: str = ""
    stream: bool | None = True

    @property
    def wanted(self) -> str:
        """The model's name.

        Raises:
            InvalidInput: there is none.
        """
        if not (name := self.model or self.name):
            raise InvalidInput("model is missing.", details={"param": "model"})
        return name


class Asked(Named):
    """What ``/api/chat`` and ``/api/generate`` have in common."""

    options: Sampling | None = None
    format: Literal["", "json"] | dict[str, Any] | None = None
    keep_alive: str | int | float | None = None
    think: bool | str | None = None

    def sampling(self) -> Options:
        """Raises InvalidInput for a value out of its range."""
        given = self.options or Sampling()
        stop = [given.stop] if isinstance(given.stop, str) else given.stop or []
        endless = given.num_predict is not None and given.num_predict <= ENDLESS
        return Options(
            temperature=given.temperature,
            top_p=given.top_p,
            top_k=given.top_k,
            max_tokens=None if endless else given.num_predict,
            stop=tuple(stop),
            seed=given.seed,
            min_p=given.min_p,
            repetition_penalty=given.repeat_penalty,
            presence_penalty=given.presence_penalty,
            frequency_penalty=given.frequency_penalty,
            response_format=self._format(),
        )

    def _format(self) -> JsonFormat | None:
        if not self.format:
            return None
        return JsonFormat() if self.format == "json" else JsonFormat(self.format)

    @property
    def leaves(self) -> bool:
        """Whether the model is to leave memory: ``keep_alive`` is nought, in any of its spellings."""
        given = str(self.keep_alive).strip() if self.keep_alive is not None else ""
        return given.rstrip("smhun") in ("0", "0.0")


class Turn(Lenient):
    """One of ``messages``."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str | None = ""
    images: list[str] | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_name: str | None = None
    name: str | None = None


class ChatBody(Asked):
    messages: list[Turn] = Field(default_factory=list)
    tools: list[dict[str, Any]] | None = None


class GenerateBody(Asked):
    prompt: str = ""
    suffix: str | None = None
    system: str | None = None
    template: str | None = None
    context: list[int] | None = None
    images: list[str] | None = None
    raw: bool | None = False


class EmbedBody(Named):
    input: str | list[str] = Field(default_factory=list)
    prompt: str = ""


@dataclass(frozen=True, slots=True)
class Order:
    """A parsed request."""

    request: GenerationRequest
    ask: Ask
    stream: bool


async def chat_order(body: ChatBody, intake: ImageIntake, caller: str, trace: Trail) -> Order:
    """A chat with messages.

    Raises:
        InvalidInput: a field is wrong.
        PayloadTooLarge, UnsupportedMedia: an image cannot be taken.
    """
    return _order(
        body,
        GenerationRequest(
            request_id=secrets.token_hex(16),
            model=body.wanted,
            messages=await _messages(body.messages, intake),
            options=body.sampling(),
            tools=read_tools(body.tools, None, None) if body.tools else NO_TOOLS,
            continue_final=body.messages[-1].role == "assistant",
            **_common(body, caller, trace),
        ),
    )


async def generate_order(body: GenerateBody, intake: ImageIntake, caller: str, trace: Trail) -> Order:
    """A single prompt; through the chat template, unless ``raw``. Raises as :func:`chat_order`."""
    for name, value in (("suffix", body.suffix), ("template", body.template), ("context", body.context)):
        if value:
            raise InvalidInput(f"{name} is not supported here. Leave it out.", details={"param": name})
    messages = [Message.of(Role.SYSTEM, body.system)] if body.system and not body.raw else []
    messages.append(Message(Role.USER, await _parts(body.prompt, body.images, intake)))
    return _order(
        body,
        GenerationRequest(
            request_id=secrets.token_hex(16),
            model=body.wanted,
            messages=tuple(messages),
            options=body.sampling(),
            raw=bool(body.raw),
            **_common(body, caller, trace),
        ),
    )


def _common(body: Asked, caller: str, trace: Trail) -> dict[str, Any]:
    streams = body.stream is not False
    return {
        "priority": Priority.HIGH if streams else Priority.NORMAL,
        "caller": caller,
        "context_policy": "truncate",
        "trace": trace.carrier(),
    }


def _order(body: Asked, request: GenerationRequest) -> Order:
    needs = {Capability.COMPLETION if request.raw else Capability.CHAT}
    needs |= {Capability.VISION} if request.has_images else set()
    needs |= {Capability.TOOLS} if request.has_tools else set()
    ask = Ask(
        request.request_id,
        request.model,
        frozenset(needs),
        priority=request.priority,
        caller=request.caller,
        least_tokens=least_tokens(request),
    )
    return Order(request, ask, body.stream is not False)


async def _messages(turns: Sequence[Turn], intake: ImageIntake) -> tuple[Message, ...]:
    """The conversation. Ollama's calls have no ids: a result belongs to the first open call of its tool."""
    open_calls: list[ToolCall] = []
    messages: list[Message] = []
    for number, turn in enumerate(turns):
        parts = await _parts(turn.content or "", turn.images, intake)
        if turn.role == "tool":
            call = _answered(open_calls, turn.tool_name or turn.name, number)
            messages.append(Message(Role.TOOL, parts, (), call.id, call.name))
            continue
        calls = _calls(turn.tool_calls or [], number) if turn.role == "assistant" else ()
        open_calls += calls
        messages.append(Message(Role(turn.role), parts, calls))
    return tuple(messages)


async def _parts(text: str, images: Sequence[str] | None, intake: ImageIntake) -> tuple[Part, ...]:
    pictures = await intake.verify(images) if images else []
    shown: list[Part] = [Image(picture.media_type, picture.data) for picture in pictures]
    return (*shown, Text(text)) if text else tuple(shown)


def _calls(given: Sequence[Mapping[str, Any]], number: int) -> tuple[ToolCall, ...]:
    calls = []
    for place, sent in enumerate(given):
        function = sent.get("function")
        name = function.get("name") if isinstance(function, Mapping) else None
        arguments = function.get("arguments", {}) if isinstance(function, Mapping) else None
        if not isinstance(name, str) or not isinstance(arguments, Mapping):
            raise InvalidInput(
                f"messages[{number}].tool_calls: a call has a function with its name and, as an object, its arguments.",
                details={"param": f"messages[{number}].tool_calls"},
            )
        calls.append(ToolCall(f"call_{number}_{place}", name, json.dumps(arguments)))
    return tuple(calls)


def _answered(open_calls: list[ToolCall], name: str | None, number: int) -> ToolCall:
    """The call that a result answers, which is open no more."""
    for call in open_calls:
        if name in (None, call.name):
            open_calls.remove(call)
            return call
    raise InvalidInput(
        f"messages[{number}] is the result of a tool that was not called.", details={"param": f"messages[{number}]"}
    )


def body_of(model: type[Any], value: Any) -> Any:
    """The body; Raises InvalidInput, which names every field that is wrong."""
    given = {name: field for name, field in value.items() if field is not None} if isinstance(value, dict) else value
    return read(model, given)
