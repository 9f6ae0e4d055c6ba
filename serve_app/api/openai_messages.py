"""The parts of a chat request that have a shape of their own: messages, tools, response format."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from serve_app.api.images import ImageIntake
from serve_app.domain.errors import InvalidInput
from serve_app.domain.generation import Image, JsonFormat, Message, Part, Role, Text
from serve_app.domain.tools import Choice, Tool, ToolCall, ToolUse

ROLES = {
    "system": Role.SYSTEM,
    "developer": Role.SYSTEM,
    "user": Role.USER,
    "assistant": Role.ASSISTANT,
    "tool": Role.TOOL,
}
CHOICES: Mapping[str, Choice] = {"none": "none", "auto": "auto", "required": "required"}


class Given(Protocol):
    """A message as it was sent."""

    @property
    def role(self) -> str: ...
    @property
    def content(self) -> str | list[dict[str, Any]] | None: ...
    @property
    def name(self) -> str | None: ...
    @property
    def tool_calls(self) -> list[dict[str, Any]] | None: ...
    @property
    def tool_call_id(self) -> str | None: ...


async def read_messages(given: Sequence[Given], intake: ImageIntake) -> tuple[Message, ...]:
    """The conversation. A result of a tool gets the name of the call that it answers.

    Raises:
        InvalidInput: ``details["param"]`` names the place.
        PayloadTooLarge, UnsupportedMedia: an image cannot be taken.
    """
    called: dict[str, str] = {}
    messages: list[Message] = []
    for number, sent in enumerate(given):
        message = await _message(sent, number, called, intake)
        called |= {call.id: call.name for call in message.tool_calls}
        messages.append(message)
    return tuple(messages)


async def _message(sent: Given, number: int, called: Mapping[str, str], intake: ImageIntake) -> Message:
    role = ROLES.get(sent.role)
    if role is None:
        place = f"messages[{number}].role"
        raise _wrong(place, f"{place} is {sent.role!r}; it must be one of {', '.join(ROLES)}.")
    if role is Role.TOOL and not sent.tool_call_id:
        raise _wrong(f"messages[{number}].tool_call_id", "A message of the role tool needs a tool_call_id.")
    parts: tuple[Part, ...]
    if sent.content is None or isinstance(sent.content, str):
        parts = (Text(sent.content),) if sent.content else ()
    else:
        parts = await _parts(sent.content, number, intake)
    calls = _calls(sent.tool_calls or [], number) if role is Role.ASSISTANT else ()
    if role is not Role.TOOL:
        return Message(role, parts, calls)
    return Message(role, parts, (), sent.tool_call_id, sent.name or called.get(sent.tool_call_id or ""))


def _calls(given: Sequence[Mapping[str, Any]], number: int) -> tuple[ToolCall, ...]:
    calls = []
    for sent in given:
        function = sent.get("function")
        function = function if isinstance(function, Mapping) else {}
        values = (sent.get("id"), function.get("name"), function.get("arguments", "{}"))
        if not all(isinstance(value, str) for value in values) or not _is_object(values[2]):
            raise _wrong(
                f"messages[{number}].tool_calls",
                "A tool call has an id and a function with its name and, as the text of a JSON object, its arguments.",
            )
        calls.append(ToolCall(*map(str, values)))
    return tuple(calls)


def _is_object(text: Any) -> bool:
    try:
        return isinstance(json.loads(text or "{}"), dict)
    except (TypeError, ValueError, RecursionError):
        return False


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
            raise _wrong(
                f"messages[{number}].content",
                f"messages[{number}] has a part of type {part.get('type')!r}; text and image_url are supported.",
            )
    return tuple(parts)


def _image_url(part: Mapping[str, Any], number: int) -> str:
    given = part.get("image_url")
    url = given.get("url") if isinstance(given, Mapping) else given
    if not isinstance(url, str) or not url[:5].lower() == "data:":
        raise _wrong(
            f"messages[{number}].content",
            "image_url must be a data URI (data:image/png;base64,…). This server fetches nothing from addresses.",
        )
    return url


def read_tools(
    tools: Sequence[Mapping[str, Any]] | None, choice: str | Mapping[str, Any] | None, parallel: bool | None
) -> ToolUse:
    """``tools``, ``tool_choice`` and ``parallel_tool_calls``.

    Raises:
        InvalidInput: one of them is wrong.
    """
    offered = tuple(_tool(tool, number) for number, tool in enumerate(tools or ()))
    together = parallel is None or parallel
    if choice is None or isinstance(choice, str):
        if choice is not None and choice not in CHOICES:
            raise _wrong("tool_choice", f"tool_choice must be one of {', '.join(CHOICES)}, or name a function.")
        return ToolUse(offered, CHOICES[choice or "auto"], parallel=together)
    function = choice.get("function")
    name = function.get("name") if isinstance(function, Mapping) else None
    if choice.get("type") != "function" or not isinstance(name, str):
        raise _wrong("tool_choice", 'tool_choice must be like {"type": "function", "function": {"name": "…"}}.')
    return ToolUse(offered, "required", name, together)


def _tool(given: Mapping[str, Any], number: int) -> Tool:
    function = given.get("function")
    if given.get("type", "function") != "function" or not isinstance(function, Mapping):
        raise _wrong(f"tools[{number}]", 'A tool must be like {"type": "function", "function": {"name": "…"}}.')
    name, description = function.get("name"), function.get("description") or ""
    parameters = function.get("parameters") or {}
    if not (isinstance(name, str) and isinstance(description, str) and isinstance(parameters, Mapping)):
        raise _wrong(
            f"tools[{number}]", "A function has a name and perhaps a description and, as an object, parameters."
        )
    return Tool(name, description, parameters)


def read_format(given: Mapping[str, Any] | None) -> JsonFormat | None:
    """``response_format``: text, json_object or json_schema.

    Raises:
        InvalidInput: another type, or a schema where none should be.
    """
    kind = (given or {}).get("type", "text")
    if given is None or kind == "text":
        return None
    if kind == "json_object":
        return JsonFormat()
    described = given.get("json_schema")
    schema = described.get("schema") if isinstance(described, Mapping) else None
    if kind != "json_schema" or not isinstance(schema, Mapping | bool):
        raise _wrong(
            "response_format",
            'response_format must be of type text, json_object, or json_schema with {"json_schema": {"schema": {…}}}.',
        )
    return JsonFormat(schema)


def _wrong(param: str, message: str) -> InvalidInput:
    return InvalidInput(message, details={"param": param})
