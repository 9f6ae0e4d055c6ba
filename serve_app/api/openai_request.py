"""What OpenAI's clients ask for (https://platform.openai.com/docs/api-reference/chat), as the platform's own request.

Fields that change nothing about the answer are ignored, whatever they are called. Those that would change it and are
not supported are refused by name: an answer that silently lacks what was asked for is worse than none.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict

from serve_app.api.images import ImageIntake
from serve_app.api.validation import read
from serve_app.domain.catalog import Capability
from serve_app.domain.errors import InvalidInput
from serve_app.domain.generation import GenerationRequest, Image, Message, Options, Part, Priority, Role, Text
from serve_app.domain.routing import Ask
from serve_app.telemetry.propagation import TraceContext


class _Lenient(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", frozen=True)


class StreamOptions(_Lenient):
    include_usage: bool = False


class ChatMessage(_Lenient):
    role: str
    content: str | list[dict[str, Any]] | None = None


class ChatBody(_Lenient):
    """The body of ``POST /v1/chat/completions``; what is not named here is in ``model_extra``."""

    model: str
    messages: list[ChatMessage]
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    stop: str | list[str] | None = None
    seed: int | None = None

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


@dataclass(frozen=True, slots=True)
class Chat:
    """A parsed request: what the router is asked, what the model is asked, and how the answer is wanted."""

    ask: Ask
    request: GenerationRequest
    model: str
    stream: bool
    include_usage: bool


_ROLES = {
    "system": Role.SYSTEM,
    "developer": Role.SYSTEM,
    "user": Role.USER,
    "assistant": Role.ASSISTANT,
}


def _empty(value: Any) -> bool:
    return not value


# Whether each field, as given, leaves the answer as it would be without it.
_WITHOUT_EFFECT: Mapping[str, Callable[[Any], bool]] = {
    "n": lambda value: value in (None, 1),
    "tools": _empty,
    "functions": _empty,
    "tool_choice": lambda value: value in (None, "none", "auto"),
    "function_call": lambda value: value in (None, "none", "auto"),
    "response_format": lambda value: not value or (isinstance(value, Mapping) and value.get("type") == "text"),
    "logprobs": _empty,
    "top_logprobs": _empty,
    "logit_bias": _empty,
    "frequency_penalty": _empty,
    "presence_penalty": _empty,
    "audio": _empty,
    "modalities": lambda value: value in (None, [], ["text"]),
    "web_search_options": lambda value: value is None,
}


async def read_chat(value: Any, intake: ImageIntake, caller: str, trace: TraceContext) -> Chat:
    """The request in a JSON body.

    Raises:
        InvalidInput: a field is wrong or not supported; ``details["param"]`` names it.
        PayloadTooLarge, UnsupportedMedia: an image cannot be taken.
    """
    body = read(ChatBody, value)
    _refuse_unsupported(body.model_extra or {})
    messages = tuple([await _message(message, number, intake) for number, message in enumerate(body.messages)])
    request = GenerationRequest(
        request_id=secrets.token_hex(16),
        model=body.model,
        messages=messages,
        options=_options(body),
        priority=Priority.HIGH if body.stream else Priority.NORMAL,
        caller=caller,
        context_policy="error",
        trace=trace.carrier(),
    )
    needs = {Capability.CHAT} | ({Capability.VISION} if request.has_images else set())
    ask = Ask(request.request_id, body.model, frozenset(needs), priority=request.priority, caller=caller)
    return Chat(ask, request, body.model, bool(body.stream), body.include_usage)


def _refuse_unsupported(extra: Mapping[str, Any]) -> None:
    for name, has_no_effect in _WITHOUT_EFFECT.items():
        if not has_no_effect(extra.get(name)):
            raise InvalidInput(
                f"{name} is not supported here with this value. Leave it out, or ask another server.",
                details={"param": name},
            )


def _options(body: ChatBody) -> Options:
    stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
    most = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    return Options(body.temperature, body.top_p, body.top_k, most, tuple(stop), body.seed)


async def _message(message: ChatMessage, number: int, intake: ImageIntake) -> Message:
    role = _ROLES.get(message.role)
    if role is None:
        raise InvalidInput(
            f"messages[{number}].role is {message.role!r}; it must be one of {', '.join(_ROLES)}.",
            details={"param": f"messages[{number}].role"},
        )
    if (message.model_extra or {}).get("tool_calls"):
        raise InvalidInput("tool_calls are not supported here.", details={"param": f"messages[{number}].tool_calls"})
    if message.content is None or isinstance(message.content, str):
        return Message(role, (Text(message.content),) if message.content else ())
    return Message(role, await _parts(message.content, number, intake))


async def _parts(content: list[dict[str, Any]], number: int, intake: ImageIntake) -> tuple[Part, ...]:
    urls = [_image_url(part, number) for part in content if part.get("type") == "image_url"]
    images = iter([Image(picture.media_type, picture.data) for picture in await intake.verify(urls)])
    parts: list[Part] = []
    for part in content:
        if part.get("type") == "image_url":
            parts.append(next(images))
        elif part.get("type") == "text" and isinstance(part.get("text"), str):
            parts.append(Text(part["text"]))
        else:
            raise InvalidInput(
                f"messages[{number}] has a part of type {part.get('type')!r}; text and image_url are supported.",
                details={"param": f"messages[{number}].content"},
            )
    return tuple(parts)


def _image_url(part: Mapping[str, Any], number: int) -> str:
    given = part.get("image_url")
    url = given.get("url") if isinstance(given, Mapping) else given
    if not isinstance(url, str) or not url[:5].lower() == "data:":
        raise InvalidInput(
            "image_url must be a data URI (data:image/png;base64,…). This server fetches nothing from addresses.",
            details={"param": f"messages[{number}].content"},
        )
    return url
